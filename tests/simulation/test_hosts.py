"""Workers in other processes: round trips, early hand-over, and hosts that are silent before they are known to be lost."""

import numpy as np
import pytest
from policy_cases import PAPER, SLOWED, Always, make_profile, ms, simulate

from superserve_jax import errors
from superserve_jax.simulation import simulator, traces
from superserve_jax.simulation.cluster import Cluster, Outage

TEN = make_profile([(10.0, 10.0, 10.0)])  # every batch takes 10 ms


def serve(arrivals_ms, **options):
    return simulate(TEN, Always(0, 1), arrivals_ms, slo_ms=100.0, **options)


@pytest.mark.parametrize(
    ("lead_ms", "finish_ms"),
    [
        (0.0, [14, 28, 42]),  # each batch waits for the answer to the one before
        (1.0, [14, 27, 40]),
        (4.0, [14, 24, 34]),  # the next batch is there when the device is done
    ],
)
def test_an_early_hand_over_hides_the_round_trip(lead_ms, finish_ms):
    result = serve([0, 0, 0], round_trip_ms=4.0, lead_ms=lead_ms)
    assert ms(result.finish_s) == finish_ms


@pytest.mark.parametrize(
    ("trip_ms", "finish_ms"),
    [
        (4.0, [14, 24, 34, 44, 54, 64]),
        (30.0, [40, 50, 80, 90, 120, 130]),  # a third batch must wait for the first answer
    ],
)
def test_at_most_two_batches_are_under_way_to_one_worker(trip_ms, finish_ms):
    result = serve([0] * 6, round_trip_ms=trip_ms, lead_ms=trip_ms)
    starts, ends = ms(result.start_s), ms(result.finish_s)
    assert ends == finish_ms
    assert max(sum(s <= at < e for s, e in zip(starts, ends, strict=True)) for at in starts) == 2


def test_a_hidden_round_trip_costs_no_accuracy_and_an_open_one_does():
    trace = traces.gamma(rate_qps=0.8 * 8 * PAPER.throughput_qps(PAPER.rows[0].subnet), cv2=4, duration_s=2.0)
    accuracy = [
        simulator.simulate(PAPER, "slackfit", trace, cluster=Cluster(8, round_trip_ms=trip, lead_ms=lead)).mean_accuracy
        for trip, lead in ((0.0, 0.0), (2.5, 2.5), (2.5, 0.0))
    ]
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.001)
    assert accuracy[2] < accuracy[0] - 0.005


def test_a_silent_worker_answers_nothing_and_its_batch_is_given_back_late():
    # The first batch is lost at 5 ms. A second query finds the only other worker, which is idle.
    silent = Outage(0, 0.005, noticed_s=0.030)
    result = serve([0, 20], workers=2, outages=(silent,))
    assert (ms(result.start_s), result.worker.tolist()) == ([35, 20], [1, 1])
    at_once = serve([0, 20], workers=2, outages=(Outage(0, 0.005),))
    assert ms(at_once.start_s) == [5, 20]


def test_an_idle_worker_that_is_silent_still_gets_a_batch():
    result = serve([10], workers=1, outages=(Outage(0, 0.005, 0.060, noticed_s=0.020),))
    assert (ms(result.start_s), ms(result.finish_s)) == ([60], [70])


def test_batches_that_were_handed_over_early_are_given_back_as_well():
    result = serve([0, 0], round_trip_ms=4.0, lead_ms=4.0, outages=(Outage(0, 0.011, 0.050),))
    assert ms(result.start_s) == [50, 60]


def test_a_silent_worker_gets_at_most_two_batches():
    policy = Always(0, 1)
    silent = Outage(0, 0.005, 0.500, noticed_s=0.300)
    result = simulate(TEN, policy, [0] * 20, slo_ms=1000.0, round_trip_ms=4.0, lead_ms=4.0, outages=(silent,))
    assert sum(state.now_s < 0.3 for state in policy.states) == 2
    assert min(ms(result.start_s)) == 500


def test_queries_of_a_lost_worker_are_answered_late_unless_they_expire():
    silent = Outage(0, 0.005, noticed_s=0.150)
    late = serve([0], workers=2, outages=(silent,))
    assert (late.outcome.tolist(), ms(late.start_s)) == ([simulator.LATE], [155])
    assert serve([0], workers=2, outages=(silent,), expire=True).outcome.tolist() == [simulator.EXPIRED]
    known_at_once = serve([0] * 12, outages=(Outage(0, 0.115, 0.200),))  # while the last one runs, which is late already
    assert known_at_once.outcome[-1] == simulator.EXPIRED


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("noticed_s", [0.0, 0.15])
def test_every_query_has_one_outcome_when_a_host_is_lost(workers, noticed_s):
    trace = traces.gamma(rate_qps=8000.0, cv2=4, duration_s=1.0)
    outages = tuple(Outage(worker, 0.3, 0.8, noticed_s) for worker in range(workers // 2))
    cluster = Cluster(workers, outages=outages, round_trip_ms=1.0, lead_ms=1.0)
    result = simulator.simulate(SLOWED, "slackfit", trace, cluster=cluster)
    assert np.isfinite(result.finish_s[result.outcome <= simulator.LATE]).all()
    assert (result.finish_s[result.outcome <= simulator.LATE] > trace.arrivals_s[result.outcome <= simulator.LATE]).all()
    assert np.isinf(result.finish_s[result.outcome > simulator.LATE]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"round_trip_ms": 1.0, "lead_ms": 2.0}, "lead_ms=2 must be at most round_trip_ms=1"),
        ({"round_trip_ms": float("inf")}, "which must be finite"),
        ({"round_trip_ms": -1.0}, "round_trip_ms must be 0 or more, got -1"),
        ({"outages": (Outage(0, 1.0, 2.0, noticed_s=1.5),)}, "an outage must be noticed before it ends"),
    ],
)
def test_an_impossible_cluster_is_refused(wrong, message):
    with pytest.raises(errors.ConfigError, match=message):
        Cluster(**wrong)
