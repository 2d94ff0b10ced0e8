"""The rules about locks in `serving/server.py`: no foreign code under a lock, and calls that interrupt their own thread.

One file because the tests share the tracking lock.
"""

import contextlib
import functools
import gc
import itertools
import logging
import signal
import sys
import threading
import time
import traceback
import weakref

import pytest
from bad import within
from fakes import LONG_MS, PROFILE, SUBNETS, WAIT_S, fake, held, outcomes, serve, several, wait_until, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.futures import Query
from superserve_jax.serving.threads import Outbox

# -- no foreign code under a lock ---------------------------------------------------------------------------------------------


class Witness:
    """Notes every call of foreign code by a thread that holds the lock of one of its pools."""

    def __init__(self):
        self.pools, self.calls, self.violations = [], set(), []

    def __call__(self, what):
        self.calls.add(what)
        if any(pool.is_held_here() for pool in self.pools):
            self.violations.append(f"{what}: {''.join(traceback.format_stack(limit=6))}")

    def error(self, text):
        """An error that notes calls of its `repr` and its finalizer."""
        witness = self

        class Foreign(RuntimeError):
            def __repr__(self):
                witness("repr")
                return f"Foreign({text!r})"

            def __str__(self):
                witness("str")
                return text

            def __del__(self):
                witness("end of an error")

        return Foreign(text)

    def input(self, value):
        """An input that notes the call of its finalizer."""
        array = x(value)
        weakref.finalize(array, self, "end of an input").atexit = False
        return array

    def engine(self, name, on_run=None, kind=FakeEngine):
        """An engine that notes its calls and the call of its finalizer."""
        witness = self

        class Foreign(kind):
            def run(self, *args):
                witness("run")
                return super().run(*args)

            def __del__(self):
                witness("end of an engine")

        return fake(on_run, name=name, make=Foreign)


@pytest.fixture
def witness():
    witness = Witness()

    class Handler(logging.Handler):
        def emit(self, record):
            witness("log")

    log, handler = logging.getLogger("superserve_jax.serving"), Handler()
    log.addHandler(handler)
    log.propagate = False  # pytest would keep the errors that are logged
    gc.disable()  # a collection may come at any moment, also while the server allocates memory under its lock
    yield witness
    gc.enable()
    log.propagate = True
    log.removeHandler(handler)


def everything_goes_wrong(witness, kind):
    """A server in which batches fail, queries are cancelled, expire and find the queue full, and workers come and go."""
    count, engines = itertools.count(), itertools.count(10)

    def on_run(subnet, batch_size, inputs):
        if any(i == 13 for i in inputs) or next(count) % 7 == 0:
            raise witness.error("the device burns")

    def policy(profile, state):
        if next(count) % 11 == 0:
            raise witness.error("the policy fails")
        return Decision(profile.rows[0].subnet, 4, defer_ms=0.0)

    def make():
        return witness.engine(f"fake:{next(engines)}", on_run, kind)

    options = {"expire": True, "max_queue": 20, "max_failures": 2, "slo_ms": 1.0}
    with serve(make(), make(), policy=policy, **options) as s:
        witness.pools.append(s.pool)
        for i in range(400):
            try:
                future = s.submit(witness.input(i % 20), slo_ms=(0.5, 5.0, LONG_MS)[i % 3])
                if i % 4 == 0:
                    future.add_done_callback(lambda f: witness("callback"))
                if i % 5 == 0:
                    future.cancel()
                del future
            except errors.SuperServeError:
                time.sleep(1e-4)
            if i % 20 == 0:
                s.add_worker(make())
                s.health(), s.snapshot()
            if i % 50 == 49:
                workers = s.pool.swaps.swappable()
                with contextlib.suppress(errors.ConfigError):  # the policy fails when it is tried
                    s.pool.swaps.swap(workers, [make() for _ in workers], [PROFILE] * len(workers))
                s.pool.swaps.wait()
            if i % 60 == 59:
                alive = [w["name"] for w in s.health()["per_worker"] if w["state"] in ("idle", "running")]
                if len(alive) > 1:
                    s.remove_worker(alive[0])
        with contextlib.suppress(errors.QueueFullError):
            s.submit_many([witness.input(1) for _ in range(10)], slo_ms=LONG_MS)
        s.close(drain=False)
    gc.collect()


