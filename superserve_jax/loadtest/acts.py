"""What code around a server may do at any moment, such as `submit` or `other_server`, for `agents`. No jax.

An act waits at most `Scene.stall_s` for other acts, so no two wait for each other forever. One file because it is one list of
small functions.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import math
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.loadtest.recorder import Deliberate, Recorder
from superserve_jax.profile import Profile
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server

SIGNAL = signal.SIGUSR1
_SLOS_MS = 5.0, 100.0, 30_000.0
_LATE_S = 10.0  # health and snapshot may take so much longer than `stall_s`, since signal handlers interrupt them
_SHOWN = 20  # undocumented errors that are kept

# -- errors -------------------------------------------------------------------------------------------------------------------


class BadRepr(Exception):
    """Neither `repr` nor `str` work."""

    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


class BadReprBase(BadRepr):
    """Its `repr` raises what is no `Exception`."""

    def __repr__(self):
        raise SystemExit(3)

    __str__ = __repr__


class LongRepr(Exception):
    """Its `repr` is long."""

    def __repr__(self):
        return "x" * 10**6


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """Its `__traceback__` cannot be set, and no note can be added."""

    code: int = 1


@dataclasses.dataclass
class Unhashable(Exception):
    """It cannot be a key of a dict."""

    code: int = 1


class Circular(Exception):
    """It is its own cause."""

    def __init__(self):
        super().__init__()
        self.__cause__ = self


ERRORS: tuple[type[BaseException], ...] = (
    *(BadRepr, BadReprBase, LongRepr, Frozen, Unhashable, Circular, concurrent.futures.CancelledError, asyncio.CancelledError),
    *(SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, MemoryError, RuntimeError),
)


def raise_one(rng: random.Random) -> None:
    """Raises a random error. In the main thread it is not KeyboardInterrupt, which the server must pass on there."""
    kind = rng.choice(ERRORS)
    if kind is KeyboardInterrupt and threading.current_thread() is threading.main_thread():
        kind = SystemExit
    raise kind()


# -- the scene ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReplacedExport:
    """An export that is replaced while a server swaps to it.

    Args:
      open: opens a server of the export.
      path: the export's directory.
      replace: `replace(i)` writes version i, which is 0 or 1, to `path`.
      inputs: some inputs.
      outputs: for each version, the right outputs for `inputs`.
      leaked_blocks: how many memory blocks of Python other libraries leak in each act with this name.
    """

    open: Callable[[], Server]
    path: Any
    replace: Callable[[int], object]
    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray]
    leaked_blocks: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Scene:
    """What the misbehaving code can reach, and what it noted.

    Args:
      recorder: records all queries.
      profile: the profile of all engines.
      make_engine: makes an engine, recorded.
      stall_s: the longest wait of an act.
      export: see `ReplacedExport`; None for none.

    Attributes:
      target: the server of the storm.
      acts: how often each act was done. The count may lose some, since nothing guards it.
      slowest_s: the longest time that each act took.
      undocumented: descriptions of errors that no server may raise.
      made: queries of acts whose results nobody has read.
    """

    target: Server

    def __init__(
        self,
        recorder: Recorder,
        profile: Profile,
        make_engine: Callable[[], Engine],
        *,
        stall_s: float,
        export: ReplacedExport | None = None,
    ):
        self.recorder, self.profile, self.make_engine = recorder, profile, make_engine
        self.stall_s, self.export = stall_s, export
        self.acts = collections.Counter[str]()
        self.slowest_s: dict[str, float] = {}
        self.undocumented: list[str] = []
        self.made: collections.deque[tuple[int, Future]] = collections.deque(maxlen=1_000)
        self.export_server: Server | None = None

    def act(self, act: "Act", rng: random.Random) -> None:
        """Does an act. Documented errors are fine, and all others are noted."""
        name, start_s = act.__name__, time.monotonic()
        self.acts[name] += 1
        try:
            act(self, rng)
        except (errors.SuperServeError, Deliberate):
            pass
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C
            self.note(f"{name} raised\n{''.join(traceback.format_exception(error))}")
        finally:
            took_s = time.monotonic() - start_s
            self.slowest_s[name] = max(self.slowest_s.get(name, 0.0), took_s)
            if act is ask and took_s > self.stall_s + _LATE_S:
                self.note(f"health and snapshot took {took_s:.1f} s")

    def any_act(self, rng: random.Random, *, in_finalizer: bool = False) -> None:
        """Does a random act. A finalizer may interrupt a thread for which `add_worker` or `remove_worker` would wait."""
        act = rng.choices([*ANYWHERE], [*ANYWHERE.values()])[0]
        self.act(ask if in_finalizer and act in (add_worker, remove_worker) else act, rng)

    def note(self, text: str) -> None:
        """Notes a broken guarantee."""
        if len(self.undocumented) < _SHOWN:
            self.undocumented.append(text)


Act = Callable[[Scene, random.Random], None]


class Garbage:
    """An object in a reference cycle. Its finalizer acts, or raises."""

    def __init__(self, scene: Scene, rng: random.Random):
        self._me, self._scene, self._rng = self, scene, rng

    def __del__(self):
        self._scene.acts["finalizers"] += 1
        if self._rng.random() < 0.1:
            raise Deliberate
        self._scene.any_act(self._rng, in_finalizer=True)


# -- acts ---------------------------------------------------------------------------------------------------------------------


def ask(scene: Scene, rng: random.Random) -> None:
    """Asks for health and counts."""
    if scene.target.health()["waiting"] < 0 or min(scene.target.snapshot()["queries"].values()) < 0:
        scene.note("a count is negative")


def submit(scene: Scene, rng: random.Random) -> None:
    """Submits some queries."""
    scene.made.extend(_submit(scene, rng, scene.target, rng.randint(1, 4)))


def submit_and_cancel(scene: Scene, rng: random.Random) -> None:
    """Submits a query and cancels it, and another one that may have been answered."""
    for key, query in _submit(scene, rng, scene.target, 1):
        scene.recorder.cancel(key, query)
    with contextlib.suppress(IndexError):
        scene.recorder.cancel(*scene.made.pop())


def broken_generator(scene: Scene, rng: random.Random) -> None:
    """Submits a generator that submits and raises in the middle."""

    def through(inputs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for i, x in enumerate(inputs):
            if i == 2:
                submit(scene, rng)
            if i == 5:
                raise Deliberate("the generator fails")
            yield x

    _submit(scene, rng, scene.target, rng.randint(3, 8), through=through)


def wrong_arguments(scene: Scene, rng: random.Random) -> None:
    """Submits what must be refused."""
    wrong: Any = rng.choice((np.zeros(3), "x", None, object(), np.float32(1), [[1], [1, 2]]))
    options: Any = rng.choice(({}, {"slo_ms": math.nan}, {"slo_ms": 0}, {"min_accuracy": 2}, {"min_accuracy": "x"}))
    try:
        scene.target.submit(wrong, **options)
    except errors.SuperServeError:
        return
    scene.note(f"submit({wrong!r}, **{options}) was accepted")


def add_worker(scene: Scene, rng: random.Random) -> None:
    """Adds a worker."""
    scene.target.add_worker(scene.make_engine())


def remove_worker(scene: Scene, rng: random.Random) -> None:
    """Removes a worker."""
    scene.target.remove_worker(rng.choice(scene.target.health()["per_worker"])["name"])


def swap_engines(scene: Scene, rng: random.Random) -> None:
    """Gives every worker another engine, as `Server.swap` does."""
    swaps = scene.target.pool.swaps
    workers = swaps.swappable()
    try:
        swaps.swap(workers, [scene.make_engine() for _ in workers], [scene.profile] * len(workers))
    except IndexError:  # `Server.swap` allows no other worker to join meanwhile, but here all may have been replaced
        if any(worker.alive for worker in workers):
            raise


def collect(scene: Scene, rng: random.Random) -> None:
    """Collects garbage."""
    gc.collect(rng.choice((0, 1, 1, 2)))


def leave_garbage(scene: Scene, rng: random.Random) -> None:
    """Leaves objects whose finalizers act when Python finds them."""
    for _ in range(rng.randint(1, 3)):
        Garbage(scene, random.Random(rng.random()))


def other_server(scene: Scene, rng: random.Random) -> None:
    """Opens another server, uses it, and closes it in some way."""
    ending = rng.choice(("drained", "failed", "closed twice", "in a callback", "dropped", "in a cycle"))
    # While a server with `tune_runtime` is open, one in a reference cycle is collected only when the process is idle.
    other, queries = open_another(scene, rng, tune_runtime=ending != "in a cycle" and rng.random() < 0.1)
    if ending == "in a callback" and queries:
        queries[0][1].add_done_callback(lambda _: other.close(drain=False))
    elif ending == "in a cycle":
        other.me = other  # type: ignore[attr-defined]
    elif ending != "dropped":
        for _ in range(1 + (ending == "closed twice")):
            other.close(drain=ending == "drained", timeout_s=rng.choice((0.0, scene.stall_s)))


def open_another(scene: Scene, rng: random.Random, *, tune_runtime: bool) -> tuple[Server, list[tuple[int, Future]]]:
    """A small server, and the queries that wait in it."""
    other = Server.from_engines(
        [scene.make_engine() for _ in range(rng.randint(1, 2))],
        scene.profile,
        stall_s=scene.stall_s,
        tune_runtime=tune_runtime,
        max_queue=20,
    )
    return other, _submit(scene, rng, other, rng.randint(1, 30))


def send_signal(scene: Scene, rng: random.Random) -> None:
    """Interrupts the main thread by the signal of `parts.Signals`."""
    signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)


def swap_while_replaced(scene: Scene, rng: random.Random) -> None:
    """Swaps to the export while two threads replace it. One of them may get an error, and the swap takes some version."""
    if scene.export is None or scene.export_server is None:
        return
    writers = [threading.Thread(target=scene.act, args=(replace_export, random.Random(rng.random()))) for _ in range(2)]
    for writer in writers:
        writer.start()
    time.sleep(rng.random() * scene.stall_s)
    scene.act(swap_export, rng)
    for writer in writers:
        writer.join()


def replace_export(scene: Scene, rng: random.Random) -> None:
    """Replaces the export."""
    if scene.export is not None:
        scene.export.replace(rng.randrange(2))


def swap_export(scene: Scene, rng: random.Random) -> None:
    """Swaps to the export, in whichever version it is."""
    if scene.export is not None and scene.export_server is not None:
        scene.export_server.swap(scene.export.path)


def ask_export(scene: Scene, rng: random.Random) -> None:
    """Compares the answers of the export's server with both versions."""
    if scene.export is None or scene.export_server is None:
        return
    for i, query in enumerate(scene.export_server.submit_many(scene.export.inputs)):
        output = query.result(timeout=60).output
        if not any(np.allclose(output, outputs[i], atol=1e-4) for outputs in scene.export.outputs):
            scene.note(f"the answer {output} to input {i} is right for neither version of the export")


ANYWHERE: dict[Act, float] = {
    ask: 4,
    submit: 4,
    submit_and_cancel: 2,
    broken_generator: 1,
    wrong_arguments: 1,
    leave_garbage: 1,
    collect: 0.3,
    add_worker: 0.3,
    remove_worker: 0.3,
    other_server: 0.5,
}
"""Acts that parts do, and how likely each one is."""


def _submit(scene: Scene, rng: random.Random, target: Server, count: int, **options: Any) -> list[tuple[int, Future]]:
    floor = rng.choice(scene.profile.rows).accuracy
    options = {"slo_ms": rng.choice(_SLOS_MS), "min_accuracy": rng.choice((0.0, floor)), "ordered": False, **options}
    return scene.recorder.submit(target, count, **options)
