"""The engine in the router: it sends batches to an actor, and finds out when the actor is lost. Ray is imported late.

Ray restarts actors, but tells too late that one is silent. So the engine has a patience of its own. A batch should be back
after p99 + the time of a call. Here p99 is the 99th percentile of its latency in the profile, times the slowdown of the
device if it is slower than that. The engine is suspect when the batch is late by max(p99, 0.04 s), and lost when it is late by
max(3 x p99, 0.12 s).
"""

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Launched, check_outputs, times_s
from superserve_jax.lengths import length_bucket
from superserve_jax.profile import Profile
from superserve_jax.remote import packing
from superserve_jax.remote.host import Answer, Failed, Opened
from superserve_jax.serving.options import InputSpec
from superserve_jax.subnet import Subnet

if TYPE_CHECKING:
    from superserve_jax.remote.devices import RayDevice

_WARM_UPS, _WARM_UP_S = 5, 10.0  # calls, and the patience for one; the first calls of a process are slow
_WEIGHT = 0.2  # of the last batch in the slowdown
_SUSPECT_S, _LOST_S = 0.04, 0.12  # the least time after the expected end of a batch
_SUSPECT, _LOST = 1.0, 3.0  # the same, as multiples of the batch's p99
_LEAST_WAIT_S = 0.02  # after the router itself stood still, an answer may be on its way


class RemoteEngine:
    """See `engines.base.Remote`.

    Args:
      place: the device that made it.
      actor: Ray's handle of the actor.
      token: names this opening of the engine, see `Host.drop`.
      opened: what `Host.open` answered.

    Attributes:
      profile: the profile of the engine in the actor.
      decodes: whether inputs may be image files, which the actor decodes.
      call_s: how long a call takes beside the time of the device.
      pid: the actor's process, on `host`.
      answered_s: when the last answer came.
      is_lost: whether a batch has found that the actor is lost.
    """

    overlap = True

    def __init__(self, place: "RayDevice", actor: Any, token: str, opened: Opened):
        self.place, self._actor, self._key = place, actor, opened.key
        self.host, self.pid = opened.host, opened.pid
        self.name = place.label
        self.input_shape, self.input_dtype = opened.input_shape, np.dtype(opened.input_dtype)
        self.lengths, self.pad_id = opened.lengths, opened.pad_id
        self.decodes = InputSpec.of(self).is_image
        self._ndim = len(self.input_shape) if self.decodes else None
        self.class_names, self.compute_dtype = opened.class_names, opened.compute_dtype
        self.profile = Profile.from_json(opened.profile)
        self._rank = {row.subnet: rank for rank, row in enumerate(self.profile.rows)}
        self._p99_s = times_s(self.profile, "p99_ms")
        self.is_lost = False
        self._slowdown = 1.0
        self.answered_s = 0.0
        self._last: Callable[[], _Call | None] = lambda: None  # a weak reference, since a call refers to its engine
        self.call_s = self.lead_s = 0.0
        weakref.finalize(self, drop, actor, token).atexit = False
        self.call_s = self.lead_s = self._warm_up()

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `Engine.run`."""
        launched = self.launch(subnet, batch_size, inputs)
        launched.wait()
        return launched.outputs()

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `Overlapping.launch`."""
        length = length_bucket(self.lengths, inputs) if self.lengths else 0
        p99_s = self._p99_s[subnet, batch_size, length]
        call = self._call(subnet, batch_size, inputs, self._slowdown * p99_s)
        return Launched(call.wait, call.outputs, call.in_time, call.device_s)

    def _call(self, subnet: Subnet, batch_size: int, inputs: Sequence[np.ndarray], p99_s: float) -> "_Call":
        from ray import exceptions

        if self.is_lost:
            raise errors.EngineLostError(f"{self.name} has been lost")
        now_s = time.monotonic()
        try:
            ref = self._actor.run.remote(self._key, self._rank[subnet], batch_size, packing.pack(inputs, ndim=self._ndim))
        except exceptions.RayError as error:
            raise self.lost(error) from None
        before = self._last()
        call = _Call(self, ref, len(inputs), now_s, p99_s, before if before and not before.is_answered else None)
        self._last = weakref.ref(call)
        return call

    def observe(self, device_s: float, p99_s: float) -> None:
        """Notes how long the device took for a batch whose p99, times the slowdown, was `p99_s`. One outlier counts little."""
        change = min(device_s / p99_s, 2.0) - 1.0
        self._slowdown = max(1.0, self._slowdown * (1.0 + _WEIGHT * change))

    def lost(self, error: BaseException) -> errors.EngineLostError:
        """Notes that the actor is lost, and returns the error for it."""
        self.is_lost = True
        reason = "has not answered in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}"
        return errors.EngineLostError(f"{self.name} on {self.host} is lost: {reason}")

    def _warm_up(self) -> float:
        """Makes some calls with blank inputs, so that no query pays for the first ones. Returns the time of a call."""
        fastest, size = self.profile.fastest().subnet, self.profile.max_batch
        shape = (self.lengths[0], *self.input_shape[1:]) if self.lengths else self.input_shape
        blank = np.full(shape, self.pad_id if self.lengths else 0, self.input_dtype)
        calls_s, devices_s = [], []
        while len(calls_s) < _WARM_UPS:
            start_s = time.monotonic()
            call = self._call(fastest, size, [blank] * size, _WARM_UP_S)
            try:
                call.wait()
                call.outputs()
            except errors.EngineLostError:
                raise
            except Exception:  # any exception: the server finds out what the engine cannot do
                if size == self.profile.batch_sizes[0]:
                    return 0.0
                size = self.profile.batch_sizes[0]  # the largest batch may need too much memory
                continue
            devices_s.append(call.device_s())
            calls_s.append(max(0.0, time.monotonic() - start_s - devices_s[-1]))
        length = self.lengths[0] if self.lengths else 0
        self._slowdown = max(1.0, statistics.median(devices_s) / self._p99_s[fastest, size, length])
        return statistics.median(calls_s)


