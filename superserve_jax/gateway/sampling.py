"""What servers did in each of the last 300 seconds, as the live page shows it. No sockets, no thread.

`Sampler.step` compares the server's counters with those of a second ago. It is called once a second, however many pages are
open. A sample becomes JSON once, and every page gets the same bytes. An event is one of

    {"samples": [SAMPLE], "now": NOW}                  each second
    {"about": ABOUT, "samples": [SAMPLE, ...], "now": NOW}    for a new page, and if the models or their accuracies change

Values are by name of the model: SAMPLE is {"t": Unix time, "models": {NAME: what `gained` returns}}.
"""

import bisect
import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from superserve_jax.gateway.model import ServedModel

KEEP_S = 300
"""Number of seconds, and of samples, that are kept."""
_LOST = ("expired", "failed", "refused")
_MAX_TEXT = 300  # characters of a worker's error


class Sampler:
    """Makes the samples and keeps them.

    Args:
      models: the models by name. It is read at each step, so models may come and go.
      demo: returns the state of the demo's traffic, by model; None if there is no demo.
      clock: the time of day in seconds.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        demo: Callable[[], dict[str, Any]] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._models, self._demo, self._clock = models, demo, clock
        self._before: dict[str, tuple[ServedModel, dict[str, Any]]] = {}
        self._samples: collections.deque[bytes] = collections.deque(maxlen=KEEP_S)
        self._about: dict[str, Any] = {}
        self._now: dict[str, Any] = {}

    def step(self) -> bytes:
        """Takes a sample, and returns the event for the pages that are open."""
        snapshots = {name: (model, model.server.snapshot()) for name, model in [*self._models.items()]}
        found = {}
        for name, (model, snapshot) in snapshots.items():
            before = self._before.get(name)
            if before is not None and before[0] is model and snapshot["uptime_s"] > before[1]["uptime_s"]:
                found[name] = gained(before[1], snapshot, slo_ms=model.server.slo_ms)
        sample = msgspec.json.encode({"t": round(self._clock(), 3), "models": found})
        self._samples.append(sample)
        told = {name: _state(model, snapshot, self._before.get(name)) for name, (model, snapshot) in snapshots.items()}
        self._now = {"models": told, "demo": None if self._demo is None else self._demo()}
        about = {name: _description(model, snapshot) for name, (model, snapshot) in snapshots.items()}
        self._before, changed, self._about = snapshots, about != self._about, about
        return self.history() if changed else self._event((sample,))

    def history(self) -> bytes:
        """The event for a new page."""
        return self._event(self._samples, {"keep_s": KEEP_S, "models": self._about})

    def _event(self, samples: Sequence[bytes] | collections.deque[bytes], about: dict[str, Any] | None = None) -> bytes:
        event = {"samples": msgspec.Raw(b"[" + b",".join(samples) + b"]"), "now": self._now}
        return msgspec.json.encode(event if about is None else {"about": about, **event})


def gained(before: Mapping[str, Any], now: Mapping[str, Any], *, slo_ms: float) -> dict[str, Any]:
    """What happened between two snapshots of a server (see `Server.snapshot`), and the queue at the second one.

    Args:
      before, now: the snapshots.
      slo_ms: the server's SLO.

    Returns a dict:

    - `qps`: queries that arrived per second.
    - `met`, `late`, `lost`: numbers of queries that were answered in time and late, and that expired, failed or were refused.
    - `accuracy`: mean accuracy of the answers, a fraction of 1; None without answers.
    - `mix`: number of answers by accuracy of the subnet, such as {"0.9379": 12}. So it stays right after a swap.
    - `p50_ms`, `p99_ms`: percentiles of the latency; None without answers. `batch`: mean queries in a batch; None without one.
    - `busy`: the share of the time in which the workers ran a batch.
    - `waiting`, `running`: numbers of queries. `oldest_ms`: how long the oldest query has waited.
    """
    seconds = now["uptime_s"] - before["uptime_s"]
    queries = {name: now["queries"][name] - before["queries"][name] for name in ("arrived", "met", "late", *_LOST)}
    mix: dict[str, int] = {}
    busy_s, total = 0.0, 0.0
    for place, counts in now["subnets"].items():
        old = before["subnets"].get(place)
        if old is None or old["accuracy"] != counts["accuracy"] or old["batches"] > counts["batches"]:
            old = {"met": 0, "late": 0, "busy_s": 0.0}  # it had no batch before, or a swap has started new counters
        busy_s += counts["busy_s"] - old["busy_s"]
        if answers := counts["met"] + counts["late"] - old["met"] - old["late"]:
            key = _key(counts["accuracy"])
            mix[key] = mix.get(key, 0) + answers
            total += answers * counts["accuracy"]
    sizes = _by_key(now["batch_sizes"], before["batch_sizes"])
    batches, answered = sum(sizes.values()), sum(mix.values())
    latencies = [new - old for new, old in zip(now["latency_s"]["counts"], before["latency_s"]["counts"], strict=True)]
    histogram = split(now["latency_s"]["edges"], latencies, at_s=1e-3 * slo_ms, above=queries["late"])
    alive = sum(worker["state"] not in ("left", "lost", "abandoned", "removed") for worker in now["workers"])
    return {
        "qps": round(queries["arrived"] / seconds, 1),
        "met": queries["met"],
        "late": queries["late"],
        "lost": sum(queries[name] for name in _LOST),
        "accuracy": round(total / answered, 5) if answered else None,
        "mix": mix,
        "p50_ms": percentile(*histogram, 0.5),
        "p99_ms": percentile(*histogram, 0.99),
        "batch": round(sum(int(size) * count for size, count in sizes.items()) / batches, 2) if batches else None,
        "busy": round(min(busy_s / (seconds * max(alive, 1)), 1.0), 3),
        "waiting": now["waiting"],
        "running": now["running"],
        "oldest_ms": round(1e3 * now["oldest_wait_s"], 1),
    }


def split(edges_s: Sequence[float], counts: Sequence[int], *, at_s: float, above: int) -> tuple[list[float], list[int]]:
    """Divides the bucket of the SLO at the SLO, since the number of late answers is known.

    So the 99th percentile is above the SLO exactly if more than 1 % of the answers were late. That holds for queries with the
    server's SLO. Answers with another one may be counted on the wrong side, within this bucket.

    Args:
      edges_s, counts: the histogram, see `percentile`.
      at_s: the SLO.
      above: number of times above it.

    >>> split((0.025, 0.04), (5, 10, 2), at_s=0.036, above=3)
    ([0.025, 0.036, 0.04], [5, 9, 1, 2])
    """
    place = bisect.bisect_left(edges_s, at_s)
    upper = min(max(above - sum(counts[place + 1 :]), 0), counts[place])
    return [*edges_s[:place], at_s, *edges_s[place:]], [*counts[:place], counts[place] - upper, upper, *counts[place + 1 :]]


def percentile(edges_s: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The percentile of a histogram of times, in milliseconds. None for an empty one.

    The times in a bucket count as evenly spaced, as in Prometheus. Times above the last edge count as that edge.

    Args:
      edges_s: upper edges of the buckets, in seconds.
      counts: number of times in each bucket, with one more entry for longer times.
      share: 0.99 for the 99th percentile.

    >>> percentile((0.001, 0.002), (0, 10, 0), 0.5), percentile((0.001,), (0, 3), 0.5), percentile((0.001,), (0, 0), 0.5)
    (1.5, 1.0, None)
    """
    if not (total := sum(counts)):
        return None
    wanted, below, lower = share * total, 0, 0.0
    for edge, count in zip(edges_s, counts, strict=False):
        if count and below + count >= wanted:
            return round(1e3 * (lower + (edge - lower) * (wanted - below) / count), 3)
        below, lower = below + count, edge
    return 1e3 * edges_s[-1]


