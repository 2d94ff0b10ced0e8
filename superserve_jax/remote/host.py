"""What runs in an actor: an engine, and the calls of a router. No Ray, and jax only where an export is opened.

A router sends at most two batches at a time. Two threads serve them. While the device computes one batch, the other thread
unpacks the inputs of the next one and hands them to the device. A third thread makes the engine of the next export in a swap.
"""

import dataclasses
import os
import pickle
import platform
import socket
import threading
import time
from typing import Any, NamedTuple

import superserve_jax
from superserve_jax import errors, foreign
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.remote import packing
from superserve_jax.remote.packing import Packed
from superserve_jax.serving.makers import Source

_PLAIN = ("builtins.", "superserve_jax.")  # errors of these packages can be read without jax


class Answer(NamedTuple):
    """The outputs of a batch, see `packing.pack_outputs`, and the time that the device took."""

    outputs: Any
    device_s: float


class Failed(NamedTuple):
    """An error, pickled. An error of another library is a RuntimeError with its text, since a router need not have it."""

    error: bytes

    @classmethod
    def of(cls, error: BaseException) -> "Failed":
        """Makes the answer of an error."""
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        if kind.startswith(_PLAIN):
            try:
                data = pickle.dumps(error)
                pickle.loads(data)
                return cls(data)
            except Exception:  # any exception: pickling runs code of the error's class
                pass
        return cls(pickle.dumps(RuntimeError(foreign.text_of(error))))

    def exception(self) -> Any:
        """The inverse of `of`."""
        return pickle.loads(self.error)


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a router must know about an engine in an actor.

    Args:
      key: names the engine in `Host.run`.
      name, input_shape, input_dtype, lengths, pad_id, class_names, compute_dtype: see `Engine`.
      profile: the engine's profile, as `Profile.to_json` writes it.
      versions: {a name such as "superserve-jax": its version}.
      host, pid: where the actor runs.
    """

    key: str
    name: str
    input_shape: tuple[int, ...]
    input_dtype: str
    lengths: tuple[int, ...]
    pad_id: int
    class_names: tuple[str, ...]
    compute_dtype: str
    profile: dict[str, Any]
    versions: dict[str, str]
    host: str
    pid: int


def versions() -> dict[str, str]:
    """The versions that a router and its actors must have in common."""
    return {"superserve-jax": superserve_jax.__version__, "Python": ".".join(platform.python_version_tuple()[:2])}


class Host:
    """The engines of one actor, by key. There are two of them during a swap."""

    def __init__(self):
        self._engines: dict[str, _Turns] = {}
        self._dropped: set[str] = set()  # tokens that were dropped before their engine was made
        self._lock = threading.Lock()  # guards both, and the tokens of engines
        self._opening = threading.Lock()  # held while an engine is made

    def ping(self) -> int:
        """The id of the process. An answer means that the process is up."""
        return os.getpid()

    def keys(self) -> list[str]:
        """The keys of its engines."""
        return list(self._engines)

    def open(self, source: Source, token: str, *, alone: bool) -> Opened | Failed:
        """Makes an engine, unless there is one already that fits the source.

        Args:
          source: what to make it from.
          token: "PROCESS:NUMBER" of the router and this call, see `drop`. It becomes the key of a new engine.
          alone: whether other routers are dead. Their engines are freed first, except one that fits.
        """
        try:
            with self._lock:
                for key, turns in [*self._engines.items()] if alone else ():
                    owner = token.split(":")[0]
                    turns.tokens = {each for each in turns.tokens if each.split(":")[0] == owner}
                    if not turns.tokens and not turns.fits(source):
                        del self._engines[key]
            turns = self._opened(source, token)
            if turns is None:
                with self._opening:
                    turns = self._opened(source, token) or self._made(source, token)
            engine, profile = turns.engine, turns.profile
            return Opened(
                turns.key,
                engine.name,
                tuple(engine.input_shape),
                engine.input_dtype.str,
                tuple(engine.lengths),
                engine.pad_id,
                tuple(getattr(engine, "class_names", ())),
                getattr(engine, "compute_dtype", profile.compute_dtype),
                profile.to_json(),
                versions(),
                socket.gethostname(),
                os.getpid(),
            )
        except BaseException as error:
            return Failed.of(error)

    def _opened(self, source: Source, token: str) -> "_Turns | None":
        with self._lock:
            turns = next((each for each in self._engines.values() if each.fits(source)), None)
            if turns is not None:
                self._locked_add(turns, token)
            return turns

    def _made(self, source: Source, token: str) -> "_Turns":
        turns = _Turns(token, source, *source.open())
        with self._lock:
            self._locked_add(turns, token)
        return turns

    def _locked_add(self, turns: "_Turns", token: str) -> None:
        if token in self._dropped:
            self._dropped.remove(token)
        else:
            self._engines[turns.key] = turns
            turns.tokens.add(token)

    def run(self, key: str, rank: int, batch_size: int, packed: Packed) -> Answer | Failed:
        """Computes a batch. `rank` is the subnet's place in the profile."""
        try:
            turns = self._engines.get(key)
            if turns is None:
                raise errors.EngineLostError("the process was started again, and has no engine yet")
            return turns.run(rank, batch_size, packing.unpack(packed, tuple(turns.engine.input_shape)))
        except BaseException as error:
            return Failed.of(error)

    def drop(self, token: str) -> None:
        """Frees an engine when all that opened it have dropped it."""
        with self._lock:
            turns = next((each for each in self._engines.values() if token in each.tokens), None)
            if turns is None:
                self._dropped.add(token)
                return
            turns.tokens.remove(token)
            if not turns.tokens:
                del self._engines[turns.key]


class _Turns:
    """One engine, which two threads use in turns. The first to come is the first to finish."""

    def __init__(self, key: str, source: Source, engine: Engine, profile: Profile):
        self.key, self.engine, self.profile = key, engine, profile
        self._source = source
        self._subnets = [row.subnet for row in profile.rows]
        self._launching, self._finishing = threading.Lock(), threading.Lock()
        self._free_s = 0.0  # when the device was done with the last batch
        self.tokens: set[str] = set()

    def fits(self, source: Source) -> bool:
        """Whether a source asks for this engine."""
        return source.fits(self._source, self.profile)

    def run(self, rank: int, batch_size: int, inputs: list[Any]) -> Answer:
        """The outputs of a batch."""
        engine: Any = self.engine
        launched, outputs = None, []
        with self._launching:
            begin_s = time.monotonic()
            if getattr(engine, "overlap", False):
                launched = engine.launch(self._subnets[rank], batch_size, inputs)
            self._finishing.acquire()  # before another thread may launch, so that the order stays
        try:
            if launched is None:
                begin_s = time.monotonic()
                outputs = engine.run(self._subnets[rank], batch_size, inputs)
            else:
                launched.wait()
                outputs = launched.outputs()
            now_s = time.monotonic()
            device_s, self._free_s = now_s - max(begin_s, self._free_s), now_s
            return Answer(packing.pack_outputs(outputs), device_s)
        finally:
            self._finishing.release()
