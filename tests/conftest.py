"""Shared fixtures: a tiny SuperNet of each kind of block, with statistics of its own for every subnet that a test asks for."""

import os

os.environ.setdefault("SUPERSERVE_CACHE", "")  # tests neither read nor fill this user's cache, unless one sets its own

import jax
import pytest
from tiny import CONFIGS, TINY, random_params, random_statistics

from superserve_jax import exports
from superserve_jax.exports import Served
from superserve_jax.supernets.supernet import SuperNet

collect_ignore = ["helpers", "data"]


def pytest_collection_modifyitems(config, items):
    """Without a GPU, tests that need one are not there to be skipped."""
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() == "cpu":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(params=sorted(CONFIGS))
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A TFDS folder with a small cluttered_digits in it: 300 training images, 90 test images."""
    from superserve_jax.training.datasets import prepared
    from superserve_jax.training.datasets.cluttered_digits import render

    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "NUM_IMAGES", {"train": 300, "test": 90})
        prepared.load("cluttered_digits", str(folder))
    return str(folder)


@pytest.fixture
def tiny():
    """A SuperNet of basic blocks, calibrated (with made-up statistics) for its smallest, a middle and its largest subnet."""
    space = TINY.space()
    chosen = [space.smallest(), space.subnet(depth=(1, 1, 1), expand=0.5, width=1.0), space.largest()]
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in chosen})


@pytest.fixture
def export(tiny, tmp_path):
    """An export with one served subnet."""
    served = [Served(s, 0.5, None, TINY.flops(s), TINY.num_params(s)) for s in tiny.calibrated[:1]]
    exports.export(tmp_path / "export", tiny, served, measured="made up")
    return exports.load(tmp_path / "export")


@pytest.fixture
def compilations(caplog):
    """Counts what jax traces and compiles from now on."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    yield lambda: [e for e in events if "compile" in e or "trace" in e]
    events.clear()
