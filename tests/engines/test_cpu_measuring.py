"""The measurements that choose parts and workers on a CPU, and a measurement beside busy engines."""

import dataclasses
import itertools
import threading
import time
import types

import numpy as np
import pytest
from fakes import PROFILE, SUBNETS, WAIT_S, fake, several, wait_until

from superserve_jax import machine
from superserve_jax.engines import cpu_clients, cpu_workers, profiling
from superserve_jax.engines.cpu_clients import Share
from superserve_jax.profile import Profile

MODEL = types.SimpleNamespace(config=types.SimpleNamespace(flops=lambda subnet: 1 + subnet.gates[0]))
ACCURACIES = {r.subnet: r.accuracy for r in PROFILE.rows}


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """Sets the number of cores: two, unless the test calls it."""

    def set_to(count):
        monkeypatch.setattr(machine, "cores", lambda: count)

    set_to(2)
    return set_to


# -- parts --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts_with(monkeypatch):
    """Runs `faster_parts` with engines that compute nothing. `seconds(size, part)` is the time of a batch, part 0 is whole."""

    def engine(model, device, **options):
        return types.SimpleNamespace(**{"parts": {}, **options, "input_shape": (2,), "input_dtype": np.float32})

    monkeypatch.setattr(cpu_workers, "DeviceEngine", engine)

    def run(seconds, batch_sizes, subnet_list=SUBNETS):
        asked = set()

        def time_s(engine, subnet, size, inputs):
            assert len(inputs) == size
            asked.add((subnet, size, engine.parts.get(size, 0)))
            return seconds(size, engine.parts.get(size, 0)) * (1 + subnet.gates[0])

        monkeypatch.setattr(profiling, "time_s", time_s)
        found = cpu_workers.faster_parts(MODEL, batch_sizes, subnet_list=subnet_list)
        assert {s for s, _, _ in asked} == set(subnet_list)
        assert {size for _, size, _ in asked} == set(batch_sizes)
        return found

    return run


@pytest.mark.parametrize("fastest", [1, 2, 4])
def test_the_fastest_parts_are_chosen(parts_with, fastest):
    parts, ratio = parts_with(lambda size, part: {0: 1.0, fastest: 0.5}.get(part, 0.9) * size, (8,))
    assert (parts, ratio) == ({8: fastest}, pytest.approx(2.0))


def test_batch_sizes_that_gain_too_little_run_whole(parts_with):
    gains = {1: 1.0, 2: 1.029, 4: 1.031, 8: 2.0}
    parts, ratio = parts_with(lambda size, part: size / gains[size] if part else size, (1, 2, 4, 8))
    assert set(parts) == {4, 8}
    assert ratio == pytest.approx(2.0)
    assert parts_with(lambda size, part: size / gains[size] if part else size, (1, 2))[0] == {}


def test_parts_that_are_slower_are_not_used(parts_with):
    assert parts_with(lambda size, part: 2.0 if part else 1.0, (1, 4)) == ({}, pytest.approx(0.5))


def test_of_parts_with_equal_times_the_largest_is_chosen(parts_with):
    assert parts_with(lambda size, part: {0: 1.0, 4: 0.9}.get(part, 0.5), (8,))[0] == {8: 2}


def test_one_disturbed_round_changes_no_decision(parts_with):
    calls = itertools.count()

    def seconds(size, part):
        return 100.0 if next(calls) in (0, 7) else {0: 1.0, 2: 0.5}.get(part, 0.9)

    assert parts_with(seconds, (8,)) == ({8: 2}, pytest.approx(2.0))


@pytest.mark.parametrize("count", [1, 3, 6, 16])
def test_with_any_number_of_cores_a_batch_has_a_part_for_each_lane(parts_with, cores, count):
    cores(count)
    parts, _ = parts_with(lambda size, part: 0.5 if part else 1.0, (1, 2, 4, 8, 16))
    assert set(parts) == {1, 2, 4, 8, 16}
    assert all(1 <= part <= size for size, part in parts.items())


# -- workers ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def workers_with(monkeypatch):
    """Runs `faster_workers` with engines whose batches sleep. `seconds(workers, size)` is the time of a batch."""
    made = []

    class Sleeping:
        lengths, input_shape, input_dtype = (), (2,), np.dtype(np.float32)

        def __init__(self, seconds):
            self.seconds = seconds

        def run(self, subnet, size, inputs):
            assert len(inputs) == size
            time.sleep(self.seconds(size))

    def run(seconds, batch_sizes=(1, 4), parts=None):
        def create(model, workers, **options):
            made.append((workers, options["parts"]))
            return [Sleeping(lambda size: seconds(workers, size)) for _ in range(workers)]

        monkeypatch.setattr(cpu_workers, "create", create)
        made.clear()
        how = {"subnet_list": SUBNETS[:1], "rounds": 1}
        return *cpu_workers.faster_workers(MODEL, batch_sizes, parts or {}, **how), list(made)

    return run


# Real sleeps, so the cases are far from the limit. A sleep of 20 ms may take a little longer on a busy machine.
@pytest.mark.parametrize(("slower", "workers"), [(1.0, 2), (4.0, 1)])
def test_several_workers_need_a_higher_throughput(workers_with, slower, workers):
    found, _, made = workers_with(lambda n, size: 0.02 * (slower if n == 2 else 1.0), (4,))
    assert found == workers
    assert [n for n, _ in made] == [1, 2]


def test_the_best_batch_size_of_each_way_counts(workers_with):
    # One worker gains from large batches, and two workers do not.
    found, ratio, _ = workers_with(lambda n, size: 0.02 * (1.0 if n == 1 else size))
    assert (found, ratio < 1) == (1, True)


