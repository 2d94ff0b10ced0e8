"""How a server ends: by one or many calls of close, at the interpreter's exit, and in a fork.

One file because after each test no thread of a server may be left.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
from fakes import WAIT_S, Gate, fake, held, outcomes, serve, threads, wait_until, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.serving import runtime

OTHERS = weakref.WeakSet()  # threads that earlier tests of this process left, which may end at any moment


def own_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("superserve") and t not in OTHERS]


@pytest.fixture(autouse=True, scope="module")
def note_other_threads():
    OTHERS.update(threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    yield
    wait_until(lambda: not own_threads())


def test_closing_answers_the_waiting_queries():
    with held() as (s, gate, _):
        futures = s.submit_many(x(range(20)))
        with threads(s.close):
            wait_until(lambda: s.health()["closed"])
            gate.opened.set()
        assert [f.result(0).output[0] for f in futures] == list(range(20))


@pytest.mark.parametrize("error", [None, KeyError], ids=["closed", "left by an error"])
@pytest.mark.parametrize(("make", "running"), [(FakeEngine, 4), (FakeDevice, 8)])
def test_without_draining_running_batches_are_answered_and_waiting_queries_fail(make, running, error):
    gate = Gate()
    s = serve(fake(gate, make=make))
    futures = s.submit_many(x(range(12)))
    with gate.holding():
        futures[-1].add_done_callback(lambda _: gate.opened.set())
        s.close(drain=False) if error is None else s.__exit__(error, error())
    assert [f.result(0).output[0] for f in futures[:running]] == list(range(running))
    for f in futures[running:]:
        with pytest.raises(errors.ServerClosedError, match="closed without draining"):
            f.result(0)
    queries = s.snapshot()["queries"]
    assert (queries["met"], queries["failed"]) == (running, 12 - running)


def test_a_closed_server_refuses_and_closes_again():
    s = serve()
    with threads(*[s.close] * 3):
        s.close()
    with pytest.raises(errors.ServerClosedError, match="takes no queries; open a new one"):
        s.submit(x(1))
    assert s.health()["closed"]


def test_closing_with_a_timeout_abandons_stuck_workers_and_fails_every_query_left():
    with held() as (s, _, first):
        waiting = s.submit_many(x(range(20)))
        s.close(timeout_s=0.01)
        assert s.health()["abandoned"] == 1
        wait_until(lambda: own_threads() == ["superserve-fake:0"])
        for f in (first, *waiting):
            with pytest.raises(errors.ServerClosedError, match=r"after 0\.01 s"):
                f.result(0)


def test_a_callback_may_close_its_own_server():
    with held() as (s, gate, first):
        first.add_done_callback(lambda f: s.close())
        waiting = s.submit(x(1))
        gate.opened.set()
        assert outcomes([waiting]) == [1]


def test_a_server_without_references_ends_its_threads_and_fails_the_waiting_queries():
    gate = Gate()
    s = serve(fake(gate))
    running = s.submit(x(0))
    assert gate.entered.wait(WAIT_S)
    waiting = s.submit(x(1))
    del s
    gc.collect()
    with pytest.raises(errors.ServerClosedError):
        waiting.result(WAIT_S)
    gate.opened.set()
    assert outcomes([running]) == [0]


def test_the_runtime_is_tuned_while_any_of_several_servers_is_open():
    before = sys.getswitchinterval()
    a, b = serve(tune_runtime=True), serve(tune_runtime=True)
    a.close()
    assert sys.getswitchinterval() == pytest.approx(runtime.SWITCH_INTERVAL_S)
    assert gc.get_freeze_count() > 0
    b.close()
    assert sys.getswitchinterval() == before
    assert gc.get_freeze_count() == 0


def test_objects_that_were_frozen_before_stay_frozen():
    gc.freeze()
    try:
        with runtime.low_latency():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("found", "meanwhile"),
    [((700, 10, 10), runtime.GC_THRESHOLDS), ((0, 10, 10), (0, 10, 10)), ((30_000, 5, 500), (30_000, 20, 500))],
)
def test_collections_are_rarer_while_a_server_is_open_unless_they_were_off_or_rarer_before(found, meanwhile):
    before = gc.get_threshold()
    gc.set_threshold(*found)
    try:
        with runtime.low_latency(), runtime.low_latency():
            assert gc.get_threshold() == meanwhile
        assert gc.get_threshold() == found
    finally:
        gc.set_threshold(*before)


# -- closing under traffic ----------------------------------------------------------------------------------------------------


OPEN = """
import math, os, signal, sys, threading, time
import numpy as np
from superserve_jax import errors, profile, subnet
from superserve_jax.engines import fake
from superserve_jax.scheduling import policies
from superserve_jax.serving import server

row = profile.Row(subnet.Subnet((0,)), 0.7, (1.0, 2.0))
table = profile.Profile((1, 16), (row,))
policy = lambda profile, state: policies.Decision(row.subnet, 16)

def serve(on_run=None, **options):
    engines = [fake.FakeEngine(table, on_run=on_run, name=f"fake:{i}") for i in range(2)]
    return server.Server.from_engines(engines, table, policy=policy, slo_ms=60_000.0, **options)

def traffic(s):
    while True:
        for future in s.submit_many([np.float32(i) for i in range(20)]):
            future.result()

