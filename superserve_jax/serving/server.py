"""The threaded server: queries in, futures out. No jax until a model is loaded.

Threads
- **Client threads**, any number: `submit` checks the query and puts it into the queue. They never wait for a device.
- **One worker thread per engine** (`workers.Pool._work_on`): waits on the condition `_work` while the queue is empty, else
  asks the policy, takes the batch, runs the engine, answers the futures and runs their done-callbacks. No router in between.
  Where the device computes on its own (`engine.Overlapping`), it takes the next batch and hands it over shortly before the
  last is done, and then answers that one.
- **One watchdog** (`crew.Crew._watch`): sleeps on a bell, which rings when the server has been closed or collected. Every
  quarter of `stall_s` it abandons the workers stuck in an engine: a thread in a call cannot be ended.
- **The closing thread**, any: waits on the condition `_left` until every worker has left, then joins the threads. So does
  whoever removes a worker, for that one.
- **A swapping thread**, any but a worker's: makes the new engines while the workers run, gives each worker its successor under
  the pool's lock, and waits on `_left` until all have taken theirs up, each between two batches (`swap.Swapping`).

Locks
- **The pool's lock** guards the queue and the workers' state. It is held for a submit, or for one decision of the policy
  (10 us); never while an engine runs, and never while a future resolves, since that runs foreign code.
- **The server's `_changing`** is held by who swaps or adds a worker while the engines are made, and taken before the pool's.
- **The futures' locks**, one for all queries of a submit, and **the mailboxes' locks**, one for each event loop that awaits
  queries, are held for a few instructions, and never while the pool's lock is.

Who may block on what: clients and workers on the pool's lock, briefly; workers on their engine, for as long as it takes; a
client in `Future.result` on a lock of its own, which the worker that answers releases. A done-callback runs in a worker and
keeps its device waiting.

Exactly once: a future turns away every answer but the first, so whoever comes late (an abandoned worker, the answer to a
cancelled query, a close) has no effect. Never not at all: a query is in the queue, among the retries (see `retries.py`), in
`Worker.flights` of a worker that is present, or about to be resolved by the thread that took it from there; a worker that goes
gives its batches back, and the last one fails what waits.

Faults: a batch that failed is run again, by another worker if there is one, and then in ever smaller parts, until the input
that fails has failed alone; only that query gets the error. The worker meanwhile runs the failed batch with blank inputs. Only
where that fails, too, it is to blame, and it leaves after `max_failures` such batches in a row. Where its memory did not
suffice, the batch goes back and the worker's batches are at most half as large from then on.

All threads are daemons, so a server that nobody closed does not keep the interpreter alive; before that goes, the workers end
(`crew.Crew._exit`). A fork has the server's memory but none of its threads: there it refuses everything, and closing it does
nothing.
"""

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Unpack

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.lengths import trim_padding
from superserve_jax.profile import Profile, profiles_of_workers
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Policy
from superserve_jax.serving import background
from superserve_jax.serving.futures import Future, Query
from superserve_jax.serving.options import Options, Tuning
from superserve_jax.serving.workers import Pool

_MAX_SLO_MS = 1e12  # 31 years; a thread cannot wait for much longer
_MAX_NAME = 100  # characters of a policy's name, which may nest


