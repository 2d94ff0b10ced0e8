"""Random faults and many clients against a real server of fake engines, judged from the history. No jax.

Everything at once, for as many queries as are asked for: clients of several SLOs, floors and sizes that wait, cancel and come
in bursts; batches that fail, are slow, hang or need too much memory; inputs that fail whatever batch they are in; workers that
break for good; others that are removed and added. Faults are drawn from a seed; how the threads take turns is not.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.loadtest.checker import Checker, Findings
from superserve_jax.loadtest.recorder import Recorder
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import SlackFit
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
"""What the engines are said to take. They take no time at all, but for the faults."""

_MOST_NOTES = 100_000  # unread ones, before clients wait for the checker
_PATIENCE_S = 30.0  # of a client with a query, and of who closes the server
_GONE = ("left", "abandoned", "removed")  # see `server.Server.health`


class PoisonedError(Exception):
    """An input is to blame."""


class FaultyError(Exception):
    """A device is to blame."""


@dataclasses.dataclass(frozen=True)
class Storm:
    """What comes, and what goes wrong.

    Args:
      queries: how many are offered.
      workers, clients: how many; a worker that is lost is replaced.
      slos_ms: of a burst of queries, one at random.
      floors: accuracies that a burst may ask for, one at random.
      burst: a client submits from 1 to so many queries in one call,
      window: and waits for its oldest once it has so many bursts under way.
      max_queue: of the server; small enough, and it refuses some.
      poisoned: one of so many inputs is, so that no batch with it can run; 0 for none.
      cancelled: share of the bursts of which a query is cancelled.
      failing, slow, full, hanging: shares of the batches that raise, take a few milliseconds, need too much memory, or hang
        for twice `stall_s`.
      broken: share of the workers that raise from the start.
      changed_every_s: how often a worker is removed, and another one added; inf for never.
      closed_after: so many offered queries, after which the server is closed without draining; the clients go on.
      stall_s: see `tuning.Tuning`.
      overlap: whether workers take their next batch while the device computes.
      strict: whether the policy keeps the strict order of deadlines, and the checker judges it; else the default policy.
      switch_interval_s: how long a Python thread runs before another may.
      seed: of everything random.
    """

    queries: int = 20_000
    workers: int = 4
    clients: int = 8
    slos_ms: Sequence[float] = (5.0, 20.0, 100.0, 30_000.0)
    floors: Sequence[float] = (0.0, 0.0, 0.0, 0.75, 0.8)
    burst: int = 32
    window: int = 8
    max_queue: int = 800
    poisoned: int = 1_000
    cancelled: float = 0.05
    failing: float = 0.005
    slow: float = 0.005
    full: float = 0.001
    hanging: float = 0.0002
    broken: float = 0.1
    changed_every_s: float = 0.1
    closed_after: float = math.inf
    stall_s: float = 0.2
    overlap: bool = False
    strict: bool = True
    switch_interval_s: float = 1e-5
    seed: int = 0

    def __post_init__(self):
        for name in "queries", "workers", "clients", "burst", "window", "max_queue":
            if getattr(self, name) < 1:
                raise errors.ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in "cancelled", "failing", "slow", "full", "hanging", "broken":
            if not 0 <= getattr(self, name) <= 1:
                raise errors.ConfigError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class StormResult:
    """What became of a storm: the findings, and how many workers came and went how. `faults` counts those drawn, by kind."""

    findings: Findings
    seconds: float
    workers: dict[str, int]
    faults: dict[str, int]


def run_storm(storm: Storm, *, on_progress: Callable[[int], object] = lambda offered: None) -> StormResult:
    """Runs a storm in threads of its own, and reads the history in this one.

    Args:
      on_progress: called as `on_progress(queries offered so far)` several times a second.
    """
    return _Run(storm).run(on_progress)


class _Run:
    """The state that clients, the one who changes workers, and the checker share."""

    def __init__(self, storm: Storm):
        self._storm = storm
        self._recorder = Recorder()
        self._checker = Checker(PROFILE, strict_order=storm.strict, abandons=storm.hanging > 0)
        self._over = threading.Event()  # the traffic is
        self._woken = threading.Event()  # whoever hangs
        self._numbers = itertools.count()
        self._went: collections.Counter[str] = collections.Counter()
        self._faults: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()  # of `_faults`
        self._errors: list[BaseException] = []  # of the threads here

    def run(self, on_progress: Callable[[int], object]) -> StormResult:
        """See the function."""
        storm, recorder = self._storm, self._recorder
        make = SlackFit if not storm.strict else lambda table: SlackFit(table, defer=False)
        start_s = time.monotonic()
        with _switch_interval(storm.switch_interval_s):
            target = Server.from_engines(
                [self._engine() for _ in range(storm.workers)],
                PROFILE,
                policy=recorder.policy(make),
                max_queue=storm.max_queue,
                stall_s=storm.stall_s,
                tune_runtime=False,
            )
            shares = [len(range(i, storm.queries, storm.clients)) for i in range(storm.clients)]
            clients = [
                self._thread(f"client-{i}", self._client, target, random.Random(f"{storm.seed} client {i}"), share)
                for i, share in enumerate(shares)
            ]
            keeper = self._thread("keeper", self._keep, target)
            while any(thread.is_alive() for thread in clients):
                clients[0].join(0.02) if clients[0].is_alive() else time.sleep(0.02)
                self._checker.read(recorder.notes)
                on_progress(self._checker.offered)
                if self._checker.offered >= storm.closed_after:
                    target.close(drain=False)
            self._over.set()
            keeper.join()
            target.close(timeout_s=_PATIENCE_S)
            self._woken.set()
            self._checker.read(recorder.notes)
        if self._errors:
            raise self._errors[0]
        for worker in target.health()["per_worker"]:
            self._went[f"{worker['state']} at the end"] += 1
        went, faults = dict(self._went.most_common()), dict(self._faults.most_common())
        return StormResult(self._checker.finish(), time.monotonic() - start_s, went, faults)

    # -- clients ------------------------------------------------------------------------------------------------------------

    def _client(self, target: Server, rng: random.Random, share: int) -> None:
        storm, recorder = self._storm, self._recorder
        under_way: collections.deque[Future] = collections.deque()
        while share > 0:
            while len(recorder.notes) > _MOST_NOTES:
                time.sleep(1e-3)
            count = min(rng.randint(1, storm.burst), share)
            slo_ms, floor = rng.choice(storm.slos_ms), rng.choice(storm.floors)
            share -= count
            queries = recorder.submit(target, count, slo_ms=slo_ms, min_accuracy=floor)
            if not queries:
                time.sleep(1e-3)
                continue
            under_way.append(queries[-1][1])
            if rng.random() < storm.cancelled:
                recorder.cancel(*rng.choice(queries))
            if len(under_way) >= storm.window and not _waited(under_way.popleft()):
                return
        all(map(_waited, under_way))

    # -- workers ------------------------------------------------------------------------------------------------------------

    def _engine(self) -> Engine:
        number = next(self._numbers)
        rng = random.Random(f"{self._storm.seed} engine {number}")
        hook = self._mishaps(rng, broken=rng.random() < self._storm.broken)
        kind = FakeDevice if self._storm.overlap else FakeEngine
        fake = kind(PROFILE, name=f"fake:{number}", input_dtype=np.int64, speed=math.inf, on_run=hook)
        return self._recorder.engine(fake)

    def _mishaps(self, rng: random.Random, *, broken: bool) -> Callable[[Subnet, int, Sequence[np.ndarray]], None]:
        storm = self._storm
        kinds = ("failing", "slow", "full", "hanging")
        limits = list(itertools.accumulate(getattr(storm, kind) for kind in kinds))

        def on_run(subnet: Subnet, batch_size: int, inputs: Sequence[np.ndarray]) -> None:
            if storm.poisoned and any(x and not x % storm.poisoned for x in inputs):
                self._note("poisoned")
                raise PoisonedError("an input that nobody can run")
            draw = rng.random()
            kind = "broken" if broken else next((k for k, limit in zip(kinds, limits, strict=True) if draw < limit), None)
            if kind is None:
                return
            self._note(kind)
            if kind == "slow":
                time.sleep(rng.uniform(1e-3, 5e-3))
            elif kind == "hanging":
                self._woken.wait(2 * storm.stall_s)
            elif kind == "full":
                raise MemoryError("a batch that does not fit")
            else:
                raise FaultyError("a device that fails")

        return on_run

    def _keep(self, target: Server) -> None:
        """Replaces lost workers, and now and then one that is well."""
        storm, rng = self._storm, random.Random(f"{self._storm.seed} keeper")
        change_s = time.monotonic() + storm.changed_every_s
        while not self._over.wait(0.01):
            states = {worker["name"]: worker["state"] for worker in target.health()["per_worker"]}
            gone = [name for name, state in states.items() if state in _GONE]
            alive = sorted(set(states) - set(gone))
            if time.monotonic() > change_s and alive:
                change_s = time.monotonic() + storm.changed_every_s
                with contextlib.suppress(errors.UnknownNameError, errors.ConfigError):  # it has left, or is the last one
                    target.remove_worker(rng.choice(alive))
            with contextlib.suppress(errors.ServerClosedError):
                for _ in range(storm.workers - len(alive)):
                    target.add_worker(self._engine())
                    self._went["replaced"] += 1

    def _note(self, kind: str) -> None:
        with self._lock:
            self._faults[kind] += 1

    def _thread(self, name: str, work: Callable[..., None], *args: object) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*args)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=guarded, name=f"stress-{name}", daemon=True)
        thread.start()
        return thread


def _waited(query: Future) -> bool:
    """Waits as a client does, who takes an error for an answer. False where there is none: then the query is lost, which the
    checker will say, and this client gives up."""
    try:
        query.exception(timeout=_PATIENCE_S)
    except concurrent.futures.CancelledError:
        pass
    except TimeoutError:
        return False
    return True


@contextlib.contextmanager
def _switch_interval(seconds: float) -> Iterator[None]:
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
