"""Plays a trace over the network: each request is sent when it is due, however late the answers are.

Latencies count from the time at which a request was due. One thread, one epoll, and messages that were made before. So a
request costs the generator a few system calls. It keeps the bytes of the answers, and looks at them after the run.
"""

import collections
import dataclasses
import gc
import select
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from gateway_load.messages import Answer

_LEAD_S = 0.1  # from the call to the trace's zero
_PERCENTILE = 99


class Connections(Protocol):
    """Connections to a server: `http1.Http1` or `http2.Http2`."""

    @property
    def has_room(self) -> bool:
        """Whether a request can be sent now."""
        ...

    def send(self, query: int, request: bytes) -> bool:
        """Sends a request. Returns False if that failed."""
        ...

    def receive(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Reads from the socket of this number. Yields queries and their answers."""
        ...

    def close(self) -> None:
        """Closes the connections."""
        ...


@dataclasses.dataclass(frozen=True)
class Played:
    """What became of the queries of a trace. All arrays have the shape (queries,).

    Args:
      due_s: when each request was due, from the trace's zero.
      sent_s: when it was sent; infinite if it was not.
      done_s: when its answer was read; infinite without one.
      lateness_s: how late the generator was. If no connection was free, the time up to the moment when it saw that.
      answers: the bytes of the answers; b"" without one.
      seconds: from the first request to the last answer.
      most_open: the most requests that were unanswered at the same time.
    """

    due_s: np.ndarray
    sent_s: np.ndarray
    done_s: np.ndarray
    lateness_s: np.ndarray
    answers: list[bytes]
    seconds: float
    most_open: int

    def of(self, chosen: np.ndarray) -> "Played":
        """The part of some queries. `chosen` is a mask of shape (queries,)."""
        answers = [answer for answer, is_chosen in zip(self.answers, chosen.tolist(), strict=True) if is_chosen]
        due_s, sent_s, done_s, lateness_s = (each[chosen] for each in (self.due_s, self.sent_s, self.done_s, self.lateness_s))
        return Played(due_s, sent_s, done_s, lateness_s, answers, self.seconds, self.most_open)


def play(
    connect: Callable[[select.epoll], Connections],
    due_s: np.ndarray,
    requests: Sequence[bytes],
    *,
    patience_s: float,
    on_start: Callable[[], object] = lambda: None,
) -> Played:
    """Sends the requests of a trace when they are due, and collects the answers.

    Args:
      connect: opens the connections.
      due_s: when each request is due, ascending, shape (queries,).
      requests: query i sends `requests[i % len(requests)]`.
      patience_s: how long to wait for answers after the last request is due.
      on_start: called when the connections are open.
    """
    collects = gc.isenabled()
    with select.epoll() as epoll:
        connections = connect(epoll)
        try:
            on_start()
            gc.collect()
            gc.disable()
            return _play(connections, epoll, due_s, requests, patience_s)
        finally:
            connections.close()
            if collects:
                gc.enable()


def _play(
    connections: Connections, epoll: select.epoll, due_s: np.ndarray, requests: Sequence[bytes], patience_s: float
) -> Played:
    n, due = len(due_s), due_s.tolist()
    sent, done, lateness, answers = [np.inf] * n, [np.inf] * n, [np.inf] * n, [b""] * n
    waiting: collections.deque[int] = collections.deque()  # due, but no connection was free
    next_due, ended, open_now, most_open = 0, 0, 0, 0
    end = due[-1] + patience_s
    start = time.monotonic() + _LEAD_S
    now = -_LEAD_S
    while ended < n and now < end:
        now = time.monotonic() - start
        while (next_due < n and due[next_due] <= now) or waiting:
            if not connections.has_room:
                while next_due < n and due[next_due] <= now:
                    lateness[next_due] = now - due[next_due]
                    waiting.append(next_due)
                    next_due += 1
                break
            if waiting:
                query = waiting.popleft()
            else:
                query = next_due
                next_due += 1
            now = sent[query] = time.monotonic() - start
            if lateness[query] == np.inf:
                lateness[query] = now - due[query]
            if connections.send(query, requests[query % len(requests)]):
                open_now += 1
                most_open = max(most_open, open_now)
            else:
                ended += 1
        for number, _ in _events(epoll, (due[next_due] if next_due < n else end) - time.monotonic() + start):
            for query, answer in connections.receive(number):
                answers[query] = answer
                ended += 1
                open_now -= 1
                if answer:
                    done[query] = time.monotonic() - start
    seconds = time.monotonic() - start
    return Played(due_s, np.array(sent), np.array(done), np.array(lateness), answers, seconds, most_open)


def _events(epoll: select.epoll, timeout_s: float) -> list[tuple[int, int]]:
    """Waits for answers, at most until the next request is due. `poll` counts in milliseconds, `select` in microseconds."""
    if timeout_s > 0:
        select.select([epoll], [], [], timeout_s)
    return epoll.poll(0)


def check(played: Played, read: Callable[[bytes], Answer], numbers: int) -> tuple[np.ndarray, int, list[str]]:
    """Reads all answers.

    Args:
      played: a run in which query i sent the number `i % numbers`.
      read: reads an answer.
      numbers: the number of different requests.

    Returns the accuracy of each answer (NaN without one), the number of wrong answers, and the first of them in words. An
    answer is wrong if it is an error, cannot be read, or belongs to another query.
    """
    accuracy, wrong, words = np.full(len(played.answers), np.nan), 0, list[str]()
    for query, raw in enumerate(played.answers):
        if not raw:
            continue
        try:
            answer, why = read(raw), ""
            if answer.number == answer.number and answer.number != query % numbers:
                why = f"query {query} sent {query % numbers} and got {answer.number}"
            elif answer.subnet == answer.subnet and answer.subnet != answer.rank:  # no NaN
                why = f"query {query} got the outputs of subnet {answer.rank}, but the answer names {answer.subnet}"
            accuracy[query] = answer.accuracy
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as e:
            why = f"query {query} got {raw[:300]!r}: {e}"
        if why:
            wrong += 1
            if len(words) < 5:
                words.append(why)
    return accuracy, wrong, words


def figures(played: Played, slo_ms: float, read: Callable[[bytes], Answer], numbers: int) -> dict[str, Any]:
    """The figures of a run.

    Args:
      played: the run.
      slo_ms: the latency objective.
      read: reads an answer.
      numbers: the number of different requests.
    """
    accuracy, wrong, words = check(played, read, numbers)
    latency_ms = 1e3 * (played.done_s - played.due_s)
    met, answered = latency_ms <= slo_ms, np.isfinite(latency_ms)
    ended = latency_ms[answered] if answered.any() else np.array([np.inf])
    return {
        "queries": len(met),
        "attainment": float(met.mean()),
        "accuracy": float(np.nanmean(accuracy[met])) if np.isfinite(accuracy[met]).any() else 0.0,
        "p50_ms": float(np.percentile(ended, 50)),
        "p99_ms": float(np.percentile(ended, _PERCENTILE)),
        "lateness_p99_ms": float(1e3 * np.percentile(played.lateness_s, _PERCENTILE)),
        "wrong": wrong,
        "lost": int((~answered).sum()),
        "most_open": played.most_open,
        "seconds": played.seconds,
        "words": words,
    }
