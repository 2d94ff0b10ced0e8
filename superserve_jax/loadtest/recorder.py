"""Records what the clients and the engines of a server see, for `checker.Checker`. No jax.

A server that miscounts cannot be caught by its own counters. So a `Recorder` stays outside of the server. It submits and
cancels queries, listens for their resolution, and wraps the engines and the policy.

All threads append their notes to one deque. The order of the notes proves the following:
- A query is noted as submitted after `submit` has returned. So it was in the queue before the note.
- The server asks the policy and takes the batch under one lock. So decisions are noted in the order in which batches were
  taken. The next engine call of the same thread tells which batch belongs to the decision.
- An engine call is noted as finished before the server knows of it, and a resolution is noted after it happened.

So assume that a query was noted as submitted before decision A, and a later decision took it. Then it was waiting at A. If its
deadline is earlier than one in A's batch, the server passed it over. No race explains it.
"""

import collections
import concurrent.futures
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
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

ANSWERED, CANCELLED, REFUSED, EXPIRED = "answered", "cancelled", "refused", errors.DeadlineExpiredError.__name__


class Deliberate(Exception):
    """Raised on purpose by the code around a server, where the server must pass it on."""


class Recorder:
    """Notes what happens at the edges of a server of `FakeEngine`s whose inputs have shape () and dtype int64.

    The inputs are the keys of the queries: 1, 2, 3, ... So an engine's output names its query. 0 is the blank input.

    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.scheduling.policies import SlackFit
    >>> from superserve_jax.serving.server import Server
    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> recorder = Recorder()
    >>> engine = recorder.engine(FakeEngine(profile, input_dtype=np.int64))
    >>> policy = recorder.policy(SlackFit(profile, defer=False))
    >>> with Server.from_engines([engine], profile, policy=policy) as server:
    ...     _ = recorder.submit(server, 1, slo_ms=1000.0)
    >>> [note[0] for note in recorder.notes if note[0] != "decided"][-2:]
    ['finished', 'resolved']
    """

    def __init__(self):
        self.notes: collections.deque[Note] = collections.deque()
        self._keys = itertools.count(1)  # without a lock: a signal handler or a finalizer may interrupt a submit and submit

    def submit(
        self,
        target: Server,
        count: int,
        *,
        slo_ms: float,
        min_accuracy: float = 0.0,
        ordered: bool = True,
        through: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]] = list,
    ) -> list[tuple[int, Future]]:
        """Submits `count` queries in one call. Returns their keys and futures, or an empty list if the server refuses them.

        Args:
          target: the server.
          count: number of queries.
          slo_ms, min_accuracy: see `Server.submit`.
          ordered: False if the queries may be passed over: the server may defer the call, as in a signal handler, or this is a
            second server.
          through: makes the argument of `submit_many` from the inputs. It may raise, or return a generator that does.
        """
        keys = tuple(itertools.islice(self._keys, count))
        self.notes.append(("offered", keys, time.monotonic(), slo_ms, min_accuracy))
        try:
            made = target.submit_many(through(np.array(key) for key in keys), slo_ms=slo_ms, min_accuracy=min_accuracy)
        except Exception as error:
            self.notes.append((REFUSED, keys, type(error).__name__))
            return []
        queries = cast(list[Query], made)
        self.notes.append(("submitted", keys, time.monotonic(), queries[0].deadline_s, ordered))
        for key, query in zip(keys, queries, strict=True):
            query.add_done_callback(functools.partial(self._on_resolved, key))
        return list(zip(keys, queries, strict=True))

    def read(self, key: int, query: Future, timeout_s: float) -> None:
        """Waits for a query, and notes what `result` says. Notes nothing if the query has not resolved in time."""
        try:
            query.exception(timeout_s)
        except (TimeoutError, concurrent.futures.CancelledError):
            if not query.done():
                return
        self.notes.append(("read", key, _outcome(query)))

    def cancel(self, key: int, query: Future) -> None:
        """Tries to cancel a query."""
        self.notes.append(("cancelling", key))
        query.cancel()

    def policy(self, inner: Policy) -> Policy:
        """A policy that decides as `inner` does, and notes each decision."""

        def decide(profile: Profile, state: State) -> Decision:
            if threading.current_thread().name.startswith("superserve-"):  # a swap tries a policy in its own thread
                self.notes.append(("decided", threading.get_ident()))
            return inner(profile, state)

        return decide

    def engine(self, inner: Engine) -> Engine:
        """An engine that runs the batches of `inner` and notes them."""
        return _Recorded(inner, self.notes)

    def _on_resolved(self, key: int, query: Future) -> None:
        now_s, outcome = time.monotonic(), _outcome(query)
        reply = query.result(timeout=0) if outcome == ANSWERED else None
        self.notes.append(("resolved", key, now_s, outcome, reply))


def _outcome(query: Future) -> str:
    """The outcome of a query that has resolved, in words (see `checker.CheckResult`)."""
    try:
        query.result(timeout=0)
    except concurrent.futures.CancelledError:
        return CANCELLED
    except BaseException as error:
        cause = error.__cause__
        return type(error).__name__ + ("" if cause is None else f" of {type(cause).__name__}")
    return ANSWERED


class _Recorded(Wrapper):
    """See `Recorder.engine`."""

    def __init__(self, inner: Engine, notes: collections.deque[Note]):
        super().__init__(inner)
        self.overlap = getattr(inner, "overlap", None)
        self._notes = notes

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `engines.base.Engine.run`."""
        keys = self._started(inputs)
        return self._finished(keys, lambda: super(_Recorded, self).run(subnet, batch_size, inputs))

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `engines.base.Overlapping.launch`."""
        launched = cast(Overlapping, self._inner).launch(subnet, batch_size, inputs)
        keys = self._started(inputs)
        return launched._replace(
            wait=lambda: self._guarded(keys, launched.wait), outputs=lambda: self._finished(keys, launched.outputs)
        )

    def _started(self, inputs: list[np.ndarray]) -> tuple[int, ...]:
        keys = tuple(x.item() for x in inputs)
        self._notes.append(("started", threading.get_ident(), keys))
        return keys

    def _guarded(self, keys: tuple[int, ...], call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException:
            self._notes.append(("raised", keys))
            raise

    def _finished(self, keys: tuple[int, ...], call: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        outputs = self._guarded(keys, call)
        self._notes.append(("finished", keys, time.monotonic()))
        return outputs
