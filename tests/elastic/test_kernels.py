"""A module with `kernel_select`: its subnets are small networks of the same code, without matrices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import assert_close
from tracing_checks import FAST

import superserve_jax as ss
from superserve_jax import errors, supernets
from superserve_jax.supernets import programs
from superserve_jax.training import rewiring

pytestmark = pytest.mark.usefixtures("quick_compilation")
SPEC = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
jit = functools.partial(jax.jit, compiler_options=FAST)


class Depthwise(nnx.Module):
    def __init__(self, channels, size, stride, *, elastic, rngs):
        self.kernel = nnx.Param(nnx.initializers.normal()(rngs.params(), (size, size, 1, channels)))
        self.to = nnx.Dict({str(k): nnx.Param(jnp.eye(k * k)) for k in (5, 3) if elastic and k < size})
        self.stride = stride

    def __call__(self, x):
        kernel = ss.elastic.kernel_select(self.kernel[...], {int(k): matrix[...] for k, matrix in self.to.items()})
        half = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            ((half, half), (half, half)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=kernel.shape[-1],
        )


class Block(nnx.Module):
    def __init__(self, inner, size, stride, *, elastic, rngs):
        self.expand = nnx.Conv(8, inner, (1, 1), use_bias=False, rngs=rngs)
        self.depthwise = Depthwise(inner, size, stride, elastic=elastic, rngs=rngs)
        self.norm = nnx.BatchNorm(inner, rngs=rngs)
        self.project = nnx.Conv(inner, 8, (1, 1), rngs=rngs)
        self.residual = stride == 1

    def __call__(self, x):
        y = self.project(nnx.relu(self.norm(self.depthwise(nnx.relu(self.expand(x))))))
        return x + y if self.residual else y


class Net(nnx.Module):
    """Sizes are (inner channels, kernel) of each block."""

    def __init__(self, rngs, sizes=((16, 7), (12, 7), (12, 5)), *, elastic=True):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        strides = (2, 1, 1)
        self.blocks = nnx.List(
            [Block(*size, stride, elastic=elastic, rngs=rngs) for size, stride in zip(sizes, strides, strict=False)]
        )
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@ss.elastic.family("kernels_of_tests", axes={"expand": (0.5, 1.0), "stem": None})
@dataclasses.dataclass(frozen=True)
class Config:
    def build(self, rngs):
        return Net(rngs)

    def input_spec(self, batch):
        return jax.ShapeDtypeStruct((batch, *SPEC.shape[1:]), SPEC.dtype)


@pytest.fixture(scope="module")
def net():
    config, rng = Config(), np.random.default_rng(0)
    specs = programs.param_spec(config)
    return supernets.SuperNet(config, {name: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype) for name, s in specs.items()})


def subnets(net):
    space = net.space
    mixed = space.subnet(expand=(1.0, 0.5), kernel=(3 / 7, 3 / 5), kernel_outside=5 / 7)
    return [space.smallest(), mixed, space.subnet(depth=(1,), kernel=(5 / 7, 1.0)), space.largest()]


def inputs():
    return np.random.default_rng(1).normal(size=(3, *SPEC.shape[1:])).astype(np.float32)


def extracted(net, subnet):
    sizes = net.config.sizes(subnet)
    read = net.config.shapes(sizes)
    return {name: net.config.cut(name, net.params, sizes) for name in read}


def small_module(net, subnet):
    """The same code, built with a subnet's sizes, with its parameters."""
    params = extracted(net, subnet)
    kernels = [params[f"blocks.{i}.depthwise.kernel"].shape for i, gate in enumerate((1, *subnet.gates)) if gate]
    module = Net(nnx.Rngs(0), [(shape[-1], shape[0]) for shape in kernels], elastic=False)
    graphdef, state = nnx.split(module)
    flat = {".".join(map(str, path)): (path, value) for path, value in nnx.to_flat_state(state)}
    weights = {name for name, (_, value) in flat.items() if isinstance(value, nnx.Param)}
    assert params.keys() == weights
    for name, x in params.items():
        assert flat[name][1].get_value().shape == x.shape
    new = [(path, value.replace(params[name]) if name in params else value) for name, (path, value) in flat.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(new))


def test_the_report_names_the_kernels(net):
    axes = {axis.name: axis for axis in net.config.found.axes}
    assert axes["blocks.0.depthwise.kernel"].sizes == (3, 5, 7)
    assert axes["blocks.2.depthwise.kernel"].sizes == (3, 5)
    assert axes["blocks.1.depthwise.kernel"].kind == "kernel"
    assert axes["blocks.1.depthwise.kernel"].block == "blocks.1"
    text = str(net.config.found)
    assert "kernel    blocks.*.depthwise.kernel: 3, 5, 7; cuts blocks.*.depthwise.kernel[0]" in text
    assert "blocks.*.depthwise.to.3[0] (9)" in text.partition("keep their sizes")[2]
    assert "depthwise.kernel[0]" not in text.partition("keep their sizes")[2]


@pytest.fixture(scope="module")
def expected(net):
    """What the small networks compute in training and, with the statistics of that batch, in inference."""

    def run(graphdef, state):
        module = nnx.merge(graphdef, state)
        module.set_attributes(use_running_average=False, momentum=0.0, raise_if_not_found=False)
        logits = module(inputs())
        module.eval()
        return logits, module(inputs())

    return {subnet: jax.jit(run, static_argnums=0)(*nnx.split(small_module(net, subnet))) for subnet in subnets(net)}


