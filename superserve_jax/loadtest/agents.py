"""Runs the code that misbehaves around a server during a storm: agents in threads of their own, and handlers. No jax.

- An agent does one of the `acts` again and again.
- A part is called by the server, by Python or by the system (see `parts`). It then does a random act, raises, or sleeps.
"""

import concurrent.futures
import contextlib
import functools
import gc
import io
import logging
import random
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from superserve_jax.loadtest import acts
from superserve_jax.loadtest.acts import Act, Scene
from superserve_jax.loadtest.parts import AskingHandler, Signals
from superserve_jax.loadtest.recorder import Deliberate

AGENTS: dict[str, tuple[Act, float]] = {
    "asking": (acts.ask, 0.05),
    "generators": (acts.broken_generator, 0.1),
    "arguments": (acts.wrong_arguments, 0.1),
    "servers": (acts.other_server, 0.2),
    "finalizers": (acts.leave_garbage, 0.1),
    "engine swaps": (acts.swap_engines, 0.3),
    "collections": (acts.collect, 0.5),
    "swaps": (acts.swap_while_replaced, 8.0),
    "queries to the export": (acts.ask_export, 0.02),
}
"""What each agent does, and the mean number of seconds between two of its acts."""

PARTS = ("callbacks", "policy", "engines", "log handler", "signals")
ALL = (*AGENTS, *PARTS)

_SIGNAL_S = 0.1  # the mean time between two signals
_TURN_S = 0.02  # how long the main thread sleeps in a turn, and waits for each of its queries
_CLOSES = 0.05  # the share of turns of the main thread in which it closes a server


class _Nowhere(io.TextIOBase):
    """Takes what is printed and forgets it: tracebacks of log handlers that raise."""

    def write(self, text: str, /) -> int:
        return len(text)


class Agents:
    """The agents of one storm. They act inside of the block `with Agents(...)`.

    Args:
      scene: what they can reach.
      names: some of `ALL`.
      seed: determines all random choices.
    """

    def __init__(self, scene: Scene, names: Sequence[str], *, seed: int):
        self._scene, self._names, self._seed = scene, names, seed
        self._over = threading.Event()
        self._stack = contextlib.ExitStack()
        self._rng = self._random("main thread")
        self._signals: Signals | None = None

    def _random(self, name: str) -> random.Random:
        return random.Random(f"{self._seed} {name}")

    def __enter__(self) -> "Agents":
        if not self._names:
            return self
        with self._stack:
            self._watch_hooks()
            self._stack.callback(gc.collect)  # the last finalizers
            if self._scene.export is not None:
                self._scene.export_server = self._stack.enter_context(self._scene.export.open())
            if "log handler" in self._names:
                self._add_handler()
            if "signals" in self._names:
                self._signals = self._stack.enter_context(Signals(self._scene, self._random("signal handler")))
                self._start("signals", acts.send_signal, _SIGNAL_S)
            for name in self._names:
                if name in AGENTS:
                    self._start(name, *AGENTS[name])
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._stack.close()
        self._scene.export_server = None

    def _start(self, name: str, act: Act, period_s: float) -> None:
        """Starts an agent. The end of the block waits for it."""

        def repeat() -> None:
            rng = self._random(name)
            while not self._over.wait(rng.expovariate(1 / period_s)):
                self._scene.act(act, rng)

        thread = threading.Thread(target=repeat, name=f"agent {name}", daemon=True)
        thread.start()
        self._stack.callback(thread.join)

    def _add_handler(self) -> None:
        logger, handler = logging.getLogger("superserve_jax"), AskingHandler(self._scene, self._random("log handler"))
        self._stack.callback(setattr, logger, "propagate", logger.propagate)
        self._stack.callback(logger.removeHandler, handler)
        logger.propagate = False
        logger.addHandler(handler)

    def _watch_hooks(self) -> None:
        """Errors that end a thread or a finalizer are noted."""
        note = self._scene.note

        def on_error(error: Any) -> None:  # of a thread or a finalizer; of this package, and not of another library
            text = "".join(traceback.format_exception(error.exc_value))
            if not isinstance(error.exc_value, Deliberate) and "superserve_jax" in text:
                note(f"an error ended {getattr(error, 'object', None) or getattr(error, 'thread', None)!r}\n{text}")

        self._stack.enter_context(contextlib.redirect_stderr(_Nowhere()))
        for module, name in (sys, "unraisablehook"), (threading, "excepthook"):
            self._stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, on_error)

    def turn(self) -> None:
        """Uses the server in the main thread, where signals arrive."""
        scene, rng = self._scene, self._rng
        time.sleep(_TURN_S)
        if self._signals is None:
            return
        if rng.random() < _CLOSES:
            scene.act(self._interrupt_close, rng)
        queries = scene.recorder.submit(scene.target, rng.randint(1, 4), slo_ms=1_000.0)
        for _, query in queries:
            with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
                self._signals.interruptible(functools.partial(query.exception, _TURN_S))
        scene.made.extend(queries)
        with contextlib.suppress(IndexError):  # acts of other threads take queries out, too
            for _ in range(len(scene.made)):
                key, query = scene.made.popleft()
                if query.done():
                    scene.recorder.read(key, query, 0.0)
                else:
                    scene.made.append((key, query))

    def _interrupt_close(self, scene: Scene, rng: random.Random) -> None:
        """Closes a server, perhaps with a Ctrl-C in the middle."""
        other, _ = acts.open_another(scene, rng, tune_runtime=False)
        close = functools.partial(other.close, drain=rng.random() < 0.5)
        if self._signals is not None:
            self._signals.interruptible(close)
        close()
