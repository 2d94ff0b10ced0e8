"""Measures the router at its limit: the real queue, policy, threads and futures of the server, with engines that only sleep.

One file because the four kinds of client share the server, the measurement and the table.

    python serve/bench/router.py                                   33,000 queries/s, 32 workers as fast as the recalled GPUs
    python serve/bench/router.py --rate 100000 --speed 4
    python serve/bench/router.py --clients blocking --callers 1000 --speed 16
    python serve/bench/router.py --clients await --callers 1000 --speed 16
    python serve/bench/router.py --clients bulk --callers 1000 --speed 16

Arrivals are open loop by default: every millisecond, a generator in this process submits all queries that are due, however
late the answers are. The other clients are closed loops:
- blocking: --callers threads, each with one query at a time.
- await: --callers tasks of one event loop, each with one query at a time.
- bulk: one thread that submits --callers inputs in one `submit_many`, and waits for all answers.
The router's CPU time is the CPU time of the process minus the engines' and the generator's. It includes `submit`, which
runs in the client's thread. serve/bench/stages.py measures the stages of a query between submit and result.
The engines sleep as long as `simulation.paper_profile` says. It recalls the paper's GPUs: from memory, unverified, about twice
the paper's throughput.
Library: serving.server.Server, engines.fake.FakeEngine, simulation.paper_profile, loadtest.loadgen, simulation.traces,
serving.runtime.
"""

import array
import asyncio
import collections
import contextlib
import dataclasses
import gc
import os
import pathlib
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal
from unittest import mock

import numpy as np

from superserve_jax import cli, errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import loadgen
from superserve_jax.loadtest.loadgen import Submission
from superserve_jax.scheduling import dispatch
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server
from superserve_jax.simulation import paper_profile, traces

X = np.zeros((), np.float32)
PERCENTILES = (50, 99)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      rate: the queries per second of the open loop.
      seconds: the length of the traffic.
      workers: the number of workers, with one engine each.
      speed: how many times faster the engines are than the recalled GPUs; with inf they do not sleep at all.
      slo_ms: the latency objectives; each gets an equal share of the queries. Closed loops use only the first one.
      policy: the policy's name.
      cv2: squared coefficient of variation of the gaps between arrivals; 1 is Poisson.
      clients: the kind of clients, see above.
      callers: the number of threads or tasks of a closed loop; with bulk, the number of inputs in one call.
      cpus: the number of CPUs that the process may use, if the system can limit it; if left out, all.
      seed: the seed of the arrivals.
      json: write the figures to this file.
    """

    rate: float = 33_000.0
    seconds: float = 10.0
    workers: int = 32
    speed: float = 1.0
    slo_ms: tuple[float, ...] = (36.0,)
    policy: str = "slackfit"
    cv2: float = 1.0
    clients: Literal["open", "blocking", "await", "bulk"] = "open"
    callers: int = 1000
    cpus: int | None = None
    seed: int = 0
    json: pathlib.Path | None = None

    def __post_init__(self):
        if not self.slo_ms:
            raise errors.ConfigError("slo_ms is empty; give at least one, such as 36")
        cli.check_above_zero(self, "rate", "seconds", "workers", "speed", "callers")


class Engine(FakeEngine):
    """A sleeping engine that counts its batches, queries and CPU time. Waking up and counting cost CPU time."""

    batches, queries, cpu_ns = 0, 0, 0

    def run(self, subnet: Any, batch_size: int, inputs: list[np.ndarray]) -> list[tuple[Any, int]]:
        """See `engines.base.Engine.run`."""
        start_ns = time.thread_time_ns()
        outputs = super().run(subnet, batch_size, inputs)
        self.batches += 1
        self.queries += len(inputs)
        self.cpu_ns += time.thread_time_ns() - start_ns
        return outputs


class Submitter:
    """Passes queries from the generator to the server, and counts the CPU time of `submit_many`."""

    def __init__(self, target: Server):
        self.cpu_ns = 0
        self._target = target

    def submit_many(self, xs: list[np.ndarray], **options: Any) -> list[Future]:
        """See `serving.server.Server.submit_many`."""
        start_ns = time.thread_time_ns()
        try:
            return self._target.submit_many(xs, **options)
        finally:
            self.cpu_ns += time.thread_time_ns() - start_ns


class Usage:
    """Measures, while open, `cpu_ns` and `seconds` of the process, `switches` of threads, and `pauses_ms` of the collector."""

    def __enter__(self) -> "Usage":
        self.pauses_ms = [0.0]
        gc.callbacks.append(self._on_collection)
        self._switches, self._start_ns, self._start_s = switches(), time.process_time_ns(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_ns = time.process_time_ns() - self._start_ns
        self.seconds = time.perf_counter() - self._start_s
        self.switches = switches() - self._switches
        gc.callbacks.remove(self._on_collection)

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._paused_s = time.perf_counter()
        else:
            self.pauses_ms.append(1e3 * (time.perf_counter() - self._paused_s))


class Tally:
    """Sums over queries: how many `met` their deadlines, the `accuracy` of these, and `latencies_ms` of all answers."""

    def __init__(self):
        self.queries, self.met, self.accuracy, self.latencies_ms = 0, 0, 0.0, array.array("d")

    def add(self, answers: Iterable[Future]) -> None:
        """Counts queries. A query without an answer has missed its deadline."""
        for future in answers:
            self.queries += 1
            if not future.done() or future.exception(0) is not None:
                continue
            reply = future.result(0)
            self.latencies_ms.append(reply.latency_ms)
            if reply.met_slo:
                self.met += 1
                self.accuracy += reply.accuracy


def switches() -> int:
    """The number of context switches of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nvcsw + usage.ru_nivcsw


