"""Workers that are slower than their profile, or than one another."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import PAPER, Always

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling import dispatch
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import SlackFit
from superserve_jax.scheduling.queue import DeadlineQueue
from superserve_jax.scheduling.speeds import Fleet, Pace, SlowdownEstimate
from superserve_jax.simulation import simulator, traces
from superserve_jax.simulation.cluster import Cluster, Outage, Slowdown, Stall

TIMES_MS = st.floats(0.5, 50.0)


def observed(*ratios, profiled_ms=10.0):
    estimate = SlowdownEstimate()
    for ratio in ratios:
        estimate.observe(profiled_ms, profiled_ms * ratio)
    return estimate.slowdown


def simulate(profiles, trace, seed=0, **cluster):
    workers = 8 if isinstance(profiles, Profile) else len(profiles)
    return simulator.simulate(profiles, "slackfit", trace, cluster=Cluster(workers=workers, **cluster), seed=seed)


@settings(deadline=None)
@given(st.floats(1.1, 7.0), TIMES_MS)
def test_the_estimate_follows_a_device_that_becomes_slower_and_recovers(factor, profiled_ms):
    estimate = SlowdownEstimate()
    batches = math.ceil(1000 / min(profiled_ms, 10.0))
    for _ in range(batches):
        estimate.observe(profiled_ms, factor * profiled_ms)
    assert estimate.slowdown == pytest.approx(factor, rel=0.02)
    for _ in range(batches):
        estimate.observe(profiled_ms, profiled_ms)
    assert estimate.slowdown == 1.0


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), max_size=200), TIMES_MS)
def test_the_estimate_is_never_below_1_nor_above_8(ratios, profiled_ms):
    assert 1.0 <= observed(*ratios, profiled_ms=profiled_ms) <= 8.0 + 1e-9


@settings(deadline=None)
@given(TIMES_MS)
def test_one_extreme_batch_hardly_moves_the_estimate(profiled_ms):
    assert observed(*[1.0] * 20, 50.0, profiled_ms=profiled_ms) == 1.0
    calm, stalled, hurried = (observed(*[1.5] * 200, *last, profiled_ms=profiled_ms) for last in ((), (50.0,), (0.0,)))
    assert 0.96 * calm < hurried <= calm <= stalled < 1.04 * calm


def test_noise_alone_does_not_count_as_a_slowdown():
    ratios = np.exp(0.1 * np.random.default_rng(0).standard_normal(2000))
    estimate, seen = SlowdownEstimate(), []
    for ratio in ratios:
        estimate.observe(10.0, 10.0 * ratio)
        seen.append(estimate.slowdown)
    assert np.mean(np.array(seen) == 1.0) > 0.9
    assert max(seen) < 1.15


def test_a_worker_that_left_counts_for_nothing_until_it_comes_back():
    fleet = Fleet([PAPER, PAPER.scaled(0.5), PAPER])
    assert fleet.pace(0) == (4.0, 1.0, 2.0)
    fleet.leave(1)
    assert fleet.pace(0) == (2.0, 1.0, 1.0)
    fleet.come_back(1)
    assert fleet.pace(1) == (2.0, 1.0, 1.0)


def test_equally_slow_workers_count_as_equal_workers_also_after_one_was_away():
    fleet = Fleet([PAPER] * 3)
    for worker in range(3):
        for _ in range(200):
            fleet.observe(worker, 10.0, 20.0)
    paces = [fleet.pace(worker) for worker in range(3)]  # a worker's speed is updated when it asks
    assert paces[2] == pytest.approx((3.0, 2.0, 1.0), rel=0.01)
    assert [fleet.slowdown(i) for i in range(len(paces))] == [pace.slowdown for pace in paces]
    fleet.leave(1)
    fleet.come_back(1)
    assert fleet.pace(2) == paces[2]
    assert Fleet([PAPER], correct=False).pace(0) == Pace()


deadlines = st.lists(st.floats(0.0, 0.09), min_size=1, max_size=60)


@settings(deadline=None)
@given(deadlines, st.floats(-0.01, 0.03), st.sampled_from([2.0, 4.0]), st.integers(1, 9))
def test_a_slow_device_is_served_like_a_device_with_a_slow_profile(deadlines, now_s, factor, workers):
    def decided(profile, slowdown):
        waiting, meter = DeadlineQueue(), ArrivalMeter()
        for t in range(10):
            meter.read(now_s - 0.3 + 0.03 * t, t**3)
        for i, deadline_s in enumerate(deadlines):
            waiting.push(deadline_s, i)
        waiting.pushed += 1000
        meter.shorten(now_s, 36.0)
        pace = Pace(workers, slowdown)
        row, items, _ = dispatch.next_batch(Turn(waiting, meter, SlackFit(profile), profile, pace), now_s)
        return row.subnet, items, waiting.late

    assert decided(PAPER, factor) == decided(PAPER.scaled(factor), 1.0)


def test_on_a_slow_device_the_state_has_shorter_times_and_higher_rates_and_no_other_change():
    policy, late = Always(0, 1, defer_ms=7.0), []
    for slowdown in (1.0, 2.0):
        waiting, meter = DeadlineQueue(), ArrivalMeter()
        for t in range(5):
            meter.read(0.03 * t, 10 * t**2)
        meter.shorten(0.15, 36.0)
        for i in range(250):
            waiting.push(0.16 + 1e-3 * i, i)
        dispatch.next_batch(Turn(waiting, meter, policy, PAPER, Pace(3.0, slowdown), None, 1), 0.15)
        late.append(waiting.late)
    plain, slowed = policy.states
    doubled = {"rate_qps": 2 * plain.rate_qps, "variance_qps": 2 * plain.variance_qps}
    assert slowed == plain._replace(slack_ms=plain.slack_ms / 2, slo_ms=18.0, **doubled)
    assert 0 < plain.rate_qps < plain.variance_qps
    assert (plain.near, late) == (27, [0, 4])


def test_deadlines_are_met_after_all_devices_slow_down():
    trace = traces.bursty(cv2=4.0, burst_qps=4900.0, duration_s=8.0)
    profile, slowed = PAPER.scaled(1.3), (Slowdown(1.5, from_s=4.0),)
    followed, ignored = (simulate(profile, trace, slowdowns=slowed, follow_drift=f) for f in (True, False))
    after = trace.arrivals_s >= 4.5
    met = [float((r.outcome[after] == simulator.MET).mean()) for r in (followed, ignored)]
    assert met[0] > 0.998 > 0.9 > met[1]


def test_deadlines_are_met_after_two_of_eight_devices_slow_down():
    trace = traces.bursty(cv2=4.0, burst_qps=4000.0, duration_s=4.0)
    slowed = tuple(Slowdown(2.0, from_s=1.0, worker=w) for w in (0, 1))
    followed, ignored = (simulate(PAPER.scaled(1.3), trace, slowdowns=slowed, follow_drift=f) for f in (True, False))
    assert followed.attainment > 0.99 > ignored.attainment + 0.03


@pytest.mark.parametrize("cluster", [{}, {"stalls": (Stall(1.0, 1.2),), "outages": (Outage(3, 0.5, 1.5),)}])
def test_without_slowdowns_following_them_changes_nothing(cluster):
    trace = traces.bursty(duration_s=3.0)
    followed, ignored = (simulate(PAPER, trace, follow_drift=f, **cluster) for f in (True, False))
    for name in ("finish_s", "accuracy", "worker"):
        np.testing.assert_array_equal(getattr(followed, name), getattr(ignored, name))


@pytest.mark.parametrize("cv2", [1.0, 4.0])
@pytest.mark.parametrize(("slowdowns", "load"), [((1.0, 3.0), 0.7), ((1.0, 1.0, 3.0, 3.0), 0.7), ((*[1.0] * 7, 3.0), 0.85)])
def test_devices_that_differ_threefold_meet_the_deadlines_together(slowdowns, load, cv2):
    profiles = [PAPER.scaled(slowdown) for slowdown in slowdowns]
    rate_qps = load * sum(p.throughput_qps(p.rows[0].subnet) for p in profiles)
    trace = traces.gamma(rate_qps=rate_qps, cv2=cv2, duration_s=4.0)
    result = simulate(profiles, trace)
    assert result.attainment > 0.997
    assert result.mean_accuracy > PAPER.rows[0].accuracy + 0.003
    assert set(result.worker) == set(range(len(profiles)))


def test_a_slow_worker_leaves_queries_that_only_the_fast_one_can_save():
    fast, slow = PAPER, PAPER.scaled(10.0)
    urgent_s = 1e-3 * fast.rows[0].latency_ms[-1] * 2
    waiting = DeadlineQueue()
    for i in range(40):
        waiting.push(urgent_s if i < 20 else 1.0, i)
    fleet = Fleet([fast, slow])
    _, items, _ = dispatch.next_batch(Turn(waiting, ArrivalMeter(), SlackFit(slow), slow, fleet.pace(1), None, 1), 0.0)
    assert items[0] == 20
    assert waiting.late == 0
    assert waiting.drain() == [i for i in range(40) if i not in items]


def test_a_slow_worker_takes_queries_that_nobody_can_save():
    waiting = DeadlineQueue()
    for i in range(20):
        waiting.push(-1.0, i)
    slow = PAPER.scaled(3.0)
    pace = Fleet([PAPER, slow]).pace(1)
    _, items, _ = dispatch.next_batch(Turn(waiting, ArrivalMeter(), SlackFit(slow), slow, pace, None, 1), 0.0)
    assert items == list(range(16))


@pytest.mark.parametrize("slow", [(0.0, 1.0), (2.0, 1.0, 0.5), (2.0, 1.0, 2.0, 8), (math.inf, 0.0)])
def test_an_impossible_slowdown_is_refused(slow):
    with pytest.raises(errors.ConfigError, match="Slowdown"):
        Cluster(slowdowns=(Slowdown(*slow),))


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("happens", ["emptied", "others_taken", "earlier", "later"])
def test_the_queue_may_change_while_a_slow_worker_decides(call, happens):
    """The first call decides about all queries. The second leaves out the ones that the fast worker can save."""
    fast, slow = PAPER, PAPER.scaled(10.0)
    urgent_s = 1e-3 * fast.rows[0].latency_ms[-1] * 2
    waiting, gone, calls = DeadlineQueue(), [], []
    deadlines_s = {i: urgent_s if i < 5 else 1.0 for i in range(10)}
    for i, deadline_s in deadlines_s.items():
        waiting.push(deadline_s, i)

    def decide(policy, profile, state):
        calls.append(state.waiting)
        decided = dispatch.decide(policy, profile, state)
        if len(calls) == call:
            if happens == "emptied":
                gone.extend(waiting.drain())
            elif happens == "others_taken":
                for i in waiting.drain():
                    if i < 5:
                        waiting.push(urgent_s, i)
                    else:
                        gone.append(i)
            else:
                deadlines_s[10] = urgent_s / 2 if happens == "earlier" else 2.0
                waiting.push(deadlines_s[10], 10)
        return decided

    turn = Turn(waiting, ArrivalMeter(), SlackFit(slow), slow, Fleet([fast, slow]).pace(1), None, 1, decide)
    _, items, _ = dispatch.next_batch(turn, 0.0)
    assert len(calls) >= call
    left = waiting.drain()
    assert sorted([*gone, *items, *left]) == sorted(deadlines_s)  # none lost, none twice
    assert left == sorted(left, key=lambda i: (deadlines_s[i], i))
