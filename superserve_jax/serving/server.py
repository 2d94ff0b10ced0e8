"""The threaded server: queries in, futures out. No jax until a model is loaded.

One class because open, submit, swap and close are one life cycle. A third of the file is the map of threads, locks and rules.

A query's path: `Server.submit` -> `Pool.admit` -> `Backlog.queue` -> `Worker` -> `dispatch.next_batch` -> the policy ->
`Flight` (the engine) -> `futures.answer`.

Threads
- **Client threads**, any number: `submit` checks the query and puts it into the queue. It never waits for a device.
- **One worker thread per engine** (`Worker`): waits while the queue is empty. Else it asks the policy, takes the batch, runs
  the engine, answers the futures and runs their done-callbacks. There is no router thread. If the device computes on its own
  (`engines.base.Overlapping`), the worker hands over the next batch shortly before the last one is done.
- **One watchdog** (`Watchdog`): abandons workers that are stuck in an engine or a policy object, since Python cannot end a
  thread. It also runs the deferred calls (rule 2).
- **A thread that closes the server or removes a worker**: waits until the workers have left, and joins their threads.
- **A thread that swaps**: makes the new engines while the workers run. Then it gives each worker a `Successor` under the lock,
  and waits until all workers use theirs.

Locks
- **The pool's lock** guards the queue and the workers' state. It is held for one submit or one decision of the policy (10 us).
  It is never held while an engine runs or a future resolves.
- **The server's `_changing`** is held while a swap or a new worker is prepared. It is taken before the pool's lock.
- **The futures' locks**, one for all queries of a submit, and **the mailboxes' locks**, one per event loop, are held for a few
  instructions. No thread takes the pool's lock while it holds one of them.

Rules
1. The server calls no foreign code while it holds the pool's lock, except `clock`, if that option is given. A policy object is
   called without it (`policy_call.py`). Under the lock the server does not log, take the `repr` of an error, resolve a future,
   or drop the last reference to a query, an input, an engine or an error. All this waits in the `Outbox`, which every thread
   empties after it has released the lock.
2. Signal handlers and finalizers may call the server while their own thread holds a lock, and a policy while its worker
   decides. A public method that finds this does not block or read half-changed state: the watchdog does the work later.
   `submit` returns futures, which fail if the queries are refused later. `close` refuses new queries at once. `add_worker`,
   `remove_worker` and `swap` return at once, and their errors are logged. `health` and `snapshot` return their previous
   result. In another thread, these three methods wait for each other, so a finalizer should not call them.
3. Only `dispatch` calls the policy, for the worker, and only `Flight` calls the engine. Futures resolve to a reply in
   `futures.answer` and to an error in the `Outbox`. Only these places handle errors of foreign code.
4. A query is answered exactly once: a future ignores every answer after the first. Until then the query is always in one of
   four places: the queue, a group of retries, a flight of a present worker, or the outbox.

Failures (`failures.py`): a failed batch runs again on another worker, and then in smaller parts, until the bad input has
failed alone (`retries.py`). After a failure the worker runs blank inputs. If they fail too, the worker or the subnet is at
fault (`blame.py`). The worker leaves after `max_failures` such batches in a row. Out of memory, its batches become smaller. If
an engine in another process is lost, its worker leaves at once, and if it hangs, after `stall_s`. A thread then adds it again
when the process answers (`lost.py`).

All threads are daemons, so an open server does not keep the interpreter alive; `Pool` ends the workers at exit. A fork has the
server's memory but none of its threads. Every call raises there at once, also `result` of older futures; `close` does nothing.
"""

import contextlib
import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Unpack

from superserve_jax import errors, foreign
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile, profiles_of_workers
from superserve_jax.serving import background, futures, makers, threads
from superserve_jax.serving.futures import Future, Query
from superserve_jax.serving.options import (
    InputSpec,
    Options,
    ServerOptions,
    check_floor,
    check_options,
    check_slo,
    load_policy,
)
from superserve_jax.serving.pool import Pool


