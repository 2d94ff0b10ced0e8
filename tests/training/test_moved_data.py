"""The data of a finished run has moved: what the message tells the user to do works, in the real commands."""

import json

import numpy as np
import PIL.Image
import pytest

import superserve_jax as ss
from superserve_jax.commands import replay_setup
from superserve_jax.training.step import SandwichStep

CONFIG = """
import dataclasses
import noise
from mlp_family import MLPConfig
from superserve_jax.training.config import SearchConfig
from superserve_jax.training.data import FolderConfig
from superserve_jax.training.template import from_data

def get_config():
    model = from_data(MLPConfig(image_size=8, depths=(0, 1), widths=(2, 4)), "num_classes")
    changes = {"epochs": 2.0, "batch_size": 8, "buckets": 1, "random_subnets": 0, "calibration_examples": 8}
    search = SearchConfig(candidates=4, served=2, examples=8)
    changes |= {"name": "moved", "data": FolderConfig(image_size=8)}
    return dataclasses.replace(noise.CONFIG, model=model, search=search, **changes)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_same_command_with_the_new_path_trains_nothing_and_records_the_path(run_program, tmp_path, monkeypatch):
    for k, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        (tmp_path / "old" / name).mkdir(parents=True)
        for i in range(12):
            image = np.random.default_rng([k, i]).integers(0, 256, (8, 8), dtype=np.uint8)
            PIL.Image.fromarray(image).save(tmp_path / "old" / name / f"{i}.png")
    (tmp_path / "config.py").write_text(CONFIG)
    run, export = tmp_path / "run", tmp_path / "run" / "export"
    command = ("train/supernet.py", tmp_path / "config.py", "--workdir", run, "--data.path")
    first = run_program(*command, tmp_path / "old")
    assert "compiling the programs of the first steps" in first.stderr
    evaluated = (run / "evaluation.json").read_bytes()
    new = (tmp_path / "old").rename(tmp_path / "new")

    error = run_program("train/evaluate.py", run, status=2).stderr
    assert "old does not exist; put images into" in error
    assert "`superserve train CONFIG --workdir RUN --data.path NEW`" in error
    with pytest.raises(ss.DataError, match="old does not exist"):
        replay_setup.test_examples(ss.load(export))  # the data of a replay

    with monkeypatch.context() as patch:
        patch.setattr(SandwichStep, "__call__", lambda *_, **__: pytest.fail("trained again"))
        second = run_program(*command, new)
    assert "compiling" not in second.stderr
    assert "4 candidates already; going on from there" in second.stderr
    assert (run / "evaluation.json").read_bytes() == evaluated
    assert json.loads((run / "config.json").read_text())["data"]["path"] == str(new)
    assert len(replay_setup.test_examples(ss.load(export))[1]) == 12
    for name in ("evaluate", "export"):
        assert "about 12 test examples, one half of the 24; standard error" in run_program(f"train/{name}.py", run).stdout
