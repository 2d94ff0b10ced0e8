"""DeviceEngine: all ways to slice weights and share executables give the same outputs, within their memory budgets.

Every test runs on the CPU, and also on a GPU if there is one.
"""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from tiny import TINY, TINY_BERT, assert_close, random_images, random_params, random_statistics, write_export

from superserve_jax import errors, exports, machine
from superserve_jax.engines import measuring, prepare, subnet_buckets
from superserve_jax.engines.device import DeviceEngine, default_slice_bytes
from superserve_jax.profile import Profile
from superserve_jax.supernets.supernet import SuperNet

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHOSEN = list(TINY.space().enumerate())[::20]
IMAGES = random_images(TINY, 2)


@pytest.fixture(scope="module")
def model():
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in CHOSEN})


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    with jax.default_matmul_precision("highest"):  # by default, a GPU multiplies float32 in fewer bits
        yield jax.devices(request.param)[0]


@pytest.fixture
def make(model, device):
    def make(subnet_list=CHOSEN, *, model=model, batch_sizes=(2,), **options):
        return DeviceEngine(model, device, subnet_list=subnet_list, batch_sizes=batch_sizes, **options)

    return make


def check_outputs(outputs, model, subnet, images=IMAGES):
    """Compares outputs of an engine with outputs of the masked program."""
    assert_close(outputs, model(images, subnet), 1e-5 if jax.default_backend() == "cpu" else 1e-4)


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
@pytest.mark.parametrize("buckets", [1, 3, 100])
def test_outputs_do_not_depend_on_subnet_buckets_and_slicing(model, make, slicing, buckets):
    engine = make(envelopes=subnet_buckets.choose(CHOSEN, TINY.flops, buckets), slicing=slicing)
    assert len(engine.executables) <= min(buckets, len(CHOSEN))
    for subnet in (*CHOSEN, *reversed(CHOSEN)):
        check_outputs(engine.run(subnet, 2, list(IMAGES)), model, subnet)
        check_outputs(engine.run(subnet, 2, list(IMAGES[:1])), model, subnet, IMAGES[:1])


def test_kept_slices_stay_within_their_budget_and_are_made_again(model, make, device):
    subnet_list = [*CHOSEN[:2], *CHOSEN[-2:]]
    roomy = make(subnet_list)
    assert roomy.slices.budget_bytes == default_slice_bytes(model, device)
    made = roomy.slices.makes
    largest = max(4 * TINY.num_params(s) for s in subnet_list if s != TINY.space().largest())
    tight = make(subnet_list, slice_bytes=largest)
    for _ in range(3):
        for subnet in subnet_list:
            outputs = [engine.run(subnet, 2, list(IMAGES)) for engine in (roomy, tight)]
            assert_close(*outputs, 0 if device.platform == "cpu" else 1e-4)  # on a GPU, only the first may be prepared
            assert tight.slices.nbytes <= largest
    assert roomy.slices.makes == made  # all were there already
    assert tight.slices.makes > 3


def test_a_subnet_bucket_too_large_for_the_budget_is_sliced_in_the_call(model, make):
    engine = make(slice_bytes=4 * TINY.num_params(TINY.space().smallest()))
    for subnet in CHOSEN:
        check_outputs(engine.run(subnet, 2, list(IMAGES)), model, subnet)
        assert engine.slices.nbytes <= engine.slices.budget_bytes


def test_outputs_survive_later_calls_and_do_not_keep_their_batch_in_memory(make):
    engine = make()
    first = engine.run(CHOSEN[0], 2, list(IMAGES))
    kept = [o.copy() for o in first]
    for seed in range(5):
        engine.run(CHOSEN[0], 2, list(random_images(TINY, 2, seed=seed)))
    np.testing.assert_array_equal(first, kept)
    assert all(o.base is None for o in first)


def test_dropped_slices_give_their_memory_back(make, device):
    def used_bytes():
        return device.memory_stats()["bytes_in_use"] if device.platform == "gpu" else len(jax.live_arrays())

    subnet, other = CHOSEN[1:3]
    engine = make([subnet, other], slice_bytes=4 * max(map(TINY.num_params, (subnet, other))))
    engine.run(subnet, 2, list(IMAGES))
    before = used_bytes()
    for _ in range(10):
        engine.run(other, 2, list(IMAGES))
        engine.run(subnet, 2, list(IMAGES))
    spare = 1 << 20 if device.platform == "gpu" else 2  # arrays: the statistics of both
    assert used_bytes() <= before + spare


