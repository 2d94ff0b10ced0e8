"""Configs of tiny SuperNets, and random parameters, statistics and inputs for them."""

import dataclasses
import gc

import jax
import numpy as np

from superserve_jax import exports
from superserve_jax.exports import Served
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.families.vit import ViTConfig
from superserve_jax.supernets import programs

TINY = OFAResNetConfig(
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
# Many subnets, to search in.
WIDE = dataclasses.replace(
    TINY, stage_widths=(16, 32), depths=((1, 2, 3), (1, 2, 3)), width_mults=(0.25, 0.5, 0.75, 1.0), image_size=16
)


def random_params(config, seed=0):
    """Random parameters. Scales are around 1 and everything else is around 0."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(1.0 if name.endswith("scale") else 0.0, 0.3, spec.shape), np.float32)
        for name, spec in programs.param_spec(config).items()
    }


def random_images(config, batch, seed=0):
    spec = config.input_spec(batch)
    return np.random.default_rng(seed).integers(0, 256, spec.shape, dtype=np.uint8)


def random_statistics(config, subnet, seed=0):
    """Random statistics (2, n) of a subnet."""
    n = sum(config.norm_sizes(config.sizes(subnet)).values())
    rng = np.random.default_rng([seed, n])
    return np.stack([rng.normal(0, 1, n), rng.uniform(0.5, 2, n)]).astype(np.float32)


def write_export(path, model, subnets=None, *, accuracy=0.5, step=0.1, **options):
    """Exports a model with some of its subnets; by default all calibrated ones. Their accuracies are made up, and ascend."""
    served = [
        Served(subnet, accuracy + step * i, None, model.config.flops(subnet), model.config.num_params(subnet))
        for i, subnet in enumerate(model.calibrated if subnets is None else subnets)
    ]
    return exports.export(path, model, served, **{"measured": "made up", **options})


def live_bytes(device=None):
    """Bytes of all buffers on a device; None takes all devices. A buffer that several arrays share counts once."""
    gc.collect()  # or what an earlier test left behind goes away while this one counts
    arrays = [a for a in jax.live_arrays() if not a.is_deleted() and (device is None or a.devices() == {device})]
    return sum({a.unsafe_buffer_pointer(): a.nbytes for a in arrays}.values())


TINY_BERT = DynaBERTConfig(
    num_classes=3, vocab_size=11, max_length=6, hidden_size=8, depths=(1, 2, 3), heads=(1, 2), ffn=(3, 5), eps=1e-5
)

TINY_VIT = ViTConfig(
    num_classes=3,
    image_size=6,
    channels=1,
    patch=2,
    widths=(4, 8),
    depths=(1, 2),
    heads=(1, 2),
    mlp=(3, 5),
    layer_scale=0.5,
    mean=(0.4,),
    std=(0.3,),
)


def random_tokens(config, batch=3, seed=0):
    """Sequences of different lengths. The first has the full length."""
    rng = np.random.default_rng(seed)
    shape = (batch, config.max_length)
    lengths = np.concatenate([[config.max_length], rng.integers(1, config.max_length, batch - 1)])
    return config.pack(
        rng.integers(1, config.vocab_size, shape),
        rng.integers(0, config.token_types, shape),
        mask=np.arange(config.max_length) < lengths[:, None],
    )


def assert_close(actual, expected, tolerance=1e-5):
    """Checks that two arrays agree. The tolerance is relative to the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(np.asarray(expected)).max(initial=0))


def assert_same_arrays(actual, expected):
    """Checks that two dicts have the same keys, and equal arrays, bit by bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=str(name))


def batches_of(images, labels, size):
    """A function that yields batches as `Dataset.eval` does: the last one is padded, and the padding has weight 0."""

    def make():
        for i in range(0, len(images), size):
            x, y = images[i : i + size], labels[i : i + size]
            fill = size - len(x)
            yield {
                "inputs": np.pad(x, ((0, fill), (0, 0), (0, 0), (0, 0))),
                "label": np.pad(y, (0, fill)),
                "weight": np.r_[np.ones(len(x), np.float32), np.zeros(fill, np.float32)],
            }

    return make
