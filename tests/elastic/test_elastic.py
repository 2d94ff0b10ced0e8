"""`ss.elastic` on small modules: what it finds, what it refuses, and that the rest of the library accepts the result."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elastic_nets import Block, Net, make
from flax import nnx

import superserve_jax
import superserve_jax as ss
from superserve_jax import errors, supernets
from superserve_jax.supernets import programs


def test_what_is_found():
    net = make()
    assert {axis.name: (axis.kind, axis.sizes) for axis in net.found.axes} == {
        "stem": ("width", (8,)),
        **{f"blocks.{i}.fc1": ("expand", (4, 8, 12, 16)) for i in range(3)},
    }
    [stage] = net.found.stages
    assert (stage.name, stage.depths) == ("blocks", (2, 3))
    assert net.space.size == 4**3 + 4**2
    report = str(net.found)
    cuts = "blocks.*.fc1.bias[0], blocks.*.fc1.kernel[1], blocks.*.fc2.kernel[0]"
    assert f"expand    blocks.*.fc1: 4, 8, 12, 16; cuts {cuts} (3 times)" in report
    assert "stem.kernel[0] (8)" in report
    assert "an input has this axis" in report


def test_the_report_hides_numbers_of_blocks_only_if_all_of_them_are_meant():
    layers = [nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(12, 3, rngs=nnx.Rngs(1))]
    report = str(make(nnx.Sequential(*layers)).found)
    assert "expand    layers.0: 3, 6, 9, 12; cuts layers.0.bias[0], layers.0.kernel[1], layers.2.kernel[0]\n" in report
    assert "layers.0.kernel[0] (8): an input has this axis" in report
    assert "layers.2.bias[0] (3), layers.2.kernel[1] (3): the result has this axis" in report
    module = Net(nnx.Rngs(0))
    module.blocks[1].fc2 = nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0))
    report = str(make(module, axes={"blocks.1.fc1": None}).found)
    assert "expand    blocks.*.fc1: 4, 8, 12, 16; cuts blocks.*.fc1.bias[0]" in report
    assert "blocks.*.fc2.kernel[0] (2 times)" in report
    assert "expand    blocks.1.fc1: 16 (not elastic); cuts blocks.1.fc1.bias[0]" in report
    assert "width     stem: 8 (not elastic); cuts blocks.*.fc1.kernel[0], blocks.*.fc2.bias[0], " in report
    shown = [line for line in report.splitlines() if "(not elastic)" in line]
    assert len(shown) == 2


def test_kinds_patterns_and_depth_choose():
    net = make(
        axes={"expand": (0.5, 1.0), "blocks.1.*": None, "blocks.2.fc1": (3, 16), "width": (4, 8)}, depth={"blocks": (1, 3)}
    )
    assert {axis.name: axis.sizes for axis in net.found.axes} == {
        "stem": (4, 8),
        "blocks.0.fc1": (8, 16),
        "blocks.1.fc1": (16,),
        "blocks.2.fc1": (3, 16),
    }
    assert net.space.depths == ((1, 3),)
    assert make(depth={"*": None}).space.depths == ()
    assert make(divisor=8).found.axes[1].sizes == (8, 16)
    assert make(rule="every_other").space.rule == "every_other"


def test_the_family_fits_the_rest_of_the_library():
    net = make(axes={"width": (0.5, 1.0)})
    supernets.check(net.config)


def test_the_weights_are_the_modules_and_the_module_stays():
    module = Net(nnx.Rngs(3))
    net = make(module)
    statistics = np.stack([np.zeros(24, np.float32), np.ones(24, np.float32)])
    net.statistics[net.largest] = statistics
    module.eval()
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    np.testing.assert_allclose(net(x), module(x), rtol=1e-5, atol=1e-6)
    assert type(module.blocks[0]) is Block


def test_extract_cuts_and_leaves_out():
    net = make()
    small = net.space.subnet(depth=(2,), expand=0.25)
    found = net.extract(small)
    assert found["blocks.0.fc1.kernel"].shape == (8, 4)
    assert found["blocks.2.fc1.kernel"] is None
    assert sum(x.size for x in found.values() if x is not None) == net.config.num_params(small)


def test_an_import_of_every_submodule_leaves_the_function():
    for found in pkgutil.iter_modules(superserve_jax.__path__, "superserve_jax."):
        if found.name != "superserve_jax.__main__":
            importlib.import_module(found.name)
    assert callable(ss.elastic)


def test_shapes_are_enough_to_analyse():
    net = make(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    assert net.config.num_params(net.largest) == sum(x.size for x in make().params.values())
    assert net.config.flops(net.space.smallest()) == 8 * 8 + 2 * 2 * 8 * 4 + 8 * 3


def test_a_call_and_its_flag_reach_the_module():
    class Training(Net):
        def __call__(self, x, offset, training: bool):
            x = self.stem(x + offset)
            for block in self.blocks:
                x = block(x)
            return {"logits": self.head(x) * (2.0 if training else 1.0)}

    net = make(Training(nnx.Rngs(0)), call=lambda module, x, train: module(x, 1.0, training=train)["logits"])
    x = jnp.ones((2, 8))
    program = programs.sliced(net.config, net.largest)
    logits, statistics = program.train(net.params, x, jnp.zeros(0, jnp.int32))
    np.testing.assert_allclose(logits, 2 * program.infer(net.params, x, statistics, jnp.zeros(0, jnp.int32)), rtol=1e-5)


def test_an_axis_that_is_multiplied_with_itself_is_elastic_but_not_sorted():
    class Products(Net):
        def __call__(self, x):
            h = nnx.relu(self.stem(x))
            return self.head((h[:, :, None] * h[:, None, :]).reshape(len(x), -1))

    module = Products(nnx.Rngs(0))
    module.head = nnx.Linear(64, 3, rngs=nnx.Rngs(0))
    net = make(module)
    assert net.space.size == 4
    assert net.config.units() == []
    assert ss.elastic.check(net) == 4
    supernets.check(net.config, run=False)


def test_check_finds_a_number_that_comes_from_a_size():
    class Scaled(Net):
        def __call__(self, x):
            inner = self.blocks[0].fc1(self.stem(x))
            return self.head(self.blocks[0].fc2(inner * inner.shape[-1] ** -0.5))

    net = make(Scaled(nnx.Rngs(0)))
    assert [suspect.form for suspect in net.found.suspects] == ["n ** -0.5"]
    with pytest.raises(errors.ConfigError, match=r"other logits(.|\n)*test_elastic.py:\d+: 0.25 may be n \*\* -0.5 of n = 16"):
        ss.elastic.check(net)
    assert ss.elastic.check(make()) == 4


FAMILY = """
    import dataclasses, jax
    from flax import nnx
    import superserve_jax as ss

    class MLP(nnx.Module):
        def __init__(self, config, rngs):
            self.fc1 = nnx.Linear(8, config.inner, rngs=rngs)
            self.fc2 = nnx.Linear(config.inner, config.num_classes, rngs=rngs)
        def __call__(self, x):
            return self.fc2(nnx.{activation}(self.fc1(x)))

    @ss.elastic.family("tiny_mlp", axes={{"expand": (0.5, 1.0)}})
    @dataclasses.dataclass(frozen=True)
    class TinyMLP:
        inner: int = 16
        num_classes: int = 3
        def build(self, rngs): return MLP(self, rngs)
        def input_spec(self, batch): return jax.ShapeDtypeStruct((batch, 8), "float32")