@pytest.mark.parametrize("kind", [FakeEngine, FakeDevice])
def test_no_foreign_code_runs_while_a_lock_is_held(witness, kind):
    everything_goes_wrong(witness, kind)
    assert not witness.violations, "\n".join(sorted(set(witness.violations)))
    assert witness.calls >= {"repr", "str", "log", "callback", "end of an error", "end of an input", "end of an engine"}


@pytest.mark.parametrize("method", ["drop", "fail"])
def test_a_server_that_runs_foreign_code_under_its_lock_is_noticed(witness, monkeypatch, method):
    calls = {"drop": lambda self, thing: None, "fail": lambda self, query, error: query.set_exception(error)}
    monkeypatch.setattr(Outbox, method, calls[method])
    everything_goes_wrong(witness, FakeEngine)
    assert witness.violations


# -- calls that interrupt their own thread ------------------------------------------------------------------------------------


def test_a_policy_may_call_every_method_of_its_server():
    made, seen = [], []

    def policy(profile, state):
        if not made:
            assert s.pool.is_inside()
            made.extend((s.submit(x(1)), *s.submit_many([x(2), x(3)])))
            seen.extend((s.health()["alive"], s.snapshot()["queries"]["arrived"]))
            s.add_worker(fake(name="new"))
            s.remove_worker("fake:1")
        return Decision(SUBNETS[0], 4)

    then = {"fake:0": "idle", "fake:1": "removed", "new": "idle"}
    with within(100), serve(*several(2), policy=policy) as s:
        assert outcomes([s.submit(x(0))]) == [0]
        assert outcomes(made) == [1, 2, 3]
        assert seen == [2, 0]  # as when it was opened, since nobody has asked since
        wait_until(lambda: {w["name"]: w["state"] for w in s.health()["per_worker"]} == then)


@pytest.mark.parametrize("drain", [True, False])
def test_a_policy_may_close_its_server(drain):
    refused = []

    def policy(profile, state):
        if not refused:
            s.close(drain=drain)
            with pytest.raises(errors.ServerClosedError) as caught:
                s.submit(x(1))
            refused.append(caught.value)
        return Decision(SUBNETS[0], 1)

    with within(100), serve(policy=policy) as s:
        found = {type(f.exception(WAIT_S)) for f in s.submit_many(x(range(50)))}
    assert found <= {type(None), errors.ServerClosedError}
    assert len(refused) == 1
    assert not drain or found == {type(None)}
    assert not [t for t in threading.enumerate() if t.name == "superserve-deferred" and not t.daemon]


def test_what_is_deferred_and_then_refused_fails_its_futures():
    late = []

    def policy(profile, state):
        if not late:
            late.extend(s.submit_many(x(range(5))))  # more than the queue takes
        return Decision(SUBNETS[0], 4)

    with within(100), serve(policy=policy, max_queue=4) as s:
        s.submit(x(0)).result(WAIT_S)
        assert {type(outcome) for outcome in outcomes(late)} == {errors.QueueFullError}


def test_errors_of_a_deferred_change_are_logged(caplog):
    def policy(profile, state):
        s.swap("nowhere")
        s.remove_worker("nobody")
        return Decision(SUBNETS[0], 4)

    with within(100), serve(policy=policy) as s:
        s.submit(x(0)).result(WAIT_S)
        # Not by their number: other threads may log, too.
        wait_until(lambda: all(text in caplog.text for text in ("unknown worker 'nobody'", "has no model")))


def interrupted(work, at, handler):
    """Runs `work`, and calls `handler` before the bytecode number `at` of this library. Returns whether `at` was reached."""
    left, before = [at], sys.gettrace()

    def trace(frame, event, arg):
        if "superserve_jax" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                handler()
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)  # a debugger or a measurement of coverage
    return left[0] <= 0


