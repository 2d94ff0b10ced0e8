"""What the live page shows of each second: differences of the counters, percentiles, and the state of the workers."""

import copy
import json
import math

import fakes
import gateways
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax.gateway import sampling
from superserve_jax.gateway.model import ServedModel
from superserve_jax.gateway.sampling import KEEP_S, Sampler, gained, percentile, split
from superserve_jax.serving import telemetry

EDGES_S = list(telemetry.EDGES_S)
COLUMNS = ("accuracy", "batches", "met", "late", "busy_s")
WORKER = {"name": "gpu:0", "state": "idle"}


def snapshot(uptime_s=10.0, *, subnets=None, latencies=None, sizes=None, workers=(WORKER,), waiting=0, **queries):
    """A snapshot of a server, with zeros for what is not given. `latencies` counts by bucket."""
    names = ("arrived", "met", "late", "expired", "failed", "cancelled", "refused", "requeued")
    counts = [0] * (len(EDGES_S) + 1)
    for bucket, count in (latencies or {}).items():
        counts[bucket] = count
    return {
        "uptime_s": uptime_s,
        "waiting": waiting,
        "running": 0,
        "oldest_wait_s": 0.0,
        "queries": {**dict.fromkeys(names, 0), **queries},
        "subnets": {place: dict(zip(COLUMNS, of, strict=True)) for place, of in (subnets or {}).items()},
        "batch_sizes": sizes or {},
        "latency_s": {"edges": EDGES_S, "counts": counts, "sum": 0.0},
        "workers": list(workers),
    }


def test_a_sample_has_what_came_between_two_snapshots():
    subnets = {"0": (0.7, 2, 5, 1, 0.3), "2": (0.9, 1, 4, 0, 0.2)}
    before = snapshot(arrived=12, met=9, late=1, refused=1, subnets=subnets, sizes={"4": 3})
    more = {"0": (0.7, 4, 9, 3, 0.7), "1": (0.8, 1, 2, 0, 0.4), "2": (0.9, 1, 4, 0, 0.2)}
    now = snapshot(
        12.0, arrived=32, met=15, late=3, refused=2, expired=1, failed=1, subnets=more, sizes={"1": 1, "4": 5}, waiting=7
    )
    found = gained(before, now, slo_ms=36)
    assert (found["qps"], found["met"], found["late"], found["lost"], found["waiting"]) == (10.0, 6, 2, 3, 7)
    assert found["mix"] == {"0.7000": 6, "0.8000": 2}
    assert found["accuracy"] == pytest.approx((6 * 0.7 + 2 * 0.8) / 8, abs=1e-5)
    assert found["batch"] == 3.0  # a batch of 1, and two of 4
    assert found["busy"] == pytest.approx((0.4 + 0.4) / 2)


def test_a_second_without_queries_has_no_accuracy_and_no_latency():
    found = gained(snapshot(), snapshot(11.0), slo_ms=36)
    assert {name: found[name] for name in ("accuracy", "p50_ms", "p99_ms", "batch")} == dict.fromkeys(
        ("accuracy", "p50_ms", "p99_ms", "batch")
    )
    assert (found["qps"], found["mix"], found["busy"]) == (0.0, {}, 0.0)


def test_the_counters_of_subnets_start_again_with_a_swap():
    before = snapshot(met=100, subnets={"0": (0.7, 50, 100, 0, 5.0)})
    fewer = gained(before, snapshot(11.0, met=103, subnets={"0": (0.7, 1, 3, 0, 0.1)}), slo_ms=36)
    other = gained(before, snapshot(11.0, met=300, subnets={"0": (0.6, 90, 200, 0, 0.1)}), slo_ms=36)
    assert (fewer["mix"], other["mix"], other["accuracy"]) == ({"0.7000": 3}, {"0.6000": 200}, 0.6)


def test_subnets_of_one_accuracy_count_together():
    now = snapshot(11.0, subnets={"0": (0.70001, 1, 3, 0, 0.1), "4": (0.7, 1, 2, 2, 0.1)})
    assert gained(snapshot(), now, slo_ms=36)["mix"] == {"0.7000": 7}


def test_only_live_workers_count_as_busy():
    workers = ({**WORKER, "state": "running"}, {**WORKER, "state": "left"})
    now = snapshot(11.0, subnets={"0": (0.7, 1, 3, 0, 0.5)}, workers=workers)
    assert gained(snapshot(), now, slo_ms=36)["busy"] == 0.5


@pytest.mark.parametrize("late", [0, 1, 2, 10])
def test_the_percentile_is_above_the_slo_exactly_if_more_queries_were_late(late):
    """36 ms is inside a bucket of the histogram, from 25 to 40 ms."""
    bucket = EDGES_S.index(0.04)
    now = snapshot(11.0, met=100 - late, late=late, subnets={"0": (0.7, 9, 100 - late, late, 0)}, latencies={bucket: 100})
    assert (gained(snapshot(), now, slo_ms=36)["p99_ms"] > 36) == (late > 1)


