"""The counters of a server: no query is lost or counted twice, and snapshot and Prometheus show the same numbers.

One file because counters, snapshot and Prometheus must tell the same numbers.
"""

import gc
import itertools
import json
import math

import fakes
import prometheus_client
import pytest
from fakes import LONG_MS, PROFILE, SUBNETS, WAIT_S, Cramped, Gate, always, by_slack, held, serve, traffic, x
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import parser

from superserve_jax import errors
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision, SlackFit, State
from superserve_jax.serving import telemetry
from superserve_jax.serving.prometheus import Collector
from superserve_jax.serving.telemetry import Histogram

OUTCOMES = ("met", "late", "expired", "failed", "cancelled", "refused")


def counted(snapshot):
    """The outcomes that are not 0."""
    return {name: n for name, n in snapshot["queries"].items() if n and name in OUTCOMES}


def consistent(snapshot):
    """Asserts the invariants of a snapshot of a server without abandoned workers. Returns the snapshot."""
    queries, subnets = snapshot["queries"], snapshot["subnets"].values()
    assert queries["arrived"] == sum(queries[o] for o in OUTCOMES) + snapshot["waiting"] + snapshot["running"]
    for outcome in ("met", "late"):
        assert queries[outcome] == sum(s[outcome] for s in subnets)
    batches = sum(s["batches"] for s in subnets)
    assert batches == sum(snapshot["batch_sizes"].values()) == sum(snapshot["reasons"].values())
    assert batches == sum(snapshot["slack_s"]["counts"])
    assert snapshot["batch_busy_s"].keys() == snapshot["batch_sizes"].keys()
    assert sum(snapshot["batch_busy_s"].values()) == pytest.approx(sum(s["busy_s"] for s in subnets))
    assert (snapshot["last_batch_s"] is None) == (batches == 0)
    answered = queries["met"] + queries["late"]
    assert answered == sum(snapshot["latency_s"]["counts"]) == sum(snapshot["wait_s"]["counts"])
    assert json.loads(json.dumps(snapshot)) == snapshot
    return snapshot


# -- what becomes of queries --------------------------------------------------------------------------------------------------


def test_nothing_is_counted_before_anything_has_happened():
    with serve() as s:
        snapshot = consistent(s.snapshot())
    assert not any(snapshot["queries"].values())
    assert snapshot["oldest_wait_s"] == 0


def test_answers_are_counted_by_outcome_subnet_batch_size_and_reason():
    def choose(profile, state):
        return Decision(SUBNETS[2], 4, reason="whim") if state.waiting > 2 else Decision(SUBNETS[0], 4)

    with held(policy=choose) as (s, gate, _):
        late = s.submit_many(x([1, 2]), slo_ms=1e-3)
        in_time = s.submit_many(x(range(3, 7)))
        gate.opened.set()
        fakes.outcomes([*late, *in_time])
    snapshot = consistent(s.snapshot())
    assert counted(snapshot) == {"met": 5, "late": 2}
    assert {k: [v[n] for n in ("accuracy", "batches", "met", "late")] for k, v in snapshot["subnets"].items()} == {
        "0": [0.7, 2, 3, 0],
        "2": [0.8, 1, 2, 2],
    }
    assert snapshot["batch_sizes"] == {"1": 1, "2": 1, "3": 0, "4": 1}
    assert snapshot["reasons"] == {"": 2, "whim": 1}
    assert snapshot["slack_s"]["counts"][0] == 1  # one batch began with a late query
    assert [w["batches"] for w in snapshot["workers"]] == [3]


def test_refused_queries_have_arrived_too():
    with held(max_queue=2) as (s, gate, _):
        s.submit_many(x([1, 2]))
        with pytest.raises(errors.QueueFullError):
            s.submit_many(x([3, 4, 5]))
        assert counted(consistent(s.snapshot())) == {"refused": 3}
        gate.opened.set()
    with pytest.raises(errors.ServerClosedError):
        s.submit(x(6))
    assert counted(consistent(s.snapshot())) == {"met": 3, "refused": 4}


