"""Users' code that misbehaves around the server: errors, decisions, done-callbacks and log handlers. No query is lost.

One file because every test asks the same: all queries end, and the next query is answered.
"""

import gc
import logging
import math
import signal
import sys
import threading
import time

import pytest
from fakes import SUBNETS, WAIT_S, fake, held, serve, wait_until, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest.acts import ERRORS, BadReprBase, Frozen
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving import runtime, telemetry


class Once:
    """Raises an error at its first call."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        if self.error is not None:
            error, self.error = self.error(), None
            raise error


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_an_engine_raises_its_queries_run_again(error):
    with serve(fake(Once(error))) as s:
        assert [f.result(WAIT_S).output[0] for f in s.submit_many([x(i) for i in range(4)])] == [0, 1, 2, 3]
        assert len(s.health()["last_error"]) <= 1_000
        assert s.submit(x(9)).result(WAIT_S).output[0] == 9


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_policy_raises_fails_its_queries_only(error):
    once = Once(error)

    def policy(profile, state):
        once()
        return Decision(SUBNETS[0], 4)

    with serve(policy=policy) as s:
        with pytest.raises(errors.InferenceError, match="the policy 'policy' failed"):
            s.submit(x(0)).result(WAIT_S)
        assert s.submit(x(1)).result(WAIT_S).output[0] == 1
        assert s.health()["alive"] == 1


def test_the_traceback_of_a_failing_policy_is_logged_once_for_each_type_of_error(caplog):
    raised = [*[IndexError] * 12, KeyError]

    def policy(profile, state):
        raise raised.pop(0)

    with serve(policy=policy) as s:
        while raised:
            assert isinstance(s.submit(x(0)).exception(WAIT_S), errors.PolicyError)
    logged = [
        (r.getMessage(), r.exc_info is not None) for r in caplog.records if "the policy 'policy' failed" in r.getMessage()
    ]
    assert [has_traceback for _, has_traceback in logged] == [True, False, True]
    assert logged[1][0].startswith("for the 10th time: the policy 'policy' failed: IndexError()")


class Unhashable(str):
    __hash__ = None


@pytest.mark.parametrize("reason", [[1], None, 3, math.nan, Unhashable("a"), object(), b"bytes"])
def test_a_reason_of_another_type_counts_as_other(reason):
    reasons = iter([reason, "mine", reason])
    with serve(policy=lambda profile, state: Decision(SUBNETS[0], 1, reason=next(reasons))) as s:
        for i in range(3):
            assert s.submit(x(i)).result(WAIT_S).output[0] == i
        wait_until(lambda: sum(s.snapshot()["reasons"].values()) == 3)
        counted = s.snapshot()["reasons"]
    assert counted == ({"a": 2, "mine": 1} if isinstance(reason, str) else {"mine": 1, "other": 2})


def test_reasons_that_always_change_do_not_accumulate():
    decided = iter(range(10**6))
    with serve(policy=lambda profile, state: Decision(SUBNETS[0], 1, reason=f"{next(decided)}" * 100)) as s:
        for f in s.submit_many([x(i) for i in range(500)]):
            f.result(WAIT_S)
        wait_until(lambda: sum(s.snapshot()["reasons"].values()) == 500)
        counted = s.snapshot()["reasons"]
    assert len(counted) == telemetry.MAX_REASONS + 1
    assert max(map(len, counted)) <= 100


@pytest.mark.parametrize("count", [1, 2])
def test_a_slow_done_callback_is_not_blamed_on_the_engine(count):
    entered, release = threading.Event(), threading.Event()

    def slow(_):
        entered.set()
        release.wait(WAIT_S)

    with held(count, stall_s=0.2) as (s, gate, first):
        first.add_done_callback(slow)
        gate.opened.set()
        assert entered.wait(WAIT_S)
        time.sleep(0.6)  # three times stall_s
        assert s.health()["abandoned"] == 0
        assert "answering" in [w["state"] for w in s.health()["per_worker"]]
        release.set()
        assert s.submit(x(1)).result(WAIT_S).output[0] == 1
        time.sleep(0.1)
        assert s.health()["abandoned"] == 0


def test_a_slow_callback_of_a_failed_query_is_not_blamed_on_the_engine():
    release = threading.Event()

    def fail_the_first(profile, state):
        if not release.is_set():
            raise RuntimeError("no decision")
        return Decision(SUBNETS[0], 4)

    with serve(policy=fail_the_first, stall_s=0.2) as s:
        failing = s.submit(x(0))
        failing.add_done_callback(lambda _: release.wait(0.7))
        with pytest.raises(errors.InferenceError):
            failing.result(WAIT_S)
        time.sleep(0.5)
        release.set()
        assert s.submit(x(1)).result(WAIT_S).output[0] == 1
        assert s.health()["abandoned"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, BadReprBase, Frozen])
def test_a_callback_that_raises_in_a_worker_stops_neither_the_worker_nor_other_callbacks(error):
    called = []

    def raises(_):
        raise error()

    with held() as (s, gate, _):
        futures = s.submit_many([x(i) for i in range(4)])
        for f in futures:
            f.add_done_callback(raises)
            f.add_done_callback(called.append)
        gate.opened.set()
        assert [f.result(WAIT_S).output[0] for f in futures] == [0, 1, 2, 3]
        wait_until(lambda: len(called) == 4)
        assert s.submit(x(5)).result(WAIT_S).output[0] == 5
        assert s.health()["alive"] == 1


def test_ctrl_c_while_closing_fails_every_query_and_calls_every_callback():
    called = []

    def interrupt(future):
        called.append(future)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with held() as (s, gate, _):
        futures = s.submit_many([x(i) for i in range(10)])
        futures[3].add_done_callback(interrupt)
        for f in futures:
            f.add_done_callback(called.append)
        with pytest.raises(KeyboardInterrupt):
            s.close(drain=False)
        gate.opened.set()
        for f in futures:
            assert isinstance(f.exception(WAIT_S), errors.ServerClosedError)
        wait_until(lambda: len(called) == 11)


class BadHandler(logging.Handler):
    """A log handler that asks the server, and then raises."""

    def __init__(self, error):
        super().__init__()
        self.error, self.server, self.answers = error, None, []

    def emit(self, record):
        self.answers.append(self.server.health()["waiting"] + len(self.server.snapshot()["queries"]))
        raise self.error()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
@pytest.mark.usefixtures("no_test_hangs")
def test_a_log_handler_may_ask_the_server_and_raise(error, capsys):
    handler, logger = BadHandler(error), logging.getLogger("superserve_jax")
    once = Once(RuntimeError)

    def policy(profile, state):
        once()
        return Decision(SUBNETS[0], 4)

    logger.addHandler(handler)
    try:
        with serve(fake(Once(RuntimeError)), policy=policy) as s:
            handler.server = s
            with pytest.raises(errors.InferenceError):
                s.submit(x(0)).result(WAIT_S)
            failing = s.submit(x(1))
            failing.add_done_callback(lambda _: 1 / 0)
            assert failing.result(WAIT_S).output[0] == 1
            assert s.submit(x(2)).result(WAIT_S).output[0] == 2
            assert s.health()["alive"] == 1
    finally:
        logger.removeHandler(handler)
    assert len(handler.answers) >= 2
    assert error.__name__ in capsys.readouterr().err


def test_a_callback_that_blocks_does_not_stop_the_watchdog():
    release, opened = threading.Event(), threading.Event()
    with serve(fake(lambda *_: opened.wait(WAIT_S)), stall_s=0.2, max_tries=1) as s:
        first = s.submit(x(0))
        first.add_done_callback(lambda _: release.wait(WAIT_S))
        wait_until(first.done)
        s.add_worker(fake(lambda *_: opened.wait(WAIT_S), name="b"))
        second = s.submit(x(1))
        with pytest.raises(errors.SuperServeError):
            second.result(WAIT_S)
        assert s.health()["abandoned"] == 2
        release.set()
        opened.set()


@pytest.mark.parametrize("limit", [math.nan, "1", [1]])
def test_a_time_limit_that_is_no_number_is_refused(limit):
    with serve() as s:
        with held() as (other, _, first):
            with pytest.raises(errors.ConfigError, match="timeout must be a number of seconds, or None"):
                first.result(timeout=limit)
            del other
        with pytest.raises(errors.ConfigError, match="timeout_s must be a number of seconds, or None"):
            s.close(timeout_s=limit)


def test_an_infinite_time_limit_is_none():
    s = serve()
    assert s.submit(x(1)).result(timeout=math.inf).output[0] == 1
    s.close(timeout_s=math.inf)


def test_an_engine_whose_outputs_are_always_too_few_leaves():
    class TooFew(FakeEngine):
        def run(self, subnet, batch_size, inputs):
            return super().run(subnet, batch_size, inputs)[:-1]

    with serve(fake(make=TooFew), max_failures=2) as s:
        with pytest.raises(errors.SuperServeError):
            s.submit(x(0)).result(WAIT_S)
        wait_until(lambda: s.health()["alive"] == 0)


@pytest.mark.usefixtures("no_test_hangs")
def test_a_finalizer_may_open_and_close_a_server_while_another_one_opens():
    answers = []

    class Garbage:
        def __init__(self):
            self.me = self

        def __del__(self):
            with serve(tune_runtime=True) as s:
                answers.append(s.submit(x(1)).result(WAIT_S).output[0])

    before = sys.getswitchinterval(), gc.get_threshold()
    Garbage()
    with serve(tune_runtime=True) as s:
        assert s.submit(x(2)).result(WAIT_S).output[0] == 2
        assert sys.getswitchinterval() == pytest.approx(runtime.SWITCH_INTERVAL_S)
    assert answers == [1]
    assert (sys.getswitchinterval(), gc.get_threshold()) == before
