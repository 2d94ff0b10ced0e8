"""What a server knows of each of its workers, and of the batches that a worker has. No jax."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from superserve_jax.engines.base import Engine, Launched
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Policy
from superserve_jax.scheduling.speeds import Fleet
from superserve_jax.serving.futures import Query
from superserve_jax.serving.retries import Retry
from superserve_jax.subnet import Subnet


class Successor(NamedTuple):
    """What a worker is to run instead (see `swap`)."""

    engine: Engine
    profile: Profile
    policy: Policy


@dataclasses.dataclass(slots=True, eq=False)
class Flight:
    """A batch that has been taken from where it waited, until it is answered or given back.

    Args:
      row: what it was decided to run on.
      batch: empty where blank inputs run in its place.
      place: of the batch size that it is padded to, among the profile's.
      retry: where it was taken from; None for the queue.
      reason: the policy's (see `policies.Decision`).
      started_s: since when the device has had nothing else to do first, as far as is known.
      launched: what has been handed to the device; None before, and where it runs in one call,
      refused: or the error that the device answered that with.
      shared: whether another batch has been on the device beside it.
    """

    row: Row
    batch: Sequence[Query]
    place: int
    retry: Retry | None
    reason: str
    started_s: float
    launched: Launched | None = None
    refused: BaseException | None = None
    shared: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class Worker:
    """One engine and its thread. `flights` are the batches that it has: one, or where the engine can stage a second one while
    the device computes the first (`overlap`), up to two, in the order in which they run."""

    engine: Engine
    name: str
    index: int
    profile: Profile  # of the batch sizes that it may run
    policy: Policy  # for that profile
    thread: threading.Thread = dataclasses.field(init=False)
    overlap: bool  # see `workers`
    flights: list[Flight] = dataclasses.field(default_factory=list)
    last_subnet: Subnet | None = None
    successor: Successor | None = None  # which it takes up before its next batch
    alive: bool = True
    present: bool = True
    gone: Literal["", "left", "abandoned", "removed"] = ""
    landed: bool = False  # whether the first flight has been answered
    answered: tuple[Any, ...] = ()  # what `telemetry.Counters.add` is to be told of it
    watched_s: float = 0.0  # since when the watchdog waits for the first flight
    free_s: float = 0.0  # when its device was done with the last batch
    host_s: float = 0.0  # with `overlap`, how long it takes to decide about a batch and hand it over,
    pace: float = 1.0  # and a batch over what its profile says, both of late
    batches: int = 0  # answered
    failed: int = 0  # batches
    failures: int = 0  # in a row for which it is to blame
    last_error: BaseException | None = None

    def next_begins(self, since_s: float, now_s: float) -> None:
        """What is still under way has the device to itself, at the earliest since `since_s`, and is watched from now on."""
        self.watched_s = now_s
        for flight in self.flights:
            flight.started_s = max(flight.started_s, since_s)

    def health(self, now_s: float, fleet: Fleet) -> dict[str, Any]:
        """See `server.Server.health`."""
        return {
            "name": self.name,
            "state": self.gone or ("running" if self.flights else "idle"),
            "batches": self.batches,
            "failures": self.failed,
            "max_batch": self.profile.max_batch,
            "slowdown": fleet.slowdown(self.index) if self.present else 1.0,
            "last_error": None if self.last_error is None else repr(self.last_error),
            "running_s": now_s - self.watched_s if self.flights else 0.0,
        }
