"""Checks from the notes of a `recorder.Recorder` whether a server kept its guarantees. No jax.

The guarantees are:
- Every query resolves exactly once: to an answer, or to a documented error. Its callbacks and `result` see the same outcome.
- An answer belongs to its own query. It comes from a batch that held the query and has finished, and from a subnet that
  reaches the query's floor. It says truthfully whether the deadline was met.
- No query runs in two batches at once, or after it was answered, refused or dropped.
- A query is dropped only when no subnet can meet its deadline any more.
- Batches follow the order of deadlines: no waiting query is passed over for one with a later deadline.
"""

import collections
import dataclasses
import heapq
import time
from collections.abc import Iterable, Iterator

from superserve_jax import errors
from superserve_jax.loadtest import recorder
from superserve_jax.loadtest.recorder import Note
from superserve_jax.profile import Profile
from superserve_jax.serving.futures import Reply

_NEVER_RUNS = (recorder.ANSWERED, recorder.REFUSED, recorder.EXPIRED)  # a query that ended so must not run afterwards
# The errors that a future or `submit` may give a correct query; and the error of a client's own generator.
_DOCUMENTED = frozenset(
    error.__name__
    for error in (
        *(errors.QueueFullError, errors.AdmissionError, errors.ServerClosedError, errors.WorkersLostError),
        *(errors.InferenceError, errors.PolicyError, errors.AccuracyFloorError, errors.DeadlineExpiredError),
        recorder.Deliberate,
    )
)
_SHOWN = 20  # violations that are described; further ones are only counted


@dataclasses.dataclass(slots=True)
class _Open:
    """A query that was offered and has not resolved."""

    offered_s: float
    slo_ms: float
    floor: float
    deadline_s: float | None = None  # None until it is submitted
    taken: bool = False  # whether a decision took it
    running: int = 0  # engine calls that hold it now
    finished_s: float | None = None  # when the first engine call with it returned
    cancelling: bool = False  # whether its client tried to cancel it
    passed_over: str = ""  # if it waited and was passed over: its deadline and the later batch, in words
    read: str = ""  # the outcome that `result` gave before the callback


@dataclasses.dataclass(eq=False, slots=True)
class _Decision:
    read_s: float
    keys: tuple[int, ...] | None = None  # the queries of the batch; None until they are known


@dataclasses.dataclass
class CheckResult:
    """What happened to the queries, counted from the notes alone.

    Args:
      offered: the queries with which clients called `submit`.
      outcomes: the number of queries by outcome. An outcome is "answered", "cancelled", "refused: ERROR" for an error of
        `submit`, or the future's error with its cause, such as "InferenceError of ValueError".
      lost: the queries that never resolved.
      twice: the number of resolutions and refusals of queries that had resolved before, or were never offered.
      batches: the number of engine calls.
      compared: the number of decisions whose batch was compared with all waiting queries.
      violations: the number of broken guarantees, including `lost` and `twice`.
      examples: descriptions of the first violations.
    """

    offered: int = 0
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    lost: int = 0
    twice: int = 0
    batches: int = 0
    compared: int = 0
    violations: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)