def _description(model: ServedModel, snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """The SLO, and the accuracies of the subnets, as the keys of `mix`."""
    known = {row.accuracy for profile in model.server.profiles for row in profile.rows}
    ran = {counts["accuracy"] for counts in snapshot["subnets"].values()}  # also of a worker that was added later
    return {"slo_ms": model.server.slo_ms, "accuracies": sorted({_key(accuracy) for accuracy in known | ran})}


def _state(
    model: ServedModel, snapshot: Mapping[str, Any], before: tuple[ServedModel, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Whether the model is ready, and the health of its workers."""
    batches = {} if before is None else {worker["name"]: worker["batches"] for worker in before[1]["workers"]}
    seconds = 0.0 if before is None else snapshot["uptime_s"] - before[1]["uptime_s"]
    workers = [
        {
            "name": worker["name"],
            "state": worker["state"],
            "batches": worker["batches"],
            "bps": round((worker["batches"] - batches.get(worker["name"], 0)) / seconds, 1) if seconds > 0 else 0.0,
            "failures": worker["failures"],
            "slowdown": round(worker["slowdown"], 2),
            "max_batch": worker["max_batch"],
            "out": len(worker["out_of_service"]),
            "running_s": round(worker["running_s"], 2),
            "error": None if worker["last_error"] is None else worker["last_error"][:_MAX_TEXT],
        }
        for worker in snapshot["workers"]
    ]
    return {"ready": model.is_ready(), "workers": workers}


def _key(accuracy: float) -> str:
    return f"{accuracy:.4f}"


def _by_key(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {key: count - before.get(key, 0) for key, count in now.items()}
