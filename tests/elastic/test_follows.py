"""Axes whose sizes are a function of another axis's size, such as those of squeeze-and-excite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import assert_close

import superserve_jax as ss
from superserve_jax import errors, supernets
from superserve_jax.supernets import programs

SPEC = jax.ShapeDtypeStruct((1, 6), "float32")
FOLLOWS = {"blocks.*.reduce": ("blocks.*.expand", lambda n: max(2, n // 4))}


class Block(nnx.Module):
    def __init__(self, inner, *, rngs):
        squeeze = max(2, inner // 4)
        self.expand = nnx.Linear(8, inner, rngs=rngs)
        self.reduce, self.gate = nnx.Linear(inner, squeeze, rngs=rngs), nnx.Linear(squeeze, inner, rngs=rngs)
        self.project = nnx.Linear(inner, 8, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.expand(x))
        return x + self.project(y * nnx.sigmoid(self.gate(nnx.relu(self.reduce(y)))))


class Net(nnx.Module):
    def __init__(self, inner=(24, 16), *, rngs):
        self.stem = nnx.Linear(6, 8, rngs=rngs)
        self.blocks = nnx.List([Block(n, rngs=rngs) for n in inner])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(follows=FOLLOWS, **options):
    return ss.elastic(Net(rngs=nnx.Rngs(0)), SPEC, name="follows_of_tests", follows=follows, **options)


@pytest.fixture(scope="module")
def net():
    return make(axes={"expand": (0.25, 0.5, 1.0)})


def test_the_axes_have_no_choice_of_their_own(net):
    assert [(axis.name, len(axis.choices)) for axis in net.space.axes] == [("expand", 2)]
    sizes = net.config.sizes(net.space.subnet(expand=(0.25, 0.5)))
    assert [sizes[f"blocks.{i}.{name}"] for i in range(2) for name in ("expand", "reduce")] == [6, 2, 8, 2]
    assert "blocks.0.reduce: 2, 3, 6, with blocks.0.expand; cuts" in str(net.found)
    supernets.check(net.config)


def test_subnets_are_the_same_code_built_small(net):
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    masked = programs.masked(net.config)
    assert {"blocks.0.reduce", "blocks.0.expand"} <= set(masked.traced)
    run = jax.jit(masked.infer)
    for expand in ((0.25, 0.5), (1.0, 0.25)):
        subnet = net.space.subnet(expand=expand)
        small = Net([int(n * ratio) for n, ratio in zip((24, 16), expand, strict=True)], rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(small)
        values = net.extract(subnet)
        flat = [(path, v.replace(values[".".join(map(str, path))])) for path, v in nnx.to_flat_state(state)]
        shapes = {".".join(map(str, path)): v.get_value().shape for path, v in nnx.to_flat_state(state)}
        assert {name: value.shape for name, value in values.items()} == shapes
        expected = nnx.merge(graphdef, nnx.from_flat_state(flat))(x)
        assert_close(net(x, subnet), expected)
        assert_close(run(net.params, x, jnp.ones((2, 0)), masked.active(subnet)), expected)


class Chain(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b, self.c = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))))


def test_the_digest_tells_which_axis_is_followed():
    """The axes, their sizes and their places are the same."""
    digests = set()
    for name in ("a", "b"):
        net = ss.elastic(Chain(nnx.Rngs(0)), SPEC, follows={"c": (name, lambda n: n)}, name=f"chain_{name}")
        digests.add(net.config.digest)
    assert len(digests) == 2


def test_an_axis_that_follows_a_whole_one_is_whole():
    net = make(axes={"blocks.0.expand": None})
    assert {a.name: a.sizes for a in net.found.axes if "reduce" in a.name} == {
        "blocks.0.reduce": (6,),
        "blocks.1.reduce": (2, 2, 3, 4),
    }


def test_axes_and_follows_have_the_same_patterns():
    follows = {"*.reduce": ("*.expand", lambda n: max(2, n // 4))}
    net = make(follows, axes={"*.expand": (0.5, 1.0), "blocks.1*": (0.25, 1.0)})
    sizes = {axis.name: axis.sizes for axis in net.found.axes if axis.block}
    assert sizes == {
        "blocks.0.expand": (12, 24),
        "blocks.0.reduce": (3, 6),
        "blocks.1.expand": (4, 16),
        "blocks.1.reduce": (2, 4),
    }
    for pattern in ("blocks.?.expand", "blocks.[01].expand", "blocks.0.expan[d]"):
        with pytest.raises(errors.UnknownNameError, match="unknown axis"):
            make(axes={pattern: None})


@pytest.mark.parametrize("pattern", ["blocks.*.reduce", "blocks.0.reduce", "*reduce"])
def test_a_choice_for_an_axis_that_follows_another_is_refused(pattern):
    with pytest.raises(errors.ConfigError, match=r"only axes that follow others, such as 'blocks.0.reduce'.*leave it out"):
        make(axes={pattern: (0.5, 1.0)})


@pytest.mark.parametrize(
    ("follows", "error", "message"),
    [
        ({"blocks.*.redcue": ("blocks.*.expand", lambda n: n)}, errors.UnknownNameError, "redcue.*blocks.0.reduce"),
        ({"blocks.*.reduce": ("blocks.*.expnd", lambda n: n // 4)}, errors.UnknownNameError, "expnd"),
        ({"blocks.*.reduce": ("blocks.*.expand", lambda n: n // 5)}, errors.ConfigError, "the last 6"),
        ({"blocks.*.reduce": ("blocks.*.expand", lambda n: 30 - n)}, errors.ConfigError, "ascending"),
        ({"blocks.*.reduce": ("blocks.*.expand", lambda n: n / 4)}, errors.ConfigError, "whole numbers"),
        ({"blocks.*.reduce": ("blocks.*.reduce", lambda n: n)}, errors.ConfigError, "follows another one"),
        ({"blocks.?.reduce": ("blocks.0.expand", lambda n: n // 4)}, errors.UnknownNameError, "blocks.\\?.reduce"),
        (["blocks.*.reduce"], errors.ConfigError, "follows must be a dict, such as"),
        ({"blocks.*.reduce": "blocks.*.expand"}, errors.ConfigError, "follows must be a dict such as"),
    ],
)
def test_impossible_ties_are_refused(follows, error, message):
    with pytest.raises(error, match=message):
        make(follows)
