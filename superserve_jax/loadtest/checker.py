"""Whether a server kept its promises, judged from its history alone. No jax."""

import collections
import dataclasses
import heapq
from collections.abc import Sequence

from superserve_jax.loadtest import recorder
from superserve_jax.loadtest.recorder import Note
from superserve_jax.profile import Profile
from superserve_jax.serving.futures import Reply

_MUST_NOT_RUN = {2: recorder.ANSWERED, 3: recorder.REFUSED}  # as `Checker._ended` has it
_SHOWN = 20  # violations that are kept as text; the others are only counted


@dataclasses.dataclass(slots=True)
class _Open:
    """A query that has been offered and not resolved."""

    offered_s: float
    slo_ms: float
    floor: float
    deadline_s: float | None = None  # once submitted
    taken: bool = False  # by a decision
    running: int = 0  # engine calls with it
    finished_s: float | None = None  # when the first engine call with it returned
    cancelling: bool = False
    passed_over: str = ""  # by which batch, if it was waiting


@dataclasses.dataclass(eq=False, slots=True)
class _Decision:
    keys: tuple[int, ...] = ()
    settled: bool = False  # whether the batch is known


@dataclasses.dataclass(frozen=True)
class Findings:
    """What became of the queries, all of it counted from the notes.

    Args:
      offered: queries with which clients called `submit`.
      outcomes: how many of them ended how: "answered", "cancelled", "refused: ERROR" at `submit`, or the error of the future
        with its cause, such as "InferenceError of ValueError".
      lost: queries that never resolved.
      twice: resolutions and refusals of queries that had one.
      batches: calls of engines.
      compared: decisions whose batch was compared with all that waited.
      violations: promises broken, those among `lost` and `twice` included.
      examples: the first of them, in words.
    """

    offered: int
    outcomes: dict[str, int]
    lost: int
    twice: int
    batches: int
    compared: int
    violations: int
    examples: tuple[str, ...]