COUNTS = st.lists(st.integers(0, 50), min_size=4, max_size=4)


@given(COUNTS, st.floats(1e-5, 0.1), st.integers(0, 300))
def test_a_split_keeps_all_times(counts, at_s, above):
    edges, found = split((0.001, 0.01, 0.05), counts, at_s=at_s, above=above)
    assert sum(found) == sum(counts)
    assert min(found) >= 0
    assert edges == sorted({0.001, 0.01, 0.05, at_s}) or at_s in (0.001, 0.01, 0.05)


@given(COUNTS.filter(any), st.floats(0.01, 1))
def test_a_percentile_is_in_the_bucket_of_its_query(counts, share):
    edges = (0.001, 0.01, 0.05)
    found, wanted = percentile(edges, counts, share), math.ceil(share * sum(counts) - 1e-9)
    bucket = int(np.searchsorted(np.cumsum(counts), wanted))
    lower, upper = ((0.0, *edges, edges[-1])[bucket], (*edges, edges[-1])[bucket])
    assert 1e3 * lower - 1e-2 <= found <= 1e3 * upper + 1e-2


# -- the sampler --------------------------------------------------------------------------------------------------------------


def events(server, **options):
    """A sampler, and a function that makes the next event."""
    models = {"a": ServedModel("a", server)}
    sampler = Sampler(models, clock=iter(range(10_000)).__next__, **options)
    return models, sampler, lambda: json.loads(sampler.step())


def test_the_first_event_describes_the_models_and_the_next_ones_only_add_a_sample():
    with fakes.serve(gateways.engine(), slo_ms=20) as server:
        _, sampler, step = events(server)
        first = step()
        assert first["about"]["models"] == {"a": {"slo_ms": 20.0, "accuracies": ["0.7000", "0.7500", "0.8000"]}}
        assert first["samples"] == [{"t": 0, "models": {}}]
        server.submit(np.zeros((2, 2), np.uint8)).result(fakes.WAIT_S)
        fakes.idle_worker(server)
        second = step()
        assert "about" not in second
        [sample] = second["samples"]
        assert sample["t"] == 1
        assert sum(sample["models"]["a"]["mix"].values()) == 1
        history = json.loads(sampler.history())
        assert history["samples"] == [*first["samples"], sample]
        assert history["now"] == second["now"]


def test_the_samples_of_five_minutes_are_kept():
    with fakes.serve(gateways.engine()) as server:
        _, sampler, step = events(server)
        for _ in range(KEEP_S + 20):
            step()
        kept = [sample["t"] for sample in json.loads(sampler.history())["samples"]]
        assert kept == list(range(20, KEEP_S + 20))


def test_a_model_that_comes_changes_the_description_and_has_a_sample_from_its_second_second_on():
    with fakes.serve(gateways.engine()) as one, fakes.serve(gateways.engine()) as other:
        models, _, step = events(one)
        step()
        step()
        models["b"] = ServedModel("b", other)
        event = step()
        assert [*event["about"]["models"]] == ["a", "b"]
        assert [*event["samples"][-1]["models"]] == ["a"]
        assert [*step()["samples"][-1]["models"]] == ["a", "b"]
        models["b"] = ServedModel("b", one)  # another server under the name
        assert [*step()["samples"][-1]["models"]] == ["a"]
        del models["b"]
        assert [*step()["about"]["models"]] == ["a"]


def test_the_health_of_workers_is_told():
    engines = [gateways.engine(fakes.fail, name="bad"), gateways.engine(name="good")]
    with fakes.serve(*engines, max_failures=1, max_tries=9) as server:
        _, _, step = events(server)
        step()

        def has_failed():
            server.submit(np.zeros((2, 2), np.uint8)).result(fakes.WAIT_S)
            return fakes.worker(server, "bad")["state"] == "left"

        fakes.wait_until(has_failed)
        now = step()["now"]["models"]["a"]
        assert now["ready"] is True
        bad, good = now["workers"]
        assert (bad["state"], bad["failures"], bad["bps"]) == ("left", 1, 0.0)
        assert "the device burns" in bad["error"]
        assert good["batches"] > 0 < good["bps"]
        server.close()
        assert step()["now"]["models"]["a"]["ready"] is False


def test_snapshots_are_not_changed():
    with fakes.serve(gateways.engine()) as server:
        before = server.snapshot()
        kept = copy.deepcopy(before)
        gained(before, server.snapshot(), slo_ms=36)
        assert before == kept
        assert sampling.KEEP_S == 300