@pytest.mark.parametrize(("count", "several"), [(4, 4), (16, 8)])
def test_there_is_a_worker_for_each_of_up_to_eight_cores_with_parts_that_are_not_larger(workers_with, cores, count, several):
    cores(count)
    _, _, made = workers_with(lambda n, size: 0.02, (4,), parts={4: 2})
    assert [n for n, _ in made] == [1, several]
    assert all(set(parts) == {4} and parts[4] <= 2 for _, parts in made)


def test_on_one_core_nothing_is_measured(workers_with, cores):
    cores(1)
    assert workers_with(lambda n, size: 0.01) == (1, 1.0, [])


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (16, 16)])
def test_the_parts_of_workers_are_possible_and_not_larger(cores, count, workers):
    cores(count)
    assert cpu_clients.parts_of_workers({}, workers) == {}
    parts = cpu_clients.parts_of((2, 4, 16), most=4, lanes=len(Share().lanes))
    found = cpu_clients.parts_of_workers(parts, workers)
    assert found.keys() == parts.keys()
    assert all(1 <= part <= min(size, max(parts.values())) for size, part in found.items())


SIZES_OF_BATCHES = [(1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64), (1, 3, 5, 16), (4,), (1, 2), (3, 6, 12, 24)]


@pytest.mark.parametrize("batch_sizes", SIZES_OF_BATCHES, ids=str)
def test_a_worker_with_one_core_needs_few_sizes_of_parts_and_computes_no_more_inputs(cores, batch_sizes):
    cores(2)
    for most in (1, 2, 4, 8, 16):
        parts = cpu_clients.parts_of(batch_sizes, most, 2)
        limit = max(parts.values())
        found = cpu_clients.parts_of_workers(parts, 2)
        for size, part in found.items():
            whole = min(size, limit)
            assert part in (whole, whole / 2)
        assert max(found.values()) == min(limit, max(batch_sizes))
    sizes = [{*cpu_clients.parts_of_workers({1: 1, 2: 1, 4: 2, 8: 4, 16: most}, 2).values()} for most in (4, 8, 16)]
    assert sizes == [{1, 4}, {1, 2, 8}, {1, 4, 16}]


# -- beside other engines -----------------------------------------------------------------------------------------------------


def measure(engine, beside, **options):
    return profiling.measure(
        engine, ACCURACIES, PROFILE.batch_sizes, device="fake", **{"repeats": 3, **options}, beside=beside
    )


def test_engines_beside_are_busy_during_the_measurement_and_stop_after_it():
    counts, measured, lock = [0, 0], [0], threading.Lock()
    warm_ups = 2 * len(PROFILE.rows) * len(PROFILE.batch_sizes)

    def busy(i):
        def on_run(*batch):
            with lock:
                counts[i] += 1
            time.sleep(1e-4)

        return on_run

    def on_run(*_):
        measured[0] += 1
        if measured[0] <= warm_ups:
            assert counts == [0, 0]
        else:  # both go on, as long as the measurement lasts
            before = list(counts)
            wait_until(lambda: all(now > then for now, then in zip(counts, before, strict=True)))

    beside = [fake(busy(i), name=f"fake:{i}") for i in range(2)]
    measure(fake(on_run), beside)
    assert measured[0] == warm_ups + 3 * len(PROFILE.rows) * len(PROFILE.batch_sizes)
    after = list(counts)
    time.sleep(0.01)
    assert counts == after


def test_engines_beside_run_every_subnet_and_batch_size():
    seen, enough = set(), len(PROFILE.rows) * len(PROFILE.batch_sizes)
    beside = fake(lambda subnet, size, inputs: seen.add((subnet, size, len(inputs))))
    calls = itertools.count()

    def on_run(*_):
        if next(calls) == 2 * enough:  # the first call after the warm-up
            wait_until(lambda: len(seen) == enough)

    measure(fake(on_run), [beside])
    assert seen == {(s, size, size) for s in SUBNETS for size in PROFILE.batch_sizes}


def test_an_error_of_an_engine_beside_is_raised_and_the_others_stop():
    failed, counts = threading.Event(), [0]

    def fail(*_):
        failed.set()
        raise RuntimeError("the device burns")

    def count(*_):
        counts[0] += 1

    warm_ups, calls = 2 * len(PROFILE.rows) * len(PROFILE.batch_sizes), itertools.count()
    with pytest.raises(RuntimeError, match="the device burns"):
        measure(fake(lambda *_: next(calls) < warm_ups or failed.wait(WAIT_S)), [fake(fail), fake(count)])
    after = counts[0]
    time.sleep(0.01)
    assert counts[0] == after


def test_an_error_of_the_measured_engine_stops_the_engines_beside():
    counts, calls = [0, 0], itertools.count()
    warm_ups = 2 * len(PROFILE.rows) * len(PROFILE.batch_sizes)

    def on_run(*_):
        if next(calls) > warm_ups:
            raise RuntimeError("bad luck")

    def busy(i):
        return lambda *_: counts.__setitem__(i, counts[i] + 1)

    with pytest.raises(RuntimeError, match="bad luck"):
        measure(fake(on_run), [fake(busy(i)) for i in range(2)])
    after = list(counts)
    time.sleep(0.01)
    assert counts == after


@pytest.mark.parametrize("profile", [PROFILE, Profile((1, 2, 4), rows_at={8: PROFILE.rows, 16: PROFILE.rows})])
def test_a_profile_that_is_measured_again_keeps_parts_and_workers(profile):
    profile = dataclasses.replace(profile, parts={4: 2}, cpu_workers=2)
    engine, *beside = several(3, profile=profile)
    again = profiling.measure_again(engine, profile, seconds=0.0, beside=beside)
    assert (again.parts, again.cpu_workers) == ({4: 2}, 2)