class Checker:
    """Reads the notes of a `history.Recorder`, in pieces if need be, so that memory stays bounded, and counts broken promises.

    They are: every query resolves exactly once; its answer is its own, of a batch with it that finished, from a subnet that
    reaches its floor, and honest about the deadline; nothing runs twice at once; and no query that waited with an earlier
    deadline was passed over.

    Args:
      profile: the engines'.
      strict_order: whether the policy keeps the order of the deadlines, as one does that never defers.
      abandons: whether workers are abandoned, so that a query may run again while a stuck call still holds it.
      patience: notes after which a decision whose batch is still unknown is taken for one without a batch. It has none where
        all of it was cancelled, and then its thread may have gone.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> checker = Checker(paper_profile(), strict_order=True)
    >>> checker.read(collections.deque([("offered", (1,), 0.0, 500.0, 0.0), ("submitted", (1,), 1.0, 0.5)]))
    >>> found = checker.finish()
    >>> found.offered, found.lost, found.examples
    (1, 1, ('query 1 was lost: it never resolved',))
    """

    def __init__(self, profile: Profile, *, strict_order: bool, abandons: bool = False, patience: int = 50_000):
        self._rows = profile.rows
        self._strict_order, self._abandons, self._patience = strict_order, abandons, patience
        self._unread: collections.deque[Note] = collections.deque()
        self._undecided: dict[int, _Decision] = {}  # by thread
        self._open: dict[int, _Open] = {}
        self._ended = bytearray(1)  # by key: 1 resolved, 2 answered, 3 refused; a byte is all that stays of a query
        self._waiting: list[tuple[float, int]] = []  # a heap of (deadline_s, key), with some that wait no more
        self._outcomes: collections.Counter[str] = collections.Counter()
        self.offered = self._twice = self._batches = self._compared = self._violations = 0
        self._examples: list[str] = []

    def read(self, notes: collections.deque[Note]) -> None:
        """Takes all notes from `notes`, to which others may append meanwhile."""
        while True:
            try:
                note = notes.popleft()
            except IndexError:
                break
            if note[0] == "decided":
                self._settle(note[1])
                decision = self._undecided[note[1]] = _Decision()
                note = ("decided", decision)
            elif note[0] == "started":
                self._settle(note[1], note[2])
            self._unread.append(note)
        self._go_on()

    def finish(self) -> Findings:
        """Judges what is left, once nothing happens any more."""
        for thread in list(self._undecided):
            self._settle(thread)
        self._go_on()
        for key in self._open:
            self._violation(f"query {key} was lost: it never resolved")
        return Findings(
            self.offered,
            dict(self._outcomes.most_common()),
            len(self._open),
            self._twice,
            self._batches,
            self._compared,
            self._violations,
            tuple(self._examples),
        )

    def _settle(self, thread: int, keys: tuple[int, ...] = ()) -> None:
        if (decision := self._undecided.pop(thread, None)) is not None:
            decision.keys, decision.settled = keys, True

    def _go_on(self) -> None:
        unread = self._unread
        while unread:
            kind, *rest = unread[0]
            if kind == "decided" and not rest[0].settled and len(unread) < self._patience:
                return
            unread.popleft()
            getattr(self, f"_on_{kind}")(*rest)

    def _violation(self, text: str) -> None:
        self._violations += 1
        if len(self._examples) < _SHOWN:
            self._examples.append(text)

    # -- one for each kind of note ------------------------------------------------------------------------------------------

    def _on_offered(self, keys: Sequence[int], now_s: float, slo_ms: float, floor: float) -> None:
        self.offered += len(keys)
        self._ended.extend(bytes(max(keys[-1] + 1 - len(self._ended), 0)))
        for key in keys:
            self._open[key] = _Open(now_s, slo_ms, floor)

    def _on_submitted(self, keys: Sequence[int], now_s: float, deadline_s: float) -> None:
        for key in keys:
            query = self._open[key]  # it is told of a resolution only after this
            query.deadline_s = deadline_s
            slo_s = 1e-3 * query.slo_ms
            if not query.offered_s + slo_s <= deadline_s <= now_s + slo_s:
                self._violation(f"query {key} got the deadline {deadline_s}, {query.slo_ms} ms after {query.offered_s}")
            if self._strict_order and not query.taken:
                heapq.heappush(self._waiting, (deadline_s, key))
        if len(self._waiting) > 1_000 + 2 * len(self._open):
            self._waiting = [(due_s, key) for due_s, key in self._waiting if key in self._open]
            heapq.heapify(self._waiting)

    def _on_refused(self, keys: Sequence[int], error: str) -> None:
        for key in keys:
            query = self._end(key, recorder.REFUSED, f"{recorder.REFUSED}: {error}")
            if query is not None and query.taken:
                self._violation(f"query {key} was refused, and run")

    def _on_cancelling(self, key: int) -> None:
        if (query := self._open.get(key)) is not None:
            query.cancelling = True

    def _on_decided(self, decision: _Decision) -> None:
        queries = [self._open[key] for key in decision.keys if key in self._open]
        fresh = all(not query.taken for query in queries)  # else what has failed runs again, ahead of its turn
        for key in decision.keys:
            query = self._open.get(key)
            if query is not None and query.passed_over and not query.taken:
                self._violation(f"query {key} waited and was passed over: {query.passed_over}")
        for query in queries:
            query.taken = True
        deadlines_s = [query.deadline_s for query in queries if query.deadline_s is not None]
        if fresh and deadlines_s and self._strict_order:
            self._compared += 1
            self._pass_over(max(deadlines_s), decision.keys)

    def _pass_over(self, before_s: float, keys: Sequence[int]) -> None:
        """Notes with all that waits and is due earlier that it was not taken; which is wrong if it is taken later."""
        passed = []
        while self._waiting and self._waiting[0][0] < before_s:
            deadline_s, key = heapq.heappop(self._waiting)
            query = self._open.get(key)
            if query is not None and not query.taken:
                query.passed_over = (
                    query.passed_over or f"it is due at {deadline_s}, and of the batch {keys} one at {before_s}"
                )
                passed.append((deadline_s, key))
        for entry in passed:
            heapq.heappush(self._waiting, entry)

    def _on_started(self, _: int, keys: Sequence[int]) -> None:
        self._batches += 1
        for key in keys:
            query = self._open.get(key)
            if query is not None:
                query.taken = True
                query.running += 1
                if query.running > 1 and not self._abandons:
                    self._violation(f"query {key} runs twice at once")
            elif key and not self._abandons and self._ended[key] in _MUST_NOT_RUN:
                self._violation(f"query {key} was run after it had been {_MUST_NOT_RUN[self._ended[key]]}")

    def _on_raised(self, keys: Sequence[int]) -> None:
        for key in keys:
            if (query := self._open.get(key)) is not None:
                query.running -= 1

    def _on_finished(self, keys: Sequence[int], now_s: float) -> None:
        for key in keys:
            if (query := self._open.get(key)) is not None:
                query.running -= 1
                query.finished_s = now_s if query.finished_s is None else query.finished_s

    def _on_resolved(self, key: int, now_s: float, outcome: str, reply: Reply | None) -> None:
        query = self._end(key, outcome, outcome)
        if query is None:
            return
        if outcome == recorder.CANCELLED and not query.cancelling:
            self._violation(f"query {key} was cancelled by nobody")
        if reply is None:
            return
        if query.finished_s is None or query.deadline_s is None:
            self._violation(f"query {key} was answered, and no batch with it had finished")
        elif query.finished_s > query.deadline_s if reply.met_slo else now_s <= query.deadline_s:
            self._violation(f"query {key} was due at {query.deadline_s}, and the answer at {now_s} says {reply.met_slo=}")
        value, rank = reply.output
        row = self._rows[rank]
        if (value, row.subnet, row.accuracy) != (key, reply.subnet, reply.accuracy):
            self._violation(f"query {key} got the answer of {value} from subnet {rank}, said to be of {reply.subnet}")
        if reply.accuracy < query.floor:
            self._violation(f"query {key} asked for an accuracy of {query.floor} and got {reply.accuracy}")

    def _end(self, key: int, how: str, outcome: str) -> _Open | None:
        """Closes a query's account; None where it is not open."""
        query = self._open.pop(key, None)
        if query is None:
            self._twice += 1
            self._violation(f"query {key} resolved again, or had never been offered: {outcome}")
            return None
        self._ended[key] = {recorder.ANSWERED: 2, recorder.REFUSED: 3}.get(how, 1)
        self._outcomes[outcome] += 1
        return query
