"""Measures the time of a query between submit and result, stage by stage.

    python serve/bench/stages.py
    python serve/bench/stages.py --policy max-batch --rounds 5000

There are one client, one worker, and an engine that does not sleep. First single queries are measured, then full batches.
The server is the real one. Public functions at the borders of the stages are wrapped to note the time. All times are
wall-clock times, since in the two longest stages a thread waits to wake up.
Library: serving.server.Server, serving.pool.Pool, scheduling.dispatch, engines.fake, simulation.paper_profile.
"""

import dataclasses
import functools
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from superserve_jax import cli
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.scheduling import dispatch
from superserve_jax.serving.futures import Query
from superserve_jax.serving.options import make_policy
from superserve_jax.serving.pool import Pool
from superserve_jax.serving.server import Server
from superserve_jax.simulation import paper_profile

X = np.zeros((), np.float32)
STAMPS = ("submit", "admit", "admitted", "decide", "policy", "decided", "taken", "engine", "computed", "resolved", "result")
STAGES = (
    "check inputs, make futures",
    "lock, push into the queue, wake a worker",
    "the worker wakes up",
    "state of the queue",
    "policy",
    "take the batch",
    "hand over to the engine",
    "engine (does not sleep)",
    "make replies, resolve futures",
    "the client wakes up",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      policy: the policy's name.
      rounds: the number of measurements; the program prints medians.
      json: write the figures to this file.
    """

    policy: str = "slackfit"
    rounds: int = 2000
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "rounds")


class Stamps:
    """The times, in nanoseconds, at which each border was last crossed."""

    def __init__(self):
        self.at_ns: dict[str, int] = {}

    def around(self, fn: Callable[..., Any], before: str | None, after: str | None = None) -> Callable[..., Any]:
        """Wraps `fn`, to note when it is entered (as `before`) and when it is left (as `after`)."""

        @functools.wraps(fn)
        def stamped(*args: Any, **kwargs: Any) -> Any:
            if before:
                self.at_ns[before] = time.perf_counter_ns()
            result = fn(*args, **kwargs)
            if after:
                self.at_ns[after] = time.perf_counter_ns()
            return result

        return stamped

    def stages_us(self) -> list[float]:
        """Microseconds between each two neighbours in `STAMPS`."""
        return [(self.at_ns[b] - self.at_ns[a]) / 1e3 for a, b in itertools.pairwise(STAMPS)]


def measure(options: Options, size: int) -> dict[str, float]:
    """Median microseconds of each stage, and of all, for `size` queries submitted in one call to an idle worker."""
    profile, stamps, rounds = paper_profile.paper_profile(), Stamps(), []
    device = FakeEngine(profile, speed=float("inf"))
    policy = stamps.around(make_policy(options.policy, profile), "policy", "decided")

    def ask(target: Server) -> None:
        target.submit_many([X] * size)[-1].exception()

    ask = stamps.around(ask, "submit", "result")
    with (
        mock.patch.object(device, "run", stamps.around(device.run, "engine", "computed")),
        mock.patch.object(Pool, "admit", stamps.around(Pool.admit, "admit", "admitted")),
        mock.patch.object(dispatch, "next_batch", stamps.around(dispatch.next_batch, "decide", "taken")),
        mock.patch.object(Query, "set_result", stamps.around(Query.set_result, "resolved")),
        Server.from_engines([device], profile, policy=policy) as target,
    ):
        for _ in range(options.rounds):
            time.sleep(1e-4)  # so that the worker falls asleep
            ask(target)
            rounds.append(stamps.stages_us())
    medians = {stage: statistics.median(times) for stage, times in zip(STAGES, zip(*rounds, strict=True), strict=True)}
    return {**medians, "total": statistics.median(map(sum, rounds))}


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    largest = paper_profile.paper_profile().max_batch
    one, full = measure(options, 1), measure(options, largest)
    print(f"us from submit to result, medians of {options.rounds} rounds; noting the time adds about 0.1 us to each stage")
    cli.print_table(
        [
            ("stage", "1 query", f"{largest} queries", f"{largest} queries, per query"),
            *((name, f"{one[name]:.1f}", f"{full[name]:.1f}", f"{full[name] / largest:.2f}") for name in one),
        ]
    )
    cli.write_results(options.json, {"batch": largest, "one": one, "full": full})


if __name__ == "__main__":
    cli.run(main)