def test_cancelled_queries_are_counted_whether_they_waited_or_ran():
    with held(policy=always(0, batch=1)) as (s, gate, running):
        waiting = s.submit_many(x(range(1, 6)))
        assert running.cancel()  # its answer is dropped
        assert waiting[1].cancel()
        gate.opened.set()
        [f.result(WAIT_S) for f in waiting if not f.cancelled()]
    assert counted(consistent(s.snapshot())) == {"met": 4, "cancelled": 2}


def test_a_query_that_is_cancelled_before_its_batch_runs_out_of_memory_is_not_requeued():
    gate = Gate(then=Cramped(2))
    with serve(fakes.fake(gate)) as s:
        futures = s.submit_many(x(range(4)))
        with gate.holding():
            assert futures.pop(1).cancel()
        assert fakes.outcomes(futures) == [0, 2, 3]
    snapshot = consistent(s.snapshot())
    assert counted(snapshot) == {"met": 3, "cancelled": 1}
    assert snapshot["queries"]["requeued"] == 3


def test_every_snapshot_amid_traffic_is_consistent_and_no_counter_falls():
    slos_ms = itertools.cycle((1e-3, 20.0, LONG_MS))

    def submit():
        fakes.outcomes(s.submit_many(x(range(20)), slo_ms=next(slos_ms)))

    with serve(*fakes.several(3), policy=by_slack) as s, traffic(submit, clients=2):
        before = s.snapshot()
        while before["queries"]["arrived"] < 5000 or not before["queries"]["late"]:
            snapshot = consistent(s.snapshot())
            assert snapshot["queries"]["cancelled"] == 0  # which is what is left over
            assert all(n >= before["queries"][name] for name, n in snapshot["queries"].items())
            before = snapshot
    last = consistent(s.snapshot())
    assert (last["waiting"], last["running"]) == (0, 0)


def test_the_oldest_wait_belongs_to_the_earliest_query_not_to_the_head():
    now_s = [0.0]
    with held(clock=lambda: now_s[0]) as (s, _, _):
        now_s[0] = 1.0
        s.submit(x(1))
        now_s[0] = 1.5
        s.submit(x(2), slo_ms=1.0)
        now_s[0] = 3.0
        snapshot = s.snapshot()
    assert (snapshot["waiting"], snapshot["running"], snapshot["uptime_s"]) == (2, 1, 3.0)
    assert snapshot["oldest_wait_s"] == 2.0


def test_the_last_batch_and_the_time_of_the_batches_of_each_size_are_known():
    now_s = [0.0]

    def run(subnet, batch_size, inputs):
        now_s[0] += len(inputs)

    with serve(fakes.fake(run), clock=lambda: now_s[0]) as s:
        assert s.snapshot()["last_batch_s"] is None
        for count in (3, 1, 3):
            fakes.outcomes(s.submit_many(x(range(count))))
            fakes.idle_worker(s)
        now_s[0] += 5.0
        snapshot = consistent(s.snapshot())
    assert snapshot["batch_busy_s"] == {"1": 1.0, "2": 0.0, "3": 6.0, "4": 0.0}
    assert snapshot["last_batch_s"] == 5.0


# -- histograms ---------------------------------------------------------------------------------------------------------------


@given(
    times_s=st.lists(st.floats(0, 100) | st.sampled_from(telemetry.EDGES_S), min_size=1, max_size=30),
    end_s=st.floats(0, 1e6) | st.just(0.0),
)
def test_a_time_is_counted_in_the_first_bucket_whose_edge_it_does_not_exceed(times_s, end_s):
    starts_s = sorted(end_s - t for t in times_s)
    together, singly = Histogram(telemetry.EDGES_S), Histogram(telemetry.EDGES_S)
    together.add_since(starts_s, end_s, sum(starts_s))
    expected = [0] * (len(telemetry.EDGES_S) + 1)
    for time_s in (end_s - s for s in starts_s):
        singly.add(time_s)
        expected[sum(time_s > edge for edge in telemetry.EDGES_S)] += 1
    assert together.counts == singly.counts == expected
    assert together.total == pytest.approx(singly.total, abs=1e-6)


