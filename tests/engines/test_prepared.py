"""Engines with prepared slices: folded statistics, and layouts that the largest batch chooses.

A GPU chooses other layouts than the default ones. A CPU does not, so the tests choose for it: all axes reversed.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.layout import Layout
from tiny import TINY, TINY_BERT, assert_close, random_images, random_params, random_statistics, random_tokens

import superserve_jax as ss
from superserve_jax.engines import executables, subnet_buckets
from superserve_jax.engines.device import DeviceEngine, default_slice_bytes
from superserve_jax.families.ofa_mobilenet import OFAMobileNetConfig
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHOSEN = list(TINY.space().enumerate())[::45]
IMAGES = random_images(TINY, 2)


@pytest.fixture
def model():
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in CHOSEN})


@pytest.fixture
def reversed_axes(monkeypatch):
    """Executables that may choose a layout choose this one. The list has the number of axes of each choice."""
    chosen = []

    def free_layout(axes):
        chosen.append(axes)
        return Layout(tuple(range(axes))[::-1])

    monkeypatch.setattr(executables, "free_layout", free_layout)
    return chosen


def make(model, subnet_list=CHOSEN, **options):
    options = {"batch_sizes": (1, 2), "prepared": True, **options}
    return DeviceEngine(model, jax.devices()[0], subnet_list=subnet_list, **options)


def outputs_of(engine, inputs=IMAGES):
    return [engine.run(s, batch, list(inputs[:batch])) for s in engine.subnets for batch in engine.batch_sizes]


@pytest.mark.slow
@pytest.mark.usefixtures("reversed_axes")
@pytest.mark.parametrize("buckets", [3, 100])
def test_outputs_do_not_depend_on_folding_and_layouts(model, buckets):
    envelopes = subnet_buckets.choose(CHOSEN, TINY.flops, buckets)
    engine = make(model, envelopes=envelopes)
    for _ in range(2):
        for subnet in engine.subnets:
            for batch in (1, 2):
                assert_close(engine.run(subnet, batch, list(IMAGES[:batch])), model(IMAGES[:batch], subnet))
    slicers = [bucket.slicer for _, bucket in engine.calls.values()]
    assert all(slicer is not None for slicer in slicers)
    assert {f.layout.major_to_minor for s in slicers for f in s.call.output_formats} >= {(0,), (1, 0), (3, 2, 1, 0)}
    alone = {s for s, bucket in ((s, b) for (s, _, _), (_, b) in engine.calls.items()) if bucket.is_folded}
    members = collections.Counter(envelopes.get(s, s) for s in CHOSEN)
    assert alone == {s for s in CHOSEN if members[envelopes.get(s, s)] == 1}


def test_prepared_slices_come_from_the_cache_with_their_layouts(model, root, reversed_axes):
    first, calls = outputs_of(make(model, CHOSEN[:2])), len(reversed_axes)
    entries = set(root.glob("*.bin"))
    np.testing.assert_array_equal(np.concatenate(outputs_of(make(model, CHOSEN[:2]))), np.concatenate(first))
    assert set(root.glob("*.bin")) == entries
    assert len(reversed_axes) == calls > 0  # nothing was traced again
    plain = outputs_of(make(model, CHOSEN[:2], prepared=False))
    assert_close(np.concatenate(first), np.concatenate(plain))
    assert set(root.glob("*.bin")) > entries


@pytest.mark.slow
@pytest.mark.usefixtures("reversed_axes")
def test_a_transformer_with_other_layouts_gives_the_same_outputs():
    model, tokens, space = SuperNet.create(TINY_BERT, seed=0), random_tokens(TINY_BERT, 2), TINY_BERT.space()
    engine = make(model, [space.smallest(), space.largest()], lengths=(3, 6))
    tokens[1, 3:] = TINY_BERT.pack(np.zeros((1, 0), np.int32), length=6)[0, 3:]  # a short sequence
    for subnet in engine.subnets:
        assert_close(engine.run(subnet, 2, list(tokens)), model(tokens, subnet))
        assert_close(engine.run(subnet, 1, [tokens[1, :3]]), model(tokens[1:], subnet))


class Plain(nnx.Module):
    """A module that `ss.elastic` makes a SuperNet of."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.out = (nnx.Conv(c, 8, (3, 3), use_bias=False, rngs=rngs) for c in (3, 8))
        self.norm, self.last = (nnx.BatchNorm(8, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(nnx.relu(self.last(self.out(x))).mean((1, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("reversed_axes")
def test_the_norms_of_a_traced_module_are_folded_too(dtype):
    net = ss.elastic(Plain(), jax.ShapeDtypeStruct((1, 6, 6, 3), "float32"), name="prepared plain module")
    subnets = [net.space.smallest(), net.space.largest()]
    model = SuperNet(net.config, random_params(net.config), {s: random_statistics(net.config, s) for s in subnets})
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    engine = make(model, subnets, compute_dtype=dtype)
    for _, bucket in engine.calls.values():
        assert bucket.is_folded
        assert "scale" not in " ".join(bucket.weights)
    for subnet in subnets:
        expected = model(images, subnet)
        error = np.abs(np.stack(engine.run(subnet, 2, list(images))) - expected).max() / np.abs(expected).max()
        assert error < (1e-5 if dtype == "float32" else 0.05)


def test_norms_fold_into_kernels_that_are_smaller():
    config = OFAMobileNetConfig(image_size=16, width_mult=0.1, depths=(1, 2), expand_ratios=(3.0,), kernel_sizes=(3, 5))
    subnets = [config.space().smallest(), config.space().sample(0, 1)]
    model = SuperNet(config, random_params(config), {s: random_statistics(config, s) for s in subnets})
    images = random_images(config, 2)
    engine = make(model, subnets, batch_sizes=(2,))
    assert all(bucket.is_folded for _, bucket in engine.calls.values())
    for subnet in subnets:
        assert_close(np.stack(engine.run(subnet, 2, list(images))), model(images, subnet))


def test_a_single_subnet_of_a_traced_family_folds_nothing():
    class Split(Plain):
        def __call__(self, x):
            first, second = jnp.split(nnx.relu(self.norm(self.conv(x))), 2, axis=-1)
            return self.head(nnx.relu(self.last(self.out(jnp.concatenate([second, first], -1)))).mean((1, 2)))

    spec = jax.ShapeDtypeStruct((1, 6, 6, 3), "float32")
    net = ss.elastic(Split(), spec, name="split module", axes={"expand": (0.5, 1.0), "width": (0.5, 1.0)})
    single = SingleSubnetConfig(net.config, net.space.smallest())
    program = programs.sliced(single, single.space().largest())
    assert program.folds == {}
    params, rows = random_params(net.config), random_statistics(net.config, net.space.smallest())
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    none = program.active(program.envelope)
    found = program.infer_folded(program.fold(params, rows), images, rows, none)
    assert_close(found, SuperNet(net.config, params, {net.space.smallest(): rows})(images, net.space.smallest()))


def test_slices_that_exceed_the_budget_are_not_prepared(model):
    budget = 4 * TINY.num_params(TINY.space().smallest())
    engine = make(model, [CHOSEN[0], CHOSEN[-1]], slice_bytes=budget, batch_sizes=(2,))
    prepared = {s: bucket.is_folded for (s, _, _), (_, bucket) in engine.calls.items()}
    assert prepared == {s: TINY.num_params(s) * 4 <= budget for s in engine.subnets}
    for subnet in engine.subnets:
        assert_close(engine.run(subnet, 2, list(IMAGES)), model(IMAGES, subnet))
    assert engine.slices.nbytes <= budget


def test_on_a_cpu_nothing_is_prepared_unless_asked_for(model):
    engine = make(model, CHOSEN[:1], batch_sizes=(1,), prepared=None)
    [(_, bucket)] = engine.calls.values()
    assert bucket.slicer is not None
    assert not bucket.is_folded
    assert "scale" in " ".join(bucket.weights)


def test_the_budget_of_slices_is_a_share_of_the_card_s_memory(model):
    def card(memory):
        return types.SimpleNamespace(platform="gpu", memory_stats=lambda: memory)

    assert default_slice_bytes(model, card({"bytes_limit": 4 << 30})) == 1 << 30
    least = default_slice_bytes(model, jax.devices()[0])
    assert least == 16 << 20
    assert default_slice_bytes(model, card(None)) == default_slice_bytes(model, card({})) == least


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("slicing", ["kept", "in_call"])
def test_in_bfloat16_logits_differ_little_and_weights_take_half_the_memory(model, slicing, prepared):
    chosen = {"subnet_list": [CHOSEN[0], CHOSEN[3], CHOSEN[-1]], "slicing": slicing, "prepared": prepared}
    half, whole = (make(model, **chosen, compute_dtype=dtype) for dtype in ("bfloat16", "float32"))
    for subnet in half.subnets:
        outputs = half.run(subnet, 2, list(IMAGES))
        assert outputs[0].dtype == np.float32
        assert_close(outputs, model(IMAGES, subnet), 2e-2)
        assert np.abs(np.array(outputs) - whole.run(subnet, 2, list(IMAGES))).max() > 0
    for bucket in {bucket for _, bucket in half.calls.values()}:
        assert {v.dtype.name for v in bucket.weights.values() if v.ndim > 1} == {"bfloat16"}
    assert half.slices.nbytes < 0.6 * whole.slices.nbytes or slicing == "in_call"


@pytest.mark.slow
def test_a_transformer_in_bfloat16_gives_nearly_the_same_logits():
    model, tokens = SuperNet.create(TINY_BERT, seed=0), random_tokens(TINY_BERT, 2)
    engine = make(model, [TINY_BERT.space().largest()], lengths=(6,), compute_dtype="bfloat16")
    assert_close(engine.run(TINY_BERT.space().largest(), 2, list(tokens)), model(tokens), 2e-2)


def test_executables_of_one_dtype_are_not_used_for_another(model, root):
    expected = outputs_of(make(model, CHOSEN[:1], batch_sizes=(2,)))
    entries = len(list(root.glob("*.bin")))
    make(model, CHOSEN[:1], batch_sizes=(2,), compute_dtype="bfloat16")
    assert len(list(root.glob("*.bin"))) == 2 * entries
    np.testing.assert_array_equal(outputs_of(make(model, CHOSEN[:1], batch_sizes=(2,))), expected)


@pytest.mark.gpu
def test_a_gpu_chooses_layouts_and_keeps_all_statistics(model):
    with jax.default_matmul_precision("highest"):
        engine = make(model, prepared=None)
        for _ in range(2):
            for subnet in engine.subnets:
                assert_close(engine.run(subnet, 2, list(IMAGES)), model(IMAGES, subnet), 1e-4)
    slicers = [bucket.slicer for _, bucket in engine.calls.values()]
    layouts = [f.layout.major_to_minor for slicer in slicers for f in slicer.call.output_formats]
    assert any(layout != tuple(range(len(layout))) for layout in layouts)
    assert engine.statistics.makes == len(engine.subnets)
    assert engine.slices.budget_bytes == default_slice_bytes(model, engine.device) > 1 << 30
