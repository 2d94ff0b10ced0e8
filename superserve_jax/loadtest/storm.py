"""A storm: many clients and random failures against a real server of fake engines, checked by `checker.Checker`. No jax.

- Clients ask for different SLOs and accuracy floors. They submit in bursts, wait, and cancel.
- Batches fail, are slow, hang, or need too much memory. Some inputs fail in every batch.
- Some workers are broken from the start. Others are removed and added while the traffic runs.

Failures are drawn from a seed. The order in which threads run is not.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.loadtest.checker import Checker, CheckResult
from superserve_jax.loadtest.recorder import Recorder
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import ByProfile, SlackFit
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

_SIZES = (1, 2, 4, 8, 16)
PROFILE = Profile(
    _SIZES,
    tuple(
        Row(Subnet((i,)), accuracy, tuple(0.05 * (i + 1) * (1 + 0.3 * b) for b in _SIZES))
        for i, accuracy in enumerate((0.7, 0.75, 0.8))
    ),
)
"""The profile that the server gets. The engines do not sleep, so a batch takes no time unless a failure makes it slow."""

_FLOORS = (0.0, 0.0, 0.0, 0.75, 0.8)  # accuracy floors of bursts
_BURST = 32  # the largest number of queries that a client submits in one call
_CANCELLED = 0.05  # the share of bursts with one cancelled query
_SWITCH_INTERVAL_S = 1e-5  # for `sys.setswitchinterval`: short, so that races become likely
_MOST_NOTES = 100_000  # with more unread notes, clients wait for the checker
_GONE = ("left", "abandoned", "removed")  # states of workers in `Server.health`


@dataclasses.dataclass(frozen=True)
class Storm:
    """The traffic and the failures.

    Args:
      queries: the number of queries to submit.
      workers: the number of workers. A lost worker is replaced.
      clients: the number of client threads.
      slos_ms: the SLOs. Each burst gets a random one.
      window: a client with `window` unanswered bursts waits for the oldest one.
      max_queue: see `Server`. A small queue refuses some queries.
      poisoned: every `poisoned`-th input makes every batch with it fail; 0 for none.
      failing: the share of batches that raise an error.
      slow: the share of batches that take a few milliseconds.
      full: the share of batches that need too much memory.
      hanging: the share of batches that hang for 2 * `stall_s`.
      broken: the share of workers on which every batch fails.
      changed_every_s: the seconds between two replacements of a working worker; inf for none.
      closed_after: the number of submitted queries after which the server is closed without draining. The clients go on.
      stall_s: see `Server`.
      expire: see `Server`. If true, queries that can no longer meet their deadline are dropped.
      overlap: whether the engines let a worker take its next batch while the device computes.
      strict: whether the policy takes queries strictly in the order of deadlines, which is then checked. If not, the default
        policy serves, which may defer queries.
      patience_s: the longest wait for a future, and for the server to close. A future that takes longer counts as lost.
      seed: determines all random choices.
    """

    queries: int = 20_000
    workers: int = 4
    clients: int = 8
    slos_ms: Sequence[float] = (5.0, 20.0, 100.0, 30_000.0)
    window: int = 8
    max_queue: int = 800
    poisoned: int = 1_000
    failing: float = 0.005
    slow: float = 0.005
    full: float = 0.001
    hanging: float = 0.0002
    broken: float = 0.1
    changed_every_s: float = 0.1
    closed_after: float = math.inf
    stall_s: float = 0.2
    expire: bool = False
    overlap: bool = False
    strict: bool = True
    patience_s: float = 30.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class StormResult:
    """The outcome of a storm.

    Args:
      check: what the checker counted and found.
      seconds: how long the storm took.
      workers: the number of workers by fate: "replaced", or "STATE at the end" for each state.
      failures: the number of failures that were injected, by kind.
    """

    check: CheckResult
    seconds: float
    workers: dict[str, int]
    failures: dict[str, int]


def run_storm(storm: Storm, *, on_progress: Callable[[int], object] = lambda offered: None) -> StormResult:
    """Runs a storm. Clients are threads of their own; the calling thread checks the notes.

    Args:
      storm: the traffic and the failures.
      on_progress: called as `on_progress(queries offered so far)` several times a second.
    """
    return _StormRun(storm).run(on_progress)


class _StormRun:
    """A running storm: the state that its clients, the keeper of its workers and the checker share."""

    def __init__(self, storm: Storm):
        self._storm = storm
        self._recorder = Recorder()
        self._checker = Checker(PROFILE, strict_order=storm.strict, abandons=storm.hanging > 0)
        self._traffic_ended = threading.Event()
        self._closed = threading.Event()  # ends the hanging batches
        self._numbers = itertools.count()  # of engines
        self._replaced = 0
        self._failures: list[str] = []  # the kind of each failure, from all threads

    def run(self, on_progress: Callable[[int], object]) -> StormResult:
        """See `run_storm`."""
        storm, notes, checker = self._storm, self._recorder.notes, self._checker
        start_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            target = Server.from_engines(
                [self._engine() for _ in range(storm.workers)],
                PROFILE,
                policy=self._recorder.policy(ByProfile(functools.partial(SlackFit, defer=not storm.strict), PROFILE)),
                slo_ms=min(storm.slos_ms),  # a worker pauses so long after a failure; clients always give their own SLO
                max_queue=storm.max_queue,
                stall_s=storm.stall_s,
                expire=storm.expire,
                tune_runtime=False,
            )
            threads = stack.enter_context(ThreadPool(storm.clients + 1))
            clients = [threads.apply_async(self._client, (target, i)) for i in range(storm.clients)]
            keeper = threads.apply_async(self._keep, (target,))
            while not all(client.ready() for client in clients):
                time.sleep(0.02)
                checker.read(notes)
                on_progress(checker.result.offered)
                if checker.result.offered >= storm.closed_after:
                    target.close(drain=False)
            self._traffic_ended.set()
            keeper.wait()
            target.close(timeout_s=storm.patience_s)
            self._closed.set()
            checker.read(notes)
        for thread in (*clients, keeper):
            thread.get()  # raises the error that ended it
        states = collections.Counter(f"{worker['state']} at the end" for worker in target.health()["per_worker"])
        seconds = time.monotonic() - start_s
        failures = dict(collections.Counter(self._failures))
        return StormResult(checker.finish(), seconds, {"replaced": self._replaced, **states}, failures)

    # -- clients ------------------------------------------------------------------------------------------------------------

    def _client(self, target: Server, number: int) -> None:
        storm, recorder = self._storm, self._recorder
        rng = random.Random(f"{storm.seed} client {number}")
        share = len(range(number, storm.queries, storm.clients))  # queries that this client has left
        bursts: collections.deque[Future] = collections.deque()  # the last query of each unanswered burst
        while share > 0:
            while len(recorder.notes) > _MOST_NOTES:
                time.sleep(1e-3)
            count = min(rng.randint(1, _BURST), share)
            share -= count
            queries = recorder.submit(target, count, slo_ms=rng.choice(storm.slos_ms), min_accuracy=rng.choice(_FLOORS))
            if not queries:
                time.sleep(1e-3)
                continue
            bursts.append(queries[-1][1])
            if rng.random() < _CANCELLED:
                recorder.cancel(*rng.choice(queries))
            if len(bursts) >= storm.window and not self._resolves(bursts.popleft()):
                return
        all(map(self._resolves, bursts))

    def _resolves(self, query: Future) -> bool:
        """Waits for a query. Returns False if the query is lost. The client then gives up."""
        with contextlib.suppress(concurrent.futures.CancelledError, TimeoutError):
            query.exception(timeout=self._storm.patience_s)
        return query.done()

    # -- workers ------------------------------------------------------------------------------------------------------------

    def _engine(self) -> Engine:
        number = next(self._numbers)
        rng = random.Random(f"{self._storm.seed} engine {number}")
        kind = FakeDevice if self._storm.overlap else FakeEngine
        hook = self._failure_hook(rng, broken=rng.random() < self._storm.broken)
        fake = kind(PROFILE, name=f"fake:{number}", input_dtype=np.int64, speed=math.inf, on_run=hook)
        return self._recorder.engine(fake)

    def _failure_hook(self, rng: random.Random, *, broken: bool) -> Callable[[Subnet, int, Sequence[np.ndarray]], None]:
        """Makes a hook for an engine to call before each batch. The hook injects the failures."""
        storm = self._storm
        kinds = ("failing", "slow", "full", "hanging", None)
        shares = [storm.failing, storm.slow, storm.full, storm.hanging]
        shares.append(max(1 - sum(shares), 0.0))

        def on_run(subnet: Subnet, batch_size: int, inputs: Sequence[np.ndarray]) -> None:
            if storm.poisoned and any(x and not x % storm.poisoned for x in inputs):
                self._failures.append("poisoned")
                raise ValueError("no batch with this input can run")
            [kind] = ("broken",) if broken else rng.choices(kinds, shares)
            if kind is None:
                return
            self._failures.append(kind)
            if kind == "slow":
                time.sleep(rng.uniform(1e-3, 5e-3))
            elif kind == "hanging":
                self._closed.wait(2 * storm.stall_s)
            elif kind == "full":
                raise MemoryError("a batch that does not fit")
            else:
                raise RuntimeError("a device that fails")

        return on_run

    def _keep(self, target: Server) -> None:
        """Replaces lost workers, and every `changed_every_s` seconds a working one."""
        storm, rng = self._storm, random.Random(f"{self._storm.seed} keeper")
        change_s = time.monotonic() + storm.changed_every_s
        while not self._traffic_ended.wait(0.01):
            states = {worker["name"]: worker["state"] for worker in target.health()["per_worker"]}
            alive = sorted(name for name, state in states.items() if state not in _GONE)
            if time.monotonic() > change_s and alive:
                change_s = time.monotonic() + storm.changed_every_s
                with contextlib.suppress(errors.UnknownNameError, errors.ConfigError):  # it has left, or is the last one
                    target.remove_worker(rng.choice(alive))
            with contextlib.suppress(errors.ServerClosedError):
                for _ in range(storm.workers - len(alive)):
                    target.add_worker(self._engine())
                    self._replaced += 1
