"""What `ss.elastic` refuses, and what its messages say."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from elastic_nets import Net, make
from flax import nnx

import superserve_jax as ss
from superserve_jax import errors


class Two(Net):
    def __call__(self, x):
        return super().__call__(x), x


class Flat(Net):
    def __call__(self, x):
        return super().__call__(x).sum(-1)


class TwoInputs(Net):
    def __call__(self, x, y, train: bool, *, scale=1.0):
        return super().__call__(x + scale * y)


class Decides(Net):
    def __call__(self, x):
        if x.sum() > 0:
            x = -x
        return super().__call__(x)


class OwnStatistics(nnx.Module):
    def __init__(self):
        self.seen = nnx.BatchStat(jnp.zeros(8))

    def __call__(self, x):
        return x * self.seen[...]


class FixedNorm(Net):
    def __call__(self, x):
        return self.head(self.blocks[0].norm(self.stem(x), use_running_average=True))


class OneNormForAll(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        for block in self.blocks:
            block.norm = self.blocks[0].norm


class Decaying(nnx.Module):
    """A norm whose statistics are those of several batches."""

    def __init__(self):
        self.mean, self.var = nnx.BatchStat(jnp.zeros(8)), nnx.BatchStat(jnp.ones(8))

    def __call__(self, x, train):
        if train:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return (x - self.mean[...]) / self.var[...]


class DecayingNet(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = Decaying()

    def __call__(self, x, train: bool):
        return self.head(self.norm(self.stem(x), train))


class Tree(nnx.Module):
    def __init__(self):
        self.weights = nnx.Param({"a": jnp.ones((8, 4)), "b": jnp.ones((4, 3))})

    def __call__(self, x):
        return x @ self.weights["a"] @ self.weights["b"]


class Offset(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.offset = nnx.Variable(jnp.ones(8))


class Rigid(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x):
        return x * self.scale[...]


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        ("a string", {}, errors.ConfigError, "expected a Flax NNX module, got str"),
        (Two, {}, errors.ConfigError, r"returns arrays of the shapes .*lambda module, x: module\(x\)\[0\]"),
        (
            TwoInputs,
            {},
            errors.ConfigError,
            r"TwoInputs.__call__ needs the arguments \['x', 'y'\], but.*one array.*call=lambda module, x: module\(",
        ),
        (Flat, {}, errors.ConfigError, r"one array \(batch, classes\)"),
        (
            Decides,
            {},
            errors.ConfigError,
            r"looks at the numbers of its arguments at test_refusals.py:\d+.*jnp.where or lax.cond",
        ),
        (OwnStatistics, {}, errors.ConfigError, "'seen' is an nnx.BatchStat.*only the mean and var.*nnx.Variable"),
        (FixedNorm, {}, errors.ConfigError, "does not update 'blocks.0.norm.mean'.*use_running_average.*call=lambda"),
        (
            OneNormForAll,
            {},
            errors.ConfigError,
            "norm 'blocks.0.norm' is called more than once.*a norm of its own for each call",
        ),
        (DecayingNet, {}, errors.ConfigError, "'norm.mean' keeps a part of its old value.*attribute `momentum`"),
        (Tree, {}, errors.ConfigError, "'weights' is an nnx.Param that holds a dict; make each array an nnx.Param"),
        (Rigid, {}, errors.ConfigError, r"nothing of this module is elastic(.|\n)*scale\[0\] \(8\): an input has this axis"),
        (Net, {"axes": {"blocks.*.fc3": (4,)}}, errors.UnknownNameError, "unknown axis 'blocks.*.fc3'.*blocks.0.fc1"),
        (Net, {"axes": {"expand": (32,)}}, errors.ConfigError, "'blocks.0.fc1' has 16 entries, so it cannot have 32.*ratio"),
        (Net, {"axes": {"expand": (1.5,)}}, errors.ConfigError, "the ratio 1.5 of axis .* above 0 and at most 1"),
        (Net, {"axes": {"expand": 0.5}}, errors.ConfigError, "axes must be a dict such as .*got 0.5 for 'expand'"),
        (Net, {"axes": ["expand"]}, errors.ConfigError, "axes must be a dict, such as"),
        (Net, {"depth": {"layers": (1, 2)}}, errors.UnknownNameError, "unknown stage of blocks 'layers'.*blocks"),
        (Net, {"depth": {"blocks": (1, 4)}}, errors.ConfigError, "stage 'blocks' has 3 blocks, so it cannot keep 4"),
        (Net, {"depth": {"blocks": (0.5, 1.0)}}, errors.ConfigError, "must be numbers of blocks"),
        (Net, {"rule": "last"}, errors.UnknownNameError, "unknown rule 'last'"),
        (Net, {"divisor": 0}, errors.ConfigError, "divisor must be a whole number from 1 up, got 0"),
    ],
)
def test_misuse_is_refused(module: Any, options: dict[str, Any], error: type[Exception], message: str):
    if isinstance(module, type):
        module = module(nnx.Rngs(0)) if issubclass(module, Net) else module()
    with pytest.raises(error, match=message):
        make(module, **options)


def test_shapes_in_place_of_numbers_that_the_code_reads_are_refused():
    with pytest.raises(errors.ConfigError, match=r"'offset' has a shape, but no numbers.*nnx.eval_shape.*nnx.Param"):
        make(nnx.eval_shape(lambda: Offset(nnx.Rngs(0))))


def test_an_input_spec_without_a_batch_axis_is_refused():
    for spec in ((1, 8), jax.ShapeDtypeStruct((), "float32")):
        with pytest.raises(errors.ConfigError, match=r"input_spec must be a jax.ShapeDtypeStruct with a batch axis"):
            ss.elastic(Net(nnx.Rngs(0)), spec)  # type: ignore[arg-type]


def test_the_name_of_another_family_is_refused():
    with pytest.raises(errors.ConfigError, match=r"family 'dynabert' exists already .*; give another name"):
        make(name="dynabert")
    assert make().config.family == "elastic_net"
    assert make().config.family == "elastic_net"  # a cell of a notebook may run again