@pytest.mark.parametrize("name", ["submit", "health", "snapshot", "add and remove", "full queue"])
def test_a_signal_may_arrive_at_any_bytecode(name):
    def change():
        s.remove_worker(s.add_worker(fake(name="extra")))

    def fill():
        with pytest.raises(errors.QueueFullError):
            s.submit_many([x(1)] * 200)

    work = {
        "submit": lambda: mine.append(s.submit(x(1))),
        "health": lambda: s.health(),
        "snapshot": lambda: s.snapshot(),
        "add and remove": change,
        "full queue": fill,
    }[name]
    inner, mine = [], []

    def handler():
        inner.extend((s.submit(x(2)), *s.submit_many([x(3)])))
        assert s.health()["closed"] is False
        assert s.snapshot()["queries"]["failed"] == 0

    with within(300), serve(max_queue=100) as s:
        at = 1
        while interrupted(work, at, handler):
            at += 1 + at // 40  # every bytecode at first, and then some
            assert set(outcomes([*inner, *mine])) <= {1, 2, 3}
            inner.clear(), mine.clear()
        assert at > 50


@pytest.mark.parametrize("at", range(5, 400, 30))
def test_a_signal_handler_may_close_the_server_at_any_bytecode_of_a_submit(at):
    mine = []

    def submit():
        try:
            mine.append(s.submit(x(1)))
        except errors.ServerClosedError as error:
            mine.append(error)

    with within(100), serve() as s:
        interrupted(submit, at, s.close)
        outcome = mine[0] if isinstance(mine[0], Exception) else mine[0].exception(WAIT_S)
        assert outcome is None or isinstance(outcome, errors.ServerClosedError)
        with pytest.raises(errors.ServerClosedError):
            s.submit(x(2))


@pytest.mark.parametrize("drain", [True, False])
def test_ctrl_c_at_any_bytecode_of_close_loses_no_query(drain):
    def interrupt():
        raise KeyboardInterrupt

    at, reached = 1, True
    while reached:
        with held() as (s, gate, first):
            futures = s.submit_many(x(range(4)))
            threading.Timer(0.01, gate.opened.set).start()
            try:
                reached = interrupted(functools.partial(s.close, drain=drain), at, interrupt)
            except KeyboardInterrupt:
                s.close(drain=drain)
            assert all(f.done() for f in (first, *futures))
        at += 1 + at // 40
    assert at > 50


def test_ctrl_c_in_a_log_handler_loses_no_query_that_is_about_to_fail():
    class Handler(logging.Handler):
        def emit(self, record):
            logger.removeHandler(self)
            raise KeyboardInterrupt

    logger, query = logging.getLogger("superserve_jax"), Query(None, 0.0, 1.0, 0.0)
    with within(100), serve() as s:
        with s.pool.lock:
            s.pool.outbox.call(s.pool.policy_call.failed, (ValueError("bad"), [query]))
            logger.addHandler(Handler())
        with pytest.raises(KeyboardInterrupt):
            s.pool.outbox.empty()
        assert outcomes([s.submit(x(1))]) == [1]
        assert "bad" in str(query.exception(WAIT_S))


def test_finalizers_may_submit_at_any_moment_of_a_worker():
    answers, count, opened, before = [], itertools.count(), [], threading.gettrace()

    def trace(frame, event, arg):
        if not opened or "superserve_jax" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(count) % 97 == 0 and len(answers) < 300:
            sys.settrace(None)
            answers.append(opened[0].submit(x(7)))
            sys.settrace(trace)
        return trace

    threading.settrace(trace)
    try:
        with within(300), serve(*several(2)) as s:
            opened.append(s)
            for i in range(200):
                assert outcomes([s.submit(x(i))]) == [i]
            assert set(outcomes(answers)) == {7}
            assert len(answers) > 20
    finally:
        threading.settrace(before)  # type: ignore[arg-type]


def test_a_signal_handler_may_close_while_the_main_thread_submits():
    def on_alarm(*_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        s.close()

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with held() as (s, gate, first):
            gate.opened.set()  # before the alarm: a close would wait for this batch
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            futures = []
            with contextlib.suppress(errors.ServerClosedError):
                while True:
                    futures.append(s.submit(x(1)))
            assert s.health()["closed"]
            assert outcomes([first]) == [0]
            assert set(outcomes(futures)) <= {1}
    finally:
        signal.signal(signal.SIGALRM, before)
