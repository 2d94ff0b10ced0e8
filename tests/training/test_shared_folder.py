"""A run's folder that other programs write to: nothing of theirs is deleted, and only one process trains in it."""

import logging
import re

import numpy as np
import pytest
from lock_holder import locked_elsewhere
from noise import RESNET

from superserve_jax import errors, files
from superserve_jax.training import loop
from superserve_jax.training.checkpoints import Checkpoints
from superserve_jax.training.runs import Run

pytestmark = pytest.mark.usefixtures("on_noise", "quick_compilation")


def test_a_second_training_is_refused_and_names_the_first(tmp_path):
    run = Run.create(RESNET, tmp_path / "run")
    message = r"locked by process {} on \S+, which trains there now; wait"
    with locked_elsewhere(run.workdir / "training.lock") as pid, pytest.raises(errors.ConfigError, match=message.format(pid)):
        loop.train(RESNET, run.workdir)
    loop.train(RESNET, run.workdir)  # the system has released the lock of the killed process


@pytest.mark.parametrize("step", [1, 5, 100])
def test_a_checkpoint_of_another_program_is_kept(tmp_path, caplog, step):
    theirs = tmp_path / "run" / "checkpoints" / str(step) / "weights.bin"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    with caplog.at_level(logging.WARNING):
        loop.train(RESNET, tmp_path / "run")
    [kept] = (tmp_path / "run" / "set_aside").glob(f"{step}.*/weights.bin")
    assert kept.read_bytes() == b"precious"
    assert re.search(rf"checkpoints/{step} is now .*/set_aside/{step}\.", caplog.text)


def test_older_checkpoints_without_checksums_are_kept_when_training_goes_on(tmp_path):
    run = loop.train(RESNET, tmp_path / "run")
    with run.checkpoints() as saved:
        last = saved.latest()
    theirs = run.workdir / "checkpoints" / "1"
    theirs.mkdir()
    (theirs / "weights.bin").write_bytes(b"precious")
    with run.checkpoints() as saved:
        assert saved.latest(clean=True) == last
        for step in (last + 1, last + 2, last + 3):
            saved.save(step, params={"x": np.zeros(1)})
    assert (run.workdir / "checkpoints" / str(last + 3)).exists()
    assert [p.read_bytes() for p in run.workdir.rglob("weights.bin")] == [b"precious"]


def test_a_step_that_somebody_else_saved_is_not_overwritten(tmp_path):
    with Checkpoints(tmp_path) as saved:
        theirs = tmp_path / "checkpoints" / "3" / "weights.bin"
        theirs.parent.mkdir(parents=True)
        theirs.write_bytes(b"precious")
        with pytest.raises(errors.DataError, match="exists already; another program writes checkpoints there"):
            saved.save(3, params={"x": np.zeros(1)})
    assert theirs.read_bytes() == b"precious"


def test_a_lock_is_free_after_its_block_and_excludes_another_thread(tmp_path):
    for path in (tmp_path, tmp_path / "file"):
        with files.locked(path), pytest.raises(BlockingIOError, match="locked by"), files.locked(path):
            pass
        with files.locked(path):
            pass