@contextlib.contextmanager
def timed_decisions() -> Iterator[array.array]:
    """Measures, while open, the microseconds of each decision: the state, the policy, and taking the batch."""
    times_us, decide = array.array("d"), dispatch.next_batch

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        taken = decide(*args, **options)
        times_us.append(1e6 * (time.perf_counter() - start))
        return taken

    with mock.patch.object(dispatch, "next_batch", timed):
        yield times_us


def open_loop(options: Options, target: Server) -> dict[str, Any]:
    """Submits the arrivals of a trace. Returns the figures of the generator and of the queries."""
    trace = traces.gamma(rate_qps=options.rate, cv2=options.cv2, duration_s=options.seconds, seed=options.seed)
    trace = trace.mixed(slo_ms=dict.fromkeys(options.slo_ms, 1.0), seed=options.seed)
    submitter, tally, lateness_s = Submitter(target), Tally(), np.empty(len(trace))
    waiting: collections.deque[Submission] = collections.deque()
    wait_s = 1e-3 * max(options.slo_ms) + 5e-3
    blocks = []  # allocated memory blocks after a quarter of the queries, and at the end
    start_ns, used = time.thread_time_ns(), Usage()
    with used:
        for sent in loadgen.submit_when_due(submitter, trace, [X] * len(trace)):
            lateness_s[sent.places] = sent.now_s - trace.arrivals_s[sent.places]
            waiting.append(sent)
            while waiting[0].now_s < sent.now_s - wait_s:  # answered or missed by now; kept, they would look like a leak
                done = waiting.popleft()
                tally.add(done.answers or [Future()] * len(done.places))
            if not blocks and sent.places[-1] >= len(trace) // 4:
                blocks.append(sys.getallocatedblocks())
        own_ns = time.thread_time_ns() - start_ns - submitter.cpu_ns
    blocks.append(sys.getallocatedblocks())
    time.sleep(wait_s)
    for sent in waiting:
        tally.add(sent.answers or [Future()] * len(sent.places))
    return {
        **figures(tally, used, own_ns),
        "submit_us_per_query": submitter.cpu_ns / len(trace) / 1e3,
        "generator_us_per_query": own_ns / len(trace) / 1e3,
        "lateness_ms": percentiles(1e3 * lateness_s),
        "blocks_grown": blocks[-1] - blocks[0],
    }


def blocking(options: Options, target: Server) -> dict[str, Any]:
    """Threads that each ask one query after another."""
    tallies = [Tally() for _ in range(options.callers)]
    ready, end_s = threading.Barrier(options.callers + 1), [0.0]

    def ask(tally: Tally) -> None:
        ready.wait()
        while time.monotonic() < end_s[0]:
            future = target.submit(X, slo_ms=options.slo_ms[0])
            future.exception()
            tally.add((future,))

    threads = [threading.Thread(target=ask, args=(tally,), daemon=True) for tally in tallies]
    for thread in threads:
        thread.start()
    end_s[0] = time.monotonic() + options.seconds
    with Usage() as used:
        ready.wait()
        for thread in threads:
            thread.join()
    return figures(merged(tallies), used, 0)


def awaiting(options: Options, target: Server) -> dict[str, Any]:
    """Tasks of one event loop that each ask one query after another."""
    tally = Tally()

    async def ask(end_s: float) -> None:
        while time.monotonic() < end_s:
            future = target.submit(X, slo_ms=options.slo_ms[0])
            await future
            tally.add((future,))

    async def ask_all() -> None:
        end_s = time.monotonic() + options.seconds
        await asyncio.gather(*(ask(end_s) for _ in range(options.callers)))

    with Usage() as used:
        asyncio.run(ask_all())
    return figures(tally, used, 0)


