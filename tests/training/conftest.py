"""A short run on noise, which is trained once for each file of tests."""

import shutil

import noise
import pytest

from superserve_jax.training import data, loop
from superserve_jax.training.runs import Run


@pytest.fixture(scope="module")
def on_noise():
    """Replaces the dataset of every config by noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "open", noise.Noise)
        yield


@pytest.fixture
def config():
    """The config of the short run: 12 steps of a small MLP."""
    return noise.CONFIG


@pytest.fixture(scope="module")
def finished(on_noise, tmp_path_factory):
    """The run, which tests only read."""
    return loop.train(noise.CONFIG, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, which a test may change."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    return Run.open(tmp_path / "run")
