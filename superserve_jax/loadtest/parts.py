"""What a server, Python or the system calls, and what then misbehaves: callbacks, policies, engines, handlers. No jax."""

import functools
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from superserve_jax.engines import base
from superserve_jax.engines.base import Engine, Launched, Wrapper
from superserve_jax.loadtest import acts
from superserve_jax.loadtest.acts import Scene
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Decision, Policy, State
from superserve_jax.serving.futures import Future
from superserve_jax.subnet import Subnet

_BAD = 0.1  # the share of odd engines that give NaN for one subnet


def callback(scene: Scene, rng: random.Random) -> Callable[[Future], object]:
    """A done-callback that acts, raises or blocks."""
    kind, own = rng.choices(("act", "raise", "block"), (10, 10, 1))[0], random.Random(rng.random())

    def on_done(_: Future) -> None:
        scene.acts[f"callbacks that {kind}"] += 1
        if kind == "act":
            scene.any_act(own)
        elif kind == "raise":
            acts.raise_one(own)
        else:
            time.sleep(1.5 * scene.stall_s)

    return on_done


def policy(scene: Scene, rng: random.Random, inner: Policy, *, share: float = 0.03) -> Policy:
    """A policy that misbehaves in a share of its calls, and otherwise decides as `inner` does."""

    def decide(profile: Profile, state: State) -> Any:
        good = inner(profile, state)
        if rng.random() > share:
            return good
        scene.acts["odd decisions"] += 1
        row = rng.choice(profile.rows)
        match rng.randrange(8):
            case 0:
                acts.raise_one(rng)
            case 1:
                return rng.choice((None, 3, "best", object, [], good[:2]))
            case 2:
                return Decision(row.subnet, rng.choice((0, -1, math.nan, 1.5, None)))  # type: ignore[arg-type]
            case 3:
                return Decision(rng.choice((Subnet((99,)), None, "x", [])), 1)  # type: ignore[arg-type]
            case 4:
                return good._replace(reason=rng.choice(([], {}, None, b"x", f"{rng.random()}", "x" * 10_000)))
            case 5:
                return good._replace(defer_ms=rng.choice((math.nan, "x", None)))
            case 6:
                time.sleep(rng.choices((5e-3, 2 * scene.stall_s), (15, 1))[0])  # slow, or it hangs
            case 7:
                scene.act(rng.choice((acts.ask, acts.submit, acts.add_worker)), rng)
        return Decision(row.subnet, rng.choice((1, 2, 10**9)))

    return decide


class OddEngine(Wrapper):
    """An engine that misbehaves in a share of its batches. Some of these engines also give NaN for one subnet.

    Args:
      rng: draws what it does.
      inner: an engine that works.
      profile: the profile of `inner`.
      share: the share of the batches.
    """

    def __init__(self, rng: random.Random, inner: Engine, profile: Profile, *, share: float = 0.02):
        super().__init__(inner)
        self.overlap = getattr(inner, "overlap", None)
        self._rng, self._share = rng, share
        self._bad = rng.choice(profile.rows).subnet if rng.random() < _BAD else None

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Any:
        """See `engines.base.Engine.run`."""
        return self._spoil(super().run(subnet, batch_size, inputs), subnet)

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `engines.base.Overlapping.launch`."""
        launched = self._inner.launch(subnet, batch_size, inputs)  # type: ignore[attr-defined]
        return launched._replace(outputs=lambda: self._spoil(launched.outputs(), subnet))

    def _spoil(self, outputs: Sequence[Any], subnet: Subnet) -> Any:
        rng = self._rng
        if subnet is self._bad:
            base.check_outputs(np.full((len(outputs), 1), np.nan), len(outputs))
        if rng.random() > self._share:
            return outputs
        match rng.randrange(5):
            case 0:
                acts.raise_one(rng)
            case 1:
                return outputs[:-1]
            case 2:
                return [*outputs, *outputs]
            case 3:
                return None
            case 4:
                return map(functools.partial(_fail, rng), outputs)


def _fail(rng: random.Random, _: Any) -> None:
    acts.raise_one(rng)


class AskingHandler(logging.Handler):
    """A log handler that asks the server and submits, and sometimes raises.

    It does not use its lock. Otherwise a callback that closes a server inside of it would wait for a worker that logs.
    """

    def __init__(self, scene: Scene, rng: random.Random):
        super().__init__()
        self._scene, self._rng = scene, rng

    def handle(self, record: logging.LogRecord) -> bool:
        """See `logging.Handler`."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self._scene.acts["log records"] += 1
        if self._rng.random() < 0.5:
            self._scene.act(self._rng.choice((acts.ask, acts.ask, acts.submit)), self._rng)
        if self._rng.random() < 0.02:
            acts.raise_one(self._rng)


class Interrupt(KeyboardInterrupt):
    """A Ctrl-C of `Signals`, and not of the user."""


class Signals:
    """A signal whose handler acts in the main thread, and sometimes raises KeyboardInterrupt there, as Ctrl-C does.

    It works inside of the block `with Signals(...)`, which must be in the main thread. `acts.send_signal` sends the signal.

    Args:
      scene: where the handler acts.
      rng: draws what it does.
    """

    def __init__(self, scene: Scene, rng: random.Random):
        self._scene, self._rng = scene, rng
        self._before: Any = None
        scene.acts["interrupts"] = 0  # the first look-up of a new key would run code that a signal may interrupt

    def __enter__(self) -> "Signals":
        self._before = signal.signal(acts.SIGNAL, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(acts.SIGNAL, self._before)

    def interruptible(self, call: Callable[[], object]) -> None:
        """Makes a call that Ctrl-C may interrupt."""
        try:
            call()
        except Interrupt:
            self._scene.acts["interrupts"] += 1

    def _on_signal(self, _: int, frame: Any) -> None:
        self._scene.acts["signals"] += 1
        inner = frame  # the innermost frame of this package, which is a test of the server
        while inner is not None and __package__ not in inner.f_globals.get("__name__", ""):
            inner = inner.f_back
        is_waiting = inner is not frame and inner is not None and inner.f_code is Signals.interruptible.__code__
        if is_waiting and self._rng.random() < 0.3:
            raise Interrupt
        self._scene.any_act(self._rng)
