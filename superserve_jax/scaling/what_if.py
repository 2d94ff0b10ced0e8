"""What if: the served accuracy that another number of workers would have reached on recent traffic. No jax.

Recent traffic is a list of seconds. Each is simulated on its own, from an empty queue. That is long enough: deadlines are tens
of milliseconds. A live server asks in a process of its own, since a simulation would compete with the server for the
interpreter.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.simulation import simulator
from superserve_jax.simulation.cluster import Cluster
from superserve_jax.simulation.traces import Trace

_TIMEOUT_S = 120.0


class Served(NamedTuple):
    """What became of some queries.

    Args:
      queries: how many arrived.
      met: how many of them met their deadline.
      correct: the sum over these of the accuracy of their subnet.
    """

    queries: int = 0
    met: int = 0
    correct: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """The served accuracy: a query that missed its deadline counts as 0. None without queries.

        >>> Served(queries=4, met=3, correct=2.25).accuracy
        0.5625
        """
        return self.correct / self.queries if self.queries else None


def total(parts: Iterable[Served]) -> Served:
    """The sum.

    >>> total([Served(2, 2, 1.5), Served(2, 1, 0.75)])
    Served(queries=4, met=3, correct=2.25)
    """
    return Served(*(sum(column) for column in zip(Served(), *parts, strict=True)))


def serve(profile: Profile, policy: str, trace: Trace, workers: int) -> Served:
    """Simulates so many workers on some traffic.

    >>> from superserve_jax.simulation import traces
    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> serve(paper_profile(), "fixed:smallest", traces.gamma(rate_qps=100.0, cv2=0, duration_s=1.0), 1).met
    100
    """
    result = simulator.simulate(profile, policy, trace, cluster=Cluster(workers))
    met = result.outcome == simulator.MET
    return Served(len(trace), int(met.sum()), float(result.accuracy[met].sum()))


class Question(NamedTuple):
    """A question to a process of its own.

    Args:
      profile: the profile of all workers.
      policy: the policy's name.
      slo_ms: the SLO of all queries.
      seconds: the arrivals of each second, in seconds.
      workers: the number of workers.
    """

    profile: Profile
    policy: str
    slo_ms: float
    seconds: Sequence[np.ndarray]
    workers: int

    def answer(self) -> list[Served]:
        """What would have become of the queries of each second."""
        traces = (Trace(arrivals_s, self.slo_ms) for arrivals_s in self.seconds)
        return [serve(self.profile, self.policy, trace, self.workers) for trace in traces]

    def ask(self) -> list[Served]:
        """Like `answer`, in a process of its own. Raises SuperServeError if that process fails or takes two minutes."""
        command = [sys.executable, "-m", "superserve_jax.scaling.what_if"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(command, input=pickle.dumps(self), capture_output=True, timeout=_TIMEOUT_S, env=env)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise errors.SuperServeError(f"the simulation of {self.workers} workers failed: {error}") from error
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise errors.SuperServeError(f"the simulation of {self.workers} workers failed: {lines[-1]}")
        return pickle.loads(done.stdout)


def main() -> None:
    """Answers the question on the standard input, with low priority."""
    if hasattr(os, "nice"):
        os.nice(10)
    sys.stdout.buffer.write(pickle.dumps(pickle.load(sys.stdin.buffer).answer()))


if __name__ == "__main__":
    main()