class Server:
    """Serves a SuperNet on one or several devices. For every batch, the policy picks a subnet that can meet the deadlines.

    Args:
      path_or_model: the directory of an export, or what `superserve_jax.load` returned.
      batch_sizes: batch sizes to make executables for. None takes 1, 2, 4, 8 and 16; on GPUs also 32 and 64, if each gives
        at least 5 % more throughput.
      lengths: length buckets to make executables for, if inputs have a length. Inputs are padded to one of them, and longer
        inputs are refused. None takes powers of two from 16 up to the model's longest.
      devices: with one worker for each: jax devices, or processes, such as `ray_devices(16)`. None takes all jax devices.
      slicing: when a device slices a subnet's weights out of the SuperNet's weights: "in_call" in every call, "kept" when the
        subnet changes (see `engines.device`). None takes the faster way, according to the profile.
      slice_bytes: with "kept", how many bytes the slices may take; None as in `DeviceEngine`.
      compute_dtype: "float32" or "bfloat16" (see `dtypes`). The export needs accuracies in it. CPUs are slower in bfloat16.
      cpu_workers: how many workers divide the cores of a CPU and share the weights. None takes the better number according to
        the profile.
      **options: see `options.ServerOptions`: policy, slo_ms, max_queue, expire, and others.

    Attributes:
      model: the model; None for a server of engines.
      profiles, profile: the workers' latency profiles at the start or the last swap, and the first of these.
      inputs, slo_ms: the inputs that it takes, an `options.InputSpec`, and the SLO of queries that are submitted without one.
      pool: the state that the server's threads share.

    Queries are served in the order of their deadlines. One exception: the default policy puts queries that are already too
    late behind the others (see `policies.SlackFit`; `policies.SlackFit(profile, defer=False)` keeps the strict order). With
    several length buckets, a batch takes the first query and others that are no longer (see `scheduling.length_queue`).

    In an overload, the default policy meets the same share of the queries of every SLO: capacity of the workers / arrival rate
    (see `tests/serving/test_overload.py`). A full queue refuses all queries alike. Admission control prefers long SLOs in the
    first 0.2 s of an overload, and after that treats all SLOs alike (see `scheduling.admission`).

    Use the server as a context manager. A normal exit answers the waiting queries; an exit by an exception fails them. A
    server that is dropped without `close` ends when Python collects it; in a reference cycle, when the process is idle.

    >>> import numpy as np
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
        batch_sizes: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        devices: Sequence[Any] | None = None,
        slicing: Literal["kept", "in_call"] | None = None,
        slice_bytes: int | None = None,
        compute_dtype: ComputeDtype = "float32",
        cpu_workers: int | None = None,
        **options: Unpack[ServerOptions],
    ):
        checked = check_options(options)  # before anything that takes long
        given: dict[str, Any] = {"batch_sizes": batch_sizes, "lengths": lengths, "devices": devices}
        given |= {"slicing": slicing, "slice_bytes": slice_bytes}
        given |= {"compute_dtype": compute_dtype, "cpu_workers": cpu_workers}
        self._maker, engines, profiles = makers.open_export(path_or_model, background_traffic, **given)
        self._open(engines, profiles, checked)

    @classmethod
    def from_engines(
        cls, engines: Sequence[Engine], profile: Profile | Sequence[Profile], **options: Unpack[ServerOptions]
    ) -> "Server":
        """Opens a server of existing engines, all with the batch sizes and length buckets of `profile`.

        Args:
          engines: one engine for each worker, all for the same inputs.
          profile: one profile for all engines, or a list with one for each. A worker serves the subnets of its profile.
          **options: see `options.ServerOptions`.
        """
        self = cls.__new__(cls)
        self._maker = makers.GivenEngines()
        self._open(engines, profile, check_options(options))
        return self

    def _open(self, engines: Sequence[Engine], profile: Profile | Sequence[Profile], options: Options) -> None:
        with errors.refusing(errors.ConfigError, "engines must be a list of engines (see engines.base.Engine)"):
            engines = list(engines)
            specs = {InputSpec.of(e) for e in engines}
        if len(specs) != 1:
            raise errors.ConfigError(f"a server needs engines for the same inputs; got {len(engines)} engines for {[*specs]}")
        [spec] = specs
        self.inputs = dataclasses.replace(spec, decodes=all(InputSpec.of(e).decodes for e in engines))
        each = profiles_of_workers(profile, len(engines))
        if (ours := [*self.inputs.lengths]) != (theirs := [*each[0].lengths]):
            raise errors.ConfigError(f"engines have length buckets {ours}, profile {theirs}; they must agree")
        if (nbytes := self.inputs.nbytes) > options.max_queue_bytes:
            raise errors.ConfigError(f"max_queue_bytes={options.max_queue_bytes}, but one input has {nbytes} bytes; raise it")
        self.profiles, self.profile = tuple(each), each[0]
        self.model: Any = self._maker.model
        self.slo_ms, self._clock = check_slo(options.slo_ms), options.clock
        self._changing = threading.RLock()
        self._is_changing_here = threads.held_here(self._changing)
        options, make = load_policy(options, each)
        self.pool = Pool(engines, each, make, options, input_bytes=nbytes, again=weakref.WeakMethod(self.add_worker))
        weakref.finalize(self, self.pool.dropped).atexit = False

    def __repr__(self) -> str:
        family = "engines" if self.model is None else self.model.config.family
        return f"<Server of {family}: {self.pool.describe(self.profile)}>"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(drain=error_type is None)

    def submit(self, x: Any, *, slo_ms: float | None = None, min_accuracy: float = 0.0) -> Future:
        """Submits one query.

        Args:
          x: one input, without a batch dimension, of exactly the engine's shape and dtype. With length buckets it may have any
            length up to the longest; padding at the end does not count. It is not copied, so do not write to it before the
            answer is there.
          slo_ms: the deadline, in milliseconds from now. None takes the server's `slo_ms`.
          min_accuracy: only subnets with at least this profiled accuracy, a fraction of 1, may answer.

        Returns:
          A future whose result is a `futures.Reply`.

        Raises:
          InputError, DeadlineError, AccuracyFloorError: an argument is wrong, or its own code raises. QueueFullError,
          AdmissionError, ServerClosedError, WorkersLostError: the server cannot serve the query now.
        """
        return self._admit((x,), slo_ms, min_accuracy)[0]

    def submit_many(self, xs: Iterable[Any], *, slo_ms: float | None = None, min_accuracy: float = 0.0) -> list[Future]:
        """Like `submit` for each of `xs`, but wakes a worker only once. If it raises, no query has been submitted.

        It reads at most `max_queue` + 1 inputs, so a generator without an end gives QueueFullError.
        """
        try:
            each = itertools.islice(xs, self.pool.backlog.most + 1)
        except Exception as e:  # any exception: the class of xs may make its own iterator
            raise errors.InputError(f"expected several inputs, got {type(xs).__name__} ({foreign.text_of(e)})") from e
        return self._admit(each, slo_ms, min_accuracy)

    def _admit(self, xs: Iterable[Any], slo_ms: float | None, min_accuracy: float, waited_s: float = 0.0) -> list[Any]:
        slo_ms = self.slo_ms if slo_ms is None else check_slo(slo_ms)
        floor = check_floor(min_accuracy, self.pool.backlog.best)
        now_s = self._clock() - waited_s  # they may have waited in another process before, see `remote.router`
        deadline_s = now_s + 1e-3 * slo_ms
        lock, check = threading.RLock(), self.inputs.check
        queries = [Query(check(x), now_s, deadline_s, floor, lock) for x in xs]
        if self.inputs.lengths:
            for query in queries:
                query.length = len(query.inputs)
        self.pool.admit(queries)
        return queries

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more queries, answers the waiting ones, and ends the threads. Any thread may call it, also twice.

        Args:
          drain: False fails the waiting queries with ServerClosedError. Running batches are still answered.
          timeout_s: the longest time to wait. After that, busy workers are abandoned, and every query that is left fails. None
            waits without a limit, but not for a stuck worker (see `stall_s` in `options.ServerOptions`).

        In a done-callback, which runs on a worker, it does not wait.
        """
        self.pool.close(drain=drain, timeout_s=futures.check_timeout("timeout_s", timeout_s))

    def add_worker(self, engine_or_device: Any, *, profile: Profile | None = None) -> str:
        """Adds a worker while serving. A server that has lost all its workers serves again afterwards.

        Args:
          engine_or_device: an engine like the others, or a process that makes one (see `makers.Place`). If the server was
            opened with a model, it may be a jax device: the calling thread then makes the executables first.
          profile: the worker's latencies. None takes the latencies of the first worker. An engine in another process has its
            own, and takes only batch sizes and lengths from here.

        Returns:
          The worker's name: the engine's name, with a number if another worker has that name.

        Raises:
          ConfigError or ProfileError: the engine or the profile does not fit, or there is no model. ServerClosedError.
          ThreadStartError: the system starts no thread.
        """
        if self._interrupts():
            self.pool.defer(functools.partial(self.add_worker, engine_or_device, profile=profile))
            return getattr(engine_or_device, "name", "")
        new = engine_or_device
        while makers.is_place(new):  # no lock is held, since a process may take minutes to start
            maker = self._maker
            engine, own = new.make_engine(maker.source(self._like_others(profile or self.profile)))
            with self._changing:
                if maker is self._maker:  # else there was a swap meanwhile
                    return self._add(engine, own)
        with self._changing, self._maker.settings():
            latencies = self._like_others(profile or self.profile)
            if not hasattr(new, "run"):
                new, latencies = self._maker.engine(new, latencies)
            return self._add(new, latencies)

    def _add(self, engine: Engine, profile: Profile) -> str:
        self.inputs.check_engine(engine)
        return self.pool.add(engine, self._like_others(profile))

    def _like_others(self, profile: Profile) -> Profile:
        """Returns a new worker's profile. Raises ProfileError if it does not fit those of the other workers."""
        profiles_of_workers([self.profile, profile], 2)
        return profile

    def remove_worker(self, name: str) -> None:
        """Removes a worker while serving. Returns when it has finished its batch and its thread has ended.

        In a done-callback it does not wait. It ends the wait for the process of a lost worker (see `lost`).

        Args:
          name: the worker's name in `health()["per_worker"]`.

        Raises:
          UnknownNameError: no worker has that name, or it has left. ConfigError: it is the last worker. Add another one
          before, or close the server.
        """
        if self._interrupts():
            return self.pool.defer(functools.partial(self.remove_worker, name))
        return self.pool.remove(name)

    def swap(self, path_or_model: Any) -> None:
        """Replaces the export while serving: each worker changes to the new one between two batches.

        1. The calling thread loads, compiles and warms the new export while the old one serves. Devices, batch sizes, length
           buckets and options stay. If the export has no latency profile, one is measured beside the traffic, which makes the
           latencies too long. So measure it before, with `superserve measure`. If anything is wrong with the new export, an
           error is raised, and the old one goes on.
        2. All decisions from now on are for the new export. Running batches end on the old one.
        3. `swap` returns when these batches are back. Each worker then drops the old export a moment later, and its memory is
           free, unless somebody else holds its model.

        **Until then the device's memory holds both exports**: twice the weights, slices and executables. If the memory does
        not suffice, jax's RESOURCE_EXHAUSTED is raised here. A batch that runs out of memory makes the batches of its worker
        smaller, until the next successful swap.

        The new export answers the waiting queries. Queries whose `min_accuracy` it cannot meet fail with AccuracyFloorError. A
        policy that was given by name is made again for the new profiles; a policy object is first tried with them. A second
        swap, or `add_worker`, waits until all workers know of this swap. A `close` before step 2 makes this swap fail.

        Args:
          path_or_model: the directory of an export, or what `superserve_jax.load` returned, with the same inputs and the same
            vocabulary. Classes may differ.

        Raises:
          ExportError: the export is missing or damaged. ConfigError: its inputs differ, or the policy fails with it. Or this
          server was opened with engines, or a worker was added as one. Or the caller is a done-callback.
          NotCalibratedError, ProfileError, ServerClosedError, WorkersLostError. EngineLostError: a process was lost meanwhile.
        """
        if self._interrupts():
            return self.pool.defer(functools.partial(self.swap, path_or_model))
        with self._changing, self._maker.settings():
            workers = self.pool.swaps.swappable()
            maker, engines, profiles = self._maker.successor(path_or_model, workers, self.profile)
            for engine in engines:
                self.inputs.check_engine(engine)
            each = profiles_of_workers(profiles, len(engines))
            old = self.pool.swaps.swap(workers, engines, each)
            self._maker, self.model, self.profiles, self.profile = maker, maker.model, tuple(each), each[0]
        self.pool.swaps.wait()
        del old  # here, since to free a device's memory may take long

    def _interrupts(self) -> bool:
        """Whether the calling thread already holds a lock of this server (see rule 2). Raises ServerClosedError in a fork."""
        self.pool.process.refuse_fork()
        return self.pool.is_inside() or self._is_changing_here()

    def health(self) -> dict[str, Any]:
        """The state of the server now, as plain values.

        - `alive`: number of live workers. `joined`, `abandoned`: how many have joined and were abandoned so far.
        - `failures`: number of failed batches; `last_error`: the text of the last error, or None.
        - `waiting`, `running`: numbers of queries. `closed`: whether the server was closed.
        - `per_worker`: a dict for each present worker and about 16 that have gone; `workers`: its length. A present worker's
          `state` is "idle", "deciding" (in a policy object), "running" or "answering" (in done-callbacks). Then it is "left"
          (it failed too often, or the server was closed), "lost" (its process is gone, see `lost`), "abandoned" (it was stuck)
          or "removed". `name`, `last_error`. `batches`: how many it answered; `failures`: how many failed on it; `running_s`:
          how long its batch has run. `max_batch`: its largest batch size, smaller after it ran out of memory. `slowdown`: how
          many times slower than its profile it is (see `scheduling.speeds`). `out_of_service`: subnets whose outputs are not
          finite (see `blame`).
        """
        return self.pool.health()

    def snapshot(self) -> dict[str, Any]:
        """What the server has done since it was opened, and its state now, as plain values for `json.dump`.

        All values are of one moment. A batch is counted when all its queries have been answered and their done-callbacks have
        run.

        - `uptime_s`; `waiting` and `running`, numbers of queries; `oldest_wait_s`: how long the oldest query has waited, 0 if
          none waits.
        - `queries`: `arrived`, and what became of them. `met`: answered by the deadline. `late`: answered after it. `expired`:
          dropped with `expire`. `failed`: answered with another error. `cancelled`: counted when the server removes them.
          `refused`: not admitted. These six, `waiting` and `running` add up to `arrived`. `requeued`: how often a query was
          put back because its batch failed or its worker left. Queries with a wrong argument count nowhere.
        - `subnets`: for each subnet that ran, under its position in the profile: `accuracy`, `batches`, the queries `met` and
          `late`, and `busy_s`, the time of its batches.
        - `batch_sizes`, `batch_busy_s`: numbers of batches, and the time they took, by number of queries. `last_batch_s`: how
          long ago the last one ended, or None. `reasons`: numbers of batches by the policy's reason (see `policies.REASONS`).
        - `latency_s`: from submit to the answer. `wait_s`: from submit until the batch started. `slack_s`: time left to the
          deadline of a batch's first query when the batch started, 0 if it was late. Each is a histogram. It has `edges` (the
          upper edges of its buckets), `counts` (with one more entry for longer times) and `sum`.
        - `workers`: `health()["per_worker"]`.
        """
        return self.pool.snapshot()


def background_traffic(rate_qps: float) -> contextlib.AbstractContextManager[None]:
    """Runs a server under load while an engine's latency profile is measured (see `background.traffic`).

    >>> with background_traffic(1000.0):
    ...     pass
    """
    return background.traffic(Server.from_engines, rate_qps)
