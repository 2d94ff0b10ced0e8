"""Blocks of a module that a subnet may leave out."""

import jax.numpy as jnp
from elastic_nets import Block, Net, make
from flax import nnx

from superserve_jax import supernets


def test_a_block_that_changes_the_stream_is_kept_with_a_reason():
    class Plain(Block):
        def __call__(self, x):
            return self.fc2(nnx.relu(self.fc1(x)))

    module = Net(nnx.Rngs(0))
    module.blocks = nnx.List([Plain(8, 16, rngs=nnx.Rngs(1)) for _ in range(2)])
    net = make(module)
    assert net.found.stages == ()
    assert "blocks.0 always runs: its output is not added to its input" in str(net.found)


def test_functions_may_be_applied_to_the_sum_of_a_block():
    class Activated(Block):
        def __call__(self, x):
            return nnx.silu(nnx.relu(super().__call__(x)))

    module = Net(nnx.Rngs(0))
    module.blocks = nnx.List([Activated(8, 16, rngs=nnx.Rngs(i)) for i in range(3)])
    assert make(module).space == make().space


def test_a_block_whose_caller_adds_the_input_is_kept():
    """Without it, `x + block(x)` would be `2 * x`."""

    class Outside(Net):
        def __call__(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    module = Outside(nnx.Rngs(0))
    module.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)])
    net = make(module, axes={"width": (0.5, 1.0)})
    assert net.found.stages == ()
    assert "its output is not added to its input" in net.found.kept["layers.0"]


class Conditioned(Block):
    def __call__(self, condition, x):
        return super().__call__(x) + condition


class Conditions(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.blocks = nnx.List([Conditioned(8, 16, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        first = x = self.stem(x)
        for block in self.blocks:
            x = block(first, x)
        return self.head(x)


def test_a_block_of_two_streams_is_kept():
    """Without the last block, its first argument would remain, and not what the other blocks have computed."""
    net = make(Conditions(nnx.Rngs(0)))
    assert {*net.found.kept} == {"blocks.1", "blocks.2"}
    assert "unknown which of them would remain" in net.found.kept["blocks.2"]


def test_blocks_may_be_called_with_keywords():
    class Keywords(Net):
        def __call__(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x=x)
            return self.head(x)

    assert make(Keywords(nnx.Rngs(0))).space == make().space


def test_blocks_may_be_called_by_another_method():
    class Named(Block):
        def apply(self, x):
            return Block.__call__(self, x)

    class Caller(Net):
        def __call__(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block.apply(x)
            return self.head(x)

    module = Caller(nnx.Rngs(0))
    module.blocks = nnx.List([Named(8, 16, rngs=nnx.Rngs(i)) for i in range(2)])
    assert make(module).found.stages == ()
    net = make(module, method="apply")
    assert net.space.depths == ((1, 2),)
    supernets.check(net.config, run=False)


def test_axes_inside_and_outside_of_blocks_have_names_of_their_own():
    class Two(Block):
        """A stream of its own inside of a block."""

        def __init__(self, *args, rngs):
            super().__init__(*args, rngs=rngs)
            self.beside = nnx.Linear(8, 16, rngs=rngs)

        def __call__(self, x):
            return x + self.fc2(nnx.relu(self.fc1(x)) + self.beside(x))

    class Deep(Net):
        def __call__(self, x):
            return super().__call__(self.last(nnx.relu(self.first(x))))

    module = Deep(nnx.Rngs(0))
    module.blocks = nnx.List([Two(8, 16, rngs=nnx.Rngs(i)) for i in range(2)])
    module.first, module.last = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    net = make(module, axes={"width": (0.5, 1.0)})
    assert {axis.name: axis.blocks for axis in net.space.axes} == {
        "width": None,
        "width_inside": (0, 1),
        "expand_outside": None,
    }
    supernets.check(net.config)


def test_an_axis_that_training_fixes_is_not_elastic():
    class Sorted(Net):
        def __call__(self, x, train: bool):
            inner = self.blocks[0].fc1(self.blocks[1].norm(self.stem(x)))
            inner = jnp.sort(inner, axis=-1) if train else inner
            return self.head(self.blocks[1].fc2(self.blocks[1].fc1(self.blocks[0].fc2(inner))))

    net = make(Sorted(nnx.Rngs(0)))
    assert {axis.name for axis in net.found.axes} == {"blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "stem"}
    assert "sort at test_blocks.py" in str(net.found)
    supernets.check(net.config, run=False)