class Checker:
    """Reads notes and counts violations. It forgets a query when it resolves, so its memory stays bounded.

    Args:
      profile: the profile of the engines.
      strict_order: whether the policy takes queries strictly in the order of deadlines. A policy that defers queries does not.
      abandons: whether the server abandons stuck workers. Then a query may run again while the stuck call still holds it.
      patience_s: how long to wait for the engine call of a decision. Then the decision counts as one without a batch. There
        is no call if all queries of the batch were cancelled, or the policy hung, and the thread has ended.

    Attributes:
      result: the counts so far.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> checker = Checker(paper_profile(), strict_order=True)
    >>> checker.read(collections.deque([("offered", (1,), 0.0, 500.0, 0.0), ("submitted", (1,), 1.0, 0.5)]))
    >>> result = checker.finish()
    >>> result.offered, result.lost, result.examples
    (1, 1, ['query 1 was lost: it never resolved'])
    """

    def __init__(self, profile: Profile, *, strict_order: bool, abandons: bool = False, patience_s: float = 5.0):
        self.result = CheckResult()
        self._rows, self._fastest_s = profile.rows, 1e-3 * profile.fastest().latency_ms[0]
        self._strict_order, self._abandons, self._patience_s = strict_order, abandons, patience_s
        self._unread: collections.deque[Note] = collections.deque()
        self._undecided: dict[int, _Decision] = {}  # by thread
        self._open: dict[int, _Open] = {}  # by key
        self._ended = bytearray(1)  # by key: an index of `_outcomes`. This byte is all that is kept of a resolved query.
        self._outcomes = [""]  # every outcome so far; "" for a query that is open
        # A heap of (deadline_s, key). It may hold queries that wait no longer. Queries that were passed over are removed.
        self._waiting: list[tuple[float, int]] = []

    @property
    def size(self) -> int:
        """The number of queries and notes in memory."""
        return len(self._open) + len(self._unread) + len(self._waiting)

    def read(self, notes: collections.deque[Note]) -> None:
        """Takes the present notes from `notes`. Other threads may append to it meanwhile."""
        for _ in range(len(notes)):
            note = notes.popleft()
            if note[0] == "decided":
                self._settle(note[1])
                decision = self._undecided[note[1]] = _Decision(time.monotonic())
                note = ("decided", decision)
            elif note[0] == "started":
                self._settle(note[1], note[2])
            self._unread.append(note)
        self._process()

    def finish(self) -> CheckResult:
        """Checks the remaining notes. Call it when the server is closed and no thread writes notes any more."""
        for thread in list(self._undecided):
            self._settle(thread)
        self._process()
        self.result.lost = len(self._open)
        for key in self._open:
            self._violation(f"query {key} was lost: it never resolved")
        return self.result

    def _settle(self, thread: int, keys: tuple[int, ...] = ()) -> None:
        """Notes that the last decision of a thread took these queries."""
        if (decision := self._undecided.pop(thread, None)) is not None:
            decision.keys = keys

    def _process(self) -> None:
        """Processes the notes in order, up to the first decision whose batch is still unknown."""
        unread = self._unread
        while unread:
            kind, *values = unread[0]
            if kind == "decided" and values[0].keys is None and time.monotonic() < values[0].read_s + self._patience_s:
                return
            unread.popleft()
            getattr(self, f"_on_{kind}")(*values)

    def _violation(self, text: str) -> None:
        self.result.violations += 1
        if len(self.result.examples) < _SHOWN:
            self.result.examples.append(text)

    def _open_ones(self, keys: Iterable[int]) -> Iterator[_Open]:
        return (self._open[key] for key in keys if key in self._open)

    # -- one method for each kind of note -----------------------------------------------------------------------------------

    def _on_offered(self, keys: tuple[int, ...], now_s: float, slo_ms: float, floor: float) -> None:
        self.result.offered += len(keys)
        self._ended.extend(bytes(max(keys[-1] + 1 - len(self._ended), 0)))
        self._open.update((key, _Open(now_s, slo_ms, floor)) for key in keys)

    def _on_submitted(self, keys: tuple[int, ...], now_s: float, deadline_s: float, ordered: bool = True) -> None:
        for key in keys:
            query = self._open[key]  # the recorder listens for its resolution only after this note
            query.deadline_s = deadline_s
            slo_s = 1e-3 * query.slo_ms
            if not query.offered_s + slo_s <= deadline_s <= now_s + slo_s:
                self._violation(
                    f"query {key} got the deadline {deadline_s}, but was offered at {query.offered_s} with {query.slo_ms} ms"
                )
            if self._strict_order and ordered and not query.taken:
                heapq.heappush(self._waiting, (deadline_s, key))
        if len(self._waiting) > 1_000 + 2 * len(self._open):
            self._waiting = [(due_s, key) for due_s, key in self._waiting if key in self._open]
            heapq.heapify(self._waiting)

    def _on_refused(self, keys: tuple[int, ...], error: str) -> None:
        for key in keys:
            query = self._end(key, f"{recorder.REFUSED}: {error}")
            if query is not None and query.taken:
                self._violation(f"query {key} was refused, but it ran")

    def _on_cancelling(self, key: int) -> None:
        for query in self._open_ones((key,)):
            query.cancelling = True

    def _on_decided(self, decision: _Decision) -> None:
        keys = decision.keys or ()
        queries = {key: self._open[key] for key in keys if key in self._open}
        fresh = not any(query.taken for query in queries.values())  # a batch of retries runs ahead of its turn
        for key, query in queries.items():
            if query.passed_over and not query.taken:
                self._violation(f"query {key} waited and was passed over: {query.passed_over}")
            query.taken = True
        deadlines_s = [query.deadline_s for query in queries.values() if query.deadline_s is not None]
        if fresh and deadlines_s and self._strict_order:
            self.result.compared += 1
            self._pass_over(max(deadlines_s), keys)

    def _pass_over(self, before_s: float, keys: tuple[int, ...]) -> None:
        """Marks all waiting queries with an earlier deadline. It is a violation if one of them is taken later."""
        while self._waiting and self._waiting[0][0] < before_s:
            deadline_s, key = heapq.heappop(self._waiting)
            for query in self._open_ones((key,)):
                if not query.taken:
                    query.passed_over = f"it was due at {deadline_s}, and the batch {keys} due at {before_s} was taken first"

    def _on_started(self, _: int, keys: tuple[int, ...]) -> None:
        self.result.batches += 1
        for key in keys:
            query = self._open.get(key)
            if query is not None:
                query.taken = True
                query.running += 1
                if query.running > 1 and not self._abandons:
                    self._violation(f"query {key} ran twice at once")
            elif not self._abandons and (outcome := self._outcome(key)).startswith(_NEVER_RUNS):
                self._violation(f"query {key} ran after it had ended: {outcome}")

    def _on_raised(self, keys: tuple[int, ...]) -> None:
        for query in self._open_ones(keys):
            query.running -= 1

    def _on_finished(self, keys: tuple[int, ...], now_s: float) -> None:
        for query in self._open_ones(keys):
            query.running -= 1
            query.finished_s = now_s if query.finished_s is None else query.finished_s

    def _on_resolved(self, key: int, now_s: float, outcome: str, reply: Reply | None) -> None:
        query = self._end(key, outcome)
        if query is None:
            return
        if query.read and query.read != outcome:
            self._violation(f"query {key} was {outcome} for its callback, but result() had said: {query.read}")
        if outcome == recorder.CANCELLED and not query.cancelling:
            self._violation(f"query {key} was cancelled, but no client asked for it")
        if outcome == recorder.EXPIRED and query.deadline_s is not None and query.deadline_s > now_s + self._fastest_s:
            self._violation(f"query {key} was dropped at {now_s}, in time for its deadline {query.deadline_s}")
        if reply is None:
            return
        if query.finished_s is None or query.deadline_s is None:
            self._violation(f"query {key} was answered before any batch with it finished")
        elif query.finished_s > query.deadline_s if reply.met_slo else now_s <= query.deadline_s:
            self._violation(f"query {key} was due at {query.deadline_s}, and the answer at {now_s} says {reply.met_slo=}")
        value, rank = reply.output
        row = self._rows[rank]
        if (value, row.subnet, row.accuracy) != (key, reply.subnet, reply.accuracy):
            self._violation(f"query {key} got the answer of query {value} by subnet {rank}, labelled {reply.subnet}")
        if reply.accuracy < query.floor:
            self._violation(f"query {key} asked for an accuracy of {query.floor} and got {reply.accuracy}")

    def _on_read(self, key: int, outcome: str) -> None:
        if key in self._open:
            self._open[key].read = outcome
        elif (ended := self._outcome(key)) != outcome:
            self._violation(f"query {key} was {ended} for its callback, but result() says: {outcome}")

    def _end(self, key: int, outcome: str) -> _Open | None:
        """Counts a query's outcome and forgets it. Returns None if it was not open."""
        query = self._open.pop(key, None)
        if query is None:
            self.result.twice += 1
            self._violation(f"query {key} resolved again, or was never offered: {outcome}")
            return None
        if outcome not in self._outcomes:
            self._outcomes.append(outcome)
        self._ended[key] = self._outcomes.index(outcome)
        self.result.outcomes[outcome] = self.result.outcomes.get(outcome, 0) + 1
        name = outcome.removeprefix(f"{recorder.REFUSED}: ").partition(" ")[0]
        if name not in (recorder.ANSWERED, recorder.CANCELLED) and name not in _DOCUMENTED:
            self._violation(f"query {key} got an undocumented error: {outcome}")
        return query

    def _outcome(self, key: int) -> str:
        """The outcome of a query that has resolved."""
        return self._outcomes[self._ended[key]]
