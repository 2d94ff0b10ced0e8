"""A module with fused queries, keys and values through the library: low precision, rewiring, slices, the server."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import superserve_jax as ss
from superserve_jax import errors, extract
from superserve_jax.supernets import programs
from superserve_jax.training import rewiring

pytestmark = pytest.mark.usefixtures("quick_compilation")
SPEC = jax.ShapeDtypeStruct((1, 5, 6), "float32")


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, head_dim: int, *, rngs: nnx.Rngs):
        self.heads, self.head_dim = heads, head_dim
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * heads * head_dim, rngs=rngs)
        self.out = nnx.Linear(heads * head_dim, width, rngs=rngs)

    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(b, t, 3 * self.heads, self.head_dim), 3, axis=2)
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return x + self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, -1))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.List([Attention(8, 4, 3, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def net():
    found = ss.elastic(Net(nnx.Rngs(0)), SPEC, name="fused", axes={"width": (0.5, 1.0)})
    rng = np.random.default_rng(1)  # zeros as biases would hide a missing mask
    found.params = {name: jnp.asarray(x + rng.normal(0, 0.2, x.shape), jnp.float32) for name, x in found.params.items()}
    return found


def inputs(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 5, 6)).astype(np.float32)


def calibrated(net, subnets):
    for subnet in subnets:
        program = programs.sliced(net.config, subnet)
        _, net.statistics[subnet] = map(np.asarray, program.train(net.params, inputs(64), jnp.zeros(0, jnp.int32)))
    return net


def test_a_program_runs_on_its_cut_of_the_parameters(net):
    subnet = net.space.subnet(depth=(1,), heads=0.5, width=0.5)
    program = programs.sliced(net.config, subnet)
    shapes = programs.used_leaves(program)
    assert shapes["blocks.0.qkv.kernel"] == (4, 3 * 2 * 3)
    assert "blocks.1.qkv.kernel" not in shapes
    cut = {name: program.cut(name, net.params, shape) for name, shape in shapes.items()}
    assert {name: value.shape for name, value in cut.items()} == shapes
    kernel = np.asarray(net.params["blocks.0.qkv.kernel"]).reshape(8, 3, 4, 3)
    np.testing.assert_array_equal(cut["blocks.0.qkv.kernel"], kernel[:4, :, :2].reshape(4, -1))
    rows, none = jnp.ones((2, program.statistics_size)), jnp.zeros(0, jnp.int32)
    np.testing.assert_array_equal(
        jax.jit(program.infer)(cut, inputs(2), rows, none), jax.jit(program.infer)(net.params, inputs(2), rows, none)
    )


def test_rewiring_keeps_the_whole_network(net):
    config, rng = net.config, np.random.default_rng(0)
    assert sorted(units.count for units in config.units()) == [4, 4, 8]
    [stream] = [units for units in config.units() if units.count == 8]
    assert {axis.path for axis in stream.readers} == {"blocks.0.qkv.kernel", "blocks.1.qkv.kernel", "head.kernel"}
    orders = [rng.permutation(units.count) for units in config.units()]
    moved = rewiring.reorder(config, dict(net.params), orders)
    assert not np.array_equal(moved["blocks.0.qkv.kernel"], net.params["blocks.0.qkv.kernel"])
    program = programs.sliced(config, net.largest)
    expected, found = (program.train(p, inputs(4), jnp.zeros(0, jnp.int32))[0] for p in (net.params, moved))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_importances_sum_over_all_readers(net):
    """To first order, a unit's importance is the change of the loss if all weights that read it are scaled."""
    batch = {"inputs": inputs(8), "label": np.arange(8) % 3}
    found = rewiring.importances(net.config, net.params, [batch])
    assert [values.shape for values in found] == [(units.count,) for units in net.config.units()]
    assert all((values > 0).all() for values in found)


def test_low_precision_computes_in_low_precision(net):
    subnet = net.space.smallest()
    program = programs.sliced(net.config, subnet)
    params = programs.cast(net.params, "bfloat16")
    rows, none = jnp.ones((2, program.statistics_size)), jnp.zeros(0, jnp.int32)
    jaxpr = str(jax.make_jaxpr(program.infer)(params, inputs(2), rows, none))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    assert products
    assert all(":bf16[" in line for line in products)
    exact = program.infer(net.params, inputs(2), rows, none)
    np.testing.assert_allclose(program.infer(params, inputs(2), rows, none), exact, rtol=0.1, atol=0.05)


def test_hidden_states_are_recorded_if_their_shape_is_fixed(net):
    assert (
        programs.masked(net.config).train_hidden(net.params, inputs(2), programs.masked(net.config).active(net.largest))[1]
        == ()
    )
    fixed = ss.elastic(Net(nnx.Rngs(0)), SPEC, name="fused_fixed")
    program = programs.masked(fixed.config)
    subnet = fixed.space.subnet(depth=(1,))
    hidden = program.train_hidden(fixed.params, inputs(2), program.active(subnet))[1]
    assert [(int(gate), state.shape) for gate, state in hidden] == [(1, (2, 5, 8)), (0, (2, 5, 8))]
    np.testing.assert_array_equal(hidden[0][1], hidden[1][1])


def test_the_server_answers_as_the_model_does(net, tmp_path):
    subnets = [net.space.smallest(), net.space.subnet(heads=0.5), net.largest]
    calibrated(net, subnets)
    cost = [{"flops": net.config.flops(s), "params": net.config.num_params(s)} for s in subnets]
    served = [ss.Served(s, accuracy=0.5 + i / 10, accuracy_shared=0.5, **cost[i]) for i, s in enumerate(subnets)]
    model = ss.load(ss.export(tmp_path / "export", net, served, measured="not at all"))
    x = inputs(3)
    with ss.Server(model, slo_ms=10_000, batch_sizes=(2,)) as server:
        for row in x:
            reply = server.submit(row).result(timeout=60)
            np.testing.assert_allclose(reply.output, model(row[None], reply.subnet)[0], rtol=1e-4, atol=1e-5)


def test_logits_are_float32():
    module = nnx.Linear(8, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    module = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), module)
    assert ss.elastic(module, jax.ShapeDtypeStruct((1, 6), "float32"))(jnp.ones((2, 6))).dtype == jnp.float32


def test_a_subnet_is_extracted_as_weights_only(net, tmp_path):
    small = net.space.smallest()
    calibrated(net, [small])
    served = ss.Served(small, 0.5, 0.5, flops=net.config.flops(small), params=net.config.num_params(small))
    subnet = extract.take(ss.load(ss.export(tmp_path / "export", net, [served], measured="not at all")))
    weights = {name: x for name, x in net.extract(small).items() if x is not None}
    assert {name: value.shape for name, value in subnet.params.items()} == {name: x.shape for name, x in weights.items()}
    np.testing.assert_array_equal(subnet.params["blocks.0.qkv.kernel"], weights["blocks.0.qkv.kernel"])
    for format in ("onnx", "stablehlo"):
        with pytest.raises(errors.ExportError, match=f"family 'fused' is traced.*{format}.*safetensors"):
            extract.content(subnet, format)
