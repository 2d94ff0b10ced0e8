"""Flax's convolutional network for MNIST, at its published size.

Source: google/flax, examples/mnist/train.py, class CNN, commit 18f8f31. Flax's wheel lacks its examples, so the network is
written again here, from the sizes and the order of the layers in that file.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tracing_checks import FAST

import superserve_jax as ss
from superserve_jax.supernets import programs

IMAGE = jax.ShapeDtypeStruct((1, 28, 28, 1), "float32")
PARAMETERS = 320 + 64 + 18_496 + 128 + 3136 * 256 + 256 + 2570  # of the layers in their order


class MnistCNN(nnx.Module):
    """Two convolutions, each with a batch norm and average pooling, then a hidden dense layer and the logits."""

    def __init__(self, rngs, *, channels=(32, 64), hidden=256):
        first, second = channels
        self.conv1 = nnx.Conv(1, first, (3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(first, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.025)
        self.conv2 = nnx.Conv(first, second, (3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(second, rngs=rngs)
        self.linear1 = nnx.Linear(7 * 7 * second, hidden, rngs=rngs)
        self.dropout2 = nnx.Dropout(0.025)
        self.linear2 = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, x, rngs):
        x = self.dropout1(self.conv1(x), rngs=rngs)
        x = _halved(self.batch_norm1(x))
        x = _halved(self.batch_norm2(self.conv2(x)))
        x = self.dropout2(self.linear1(x.reshape(len(x), -1)), rngs=rngs)
        return self.linear2(nnx.relu(x))


def _halved(x):
    """relu, then the mean of each 2x2 square."""
    return nnx.avg_pool(nnx.relu(x), window_shape=(2, 2), strides=(2, 2))


def shapes_of(**sizes):
    return nnx.eval_shape(lambda: MnistCNN(nnx.Rngs(0), **sizes))


@pytest.fixture(scope="module")
def net():
    rng, (graphdef, state, rest) = np.random.default_rng(1), nnx.split(shapes_of(), nnx.Param, ...)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), state)
    return ss.elastic(nnx.merge(graphdef, state, rest), IMAGE, call=lambda module, x: module(x, None))


def test_the_channels_and_the_hidden_units_are_elastic(net):
    assert {axis.name: (axis.kind, axis.sizes) for axis in net.found.axes} == {
        "conv1": ("expand", (8, 16, 24, 32)),
        "conv2": ("expand", (16, 32, 48, 64)),
        "linear1": ("expand", (64, 128, 192, 256)),
    }
    assert net.space.size == 4**3


def test_the_pixels_that_pooling_leaves_are_fixed_inside_of_the_first_dense_layer(net):
    pixels = {
        (fixed.size, fixed.reason.partition(":")[0]) for fixed in net.found.fixed if fixed.place.parameter == "linear1.kernel"
    }
    assert pixels == {(7, "pooling at test_mnist.py")}


def test_parameters_and_multiply_adds_are_those_of_the_layers(net):
    largest, smallest = net.space.largest(), net.space.smallest()
    assert net.config.num_params(largest) == PARAMETERS == 824_650
    assert net.config.flops(largest) == 28 * 28 * 9 * 32 + 14 * 14 * 9 * 32 * 64 + 3136 * 256 + 2560
    assert net.config.num_params(smallest) == 80 + 16 + 1168 + 32 + 784 * 64 + 64 + 650


def test_a_subnet_is_the_same_class_built_small(net):
    subnet, rng = net.space.subnet(expand=(0.75, 0.25, 0.5)), np.random.default_rng(0)
    images, program = rng.normal(size=(2, 28, 28, 1)).astype(np.float32), programs.sliced(net.config, subnet)
    statistics = np.exp(rng.normal(size=(2, 24 + 16))).astype(np.float32)
    values, split = net.extract(subnet), np.split(statistics, [24], axis=1)
    for norm, (mean, var) in zip(("batch_norm1", "batch_norm2"), split, strict=True):
        values |= {f"{norm}.mean": mean, f"{norm}.var": var}
    small = shapes_of(channels=(24, 16), hidden=128)
    small.eval()
    graphdef, state = nnx.split(small)
    flat = [(path, v, values[".".join(path)]) for path, v in nnx.to_flat_state(state)]
    assert all(v.shape == value.shape for _, v, value in flat)
    state = nnx.from_flat_state([(path, v.replace(value)) for path, v, value in flat])

    @functools.partial(jax.jit, compiler_options=FAST)
    def compute(params, state):
        return program.infer(params, images, statistics, program.active(subnet)), nnx.merge(graphdef, state)(images, None)

    logits, expected = compute(net.params, state)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