"""


@dataclasses.dataclass(frozen=True)
class _Fields:
    num_classes: int

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return Net(rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, 8), jnp.float32)


def test_a_family_is_a_config():
    config = ss.elastic.family("fields")(_Fields)(3)
    assert config.num_classes == 3
    assert config == dataclasses.replace(config)
    supernets.check(config, run=False)
    for bad, message in (
        (Net, "must be a frozen dataclass"),
        (dataclasses.dataclass(frozen=True)(type("E", (), {})), "needs the method build"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            ss.elastic.family("bad")(bad)


def test_blocks_may_be_checkpointed():
    class Checkpointed(Net):
        def __call__(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = nnx.remat(lambda block, x: block(x))(block, x)
            return self.head(x)

    module = Checkpointed(nnx.Rngs(0))
    for block in module.blocks:
        block.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))
    net = make(module)
    assert net.space == make().space
    supernets.check(net.config)


def test_an_export_is_loaded_by_a_process_that_imports_the_module(tmp_path):
    (tmp_path / "tiny.py").write_text(textwrap.dedent(FAMILY.format(activation="relu")))
    write = """
        import numpy as np, superserve_jax as ss, tiny
        net = ss.SuperNet.create(tiny.TinyMLP(), seed=0)
        cost = lambda s: {"flops": net.config.flops(s), "params": net.config.num_params(s)}
        served = [ss.Served(s, accuracy=0.5, accuracy_shared=0.5, **cost(s)) for s in net.space.enumerate()]
        ss.export("export", net, served, measured="not at all")
        np.save("logits.npy", net(np.ones((1, 8), np.float32), net.space.smallest()))
    """
    read = """
        import numpy as np, superserve_jax as ss
        {first}
        model = ss.load("export")
        np.testing.assert_array_equal(model(np.ones((1, 8), np.float32), model.subnets[0]), np.load("logits.npy"))
    """

    def run(code):
        return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)

    assert run(write).stderr == ""
    assert run(read.format(first="import tiny")).stderr == ""
    assert "unknown family 'tiny_mlp'" in run(read.format(first="")).stderr
    (tmp_path / "tiny.py").write_text(textwrap.dedent(FAMILY.format(activation="relu")).replace("(0.5, 1.0)", "(0.25, 1.0)"))
    assert "the code of family 'tiny_mlp' computes something else now" in run(read.format(first="import tiny")).stderr