class _Call:
    """A batch on its way. One thread uses it."""

    def __init__(self, engine: RemoteEngine, ref: Any, count: int, sent_s: float, p99_s: float, before: "_Call | None"):
        self._engine, self._ref, self._count, self._sent_s, self.p99_s = engine, ref, count, sent_s, p99_s
        self._before = before  # a batch that the device computes first
        self._answer: Any = None
        self._error: BaseException | None = None

    def in_time(self) -> bool:
        """See `Launched.in_time`."""
        return self._arrives(self._expected_s() + max(_SUSPECT_S, _SUSPECT * self.p99_s))

    def wait(self) -> None:
        """See `Launched.wait`."""
        if not self.is_answered and not self._arrives(self._expected_s() + max(_LOST_S, _LOST * self.p99_s)):
            self._error = self._engine.lost(TimeoutError())
        if self._error is not None:
            raise self._error

    def outputs(self) -> Sequence[Any]:
        """See `Launched.outputs`."""
        outputs = self._answer.outputs
        if isinstance(outputs, np.ndarray) and outputs.dtype.kind == "f":
            check_outputs(outputs, self._count)
        return list(outputs)

    def device_s(self) -> float:
        """See `Launched.device_s`."""
        return self._answer.device_s

    @property
    def is_answered(self) -> bool:
        """Whether the answer is known, or that there will be none."""
        return self._answer is not None or self._error is not None

    def _expected_s(self) -> float:
        """When the answer should be there. The device begins when the batch before is done."""
        if self._before is not None and self._before.is_answered:
            self._before = None
        ahead_s = 0.0 if self._before is None else self._before.p99_s
        return max(self._sent_s, self._engine.answered_s) + ahead_s + self.p99_s + self._engine.call_s

    def _arrives(self, end_s: float) -> bool:
        """Waits for the answer until `end_s`. Returns whether it is there, or never will be."""
        import ray
        from ray import exceptions

        try:
            answer: Any = ray.get(self._ref, timeout=max(_LEAST_WAIT_S, end_s - time.monotonic()))
        except exceptions.GetTimeoutError:
            return False
        except exceptions.RayError as error:
            self._error = self._engine.lost(error)
            return True
        self._engine.answered_s = time.monotonic()
        if isinstance(answer, Failed):
            self._error = answer.exception()
            if isinstance(self._error, errors.EngineLostError):
                self._engine.lost(self._error)
        elif isinstance(answer, Answer) and isinstance(answer.device_s, float):
            self._answer = answer
            self._engine.observe(answer.device_s, self.p99_s)
        else:
            self._error = errors.InferenceError(f"{self._engine.name} answered {answer!r:.100}; expected outputs")
        return True


def drop(actor: Any, token: str) -> None:
    """Frees the engine in the actor, if the actor still lives."""
    with contextlib.suppress(Exception):  # any exception: this may run while Ray or the interpreter ends
        actor.drop.remote(token)