def test_the_edges_of_times_ascend_five_to_a_decade():
    assert telemetry.EDGES_S[0] == 1e-4
    assert len(telemetry.EDGES_S) == 25
    for low, high in itertools.pairwise(telemetry.EDGES_S):
        assert high / low == pytest.approx(10**0.2, rel=0.02)


# -- reasons ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("best", {}),
        ("slack", {"slack_ms": 2.5}),
        ("late", {"late": 1}),
        ("risk", {"rate_qps": 500.0, "variance_qps": 1e6}),
        ("guard", {"slack_ms": 1.05}),
        ("short", {"slack_ms": 1.5, "waiting": 2, "workers": 8}),
        ("lost", {"slack_ms": 0.5}),
    ],
)
def test_slackfit_says_by_which_of_its_rules_it_decided(reason, state):
    state = State(**{"now_s": 0.0, "slack_ms": 30.0, "waiting": 1, "workers": 1, **state})
    assert SlackFit(PROFILE)(PROFILE, state).reason == reason
    assert reason in policies.REASONS


@pytest.mark.parametrize("name", [*policies.NAMES, "fixed:1"])
def test_every_policy_says_whether_the_head_is_lost(name):
    policy = policies.create(name, PROFILE)
    reasons = [policy(PROFILE, State(0.0, slack_ms, 1)).reason for slack_ms in (1e-3, 30.0)]
    assert reasons in (["lost", "slack"], ["lost", "best"])


def test_a_batch_that_ran_on_another_subnet_than_decided_since_its_head_asks_for_more_says_so():
    with serve(policy="fixed:0") as s:
        assert s.submit(x(1), min_accuracy=0.8).result(WAIT_S).subnet == SUBNETS[2]
    assert s.snapshot()["reasons"] == {"floor": 1}


# -- Prometheus ---------------------------------------------------------------------------------------------------------------


def scraped(registry):
    """Samples by name and labels (in the order of the labels' names), out of the text that Prometheus reads."""
    families = parser.text_string_to_metric_families(prometheus_client.generate_latest(registry).decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_prometheus_reads_the_numbers_of_the_snapshot():
    registry = prometheus_client.CollectorRegistry()
    with serve(policy=by_slack) as s:
        registry.register(Collector(s))
        fakes.outcomes(f for slo_ms in (1e-3, LONG_MS) for f in s.submit_many(x(range(9)), slo_ms=slo_ms))
        s.close()
        with pytest.raises(errors.ServerClosedError):
            s.submit(x(0))
        samples, snapshot = scraped(registry), s.snapshot()
    queries = snapshot["queries"]
    assert samples["superserve_arrivals_total",] == queries["arrived"] == 19
    assert {o: samples["superserve_queries_total", o] for o in OUTCOMES} == {o: queries[o] for o in OUTCOMES}
    for subnet, counts in snapshot["subnets"].items():
        assert [samples["superserve_answers_total", o, subnet] for o in ("met", "late")] == [counts["met"], counts["late"]]
        assert samples["superserve_busy_seconds_total", subnet] == pytest.approx(counts["busy_s"])
    for name in ("latency", "wait", "slack"):
        histogram = snapshot[f"{name}_s"]
        cumulative = list(itertools.accumulate(histogram["counts"]))
        buckets = [
            (float(le), n)
            for (metric, *le), n in samples.items()
            if metric == f"superserve_{name}_seconds_bucket"
            for le in le
        ]
        assert [n for _, n in buckets] == cumulative
        assert [le for le, _ in buckets] == [*histogram["edges"], math.inf]
        assert samples[f"superserve_{name}_seconds_count",] == cumulative[-1]
        assert samples[f"superserve_{name}_seconds_sum",] == pytest.approx(histogram["sum"])
    assert samples["superserve_batch_size_sum",] == 18
    assert samples["superserve_batch_size_bucket", "+Inf"] == samples["superserve_dispatches_total", ""]
    assert samples["superserve_workers", "left"] == 1
    assert samples["superserve_worker_batches_total", "fake:0"] == samples["superserve_batch_size_count",]


def test_a_registry_does_not_keep_an_unused_server_alive():
    registry = prometheus_client.CollectorRegistry()
    s = serve()
    registry.register(Collector(s))
    assert scraped(registry)
    del s
    gc.collect()
    assert not scraped(registry)
