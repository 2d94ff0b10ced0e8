"""Actuation: the ways of slicing and of sharing executables all give the same answers, and keep no more than they may."""

import itertools

import jax
import numpy as np
import pytest
from tiny import TINY, random_images, random_params, random_statistics

from superserve_jax import errors, exports
from superserve_jax.engines import executables, prepare, subnet_buckets
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.exports import Served
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

DEVICE = jax.devices()[0]


@pytest.fixture(scope="module")
def model():
    """Calibrated for every twentieth subnet of the space."""
    chosen = list(TINY.space().enumerate())[::20]
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in chosen})


def make(model, subnet_list=None, **options):
    subnet_list = model.calibrated if subnet_list is None else subnet_list
    return DeviceEngine(model, DEVICE, subnet_list=subnet_list, batch_sizes=(2,), **options)


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
@pytest.mark.parametrize("buckets", [1, 3])
def test_a_subnet_answers_the_same_in_a_bucket_that_it_shares(model, slicing, buckets):
    envelopes = subnet_buckets.choose(model.calibrated, TINY.flops, buckets)
    engine = make(model, envelopes=envelopes, slicing=slicing)
    assert len(engine.executables) <= buckets < len(model.calibrated)
    images = random_images(TINY, 2)
    for subnet in (*model.calibrated, *reversed(model.calibrated)):
        expected = np.asarray(model(images, subnet))
        np.testing.assert_allclose(engine.run(subnet, 2, list(images)), expected, atol=1e-5 * np.abs(expected).max())


def test_slices_hold_just_the_subnets_own_weights(model):
    for subnet in model.calibrated:
        leaves = executables.used_leaves(programs.sliced(TINY, subnet))
        assert sum(int(np.prod(shape)) for shape in leaves.values()) == TINY.num_params(subnet)


def test_a_transformers_slices_hold_just_its_own_weights():
    config = DynaBERTConfig(
        vocab_size=20, num_classes=2, max_length=6, hidden_size=8, depths=(1, 2), heads=(1, 2), ffn=(8, 16)
    )
    for subnet in (config.space().smallest(), config.space().largest()):
        leaves = executables.used_leaves(programs.sliced(config, subnet))
        assert sum(int(np.prod(shape)) for shape in leaves.values()) == config.num_params(subnet)


def test_kept_slices_stay_within_their_budget_and_are_made_again(model):
    small, large = model.calibrated[:2], model.calibrated[-2:]
    roomy = make(model, [*small, *large])
    assert roomy.slices.budget_bytes == 16 << 20
    made = roomy.slices.makes
    one = max(4 * TINY.num_params(s) for s in (*small, *large) if s != model.space.largest())
    tight = make(model, [*small, *large], slice_bytes=one)
    images = list(random_images(TINY, 2))
    for _ in range(3):
        for subnet in (*small, *large):
            np.testing.assert_array_equal(roomy.run(subnet, 2, images), tight.run(subnet, 2, images))
            assert tight.slices.nbytes <= one
    assert roomy.slices.makes == made  # all that are needed were there
    assert tight.slices.makes > 3


def test_a_bucket_too_large_for_the_budget_is_sliced_in_the_call(model):
    engine = make(model, slice_bytes=4 * TINY.num_params(model.space.smallest()))
    images = random_images(TINY, 2)
    for subnet in model.calibrated:
        expected = np.asarray(model(images, subnet))
        np.testing.assert_allclose(engine.run(subnet, 2, list(images)), expected, atol=1e-5 * np.abs(expected).max())
        assert engine.slices.nbytes <= engine.slices.budget_bytes


def test_slices_that_went_are_gone_from_the_device(model):
    subnet, other = model.calibrated[1:3]
    engine = make(model, [subnet, other], slice_bytes=4 * max(map(TINY.num_params, (subnet, other))))
    images = list(random_images(TINY, 2))
    engine.run(subnet, 2, images)
    with_subnet = len(jax.live_arrays())
    for _ in range(4):
        engine.run(other, 2, images)
        engine.run(subnet, 2, images)
    assert len(jax.live_arrays()) <= with_subnet + 2  # rows of both


def test_a_buffer_that_is_written_to_after_a_batch_changes_no_answer(model):
    engine = make(model)
    for seed, subnet in enumerate(model.calibrated):
        images = random_images(TINY, 2, seed=seed)
        outputs = engine.run(subnet, 2, list(images))
        for staged in itertools.chain(*engine._staging.values()):
            staged[:] = 255
        expected = np.asarray(model(images, subnet))
        np.testing.assert_allclose(outputs, expected, atol=1e-5 * np.abs(expected).max())


def test_changing_the_subnet_compiles_nothing(model, compilations):
    envelopes = subnet_buckets.choose(model.calibrated, TINY.flops, 3)
    engine = make(model, envelopes=envelopes, slice_bytes=4 * TINY.num_params(model.space.largest()))
    images, before = list(random_images(TINY, 2)), len(compilations())
    for _ in range(2):
        for subnet in model.calibrated:
            engine.run(subnet, 2, images)
    assert len(compilations()) == before


@pytest.mark.parametrize(
    ("options", "message"), [({"slicing": "keep"}, "did you mean 'kept'"), ({"slice_bytes": 0}, "positive")]
)
def test_slicing_that_is_not_known_is_refused_before_anything_is_compiled(model, options, message, compilations):
    before = len(compilations())
    with pytest.raises(errors.SuperServeError, match=message):
        make(model, **options)
    assert len(compilations()) == before


def test_the_profile_says_how_weights_are_sliced_and_executables_shared(model, tmp_path):
    subnet_list = sorted(model.calibrated, key=TINY.flops)
    served = [Served(s, 0.5 + 0.02 * i, None, TINY.flops(s), TINY.num_params(s)) for i, s in enumerate(subnet_list)]
    exports.export(tmp_path / "export", model, served, measured="made up")
    loaded = exports.load(tmp_path / "export")
    way, ratio = prepare.faster_slicing(loaded, DEVICE, (2,), repeats=1)
    assert way == ("kept" if ratio > 1.03 else "in_call")
    envelopes = subnet_buckets.choose(subnet_list, TINY.flops, 3)
    engine = make(loaded, subnet_list, envelopes=envelopes)
    profile = prepare.measure(loaded, engine, (2,), prepare.device_kind(DEVICE), envelopes=envelopes, repeats=1)
    assert set(profile.envelopes.values()) <= set(envelopes.values())
    profile.save(exports.profile_path(loaded.path, prepare.device_kind(DEVICE)))
    _, [again], stored = prepare.prepare(loaded, batch_sizes=(2,))
    assert stored == [profile]
    assert len(again.executables) == len(set(envelopes[r.subnet] for r in profile.rows)) <= 3


def test_what_no_subnet_slices_does_not_count_against_the_budget():
    config = DynaBERTConfig(
        vocab_size=5000, num_classes=2, max_length=6, hidden_size=8, depths=(1, 2), heads=(1, 2), ffn=(8, 16)
    )
    text = SuperNet.create(config, seed=0)
    smallest = config.space().smallest()
    engine = make(text, [smallest], lengths=(6,), slice_bytes=4 * 5000)  # the embeddings alone have 8 times as many
    engine.run(smallest, 2, [np.ones(6, np.int32)] if config.token_types == 1 else [np.ones((6, 2), np.int32)])
    assert 0 < engine.slices.nbytes <= 4 * 5000