@pytest.mark.parametrize("kind", ["sliced", "bucketed", "masked"])
def test_a_subnet_trains_and_infers_as_the_small_network(net, expected, kind):
    low, mixed = subnets(net)[:2]
    program, chosen = {
        "sliced": lambda: (programs.sliced(net.config, mixed), [mixed]),
        "bucketed": lambda: (programs.bucketed(net.config, [low, mixed]), [low, mixed]),
        "masked": lambda: (programs.masked(net.config), subnets(net)),
    }[kind]()

    def run(params, active):
        logits, statistics = program.train(params, inputs(), active)
        return logits, program.infer(params, inputs(), statistics, active)

    compiled = jit(run)
    for subnet in chosen:
        for found, logits in zip(compiled(net.params, program.active(subnet)), expected[subnet], strict=True):
            assert_close(found, logits)


def test_a_subnet_has_the_numbers_of_the_small_network(net):
    for subnet in subnets(net):
        module = small_module(net, subnet)
        weights = jax.tree.leaves(nnx.state(module, nnx.Param))
        assert net.config.num_params(subnet) == sum(x.size for x in weights)
    supernets.check(net.config)


def test_a_program_runs_on_its_cut_of_the_parameters(net):
    """A program of one subnet is given small kernels. One of several kernel sizes is given large ones, and matrices."""
    low, mixed = subnets(net)[:2]
    for program in (programs.sliced(net.config, mixed), programs.bucketed(net.config, [low, mixed])):
        shapes = programs.used_leaves(program)
        is_traced = "blocks.0.depthwise.kernel" in program.traced
        assert shapes["blocks.0.depthwise.kernel"][:2] == ((7, 7) if is_traced else (5, 5))
        assert ("blocks.0.depthwise.to.5" in shapes) == is_traced
        cut = {name: program.cut(name, net.params, shape) for name, shape in shapes.items()}
        assert {name: x.shape for name, x in cut.items()} == shapes
        assert set(program.sources(shapes)) >= {"blocks.0.depthwise.to.3", "blocks.0.depthwise.to.5"}
        rows = jnp.ones((2, program.statistics_size))
        run = jit(program.infer)
        for subnet in (low, mixed) if is_traced else (mixed,):
            whole = run(net.params, inputs(), rows, program.active(subnet))
            assert_close(run(cut, inputs(), rows, program.active(subnet)), whole)


def test_rewiring_keeps_the_whole_network_and_small_kernels(net):
    config, rng = net.config, np.random.default_rng(0)
    assert sorted(units.count for units in config.units()) == [12, 12, 16]
    moved = rewiring.reorder(config, dict(net.params), [rng.permutation(units.count) for units in config.units()])
    assert not np.array_equal(moved["blocks.0.depthwise.kernel"], net.params["blocks.0.depthwise.kernel"])
    subnet = net.space.subnet(kernel=(5 / 7, 3 / 5), kernel_outside=3 / 7)
    program = programs.sliced(config, subnet)
    expected, found = (jit(program.train)(p, inputs(), jnp.zeros(0, jnp.int32))[0] for p in (net.params, moved))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
def test_the_server_answers_as_the_model_does(net, slicing, tmp_path):
    chosen = sorted(subnets(net)[1:], key=net.config.flops)
    net = supernets.SuperNet(net.config, dict(net.params))
    for subnet in chosen:
        program = programs.sliced(net.config, subnet)
        net.statistics[subnet] = np.asarray(jit(program.train)(net.params, inputs(), jnp.zeros(0, jnp.int32))[1])
    cost = [{"flops": net.config.flops(s), "params": net.config.num_params(s)} for s in chosen]
    served = [ss.Served(s, accuracy=0.5 + i / 10, accuracy_shared=0.5, **cost[i]) for i, s in enumerate(chosen)]
    model = ss.load(ss.export(tmp_path / "export", net, served, measured="not at all"))
    with ss.Server(model, slo_ms=10_000, batch_sizes=(2,), slicing=slicing) as server:
        for row in inputs():
            reply = server.submit(row).result(timeout=60)
            assert_close(reply.output, model(row[None], reply.subnet)[0])


def make(**options):
    return ss.elastic(Net(nnx.Rngs(0)), SPEC, name="kernels_of_tests_2", **options)


def test_the_sizes_of_kernels_can_be_chosen():
    net = make(axes={"kernel": (3,), "blocks.1.depthwise.kernel": None})
    assert {a.name: a.sizes for a in net.found.axes if a.kind == "kernel"} == {
        "blocks.0.depthwise.kernel": (3, 7),
        "blocks.1.depthwise.kernel": (7,),
        "blocks.2.depthwise.kernel": (3, 5),
    }
    assert net.extract(net.space.smallest())["blocks.0.depthwise.to.5"] is None
    assert ss.elastic.check(net, subnets=1) == 1
    with pytest.raises(errors.ConfigError, match=r"'blocks.0.depthwise.kernel' has the sizes \(3, 5, 7\), .* cannot have 0.5"):
        make(axes={"kernel": (0.5, 1.0)})


def test_a_kernel_that_follows_an_axis_has_the_sizes_of_its_matrices():
    sizes = {4: 2, 8: 4, 12: 6, 16: 7}
    with pytest.raises(errors.ConfigError, match=r"would have the sizes \(2, .*some of \(3, 5, 7\), ascending, the last 7"):
        make(follows={"blocks.0.depthwise.kernel": ("blocks.0.depthwise", sizes.__getitem__)})


def test_kernels_that_are_not_elastic_need_no_matrices():
    net = make(axes={"kernel": None})
    assert net.config.num_params(net.largest) == sum(x.size for name, x in net.params.items() if ".to." not in name)
