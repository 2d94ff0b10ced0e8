"""Variables of modules that `ss.elastic` takes: parameters of an own class, buffers, plain arrays, and norms of a user."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from elastic_nets import Net, make
from flax import nnx

import superserve_jax as ss
from superserve_jax import supernets
from superserve_jax.supernets import programs


class Buffers(nnx.Module):
    """Has variables and plain arrays that are no parameters: some numbers, a counter, and random keys that the call draws."""

    def __init__(self, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(8, 16, rngs=rngs)
        self.fc2 = nnx.Linear(16, 3, rngs=rngs)
        self.offsets = nnx.Variable(rngs.normal((8,)))
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.plain = jnp.arange(8.0)
        self.tables = nnx.data({("a", 1): np.arange(8.0)})
        self.rngs = rngs.fork()

    def __call__(self, x):
        self.count[...] += 1
        x = (x + self.offsets[...] + self.plain) * self.count[...] * self.tables["a", 1]
        x += jax.random.normal(self.rngs.params(), x.shape)
        return self.fc2(nnx.relu(self.fc1(x)))


def test_variables_that_are_no_parameters_keep_their_numbers():
    x = jnp.ones((2, 8))
    net = make(Buffers(nnx.Rngs(3)))
    assert net.space.size == 4
    expected = Buffers(nnx.Rngs(3))(x)
    np.testing.assert_allclose(net(x), expected, rtol=1e-5)
    np.testing.assert_allclose(net(x), expected, rtol=1e-5)  # each call begins with the same numbers
    supernets.check(net.config)


def test_an_analysis_may_begin_while_another_function_is_traced():
    @dataclasses.dataclass(frozen=True)
    class Config:
        num_classes: int

        def build(self, rngs):
            return Buffers(rngs)

        def input_spec(self, batch):
            return jax.ShapeDtypeStruct((batch, 8), jnp.float32)

    config = ss.elastic.family("buffers")(Config)(3)
    jax.eval_shape(lambda: jnp.zeros(config.num_classes))
    supernets.check(config, run=False)


class Positive(nnx.Param):
    """A parameter with a method of its own."""

    def positive(self):
        return jnp.exp(self[...])


class Tripled(nnx.Param):
    """A parameter whose value changes when it is read."""

    def get_value(self, **options):
        return 3 * super().get_value(**options)


class Parameters(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = Positive(rngs.normal((8, 16))), Tripled(rngs.normal((16, 3)))

    def __call__(self, x):
        return jnp.tanh(x @ self.first.positive()) @ self.second.get_value()


def test_parameters_keep_their_classes():
    x, module = jnp.ones((2, 8)), Parameters(nnx.Rngs(0))
    net = make(module)
    np.testing.assert_allclose(net(x), module(x), rtol=1e-5)
    np.testing.assert_array_equal(net.extract(net.largest)["second"], module.second.get_raw_value())
    assert ss.elastic.check(net) == 4


class OwnNorm(nnx.Module):
    """A norm that a user has written, with an nnx.BatchNorm's attributes."""

    def __init__(self):
        self.mean, self.var, self.momentum = nnx.BatchStat(jnp.zeros(8)), nnx.BatchStat(jnp.ones(8)), 0.9

    def __call__(self, x, train):
        if train:
            for statistic, new in ((self.mean, x.mean(0)), (self.var, x.var(0))):
                statistic[...] = self.momentum * statistic[...] + (1 - self.momentum) * new
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + 1e-5)


class NormOutside(Net):
    """The last block holds a norm, which is called behind all blocks, also if the block is left out."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.blocks[2].outer = OwnNorm()

    def __call__(self, x, train=False):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.blocks[2].outer(x, train))


def test_a_norm_runs_where_it_is_called_and_its_statistics_are_those_of_the_batch():
    net = make(NormOutside(nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    program = programs.sliced(net.config, net.space.subnet(depth=(2,)))
    assert [*program.offsets] == ["blocks.0.norm", "blocks.1.norm", "blocks.2.outer"]
    [_, statistics] = program.train(net.params, x, jnp.zeros(0, jnp.int32))
    module = NormOutside(nnx.Rngs(0))
    module.blocks = nnx.List([*module.blocks][:2])
    h = x @ module.stem.kernel
    np.testing.assert_allclose(statistics[0, :8], h.mean(0), atol=1e-5)
    for block in module.blocks:
        block.dropout.rate = 0.0
        h = block(h)
    np.testing.assert_allclose(statistics[:, 16:], [h.mean(0), h.var(0)], atol=1e-5)
    own = program.infer(net.params, x, statistics, jnp.zeros(0, jnp.int32))
    np.testing.assert_allclose(own, module.head((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)), atol=1e-4)
