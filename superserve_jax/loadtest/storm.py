"""A storm: many clients and random failures against a real server of fake engines, checked by `checker.Checker`. No jax.

One file, because clients, keeper and checker share the state of one run. A third of it is options and results.

- Clients ask for different SLOs and accuracy floors. They submit in bursts, wait, and cancel.
- Batches fail, are slow, hang, or need too much memory. Some inputs fail in every batch.
- Some workers are broken from the start. Others are removed and added while the traffic runs.
- With `agents`, the code around the server misbehaves, too (see `agents.Agents`).
- With `seconds`, the server is closed with a time limit at the end, while all engines hang and queries wait.

Everything random is drawn from a seed. The order in which threads run is not.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.loadtest import agents, endurance, parts
from superserve_jax.loadtest.acts import ReplacedExport, Scene
from superserve_jax.loadtest.agents import Agents
from superserve_jax.loadtest.checker import Checker, CheckResult
from superserve_jax.loadtest.leftovers import ProcessState
from superserve_jax.loadtest.parts import OddEngine
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
_ODD = 0.1  # the share of bursts with a done-callback that misbehaves
_LIMIT_S = 0.5  # the time limit of the close while queries wait
LATE_S = 10.0  # such a close may return so much later, since signal handlers interrupt it
_GONE = ("left", "lost", "abandoned", "removed")  # states of workers in `Server.health`


@dataclasses.dataclass(frozen=True)
class Storm:
    """The traffic and the failures.

    Args:
      queries: the number of queries to submit, if the time suffices.
      seconds: the longest time in which to submit them.
      rate_qps: the mean number of queries that the clients submit in a second, if the server answers so many.
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
      agents: names from `agents.ALL`. With any, the caller must be the main thread.
      export: an export for the agents that replace it and swap to it; None for none.
      patience_s: the longest wait for a future, and for the server to close. A future that takes longer counts as lost.
      sample_s: the seconds between two measurements of memory.
      hung_s: if no query resolves for so long, the stacks of all threads are printed and the process ends with status 1.
      seed: determines all random choices.
    """

    queries: int = 20_000
    seconds: float = math.inf
    rate_qps: float = math.inf
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
    agents: Sequence[str] = ()
    export: ReplacedExport | None = None
    patience_s: float = 30.0
    sample_s: float = 1.0
    hung_s: float = math.inf
    seed: int = 0

    def __post_init__(self):
        for name in self.agents:
            errors.check_name("agent", name, agents.ALL)


@dataclasses.dataclass(frozen=True)
class StormResult:
    """The outcome of a storm.

    Args:
      check: what the checker counted and found.
      seconds: how long the storm took.
      workers: the number of workers by fate: "replaced", or "STATE at the end" for each state.
      failures: the number of failures that were injected, by kind. Threads count without a lock, so some may be missing.
      acts: how often the agents did what, counted in the same way.
      slowest_s: the longest time that each act took.
      undocumented: errors that no server may raise, with their stacks.
      left: what the server left behind in the process.
      memory_mb, blocks: resident memory, and the number of Python's memory blocks that no other library leaked, every
        `sample_s` seconds.
    """

    check: CheckResult
    seconds: float
    workers: dict[str, int]
    failures: dict[str, int]
    acts: dict[str, int]
    slowest_s: dict[str, float]
    undocumented: list[str]
    left: list[str]
    memory_mb: list[float]
    blocks: list[float]


def run_storm(storm: Storm, *, on_progress: Callable[[int], object] = lambda offered: None) -> StormResult:
    """Runs a storm. Clients and agents are threads of their own; the calling thread checks the notes.

    Args:
      storm: the traffic and the failures.
      on_progress: called as `on_progress(queries offered so far)` several times a second.
    """
    before, start_s = ProcessState.now(), time.monotonic()
    result = _StormRun(storm).run(on_progress)
    left = before.wait_for_leftovers(storm.patience_s)
    return dataclasses.replace(result, left=left, seconds=time.monotonic() - start_s)


class _StormRun:
    """A running storm: the state that its clients, the keeper of its workers and the checker share."""

    def __init__(self, storm: Storm):
        self._storm = storm
        self._recorder = Recorder()
        self._checker = Checker(PROFILE, strict_order=storm.strict, abandons=storm.hanging > 0 or bool(storm.agents))
        self._scene = Scene(self._recorder, PROFILE, self._engine, stall_s=storm.stall_s, export=storm.export)
        self._over = threading.Event()  # clients stop
        self._traffic_ended = threading.Event()
        self._holding = False  # every batch hangs from now on
        self._closed = threading.Event()  # ends the hanging batches
        self._numbers = itertools.count()  # of engines
        self._replaced = 0
        self._failures = collections.Counter[str]()
        self._memory_mb: list[float] = []
        self._blocks: list[float] = []

    def run(self, on_progress: Callable[[int], object]) -> StormResult:
        """See `run_storm`."""
        storm, scene, notes, checker = self._storm, self._scene, self._recorder.notes, self._checker
        with contextlib.ExitStack() as stack:
            stack.callback(faulthandler.cancel_dump_traceback_later)
            stack.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            target = scene.target = self._open()
            threads = stack.enter_context(ThreadPoolExecutor(storm.clients + 1))
            for event in (self._over, self._traffic_ended, self._closed):
                stack.callback(event.set)  # or the threads would go on after an error
            on_turn = self._every_turn(on_progress)
            on_turn()  # before the agents begin, since already their first act may hang
            with Agents(scene, storm.agents, seed=storm.seed) as around:
                clients = [threads.submit(self._client, target, i) for i in range(storm.clients)]
                keeper = threads.submit(self._keep, target)
                end_s = time.monotonic() + storm.seconds
                while not all(client.done() for client in clients):
                    around.turn()
                    checker.read(notes)
                    on_turn()
                    if checker.result.offered >= storm.closed_after:
                        target.close(drain=False)
                    if time.monotonic() > end_s and not self._over.is_set():
                        self._close_while_queries_wait(target)
            self._traffic_ended.set()
            keeper.result()
            target.close(timeout_s=storm.patience_s)
            self._closed.set()
            checker.read(notes)
        for client in clients:
            client.result()  # raises the error that ended it
        states = collections.Counter(f"{worker['state']} at the end" for worker in target.health()["per_worker"])
        return StormResult(
            checker.finish(),
            seconds=math.nan,
            workers={"replaced": self._replaced, **states},
            failures=dict(self._failures),
            acts=dict(scene.acts),
            slowest_s=scene.slowest_s,
            undocumented=scene.undocumented,
            left=[],
            memory_mb=self._memory_mb,
            blocks=self._blocks,
        )

    def _open(self) -> Server:
        storm = self._storm
        policy = ByProfile(functools.partial(SlackFit, defer=not storm.strict), PROFILE)
        if "policy" in storm.agents:
            policy = parts.policy(self._scene, random.Random(f"{storm.seed} policy"), policy)
        return Server.from_engines(
            [self._engine() for _ in range(storm.workers)],
            PROFILE,
            policy=self._recorder.policy(policy),
            slo_ms=min(storm.slos_ms),  # a worker pauses so long after a failure; clients always give their own SLO
            max_queue=storm.max_queue,
            stall_s=storm.stall_s,
            expire=storm.expire,
            tune_runtime=False,
        )

    def _every_turn(self, on_progress: Callable[[int], object]) -> Callable[[], None]:
        """A function that reports progress, measures memory, and restarts the clock of `hung_s` after progress."""
        resolved, sample_s = -1, time.monotonic()

        def on_turn() -> None:
            nonlocal resolved, sample_s
            on_progress(self._checker.result.offered)
            count = sum(self._checker.result.outcomes.values())
            if count > resolved and self._storm.hung_s < math.inf:
                resolved = count
                faulthandler.dump_traceback_later(self._storm.hung_s, exit=True, file=sys.__stderr__ or sys.stderr)
            if time.monotonic() > sample_s:
                sample_s += self._storm.sample_s
                self._memory_mb.append(endurance.resident_mb())
                self._blocks.append(self._count_blocks())

        return on_turn

    def _count_blocks(self) -> float:
        # Not the objects: `gc.get_objects` breaks tuples that other threads are making.
        leaks = {} if self._storm.export is None else self._storm.export.leaked_blocks
        return sys.getallocatedblocks() - sum(blocks * self._scene.acts[act] for act, blocks in leaks.items())

    def _close_while_queries_wait(self, target: Server) -> None:
        self._holding = True
        time.sleep(_LIMIT_S)
        start_s = time.monotonic()
        target.close(timeout_s=_LIMIT_S)
        if (took_s := time.monotonic() - start_s) > _LIMIT_S + LATE_S:
            self._scene.note(f"close(timeout_s={_LIMIT_S}) took {took_s:.1f} s")
        self._over.set()
        self._closed.set()

    # -- clients ------------------------------------------------------------------------------------------------------------

    def _client(self, target: Server, number: int) -> None:
        storm, recorder = self._storm, self._recorder
        rng = random.Random(f"{storm.seed} client {number}")
        share = len(range(number, storm.queries, storm.clients))  # queries that this client has left
        bursts: collections.deque[list[tuple[int, Future]]] = collections.deque()  # whose results were not read
        pause_s = storm.clients * _BURST / 2 / storm.rate_qps
        while share > 0 and not self._over.is_set():
            time.sleep(rng.expovariate(1) * pause_s)
            while len(recorder.notes) > _MOST_NOTES:
                time.sleep(1e-3)
            count = min(rng.randint(1, _BURST), share)
            share -= count
            queries = recorder.submit(target, count, slo_ms=rng.choice(storm.slos_ms), min_accuracy=rng.choice(_FLOORS))
            if not queries:
                time.sleep(1e-3)
                continue
            bursts.append(queries)
            if "callbacks" in storm.agents and rng.random() < _ODD:
                rng.choice(queries)[1].add_done_callback(parts.callback(self._scene, random.Random(rng.random())))
            if rng.random() < _CANCELLED:
                recorder.cancel(*rng.choice(queries))
            if len(bursts) >= storm.window and not self._resolves(bursts.popleft()):
                return
        all(map(self._resolves, bursts))

    def _resolves(self, queries: list[tuple[int, Future]]) -> bool:
        """Reads the results of a burst. Returns False if a query is lost. The client then gives up."""
        for key, query in queries:
            self._recorder.read(key, query, self._storm.patience_s)
            if not query.done():
                return False
        return True

    # -- workers ------------------------------------------------------------------------------------------------------------

    def _engine(self) -> Engine:
        number = next(self._numbers)
        rng = random.Random(f"{self._storm.seed} engine {number}")
        odd = "engines" in self._storm.agents
        kind = FakeDevice if self._storm.overlap or (odd and rng.random() < 0.5) else FakeEngine
        hook = self._failure_hook(rng, broken=rng.random() < self._storm.broken)
        fake = kind(PROFILE, name=f"fake:{number}", input_dtype=np.int64, speed=math.inf, on_run=hook)
        return self._recorder.engine(OddEngine(rng, fake, PROFILE) if odd else fake)

    def _failure_hook(self, rng: random.Random, *, broken: bool) -> Callable[[Subnet, int, Sequence[np.ndarray]], None]:
        """Makes a hook for an engine to call before each batch. The hook injects the failures."""
        storm = self._storm
        kinds = ("failing", "slow", "full", "hanging", None)
        shares = [storm.failing, storm.slow, storm.full, storm.hanging]
        shares.append(max(1 - sum(shares), 0.0))

        def on_run(subnet: Subnet, batch_size: int, inputs: Sequence[np.ndarray]) -> None:
            if self._holding:
                self._closed.wait(storm.patience_s)
            if storm.poisoned and any(x and not x % storm.poisoned for x in inputs):
                self._failures["poisoned"] += 1
                raise ValueError("no batch with this input can run")
            [kind] = ("broken",) if broken else rng.choices(kinds, shares)
            if kind is None:
                return
            self._failures[kind] += 1
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
        """Replaces lost workers, and every `changed_every_s` seconds a working one. Removes superfluous ones."""
        storm, rng = self._storm, random.Random(f"{self._storm.seed} keeper")
        change_s = time.monotonic() + storm.changed_every_s
        while not self._traffic_ended.wait(0.01):
            states = {worker["name"]: worker["state"] for worker in target.health()["per_worker"]}
            alive = sorted(name for name, state in states.items() if state not in _GONE)
            if alive and (time.monotonic() > change_s or len(alive) > storm.workers):
                change_s = time.monotonic() + storm.changed_every_s
                with contextlib.suppress(errors.UnknownNameError, errors.ConfigError):  # it has left, or is the last one
                    target.remove_worker(rng.choice(alive))
            with contextlib.suppress(errors.ServerClosedError):
                for _ in range(storm.workers - len(alive)):
                    target.add_worker(self._engine())
                    self._replaced += 1
