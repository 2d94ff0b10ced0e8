"""A SuperNet; a short run on noise, which is trained once for each file of tests; a way to count and to interrupt calls."""

import shutil
import signal

import noise
import pytest
from tiny import TINY, random_params

from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import data, loop
from superserve_jax.training.runs import Run


@pytest.fixture
def model():
    """A SuperNet of basic blocks, without statistics."""
    return SuperNet(TINY, random_params(TINY))


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


@pytest.fixture
def count_calls(monkeypatch):
    """Returns a function that replaces `owner.name` by one that also lists its calls.

    Ctrl-C is pressed in call `interrupt_at`, where the first call is 1.
    """

    def count(owner, name, *, interrupt_at=None):
        calls, real = [], getattr(owner, name)

        def counted(*arguments, **options):
            calls.append(arguments)
            if len(calls) == interrupt_at:
                signal.raise_signal(signal.SIGINT)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return count
