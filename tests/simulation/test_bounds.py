import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import policies
from superserve_jax.simulation import bounds, paper_profile, simulator, traces
from superserve_jax.simulation.cluster import Cluster
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

PAPER = paper_profile.paper_profile()
# At batch 1, a worker carries 100 queries/s on the first subnet and 25 on the second.
TWO = Profile((1,), (Row(Subnet((1, 0)), 0.7, (10.0,)), Row(Subnet((1, 1)), 0.8, (40.0,))))


def fluid_of_40(slo_ms, seconds=1.0, floors=0.0):
    """The bound of 40 queries on one worker. The last deadline is at `seconds`, so they are 40 / seconds queries/s."""
    trace = Trace(np.linspace(0.0, seconds - slo_ms / 1e3, 40), slo_ms, floors)
    bound = bounds.fluid(TWO, trace, workers=1)
    return bound.attainment, bound.accuracy


def test_the_fluid_bound_mixes_two_subnets_so_that_the_workers_just_carry_the_rate():
    # Half of 40 queries/s at 10 ms and half at 40 ms keep one worker busy for 20 * 0.01 + 20 * 0.04 = 1 s.
    assert fluid_of_40(50.0) == pytest.approx((1.0, 0.75))


def test_a_low_rate_is_bounded_by_the_best_subnet_and_a_rate_beyond_capacity_by_the_fastest():
    assert fluid_of_40(50.0, seconds=2.0) == pytest.approx((1.0, 0.8))
    assert fluid_of_40(50.0, seconds=0.1) == pytest.approx((0.25, 0.7))


def test_a_subnet_that_is_slower_than_the_slo_does_not_count():
    assert fluid_of_40(39.0, seconds=2.0) == pytest.approx((1.0, 0.7))
    assert fluid_of_40(9.0) == pytest.approx((0.0, math.nan), nan_ok=True)


def test_a_floor_spends_the_workers_on_the_queries_that_have_it():
    assert fluid_of_40(50.0, floors=np.where(np.arange(40) % 4, 0.0, 0.8)) == pytest.approx((1.0, 0.75))
    # If all 40 queries have the floor, 25 can be served.
    assert fluid_of_40(50.0, floors=0.8) == pytest.approx((25 / 40, 0.8))


@pytest.mark.parametrize("arrivals_ms", [[0.0], [1.0], [0.0, 0.0], [0.0, 1.0]])
def test_the_bound_lets_the_last_queries_finish_after_the_last_arrival(arrivals_ms):
    trace = Trace(np.array(arrivals_ms) / 1e3)
    result = simulator.simulate(PAPER, "fixed:largest", trace, cluster=Cluster(workers=1))
    assert (result.attainment, result.mean_accuracy) == (1.0, pytest.approx(PAPER.rows[-1].accuracy))
    bound = bounds.fluid(PAPER, trace, workers=1)
    assert bound.attainment == pytest.approx(1.0)
    assert bound.accuracy >= result.mean_accuracy - 1e-9


@settings(deadline=None, max_examples=15)
@given(
    policy=st.sampled_from(["slackfit", "slackfit-paper", "max-batch", "fixed:2"]),
    burst_qps=st.floats(500.0, 6000.0),
    seed=st.integers(0, 9),
)
def test_no_policy_beats_the_bound(policy, burst_qps, seed):
    profile = PAPER.scaled(1.9)
    trace = traces.bursty(burst_qps=burst_qps, cv2=2.0, duration_s=2.0, seed=seed)
    result = simulator.simulate(profile, policy, trace)
    bound = bounds.fluid(profile, trace)
    assert result.attainment <= bound.attainment + 1e-9
    # Compared as the sum over all queries, since a policy may buy accuracy with attainment.
    if bound.attainment > 1 - 1e-6:
        least = PAPER.rows[0].accuracy
        gained = result.attainment * (result.mean_accuracy - least)
        assert gained <= bound.accuracy - least + 1e-6


def test_the_number_of_workers_must_be_positive():
    with pytest.raises(errors.ConfigError, match="workers"):
        bounds.fluid(PAPER, Trace(np.zeros(1)), workers=0)


def test_a_trace_without_queries_has_no_accuracy_to_bound():
    bound = bounds.fluid(PAPER, Trace(np.zeros(0)))
    assert (bound.attainment, math.isnan(bound.accuracy)) == (1.0, True)


THREE = Profile(
    (1, 2, 4),
    tuple(
        Row(Subnet((2, i)), accuracy, latency_ms)
        for i, (accuracy, latency_ms) in enumerate([(0.7, (2.0, 3.0, 4.0)), (0.76, (4.0, 6.0, 9.0)), (0.8, (6.0, 9.0, 15.0))])
    ),
)


def small_trace(seed, n=20, rate_qps=700.0, slo_ms=20.0):
    gaps_ms = np.random.default_rng(seed).gamma(0.25, 4e3 / rate_qps, n)
    return Trace(np.rint(np.cumsum(gaps_ms)) / 1e3, slo_ms)


