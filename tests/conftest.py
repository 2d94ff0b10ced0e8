"""Shared fixtures: a tiny SuperNet of each kind of block, with statistics of its own for every subnet that a test asks for."""

import dataclasses
import os

os.environ.setdefault("SUPERSERVE_CACHE", "")  # tests neither read nor fill this user's cache, unless one sets its own

import jax
import numpy as np
import pytest

from superserve_jax import checkpoint
from superserve_jax.supernets import ofa_resnet, programs, supernet


def pytest_collection_modifyitems(config, items):
    """Without a GPU, tests that need one are not there to be skipped."""
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() == "cpu":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


TINY = ofa_resnet.OFAResNetConfig(
    num_classes=3,
    image_size=9,
    channels=1,
    block="basic",
    stem_width=8,
    stem_pool=False,
    stage_widths=(8, 16),
    strides=(1, 2),
    depths=((0, 1), (1, 2)),
    expand_ratios=(0.5, 1.0),
    width_mults=(0.5, 1.0),
    divisor=4,
    mean=(0.4,),
    std=(0.3,),
)
CONFIGS = {
    "basic": TINY,
    "bottleneck": dataclasses.replace(TINY, block="bottleneck", stem_pool=True, image_size=13),
}


def random_params(config, seed=0):
    """Parameters with which nothing cancels: norms have scales and biases of their own."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(1.0 if name.endswith("scale") else 0.0, 0.3, spec.shape), np.float32)
        for name, spec in programs.param_spec(config).items()
    }


def random_images(config, batch, seed=0):
    spec = config.input_spec(batch)
    return np.random.default_rng(seed).integers(0, 256, spec.shape, dtype=np.uint8)


def random_row(config, subnet, seed=0):
    """Statistics (2, n) of a subnet that belong to no data."""
    n = sum(config.norm_sizes(config.sizes(subnet)).values())
    rng = np.random.default_rng([seed, n])
    return np.stack([rng.normal(0, 1, n), rng.uniform(0.5, 2, n)]).astype(np.float32)


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
    return supernet.SuperNet(TINY, random_params(TINY), {s: random_row(TINY, s) for s in chosen})


@pytest.fixture
def export(tiny, tmp_path):
    """An export with one served subnet."""
    served = [checkpoint.Served(s, 0.5, None, TINY.flops(s), TINY.num_params(s)) for s in tiny.calibrated[:1]]
    checkpoint.export(tmp_path / "export", tiny, served, measured="made up")
    return checkpoint.load(tmp_path / "export")