class Server:
    """Serves a SuperNet on one device or several: for every batch the policy picks the subnet that the deadlines allow.

    Args:
      path_or_model: an export's directory, or what `superserve_jax.load` returned.
      policy: a name, such as "slackfit", or a policy (see `scheduling.policies`).
      slo_ms: a query's latency objective unless it names its own.
      batch_sizes: batch sizes to make executables for.
      lengths: of a family whose inputs have a length, the length buckets to make executables for: inputs are padded to one of
        them, and the longest that is served is the last. None takes powers of two from 16 up to the model's longest.
      devices: jax devices, one worker each; None takes all.
      slicing: when a device slices a subnet's weights out of the SuperNet's: "in_call" in every call, "kept" when the subnet
        changes (see `engines.device`); None takes the faster one, as the profile says.
      slice_bytes: of "kept", the most that the slices may take; None takes a quarter of the weights' bytes, at least 16 MiB.
      max_queue: queries that may wait; one more is refused.
      expire: whether a query that can no longer meet its deadline is answered with DeadlineExpiredError instead of late.
      **tuning: see `tuning.Tuning`.

    Queries are served in the order of their deadlines, except that the default policy lets those that cannot be met any more
    step back behind the others (see `policies.SlackFit`); `policies.SlackFit(profile, defer=False)` keeps the strict order.
    With several length buckets a batch takes the head and others that are no longer (see `length_queue`); a policy that is
    no name is asked with the profile at the head's length, so wrap one that holds tables (see `policies.ByProfile`).

    In an overload the default policy is fair to SLOs: by the time they are due, queries with a long one are as urgent as those
    with a short one that came later, and of each SLO the same share is met, what the workers carry over what comes (see
    `tests/test_overload.py`). A full queue refuses all alike, and admission control is fair once an overload has lasted for
    0.2 s; until then it prefers long SLOs (see `admission`).

    Use it as a context manager: leaving it answers what waits, or, on an exception, fails it.

    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.profile import Profile, Row
    >>> from superserve_jax.scheduling.policies import Decision
    >>> from superserve_jax.subnet import Subnet
    >>> row = Row(Subnet((1,)), 0.7, (1.0, 1.5))
    >>> table = Profile((1, 2), (row,))
    >>> fake = FakeEngine(table)
    >>> always = lambda profile, state: Decision(row.subnet, 2)
    >>> with Server.from_engines([fake], table, policy=always) as server:
    ...     reply = server.submit(np.float32(5)).result(timeout=10)
    >>> reply.output, reply.accuracy
    ((5.0, 0), 0.7)
    """

    def __init__(
        self,
        path_or_model: Any,
        *,
        policy: str | Policy = "slackfit",
        slo_ms: float = 36.0,
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
        lengths: Sequence[int] | None = None,
        devices: Sequence[Any] | None = None,
        slicing: Literal["kept", "in_call"] | None = None,
        slice_bytes: int | None = None,
        max_queue: int = 10_000,
        expire: bool = False,
        **tuning: Unpack[Tuning],
    ):
        from superserve_jax.engines import prepare  # here, since it imports jax

        self.model, engines, each = prepare.prepare(
            path_or_model,
            batch_sizes=batch_sizes,
            lengths=lengths,
            devices=devices,
            slicing=slicing,
            slice_bytes=slice_bytes,
            background=background_traffic,
        )
        self._options = {"slicing": slicing, "slice_bytes": slice_bytes}
        self._open(engines, each, policy, slo_ms=slo_ms, max_queue=max_queue, expire=expire, **tuning)

    @classmethod
    def from_engines(
        cls,
        engines: Sequence[Engine],
        profile: Profile | Sequence[Profile],
        *,
        policy: str | Policy = "slackfit",
        slo_ms: float = 36.0,
        max_queue: int = 10_000,
        expire: bool = False,
        **tuning: Unpack[Tuning],
    ) -> "Server":
        """A server of engines that exist already, all with the batch sizes and length buckets of `profile`.

        Args:
          profile: of all engines, or one for each, since devices differ: each is a worker with the subnets of its profile.
        """
        self = cls.__new__(cls)
        self.model, self._options = None, {}
        self._open(engines, profile, policy, slo_ms=slo_ms, max_queue=max_queue, expire=expire, **tuning)
        return self

    def _open(
        self,
        engines: Sequence[Engine],
        profile: Profile | Sequence[Profile],
        policy: str | Policy,
        *,
        slo_ms: float,
        **options: Any,
    ) -> None:
        settings = Options(**options)
        with errors.refusing(errors.ConfigError, "engines must be a list of engines (see engine.Engine)"):
            engines = list(engines)
            specs = {_spec(e) for e in engines}
        if len(specs) != 1:
            raise errors.ConfigError(f"a server needs engines, all for the same inputs; {len(engines)} engines take {specs}")
        [(self._shape, self._dtype, self._lengths, self._pad_id)] = specs
        each = profiles_of_workers(profile, len(engines))
        if self._lengths != each[0].lengths:
            raise errors.ConfigError(
                f"engines for the lengths {list(self._lengths)} and a profile of {list(each[0].lengths)}; they must agree"
            )
        input_bytes = math.prod((*self._lengths[-1:], *self._shape[bool(self._lengths) :])) * self._dtype.itemsize
        if input_bytes > settings.max_queue_bytes:
            raise errors.ConfigError(
                f"max_queue_bytes={settings.max_queue_bytes}, but one input has {input_bytes}; allow more"
            )
        self.profiles, self.profile = tuple(each), each[0]
        self._slo_ms = check_slo(slo_ms)
        self._changing = threading.Lock()  # held by who adds or swaps: a swap is for the workers that there were at its start
        self._pool = Pool(
            engines,
            each,
            functools.partial(make_policy, policy),
            settings,
            input_bytes=input_bytes,
            pause_s=1e-3 * self._slo_ms,
        )
        self._clock = settings.clock
        weakref.finalize(self, self._pool.ring).atexit = False

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(drain=error_type is None)

    def submit(self, x: Any, *, slo_ms: float | None = None, min_accuracy: float = 0.0) -> Future:
        """Asks for one answer.

        Args:
          x: one input, without a batch dimension, of exactly the engine's shape and dtype; with length buckets of any length
            up to the longest, padding at the end not counted. It is not copied: do not write to it until the answer is there.
          slo_ms: the answer is due so many milliseconds from now; None takes the server's.
          min_accuracy: only subnets with at least this profiled accuracy, a fraction of 1, may answer.

        Returns:
          A future whose result is a `futures.Reply`.

        Raises:
          InputError, DeadlineError, AccuracyFloorError: the query cannot be served. QueueFullError, AdmissionError,
          ServerClosedError, WorkersLostError: not by this server, now.
        """
        return self._admit((x,), slo_ms, min_accuracy)[0]

    def submit_many(self, xs: Iterable[Any], *, slo_ms: float | None = None, min_accuracy: float = 0.0) -> list[Future]:
        """Like `submit` for each of `xs`, with one wake-up for all. Where it raises, none has been submitted."""
        try:
            each = iter(xs)
        except TypeError as e:
            raise errors.InputError(f"submit_many takes inputs, got {type(xs).__name__} ({e}); submit takes one") from e
        return self._admit(each, slo_ms, min_accuracy)

    def _admit(self, xs: Iterable[Any], slo_ms: float | None, min_accuracy: float) -> list[Any]:
        slo_ms = self._slo_ms if slo_ms is None else check_slo(slo_ms)
        best = self._pool.best
        if not _is_at_most(min_accuracy, best):
            raise errors.AccuracyFloorError(
                f"min_accuracy={min_accuracy!r}, a fraction of 1, but the best served subnet has {best}; ask for no more"
            )
        now_s = self._clock()
        deadline_s = now_s + 1e-3 * slo_ms
        lock = threading.RLock()
        queries = [Query(self._checked(x), now_s, deadline_s, min_accuracy, lock) for x in xs]
        if self._lengths:
            for query in queries:
                query.length = len(query.inputs)
        self._pool.admit(queries)
        return queries

    def _checked(self, x: Any) -> np.ndarray:
        """`x` as an array. Never cast: pixels of 0..255 read as 0..1 would be wrong answers without an error."""
        array = x if type(x) is np.ndarray else _as_array(x)
        if self._lengths and array.ndim and array.shape[1:] == self._shape[1:] and array.dtype == self._dtype:
            array = trim_padding(array, self._pad_id)
            if not 0 < len(array) <= self._lengths[-1]:
                raise errors.InputError(
                    f"an input of {len(array)} tokens, padding at the end not counted; expected 1 to {self._lengths[-1]}: "
                    "cut it, or open the server with a greater length"
                )
            return array
        if array.shape != self._shape or array.dtype != self._dtype:
            raise errors.InputError(
                f"an input of shape {array.shape} and dtype {array.dtype}; expected {self._shape} and {self._dtype}, "
                "one input without a batch dimension. Inputs are never cast: convert it as the model's export describes"
            )
        return array

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more queries, answers those that wait, and ends the threads. May be called twice, from any thread.

        Args:
          drain: False fails the waiting queries with ServerClosedError; batches that are running are still answered.
          timeout_s: the longest to wait. After that, workers that are still busy are abandoned, and every query left fails
            with an error. None waits as long as it takes, but for no worker that is stuck (see `tuning.Tuning`).

        In a done-callback, which runs on a worker, it does not wait.
        """
        self._pool.close(drain=drain, timeout_s=timeout_s)

    def add_worker(self, engine_or_device: Any, *, profile: Profile | None = None) -> str:
        """Adds a worker while serving, to a server that has lost all of its workers, too, which then serves again.

        Args:
          engine_or_device: an engine like the others; or, where the server was opened with a model, a jax device, for which
            the executables are made first, in the calling thread.
          profile: its latencies; None takes those of the first worker.

        Returns:
          Its name: the engine's, with a number where a worker has that name already.

        Raises:
          ConfigError: the engine takes other inputs, or there is no model. ServerClosedError.
        """
        with self._changing:
            new, profile = engine_or_device, profile or self.profile
            if not hasattr(new, "run"):
                if self.model is None:
                    raise errors.ConfigError(
                        f"a server of engines takes an engine, got {new!r}; it has no model to make one of"
                    )
                from superserve_jax.engines import prepare  # here, since it imports jax

                new = prepare.make_engine(self.model, new, profile, **self._options)
            if (spec := _spec(new)) != (mine := (self._shape, self._dtype, self._lengths, self._pad_id)):
                raise errors.ConfigError(f"{new.name} takes {spec}, the workers of this server take {mine}; they must agree")
            profiles_of_workers([self.profile, profile], 2)
            return self._pool.add(new, profile)

    def remove_worker(self, name: str) -> None:
        """Removes a worker while serving; returns when it has finished its batch and its thread has ended.

        In a done-callback on that worker it does not wait.

        Args:
          name: one of `health()["per_worker"]`.

        Raises:
          UnknownNameError: no worker has that name, or it has left. ConfigError: it is the last one, whom nobody could
          relieve: add another first, or close the server.
        """
        self._pool.remove(name)

    def swap(self, path_or_model: Any) -> None:
        """Changes over to another export between two batches, without a gap in serving.

        It is loaded, compiled and warmed in the calling thread, beside the running one, for the same devices, batch sizes and
        length buckets and with the same options; without a latency profile beside it one is measured, beside the traffic and
        so with too long latencies: measure it before (`serve/measure.py`). Whatever is wrong with it is found before anything
        changes, and the old one goes on. Then all workers change over at once; batches that run end as they began, on the old
        one. Returns when these are back and the old one is dropped, with its memory unless somebody else holds its model.

        **Both are in the device's memory until then**: twice the weights, slices and executables. Where that does not
        suffice, jax's RESOURCE_EXHAUSTED is raised here; a batch that fails for it meanwhile makes its worker's batches
        smaller, as ever, until the next swap that succeeds.

        What waits is answered by the new one, but for queries whose `min_accuracy` that cannot meet: they fail with
        AccuracyFloorError. A policy given by name is made anew for the new profiles; another is asked with them from then on.
        A second swap, or `add_worker`, waits until all workers know of this one; a close does not, and this one is then of no
        effect.

        Args:
          path_or_model: an export's directory, or what `superserve_jax.load` returned, with the same kind of inputs and the
            same vocabulary. Classes may differ.

        Raises:
          ExportError: it is missing or damaged. ConfigError: its inputs differ, the policy cannot do with it, this server has
          no model or a worker of an engine that was given, or this is a done-callback. NotCalibratedError, ProfileError.
          ServerClosedError, WorkersLostError.
        """
        from superserve_jax.engines import prepare  # here, since it imports jax

        if self.model is None:
            raise errors.ConfigError("a server of engines has no model that another could replace; add and remove workers")
        with self._changing:
            members = self._pool.members()
            devices = [getattr(getattr(worker, "engine", None), "device", None) for worker in members]
            if None in devices:
                name = members[devices.index(None)].name
                raise errors.ConfigError(f"the worker {name} has left, or has an engine that was given to it; remove it first")
            model = prepare.load(path_or_model)
            prepare.check_same_inputs(self.model, model, self._lengths)
            _, engines, profiles = prepare.prepare(
                model,
                batch_sizes=self.profile.batch_sizes,
                lengths=self._lengths or None,
                devices=devices,
                background=background_traffic,
                **self._options,
            )
            each = profiles_of_workers(profiles, len(engines))
            old = self._pool.swap(members, engines, each)
            self.model, self.profiles, self.profile = model, tuple(each), each[0]
        self._pool.wait_for_swap()
        del old  # here, since to free a device's memory may take long, and workers take their engines under the pool's lock

    def health(self) -> dict[str, Any]:
        """How the server is, as plain values.

        `workers` it knows of, those `alive`, those `abandoned`; `failures` of batches, and `last_error` (None if none);
        queries `waiting` and `running`; whether it is `closed`; and `per_worker`, a list of dicts:
        `name`; `state`, "idle", "running", or how it went: "left" (it failed too often, or the server was closed), "abandoned"
        (it was stuck), "removed"; `batches` that it answered and `failures`, batches that it did not; `max_batch`, less than
        the profile's where its memory did not suffice; `slowdown`, how many times slower than its profile it has been of late
        (see `drift`); `last_error`; and `running_s`, for how long its present batch runs as the watchdog counts it, without
        times at which the whole process stood still.
        """
        return self._pool.health()

    def snapshot(self) -> dict[str, Any]:
        """What the server has done since it was opened, and what it holds now, at one moment, as plain values for `json.dump`.

        `uptime_s`; queries `waiting` and `running` now, and `oldest_wait_s`, how long the one that has waited longest has
        (0 where none waits). What follows counts from the opening on:

        - `queries`: those that `arrived`, whatever became of them; `met`, answered by the deadline; `late`, answered after it;
          `expired`, dropped with `expire`; `failed`, answered with another error; `cancelled`, as soon as the server has let
          go of them; `refused`, not admitted. The last six, `waiting` and `running` sum to the first. `requeued` is how often
          one was put back since its batch had failed. Queries that are wrong (their shape, say) are counted nowhere.
        - `subnets`: of each that ran, by its position in the profile, a dict of its `accuracy`, `batches`, queries `met` and
          `late`, and `busy_s`, the time its batches took.
        - `batch_sizes`, `reasons`: batches by number of queries, from 1 to the largest, and by why the policy chose as it did
          (see `policies.REASONS`).
        - `latency_s`, from submit until the answer, and `wait_s`, until the batch started, of the queries that were
          answered; and `slack_s`, until the first query of a batch was due when it started, 0 where it was late already: each
          a histogram with `edges`, the upper ones of its buckets, `counts`, one more than edges, and `sum`.
        - `workers`: `health()["per_worker"]`.

        A batch is counted as a whole once all of its queries have been answered and their done-callbacks have run.

        Raises ConfigError where the server was opened with `telemetry=False`.
        """
        return self._pool.snapshot()


def background_traffic(rate_qps: float) -> contextlib.AbstractContextManager[None]:
    """While open, runs a server under load beside an engine whose latency profile is measured (see `background.traffic`).

    >>> with background_traffic(1000.0):
    ...     pass
    """
    return background.traffic(Server.from_engines, rate_qps)


def _spec(e: Engine) -> tuple[tuple[int, ...], np.dtype, tuple[int, ...], int]:
    """What inputs an engine takes."""
    return tuple(e.input_shape), np.dtype(e.input_dtype), tuple(e.lengths), e.pad_id


def make_policy(policy: str | Policy, *profiles: Profile) -> Policy:
    """See `policies.create`. Also raises ConfigError for a policy that is neither a name nor callable."""
    if not callable(policy) and not (isinstance(policy, str) and len(policy) <= _MAX_NAME):
        raise errors.ConfigError(f"policy must be a name such as 'slackfit', or a policy, got {str(policy)[:_MAX_NAME]!r}")
    return policies.create(policy, *profiles)


def check_slo(slo_ms: float) -> float:
    """`slo_ms`. Raises DeadlineError unless it is a positive, finite number."""
    try:
        if 0 < slo_ms < _MAX_SLO_MS:
            return float(slo_ms)
    except (TypeError, ValueError):
        pass
    raise errors.DeadlineError(f"slo_ms must be a positive, finite number of milliseconds, got {slo_ms!r}; 36 is the default")


def _is_at_most(floor: float, best: float) -> bool:
    try:
        return bool(floor <= best)
    except (TypeError, ValueError):
        return False


def _as_array(x: Any) -> np.ndarray:
    with errors.refusing(errors.InputError, "an input is one array, and this cannot be made one"):
        return np.asarray(x)