def served(policy, trace, workers=2):
    """The paper's objective per query, and the simulation result."""
    result = simulator.simulate(THREE, policy, trace, cluster=Cluster(workers=workers))
    return (result.attainment * result.mean_accuracy if result.attainment else 0.0), result


def by_trying_everything(profile, trace, workers):
    """The optimum by listing all schedules: every choice of batches, their subnets, workers and order."""
    arrivals, deadlines = 1e3 * trace.arrivals_s, 1e3 * trace.deadlines_s
    floors = np.broadcast_to(trace.floors, arrivals.shape)

    def best(left, free_ms):
        result = 0.0
        for k in range(1, min(len(left), profile.max_batch) + 1):
            for batch in itertools.combinations(left, k):
                rest = tuple(i for i in left if i not in batch)
                for row, worker in itertools.product(profile.rows, range(workers)):
                    end_ms = max(free_ms[worker], max(arrivals[i] for i in batch)) + profile.latency_ms(row.subnet, k)
                    if all(end_ms <= deadlines[i] + 1e-9 and floors[i] <= row.accuracy for i in batch):
                        free = (*free_ms[:worker], end_ms, *free_ms[worker + 1 :])
                        result = max(result, k * row.accuracy + best(rest, free))
        return result

    return best(tuple(range(len(arrivals))), (0.0,) * workers) / len(arrivals)


def test_the_optimum_equals_an_example_worked_out_by_hand():
    # One worker, SLO 8 ms. Queries arrive at 0, 3 and 12 ms. The first runs on the best subnet from 0 to 6 ms, the second on
    # the middle subnet from 6 to 10 ms. A batch of both would start at 3 ms and have to end by 8 ms, which only the fastest
    # subnet can do. The third has time for the best subnet.
    best = bounds.optimum(THREE, Trace(np.array([0.0, 3.0, 12.0]) / 1e3, 8.0), workers=1)
    assert (best.value, best.attainment) == (pytest.approx((0.8 + 0.76 + 0.8) / 3), 1.0)
    # If a batch could start at its first arrival, the best subnet could run these two from 0 to 9 ms.
    assert bounds.optimum(THREE, Trace(np.array([0.0, 2.0]) / 1e3, 9.0), workers=1).value == pytest.approx(0.78)
    assert bounds.optimum(THREE, Trace(np.zeros(2), 2.0), workers=1).attainment == 0.5
    assert bounds.optimum(THREE, Trace(np.zeros(2), 1.0), workers=1).value == 0.0


@settings(deadline=None, max_examples=15)
@given(
    arrivals_ms=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    slo_ms=st.lists(st.integers(2, 16), min_size=4, max_size=4),
    floors=st.lists(st.sampled_from([0.0, 0.0, 0.76]), min_size=4, max_size=4),
    workers=st.integers(1, 2),
)
def test_the_optimum_is_what_trying_everything_finds(arrivals_ms, slo_ms, floors, workers):
    n = len(arrivals_ms)
    trace = Trace(np.sort(arrivals_ms) / 1e3, np.array(slo_ms[:n], float), np.array(floors[:n]))
    assert bounds.optimum(THREE, trace, workers=workers).value == pytest.approx(by_trying_everything(THREE, trace, workers))


@pytest.fixture(scope="module")
def regrets():
    """For each policy, its regret on each of five small traces, in points of accuracy per query."""
    small = [small_trace(seed) for seed in range(5)]
    best = [bounds.optimum(THREE, trace).value for trace in small]
    return {
        name: 100 * np.array([b - served(name, trace)[0] for b, trace in zip(best, small, strict=True)])
        for name in policies.NAMES
    }


def test_no_policy_beats_the_optimum(regrets):
    for name, regret in regrets.items():
        assert (regret >= -1e-4).all(), name


def test_the_regret_of_each_policy_against_the_optimum(regrets):
    # On so few queries SlackFit's reserves cost accuracy and save nothing.
    assert {name: float(regret.mean()) for name, regret in regrets.items()} == pytest.approx(
        {
            "slackfit": 1.80,
            "slackfit-paper": 1.04,
            "slackfit-cumulative": 1.10,
            "max-acc": 4.66,
            "max-batch": 1.10,
            "least-accurate": 9.60,
            "fixed:smallest": 9.60,
            "fixed:largest": 12.40,
            "proteus": 6.48,
        },
        abs=0.01,
    )


def test_times_that_are_no_multiples_of_a_tick_and_a_search_that_takes_too_long_are_errors():
    with pytest.raises(errors.ConfigError, match="tick_ms"):
        bounds.optimum(THREE, Trace(np.array([0.0005]), 9.0))
    with pytest.raises(errors.SuperServeError, match="fewer queries"):
        bounds.optimum(THREE, small_trace(0, n=40), limit_s=0.01)
    assert bounds.optimum(THREE, Trace(np.zeros(0))).attainment == 1.0