def test_batches_in_flight_at_once_do_not_mix_and_their_staging_buffers_can_be_used_again(model, make, device):
    engine = make()
    assert engine.overlap == (device.platform != "cpu")
    small, large, white = CHOSEN[0], CHOSEN[-1], [np.full_like(IMAGES[0], 255)] * 2
    for seed in range(20):
        images = random_images(TINY, 4, seed=seed)
        first, second = engine.launch(large, 2, list(images[:2])), engine.launch(small, 2, list(images[2:]))
        first.wait()
        outputs = first.outputs()
        engine.run(small, 2, white)  # in the staging buffer of the first batch
        check_outputs(outputs, model, large, images[:2])
        outputs = second.outputs()
        engine.run(small, 2, white)
        check_outputs(outputs, model, small, images[2:])


def test_changing_the_subnet_compiles_nothing(make, compilations):
    envelopes = subnet_buckets.choose(CHOSEN, TINY.flops, 3)
    engine = make(envelopes=envelopes, slice_bytes=4 * TINY.num_params(TINY.space().largest()))
    before = len(compilations())
    for _ in range(2):
        for subnet in CHOSEN:
            engine.run(subnet, 2, list(IMAGES))
    assert len(compilations()) == before


@pytest.mark.parametrize(
    ("options", "message"), [({"slicing": "keep"}, "did you mean 'kept'"), ({"slice_bytes": 0}, "positive")]
)
def test_unknown_slicing_is_refused_before_anything_is_compiled(make, options, message, compilations):
    before = len(compilations())
    with pytest.raises(errors.SuperServeError, match=message):
        make(**options)
    assert len(compilations()) == before


def test_a_stored_profile_says_how_to_make_the_engine_and_a_foreign_one_is_ignored(model, tmp_path, caplog):
    device, kind = jax.devices()[0], machine.device_kind(jax.devices()[0])
    loaded = exports.load(write_export(tmp_path / "export", model, sorted(CHOSEN, key=TINY.flops), step=0.02))
    way, ratio = measuring.faster_slicing(loaded, device, (2,), repeats=1)
    assert way == ("kept" if ratio > 1.03 else "in_call")
    envelopes = subnet_buckets.choose(loaded.subnets, TINY.flops, 3)
    engine = DeviceEngine(loaded, device, subnet_list=loaded.subnets, batch_sizes=(1, 2), envelopes=envelopes)
    assert engine.name == f"{device.platform}:0"
    profile = measuring.measure(loaded, engine, repeats=1)
    assert set(profile.envelopes.values()) <= set(envelopes.values())
    assert prepare.stored_profile(loaded, kind, (1, 2)) is None
    profile.save(exports.profile_path(loaded.path, kind))
    _, [again], stored = prepare.prepare(loaded, batch_sizes=(2,))
    assert stored == [profile.at((2,))]
    assert len(again.executables) == len(set(envelopes[r.subnet] for r in profile.rows)) <= 3
    assert prepare.stored_profile(loaded, kind, (1, 64)) is None
    changed = profile.to_json()
    changed["rows"][0]["accuracy"] = 0.123
    Profile.from_json(changed).save(exports.profile_path(loaded.path, kind))
    with caplog.at_level(logging.WARNING):
        assert prepare.stored_profile(loaded, kind, (2,)) is None
    assert "another export" in caplog.text


def test_weights_that_no_subnet_slices_do_not_count_against_the_budget(make):
    config = dataclasses.replace(TINY_BERT, vocab_size=5000)
    smallest, budget = config.space().smallest(), 4 * 5000  # the embeddings alone need 8 times as much
    engine = make([smallest], model=SuperNet.create(config, seed=0), lengths=(6,), slice_bytes=budget)
    engine.run(smallest, 2, [np.ones((6, 2), np.int32)])
    assert 0 < engine.slices.nbytes <= budget