s = serve()
"""


def run(code, *, returncode=0):
    """Runs a program that opens a server `s`. It must end by itself and print nothing on stderr. Returns its output."""
    done = subprocess.run([sys.executable, "-c", OPEN + code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (returncode, "")
    return done.stdout.split()


# -- closing ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drain", [True, False])
def test_a_server_closed_by_another_thread_while_all_submit_loses_no_query(drain):
    answers, refused = [], []
    s = serve(fake(lambda *_: time.sleep(0.0005)), fake(name="fake:1"), max_queue=1_000_000)

    def submit():
        try:
            while True:
                answers.extend(s.submit_many(x(range(10))))
                time.sleep(0.0005)
        except errors.ServerClosedError as error:
            refused.append(error)

    with threads(*[submit] * 3):
        wait_until(lambda: len(answers) > 500)
        with threads(lambda: s.close(drain=drain)):
            s.close(drain=drain)
    assert len(refused) == 3
    assert all(f.done() for f in answers)
    failed = [f.exception() for f in answers if f.exception() is not None]
    assert all(isinstance(error, errors.ServerClosedError) for error in failed)
    assert not (drain and failed)


def test_while_a_server_closes_a_worker_reruns_batches_that_failed_on_itself():
    def fail_once(*_):
        if not failed:
            failed.append(True)
            raise RuntimeError

    failed = []
    with held() as (s, gate, first):
        s.add_worker(fake(fail_once, name="other"))
        second = s.submit(x(1))  # on the other, which would leave it to the one that is held
        wait_until(lambda: failed)
        with threads(s.close):
            assert outcomes([second]) == [1]
            assert not first.done()
            gate.opened.set()
        assert first.result(0).output == (0.0, 0)


# -- the end of the interpreter -----------------------------------------------------------------------------------------------


def test_the_interpreter_exits_amid_traffic():
    code = """
for _ in range(4):
    threading.Thread(target=traffic, args=(s,), daemon=True).start()
time.sleep(0.05)
print(len(s.submit(np.float32(1)).result().output))
"""
    assert run(code) == ["2"]


def test_a_thread_that_outlives_the_main_one_is_still_answered():
    code = """
def client():
    threading.main_thread().join()
    print(sum(f.result().output[0] for f in s.submit_many([np.float32(i) for i in range(50)])))

threading.Thread(target=client).start()
sys.exit(3)
"""
    assert run(code, returncode=3) == ["1225.0"]


def test_a_worker_that_hangs_does_not_keep_the_interpreter():
    code = """
hung = serve(lambda *_: time.sleep(1e6))
future = hung.submit(np.float32(1))
threading.Thread(target=traffic, args=(hung,), daemon=True).start()
while not hung.health()["running"]:
    time.sleep(0.001)
"""
    run(code)


def test_the_interpreter_exits_amid_traffic_on_real_executables(export):
    code = f"""
import superserve_jax as ss
real = ss.Server({str(export.path)!r}, batch_sizes=(1, 16))
images = np.zeros((32, 9, 9, 1), np.uint8)

def classify():
    while True:
        for future in real.submit_many(list(images)):
            future.result()

for _ in range(4):
    threading.Thread(target=classify, daemon=True).start()
time.sleep(0.3)
"""
    # A thread that XLA finds taken down under it calls std::terminate, which aborts the process.
    done = subprocess.run([sys.executable, "-c", OPEN + code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, "terminate" in done.stderr, "Traceback" in done.stderr) == (0, False, False)


# -- forks and stops ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_refuses_and_exits_while_the_parent_serves_on():
    code = """
import asyncio, gc, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
hung = serve(lambda *_: time.sleep(1e6))
waiting, told = hung.submit(np.float32(1)), []
waiting.add_done_callback(told.append)
threading.Thread(target=traffic, args=(s,), daemon=True).start()

class Slow(fake.FakeEngine):
    @property
    def input_shape(self):
        entered.set()
        time.sleep(1e6)

entered = threading.Event()
threading.Thread(target=s.add_worker, args=(Slow.__new__(Slow),), daemon=True).start()  # in the fork it never goes on
entered.wait()
time.sleep(0.05)

async def wait():
    await waiting

def refused(ask):
    start_s = time.monotonic()
    try:
        ask()
    except errors.ServerClosedError as error:
        assert str(os.getppid()) in str(error) and str(os.getpid()) in str(error), error
    else:
        os._exit(9)
    assert time.monotonic() - start_s < 30  # half of the time limits below

children = []
for how in range(3):
    pid = os.fork()
    if not pid:
        assert sys.getswitchinterval() > 0.001 and gc.get_freeze_count() == 0
        for ask in (
            lambda: s.submit(np.float32(1)), lambda: s.submit_many([]), s.health, s.snapshot,
            lambda: s.remove_worker("fake:0"), lambda: s.add_worker(fake.FakeEngine(table)), lambda: s.swap("nowhere"),
            waiting.result, lambda: waiting.exception(60), lambda: asyncio.run(wait()),
            lambda: waiting.add_done_callback(print),
        ):
            refused(ask)
        assert not told
        if how == 1:
            s.close()
            hung.close(timeout_s=60)
        if how == 2:
            with serve() as mine:  # one of its own works
                assert mine.submit(np.float32(2)).result().output == (2.0, 0)
            assert sys.getswitchinterval() > 0.001 and gc.get_freeze_count() == 0
        sys.exit(40 + how)
    children.append(pid)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children), s.submit(np.float32(3)).result().output[0])
"""
    assert run(code) == ["40", "41", "42", "3.0"]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_process_that_stood_still_abandons_no_worker():
    code = """
slow = serve(lambda *_: time.sleep(0.1), stall_s=1.0)
futures = [slow.submit(np.float32(i)) for i in range(8)]
print("serving", flush=True)
for f in futures:
    f.result()
print(slow.health()["abandoned"])
"""
    with subprocess.Popen([sys.executable, "-c", OPEN + code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "serving\n"
        program.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        program.send_signal(signal.SIGCONT)
        assert program.communicate(timeout=300)[0] == "0\n"
