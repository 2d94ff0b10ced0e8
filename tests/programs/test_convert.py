"""train/convert.py as a user runs it."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from published import assert_same_model, ofa_state
from tiny import random_params, random_statistics

from superserve_jax import errors
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import loop
from superserve_jax.training.config import load_config
from superserve_jax.training.runs import Run
from superserve_jax.training.step import SandwichStep

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow

CONFIG = """
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.training.config import SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


def get_config():
    return TrainConfig(
        name="converted",
        model=OFAResNetConfig(
            num_classes=10,
            image_size=32,
            stem_depths=(1,),
            depths=((2,), (2,), (4,), (2,)),
            expand_ratios=(0.25,),
            width_mults=(0.06, 0.1),
        ),
        data=DataConfig(name="cluttered_digits", channels=3, data_dir={data_dir!r}),
        calibration_examples=64,
        epochs=0.002,
        batch_size=4,
        buckets=1,
        search=SearchConfig(candidates=2, calibration_examples=32, examples=250, served=2),
    )
"""


def test_the_program_makes_a_run_that_training_goes_on_from(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.replace("{data_dir!r}", repr(str(tmp_path / "tfds"))))
    config = load_config(tmp_path / "config.py").model
    largest = config.space().largest()
    model = SuperNet(config, random_params(config), {largest: random_statistics(config, largest)})
    np.savez(tmp_path / "weights.npz", **ofa_state(model, wrapped=False))
    run = tmp_path / "run"
    command = ["train/convert.py", tmp_path / "config.py", tmp_path / "weights.npz", "--workdir", run]
    done = program(*command, "--json", tmp_path / "out.json")
    assert "go on with" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["params"] == config.num_params(largest)
    assert_same_model(Run.open(run).model(), model)
    assert "already has a checkpoint" in program(*command, status=2).stderr
    run = Run.open(run)
    sandwich = SandwichStep(run.config.optim.create(10))
    with run.checkpoints() as saved:  # where the training loop begins
        done, state = loop._restore(saved, run, sandwich)
    assert done == 0
    for name, value in model.params.items():
        np.testing.assert_array_equal(state.params[name], value)
    assert jax.tree.structure(state) == jax.tree.structure(sandwich.init(state.params))
    shutil.rmtree(run.workdir / "checkpoints")
    with run.checkpoints() as saved, pytest.raises(errors.DataError, match="convert them again"):
        loop._restore(saved, run, sandwich)


def test_unfit_weights_leave_no_run_behind(tmp_path):
    np.savez(tmp_path / "weights.npz", weight=np.zeros(3))
    done = program("train/convert.py", "configs/debug.py", tmp_path / "weights.npz", "--workdir", tmp_path / "run", status=2)
    assert "once-for-all's OFA-ResNet has stem_stride=2, got 4" in done.stderr
    assert not (tmp_path / "run").exists()


def program(*arguments, status=0):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done
