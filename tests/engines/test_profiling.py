"""Latency profiles of a fake engine, and the three properties that SlackFit builds on."""

import dataclasses
import threading
import time
import types

import numpy as np
import pytest
from policy_cases import make_profile

from superserve_jax.engines import profiling
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.profile import Profile
from superserve_jax.serving import server


def test_a_good_profile_has_all_three_properties():
    for p in profiling.properties(make_profile([(1.0, 1.5, 2.5), (3.0, 5.0, 8.0)])):
        assert p.holding == p.of > 0
        assert p.worst > 1


def test_breaches_of_a_property_are_counted_with_the_worst_case():
    p1, p2, p3 = profiling.properties(make_profile([(1.0, 0.8, 2.0), (0.9, 1.6, 4.0)]))
    assert (p1.holding, p1.of, p1.worst) == (3, 4, pytest.approx(0.8))
    assert (p2.holding, p2.of, p2.worst) == (2, 3, pytest.approx(0.9))
    # In 0.9 ms the fastest subnet computes a batch of 2 (0.8 ms). In 1.6 ms it computes no larger batch.
    assert (p3.holding, p3.of, p3.worst) == (1, 2, pytest.approx(1.0))


TWO = make_profile([(1.0, 2.0), (2.0, 4.0)], batch_sizes=(1, 2))


@pytest.fixture
def exact_sleep(monkeypatch):
    """A clock on which nothing but sleeping takes time. On a busy machine a real sleep may take several times as long."""
    now_s = [0.0]

    def sleep(seconds):
        now_s[0] += seconds

    clock = types.SimpleNamespace(perf_counter=lambda: now_s[0], monotonic=lambda: now_s[0], sleep=sleep)
    monkeypatch.setattr(profiling, "time", clock)
    monkeypatch.setattr("superserve_jax.engines.fake.time", clock)


@pytest.mark.parametrize("profile", [TWO, Profile((1, 2), rows_at={8: TWO.rows, 16: TWO.scaled(4.0).rows})])
@pytest.mark.usefixtures("exact_sleep")
def test_latencies_are_measured_for_every_subnet_batch_size_and_length(profile):
    fake = FakeEngine(profile, input_shape=(16,) if profile.lengths else (), input_dtype=np.int32)
    measured = profiling.measure(fake, {r.subnet: r.accuracy for r in profile.rows}, (1, 2), device="fake", repeats=3)
    assert measured.lengths == profile.lengths
    for table, true in zip(measured.each_length, profile.each_length, strict=True):
        for row, expected in zip(table.rows, true.rows, strict=True):
            assert row.latency_ms == pytest.approx(expected.latency_ms)
            assert row.p99_ms == pytest.approx(expected.latency_ms)


class Staging(FakeDevice):
    """A device whose host takes 0.8 ms to stage a batch."""

    def launch(self, *batch):
        profiling.time.sleep(0.8e-3)
        return super().launch(*batch)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.usefixtures("exact_sleep")
def test_the_latency_of_a_device_that_overlaps_is_its_own_time(overlap):
    fake = Staging(TWO)
    fake.overlap = overlap
    measured = profiling.measure(fake, {r.subnet: r.accuracy for r in TWO.rows}, (1, 2), device="fake", repeats=3)
    for row, expected in zip(measured.rows, TWO.rows, strict=True):
        assert row.latency_ms == pytest.approx([ms + (0 if overlap else 0.8) for ms in expected.latency_ms])


@pytest.mark.usefixtures("exact_sleep")
def test_a_profile_is_measured_again_with_its_subnets_and_settings():
    space = Profile((1, 2), TWO.rows, "fake", slicing="in_call", compute_dtype="bfloat16")
    again = profiling.measure_again(FakeEngine(space, speed=0.5), space, seconds=0.0)
    assert [r.subnet for r in again.rows] == [r.subnet for r in space.rows]
    assert (again.device, again.slicing, again.envelopes) == ("fake", "in_call", space.envelopes)
    assert again.compute_dtype == "bfloat16"
    assert profiling.slower(again, space) == pytest.approx(2.0)


def test_the_expected_time_of_a_measurement_counts_the_least_rounds_and_the_warm_up():
    slow = TWO.scaled(3.0)  # one round takes 27 ms
    engine = FakeEngine(slow)
    start_s = time.perf_counter()
    profiling.measure_again(engine, slow, seconds=0.01)
    took_s = time.perf_counter() - start_s
    assert profiling.measuring_s(engine, slow, 0.01) == pytest.approx(5 * 0.027)
    assert took_s >= 5 * 0.027
    assert profiling.measuring_s(engine, slow, 1.0) == pytest.approx(1.0 + 2 * 0.027)


def test_one_disturbed_latency_is_not_a_slower_machine():
    rows = [dataclasses.replace(r, latency_ms=(r.latency_ms[0], 9 * r.latency_ms[1])) for r in TWO.rows[:1]]
    assert profiling.slower(Profile((1, 2), (*rows, *TWO.rows[1:])), TWO) == pytest.approx(1.0)
    by_length = Profile((1, 2), rows_at={8: TWO.rows, 16: TWO.scaled(4.0).rows})
    assert profiling.slower(by_length.scaled(1.2), by_length) == pytest.approx(1.2)


def test_background_traffic_runs_during_the_measurement_only():
    others = threading.enumerate()  # servers of earlier tests may still end

    def names():
        return {t.name for t in threading.enumerate() if t.name.startswith("superserve") and t not in others}

    table, seen = make_profile([(1.0, 2.0)], batch_sizes=(1, 2)), []
    fake = FakeEngine(table, on_run=lambda *_: seen.append(names()))
    accuracies = {r.subnet: r.accuracy for r in table.rows}
    for load in (False, True):
        seen.clear()
        profiling.measure(
            fake, accuracies, (1, 2), device="fake", repeats=3, background=server.background_traffic if load else None
        )
        beside = {"superserve-traffic", "superserve-fake:0", "superserve-watchdog"} if load else set()
        assert seen == [set()] * 4 + [beside] * 6  # two warm-ups of each, then three rounds
    assert names() == set()