def bulk(options: Options, target: Server) -> dict[str, Any]:
    """One thread that submits many inputs in one call, waits for all answers, and begins again."""
    tally, end_s = Tally(), time.monotonic() + options.seconds
    with Usage() as used:
        while time.monotonic() < end_s:
            answers = target.submit_many([X] * options.callers, slo_ms=options.slo_ms[0])
            for future in answers:
                future.exception()
            tally.add(answers)
    return figures(tally, used, 0)


CLIENTS = {"open": open_loop, "blocking": blocking, "await": awaiting, "bulk": bulk}


def merged(tallies: Iterable[Tally]) -> Tally:
    """The sum of several tallies."""
    total = Tally()
    for tally in tallies:
        total.queries += tally.queries
        total.met += tally.met
        total.accuracy += tally.accuracy
        total.latencies_ms.extend(tally.latencies_ms)
    return total


def figures(tally: Tally, used: Usage, own_ns: int) -> dict[str, Any]:
    """The figures that all clients have."""
    return {
        "queries": tally.queries,
        "rate": tally.queries / used.seconds,
        "attainment": tally.met / tally.queries,
        "accuracy": tally.accuracy / tally.met if tally.met else float("nan"),
        "latency_ms": percentiles(tally.latencies_ms),
        "cpus_busy": used.cpu_ns / 1e9 / used.seconds,
        "process_us_per_query": used.cpu_ns / tally.queries / 1e3,
        "cpu_us_per_query": (used.cpu_ns - own_ns) / tally.queries / 1e3,  # `measure` subtracts the engines' share
        "switches_per_query": used.switches / tally.queries,
        "collections": len(used.pauses_ms) - 1,
        "longest_collection_ms": max(used.pauses_ms),
    }


def percentiles(values: Any) -> dict[str, float]:
    """p50, p99 and the largest."""
    if not len(values):
        return {}
    return {**{f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}, "max": float(np.max(values))}


def measure(options: Options) -> dict[str, Any]:
    """The figures that the program prints."""
    profile = paper_profile.paper_profile()
    engines = [Engine(profile, name=f"fake:{i}", speed=options.speed) for i in range(options.workers)]
    scaled = profile if options.speed == float("inf") else profile.scaled(1 / options.speed)
    with (
        timed_decisions() as decisions_us,
        Server.from_engines(engines, scaled, policy=options.policy, max_queue=1_000_000) as target,
    ):
        found = CLIENTS[options.clients](options, target)
        target.close(drain=False)
    engine_us = sum(e.cpu_ns for e in engines) / found["queries"] / 1e3
    return {
        **found,
        "cpu_us_per_query": found["cpu_us_per_query"] - engine_us,
        "engine_us_per_query": engine_us,
        "batch": sum(e.queries for e in engines) / sum(e.batches for e in engines),
        "decision_us": percentiles(decisions_us),
    }


def report(options: Options, found: dict[str, Any]) -> None:
    """Prints the figures of a measurement."""
    offered = (
        f"{options.rate:,.0f} queries/s offered"
        if options.clients == "open"
        else f"closed loop '{options.clients}' with {options.callers} callers"
    )
    print(f"{offered}, {options.workers} workers x{options.speed:g}, {options.policy}, {os.cpu_count()} CPUs")
    print(f"  attainment       {100 * found['attainment']:.3f} % of {found['queries']:,} queries, at {found['rate']:,.0f}/s")
    print(f"  accuracy         {100 * found['accuracy']:.2f} %, batches of {found['batch']:.1f}")
    print(
        f"  router's CPU     {found['cpu_us_per_query']:.2f} us per query; engines {found['engine_us_per_query']:.2f}, "
        f"whole process {found['process_us_per_query']:.2f} ({found['cpus_busy']:.2f} CPUs busy on average)"
    )
    if options.clients == "open":
        print(f"  submit alone     {found['submit_us_per_query']:.2f} us per query")
        print(
            f"  generator's CPU  {found['generator_us_per_query']:.2f} us per query; late by {_shown(found['lateness_ms'])} ms"
        )
    print(f"  decision         {_shown(found['decision_us'])} us")
    print(f"  latency          {_shown(found['latency_ms'])} ms")
    print(f"  thread switches  {found['switches_per_query']:.3f} per query")
    print(f"  GC runs          {found['collections']}, the longest {found['longest_collection_ms']:.2f} ms")
    if options.clients == "open":
        print(f"  memory blocks    {found['blocks_grown']:+,} from a quarter of the queries to the end")


def _shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    if options.cpus is not None:
        if not hasattr(os, "sched_setaffinity") or not 0 < options.cpus <= len(os.sched_getaffinity(0)):
            raise errors.ConfigError(
                f"cpus={options.cpus}: this system cannot limit the process to that number of CPUs; leave it out"
            )
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
    found = measure(options)
    report(options, found)
    cli.write_results(options.json, found)


if __name__ == "__main__":
    cli.run(main)
