"""Batches in parts on one-thread devices, and engines that share weights: outputs, places, memory and errors.

One file because all tests use the same engines of one small model, and the same recorder of their calls.
"""

import random

import jax
import numpy as np
import pytest
from fakes import threads
from tiny import TINY, TINY_BERT, assert_close, random_images, random_params, random_statistics, random_tokens

from superserve_jax import machine
from superserve_jax.engines import cpu_clients, cpu_workers, subnet_buckets
from superserve_jax.engines.cpu_clients import Share
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.supernets.supernet import SuperNet

SIZES = (1, 2, 4)
IMAGES = list(random_images(TINY, 4))
SPACE = TINY.space()
SUBNETS = [SPACE.smallest(), SPACE.subnet(depth=(1, 1, 1), expand=0.5, width=1.0), SPACE.largest()]
ENVELOPES = subnet_buckets.choose(SUBNETS, TINY.flops, 2)  # two subnets share a subnet bucket
TOKENS = list(random_tokens(TINY_BERT, 4))


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def model():
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in SUBNETS})


@pytest.fixture
def cores(monkeypatch):
    """Sets the number of cores."""
    return lambda count: monkeypatch.setattr(machine, "cores", lambda: count)


def make(model, *, parts=None, lanes=2, subnet_list=SUBNETS, batch_sizes=SIZES, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cores", lambda: lanes)
        return DeviceEngine(model, Share(), subnet_list=subnet_list, batch_sizes=batch_sizes, parts=parts, **options)


def pointers(arrays):
    return [array.unsafe_buffer_pointer() for array in arrays]


# -- outputs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
@pytest.mark.parametrize("envelopes", [{}, ENVELOPES], ids=["sliced", "bucketed"])
def test_parts_of_every_size_give_the_outputs_of_whole_batches(model, slicing, envelopes):
    options = {"slicing": slicing, "envelopes": envelopes, "batch_sizes": (1, 4)}
    whole = make(model, **options)
    ways = (2, {4: 1}), (3, {4: 1}), (1, {4: 2}), (2, {4: 2})
    engines = [make(model, parts=parts, lanes=lanes, shares=whole, **options) for lanes, parts in ways]
    for subnet in SUBNETS:
        masked = np.asarray(model(np.stack(IMAGES), subnet))
        for size in (1, 4):
            for count in range(1, size + 1):
                expected = whole.run(subnet, size, IMAGES[:count])
                assert_close(expected, masked[:count])
                for engine in engines:
                    outputs = engine.run(subnet, size, IMAGES[:count])
                    assert len(outputs) == count
                    assert_close(outputs, expected)


@pytest.mark.parametrize(("size", "part"), [(3, 2), (4, 3), (5, 2)])
@pytest.mark.parametrize("lanes", [1, 2])
def test_the_last_part_of_a_batch_may_be_smaller(model, size, part, lanes):
    """For example, three cores divide a batch of 16 into parts of 6, 6 and 4 inputs."""
    images, subnet = list(random_images(TINY, size)), SUBNETS[0]
    engine = make(model, parts={size: part}, lanes=lanes, subnet_list=[subnet], batch_sizes=(size,))
    masked = np.asarray(model(np.stack(images), subnet))
    for count in range(1, size + 1):
        assert_close(engine.run(subnet, size, images[:count]), masked[:count])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_an_engine_with_the_parts_of_any_number_of_cores_runs_every_batch_size(model, cores, count):
    cores(count)
    sizes, subnet = (1, 2, 4, 8), SUBNETS[0]
    images = list(random_images(TINY, 8))
    parts = cpu_clients.parts_of(sizes, most=4, lanes=len(Share().lanes))
    engine = make(model, parts=parts, lanes=min(count, 3), subnet_list=[subnet], batch_sizes=sizes)
    masked = np.asarray(model(np.stack(images), subnet))
    for size in sizes:
        assert_close(engine.run(subnet, size, images[:size]), masked[:size])


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
def test_parts_of_texts_give_the_outputs_of_whole_batches_at_every_length(slicing):
    subnets = [TINY_BERT.space().smallest()]
    model = SuperNet(TINY_BERT, random_params(TINY_BERT))
    options = {"subnet_list": subnets, "batch_sizes": (4,), "lengths": (3, 6), "slicing": slicing}
    whole = make(model, **options)
    engines = [make(model, parts=parts, shares=whole, **options) for parts in ({4: 2},)]
    for subnet in subnets:
        for longest in (2, 3, 5, 6):
            for count in range(1, 5):
                inputs = [text[: longest - i % 2] for i, text in enumerate(TOKENS[:count])]
                expected = whole.run(subnet, 4, inputs)
                for engine in engines:
                    assert_close(engine.run(subnet, 4, inputs), expected)


def test_batches_follow_each_other_without_traces_of_the_earlier_ones(model):
    """A batch with fewer inputs leaves those of an earlier batch in its staging buffer."""
    engine, subnet = make(model, parts={4: 2}), SUBNETS[-1]
    for seed, count in enumerate((4, 1, 3, 2, 4, 1)):
        images = random_images(TINY, 4, seed=seed)
        assert_close(engine.run(subnet, 4, list(images[:count])), np.asarray(model(images, subnet))[:count])


def test_launched_batches_in_parts_may_be_answered_in_any_order(model):
    engine, subnet = make(model, parts={4: 1}, lanes=3), SUBNETS[-1]
    masked = np.asarray(model(np.stack(IMAGES), subnet))
    first, second = engine.launch(subnet, 4, IMAGES[:3]), engine.launch(subnet, 4, IMAGES[3:])
    for launched, expected in ((second, masked[3:]), (first, masked[:3])):
        launched.wait()
        assert_close(launched.outputs(), expected)


# -- places -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def record():
    """Records each part that an engine computes: its lane, the lane's device, and its number of inputs."""

    def record(engine):
        seen = []

        def recording(i, call):
            def run(leaves, inputs, *rest):
                output = call(leaves, inputs, *rest)
                seen.append((i, output.device, len(inputs)))
                return output

            return run

        for key, (calls, bucket) in engine.calls.items():
            engine.calls[key] = tuple(recording(i, call) for i, call in enumerate(calls)), bucket
        return seen

    return record


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_parts_run_on_the_lanes_in_turn_and_the_first_lane_is_last(model, record, lanes):
    engine = make(model, parts={4: 1}, lanes=lanes, subnet_list=SUBNETS[:1], batch_sizes=(4,))
    seen = record(engine)
    for count in range(1, 5):
        seen.clear()
        engine.run(SUBNETS[0], 4, IMAGES[:count])
        used = [i for i, _, _ in seen]
        assert sorted(used) == sorted(i % lanes for i in range(count))  # no part without an input
        assert used == sorted(used, key=lambda i: i == 0)
        assert all(device == engine.lanes[i] and size == 1 for i, device, size in seen)


def test_batch_sizes_without_parts_run_in_one_call_on_the_engines_device(model, record):
    engine = make(model, parts={4: 2, 64: 8}, subnet_list=SUBNETS[:1])
    assert engine.parts == {4: 2}  # 64 is no batch size of the engine
    seen = record(engine)
    for size in SIZES:
        engine.run(SUBNETS[0], size, IMAGES[:size])
    assert seen[:2] == [(0, engine.device, 1), (0, engine.device, 2)]
    assert [(i, size) for i, _, size in seen[2:]] == [(1, 2), (0, 2)]


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("parts", [{}, {2: 1, 4: 1}, {1: 1, 2: 1, 4: 2}, {4: 4}, {4: 1}], ids=str)
def test_the_warm_up_calls_each_executable_on_each_lane_with_few_inputs(model, record, parts, lanes):
    engine = make(model, parts=parts, lanes=lanes, subnet_list=SUBNETS[:1])
    seen = record(engine)
    for size in SIZES:
        engine.run(SUBNETS[0], size, IMAGES[:size])
    every = set(seen)
    seen.clear()
    engine.warm_up()
    assert set(seen) == every
    assert sum(size for _, _, size in seen) <= 7  # with all batch sizes


def test_an_engine_without_parts_uses_no_lanes(model):
    engine = make(model, subnet_list=SUBNETS[:1])
    assert engine.lanes == ()
    assert {device for call in engine.executables for device in _devices(call)} == {engine.device}


def test_by_default_an_engine_with_parts_uses_a_lane_on_each_core(model, cores):
    cores(3)
    options = {"subnet_list": SUBNETS[:1], "batch_sizes": (4,)}
    engine = DeviceEngine(model, jax.devices("cpu")[0], parts={4: 1}, **options)
    assert engine.lanes == Share().lanes
    assert len(engine.executables) == 3


def _devices(call):
    return {d for sharding in jax.tree.leaves((call.input_shardings, call.output_shardings)) for d in sharding.device_set}


# -- sharing ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
@pytest.mark.parametrize(("count", "workers"), [(1, 1), (2, 2), (4, 2), (5, 2)])
def test_workers_share_weights_and_slices_without_a_copy(model, cores, count, workers, slicing):
    cores(count)
    options = {"subnet_list": SUBNETS, "batch_sizes": (1, 2), "envelopes": ENVELOPES, "slicing": slicing}
    engines = cpu_workers.create(model, workers, parts={2: 1}, **options)
    first = engines[0]
    assert [e.name for e in engines] == [f"cpu:{i}" for i in range(workers)]
    assert all(e.slices is first.slices and e.buckets is first.buckets for e in engines)
    places = {place for e in engines for place in (e.device, *e.lanes)}
    assert len({lane for e in engines for lane in e.lanes}) == sum(len(e.lanes) for e in engines) <= count
    for subnet in SUBNETS:
        expected = np.asarray(model(np.stack(IMAGES[:2]), subnet))
        for engine in engines:
            for size in (1, 2):
                assert_close(engine.run(subnet, size, IMAGES[:size]), expected[:size])
        _, bucket = first.calls[subnet, 1, 0]
        placed = bucket.whole
        if bucket.slicer is not None:
            placed = first.slices.get(bucket, bucket.slice_bytes, lambda: pytest.fail("the slices were not kept"))
        assert all(pointers(placed.on(place)) == pointers(placed.arrays) for place in places)
        assert all(array.device == place for place in places for array in placed.on(place))
    assert first.slices.makes == len({s for s in first.buckets.values() if s.slicer is not None})


def test_engines_that_share_give_the_same_outputs_while_both_run_and_slices_are_dropped(model, cores):
    cores(4)
    options = {"subnet_list": SUBNETS, "batch_sizes": SIZES}
    engines = cpu_workers.create(model, 2, parts={2: 1, 4: 2}, **options)
    engines[0].slices.budget_bytes = 1  # so the slices of one subnet are kept, and every change drops them
    engines[0].slices.clear()
    expected = {s: np.asarray(model(np.stack(IMAGES), s)) for s in SUBNETS}
    before, checked = engines[0].slices.makes, []

    def run(engine, seed):
        chosen = random.Random(seed)
        for _ in range(150):
            subnet, size = chosen.choice(SUBNETS), chosen.choice(SIZES)
            count = chosen.randint(1, size)
            assert_close(engine.run(subnet, size, IMAGES[:count]), expected[subnet][:count])
        checked.append(seed)

    with threads(*(lambda e=engine, i=i: run(e, i) for i, engine in enumerate(engines))):
        pass
    assert sorted(checked) == [0, 1]
    assert engines[0].slices.makes > before + 10


def test_an_engine_that_shares_goes_on_when_the_first_one_is_gone(model, cores):
    cores(2)
    engines = cpu_workers.create(model, 2, subnet_list=SUBNETS, batch_sizes=(2,), parts={2: 1})
    engine = engines.pop()
    del engines[:]
    for subnet in SUBNETS:
        assert_close(engine.run(subnet, 2, IMAGES[:2]), model(np.stack(IMAGES[:2]), subnet))


# -- errors -------------------------------------------------------------------------------------------------------------------


class Late:
    """The output of a part that fails after the batch was started."""

    def copy_to_host_async(self):
        pass

    def __array__(self, *args, **options):
        raise RuntimeError("the lane burns")


def burn(*_):
    raise RuntimeError("the lane burns")


@pytest.mark.parametrize("failing", [burn, lambda *_: Late()], ids=["at once", "later"])
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_a_lane_that_fails_fails_the_batch_and_nothing_of_the_batch_is_used_again(model, failing, lane):
    engine, subnet = make(model, parts={4: 1}, lanes=3, subnet_list=SUBNETS[:1], batch_sizes=(4,)), SUBNETS[0]
    good, bucket = engine.calls[subnet, 4, 0]
    free = engine.staging[4, 0]
    buffers = list(free)
    engine.calls[subnet, 4, 0] = tuple(failing if i == lane else call for i, call in enumerate(good)), bucket
    with pytest.raises(RuntimeError, match="the lane burns"):
        engine.run(subnet, 4, IMAGES)
    used = [buffer for buffer in buffers if not any(buffer is other for other in free)]
    assert len(used) == 1  # it is dropped, because another lane may still read it
    engine.calls[subnet, 4, 0] = good, bucket
    masked = np.asarray(model(np.stack(IMAGES), subnet))
    for _ in range(3):
        assert_close(engine.run(subnet, 4, IMAGES), masked)
        assert not any(buffer is used[0] for buffer in free)


def test_an_input_that_does_not_fit_gives_its_staging_buffer_back(model):
    engine, subnet = make(model, parts={4: 1}, subnet_list=SUBNETS[:1], batch_sizes=(4,)), SUBNETS[0]
    before = len(engine.staging[4, 0])
    with pytest.raises(ValueError, match="broadcast"):
        engine.run(subnet, 4, [np.zeros((3, 4), np.uint8)])
    assert len(engine.staging[4, 0]) == before
    assert_close(engine.run(subnet, 4, IMAGES), model(np.stack(IMAGES), subnet))
