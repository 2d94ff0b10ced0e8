"""The counters of a server for Prometheus, through prometheus-client (`pip install 'superserve-jax[prometheus]'`). No jax.

    import prometheus_client
    import superserve_jax as ss
    from superserve_jax.serving import prometheus

    with ss.Server("runs/demo/export") as server:
        prometheus_client.REGISTRY.register(prometheus.Collector(server))
        prometheus_client.start_http_server(9000)  # http://localhost:9000/metrics
        ...

The server does no work for this until Prometheus scrapes it. Two example queries, SLO attainment over the last minute and the
99th percentile of the latency:

    sum(rate(superserve_queries_total{outcome="met"}[1m])) / sum(rate(superserve_arrivals_total[1m]))
    histogram_quantile(0.99, rate(superserve_latency_seconds_bucket[1m]))
"""

import collections
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import core, registry

from superserve_jax.serving.server import Server

_OUTCOMES = ("met", "late", "expired", "failed", "cancelled", "refused")
_STATES = ("idle", "deciding", "running", "answering", "left", "abandoned", "removed")


class Collector(registry.Collector):
    """Turns `Server.snapshot` into metrics. Without the server, once it is garbage collected, there are no metrics.

    A registry takes one collector. So give each server of a process its own `CollectorRegistry`.

    Args:
      served: the server.
    """

    def __init__(self, served: Server):
        self._server = weakref.ref(served)  # a registry lives as long as the process, and must not keep the server alive

    def collect(self) -> Iterator[core.Metric]:
        """All metrics, from one snapshot."""
        served = self._server()
        if served is not None:
            yield from metrics(served.snapshot())


def metrics(snapshot: dict[str, Any]) -> Iterator[core.Metric]:
    """The metrics of a snapshot.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> from superserve_jax.serving import telemetry
    >>> counted = telemetry.Counters(paper_profile()).snapshot(unanswered=0)
    >>> now = {"uptime_s": 1.0, "waiting": 3, "running": 0, "oldest_wait_s": 0.02, "workers": []}
    >>> {m.name: m for m in metrics({**now, **counted})}["superserve_oldest_wait_seconds"].samples[0].value
    0.02
    """
    queries, subnets, workers = snapshot["queries"], snapshot["subnets"], snapshot["workers"]
    counter, gauge = core.CounterMetricFamily, core.GaugeMetricFamily
    yield counter("superserve_arrivals", "Queries submitted.", queries["arrived"])
    yield _family(counter, "queries", "Queries by outcome.", "outcome", {o: queries[o] for o in _OUTCOMES})
    yield counter("superserve_requeues", "Queries put back into the queue.", queries["requeued"])
    yield gauge("superserve_waiting", "Queries in the queue.", snapshot["waiting"])
    yield gauge("superserve_running", "Queries in a batch that runs.", snapshot["running"])
    yield gauge("superserve_oldest_wait_seconds", "Waiting time of the oldest waiting query.", snapshot["oldest_wait_s"])

    answers = counter("superserve_answers", "Queries answered by a subnet.", labels=["subnet", "outcome"])
    for subnet, counts in subnets.items():
        for outcome in ("met", "late"):
            answers.add_metric([subnet, outcome], counts[outcome])
    yield answers
    busy_s = {subnet: counts["busy_s"] for subnet, counts in subnets.items()}
    yield _family(counter, "busy_seconds", "Time of a subnet's batches.", "subnet", busy_s)
    yield _family(counter, "dispatches", "Batches answered, by the policy's reason.", "reason", snapshot["reasons"])
    accuracies = {subnet: counts["accuracy"] for subnet, counts in subnets.items()}
    yield _family(gauge, "subnet_accuracy", "Profiled accuracy, a fraction of 1.", "subnet", accuracies)

    yield _histogram("latency_seconds", "From submit until the answer.", snapshot["latency_s"])
    yield _histogram("wait_seconds", "From submit until the batch started.", snapshot["wait_s"])
    yield _histogram("slack_seconds", "From batch start to its first deadline; 0 if late.", snapshot["slack_s"])
    sizes = snapshot["batch_sizes"]
    yield core.HistogramMetricFamily(
        "superserve_batch_size",
        "Queries in a batch.",
        buckets=_cumulative(list(sizes), [*sizes.values(), 0]),
        sum_value=sum(int(size) * count for size, count in sizes.items()),
    )

    states = collections.Counter(worker["state"] for worker in workers)
    yield _family(gauge, "workers", "Workers by state.", "state", {state: states[state] for state in _STATES})
    batches = {worker["name"]: worker["batches"] for worker in workers}
    yield _family(counter, "worker_batches", "Batches that a worker answered.", "worker", batches)
    failures = {worker["name"]: worker["failures"] for worker in workers}
    yield _family(counter, "worker_failures", "Batches that failed on a worker.", "worker", failures)
    out = {worker["name"]: len(worker["out_of_service"]) for worker in workers}
    yield _family(gauge, "worker_subnets_out_of_service", "Subnets whose outputs are not finite.", "worker", out)


def _family(make: Callable[..., Any], name: str, text: str, label: str, values: Mapping[str, float]) -> core.Metric:
    family = make(f"superserve_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, histogram: dict[str, Any]) -> core.Metric:
    buckets = _cumulative(histogram["edges"], histogram["counts"])
    return core.HistogramMetricFamily(f"superserve_{name}", text, buckets=buckets, sum_value=histogram["sum"])


def _cumulative(edges: list[Any], counts: list[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: each counts all values up to its edge."""
    return list(zip([*map(str, edges), "+Inf"], itertools.accumulate(counts), strict=True))
