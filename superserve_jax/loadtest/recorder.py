"""What the clients and the devices of a server saw. No jax.

A server that loses count cannot be convicted by its own counters. So a `Recorder` stands outside of it: it submits and
cancels, is told of every resolution, and wraps engines and policy. What it noted is judged by `promises.Checker`.

Notes are appended to one deque, which all threads may do at once, and read in that order. How much the order proves:
- A query is noted as submitted when `submit` has returned, so it was in the queue by then.
- The policy is asked under the server's lock, and the batch is taken under the same lock. So decisions are noted in the order
  in which batches were taken, and which batch belongs to a decision is told by the thread: its next engine call.
- An engine's return is noted before the server can know of it, a resolution after.
Hence a query that was noted as submitted before a decision, and that a later decision took, was waiting at the first one. If
its deadline is earlier than one in the batch of the first, it was passed over: no race explains it.
"""

import collections
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine, Launched, Overlapping, Wrapper
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Decision, Policy, State
from superserve_jax.serving.futures import Future, Query
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

Note = tuple[Any, ...]

ANSWERED, CANCELLED, REFUSED = "answered", "cancelled", "refused"


class Recorder:
    """Notes all that happens at the edges of a server of `engine.FakeEngine`s with inputs of shape () and dtype int64.

    Inputs are the queries' keys, 1, 2, 3, ..., so that an engine's output says whose it is; 0 is the blank input.

    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.scheduling.policies import SlackFit
    >>> from superserve_jax.serving.server import Server
    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> recorder = Recorder()
    >>> fake = recorder.engine(FakeEngine(profile, input_dtype=np.int64))
    >>> policy = recorder.policy(lambda table: SlackFit(table, defer=False))
    >>> with Server.from_engines([fake], profile, policy=policy) as served:
    ...     _ = recorder.submit(served, 1, slo_ms=1000.0)
    >>> [note[0] for note in recorder.notes if note[0] != "decided"][-2:]
    ['finished', 'resolved']
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self.notes: collections.deque[Note] = collections.deque()
        self.clock = clock
        self._lock = threading.Lock()
        self._offered = 0

    def submit(self, target: Server, count: int, *, slo_ms: float, min_accuracy: float = 0.0) -> list[tuple[int, Future]]:
        """Submits so many queries in one call; returns their keys and futures, none where the server refuses them."""
        with self._lock:
            keys = tuple(range(self._offered + 1, self._offered + count + 1))
            self._offered += count
        note = self.notes.append
        note(("offered", keys, self.clock(), slo_ms, min_accuracy))
        try:
            made = target.submit_many([np.array(key) for key in keys], slo_ms=slo_ms, min_accuracy=min_accuracy)
        except errors.SuperServeError as error:
            note((REFUSED, keys, type(error).__name__))
            return []
        queries = cast(list[Query], made)
        note(("submitted", keys, self.clock(), queries[0].deadline_s))
        for key, query in zip(keys, queries, strict=True):
            query.add_done_callback(functools.partial(self._resolved, key))
        return list(zip(keys, queries, strict=True))

    def cancel(self, key: int, query: Future) -> None:
        """Cancels a query, or tries to."""
        self.notes.append(("cancelling", key))
        query.cancel()

    def policy(self, make: Callable[[Profile], Policy]) -> Policy:
        """A policy that is made by `make` for every profile that it is asked about, and notes each decision."""
        made: dict[tuple[int, ...], Policy] = {}

        def decide(profile: Profile, state: State) -> Decision:
            self.notes.append(("decided", threading.get_ident()))
            if profile.batch_sizes not in made:
                made[profile.batch_sizes] = make(profile)
            return made[profile.batch_sizes](profile, state)

        return decide

    def engine(self, watched: Engine) -> Engine:
        """An engine that notes each batch of another one."""
        return _Watched(watched, self)

    def _resolved(self, key: int, query: Future) -> None:
        now_s = self.clock()
        if query.cancelled():
            outcome, reply = CANCELLED, None
        elif (error := query.exception(timeout=0)) is None:
            outcome, reply = ANSWERED, query.result(timeout=0)
        else:
            cause = f" of {type(error.__cause__).__name__}" if error.__cause__ else ""
            outcome, reply = type(error).__name__ + cause, None
        self.notes.append(("resolved", key, now_s, outcome, reply))


class _Watched(Wrapper):
    """See `Recorder.engine`."""

    def __init__(self, watched: Engine, recorder: Recorder):
        super().__init__(watched)
        self.overlap = getattr(watched, "overlap", None)
        self._recorder = recorder

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `engine.Engine.run`."""
        keys = self._started(inputs)
        return self._finished(keys, lambda: super(_Watched, self).run(subnet, batch_size, inputs))

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `engine.Overlapping.launch`."""
        wait, outputs = cast(Overlapping, self._inner).launch(subnet, batch_size, inputs)
        keys = self._started(inputs)
        return Launched(lambda: self._watched(keys, wait), lambda: self._finished(keys, outputs))

    def _started(self, inputs: list[np.ndarray]) -> tuple[Any, ...]:
        keys = tuple(x.item() for x in inputs)
        self._recorder.notes.append(("started", threading.get_ident(), keys))
        return keys

    def _watched(self, keys: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException:
            self._recorder.notes.append(("raised", keys))
            raise

    def _finished(self, keys: tuple[Any, ...], call: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        found = self._watched(keys, call)
        self._recorder.notes.append(("finished", keys, self._recorder.clock()))
        return found
