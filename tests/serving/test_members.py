"""How workers join and leave a server."""

import gc
import math
import threading
import time
import weakref

import fakes
import jax
import numpy as np
import pytest
from fakes import LONG_MS, WAIT_S, Gate, fail, x
from one_subnet import PROFILE, ROW, SIZES, fake, largest, outcomes, serve, state
from tiny import TINY, random_images

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet


def test_workers_come_and_go_while_traffic_runs():
    engines = [fake(lambda *_: time.sleep(0.0002), name=f"fake:{i}") for i in range(3)]
    answers, stop = [], threading.Event()
    with serve(*engines) as s:

        def submit():
            while not stop.is_set():
                answers.append(s.submit_many([x(i) for i in range(5)]))
                time.sleep(0.0005)

        client = threading.Thread(target=submit)
        client.start()
        for i in range(20):
            s.remove_worker(f"fake:{i % 3}")
            assert s.health()["alive"] == 2
            assert s.add_worker(engines[i % 3]) == f"fake:{i % 3}"
        stop.set()
        client.join()
        for five in answers:
            assert outcomes(five) == list(range(5))
        assert (s.health()["workers"], s.health()["alive"], s.health()["failures"]) == (3, 3, 0)


def test_a_removed_worker_finishes_its_batch_and_its_thread_ends():
    with fakes.held(2) as (s, gate, first):
        busy = next(w["name"] for w in s.health()["per_worker"] if w["state"] == "running")
        threading.Timer(0.02, gate.opened.set).start()
        s.remove_worker(busy)
        assert first.result(0).output == (0.0, 0)
        assert state(s, busy)["state"] == "removed"
        assert not [t for t in threading.enumerate() if t.name == f"superserve-{busy}"]
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 0)


def test_a_removed_worker_does_not_finish_its_pause_after_a_failure():
    failed = threading.Event()

    def fail_and_tell(subnet, batch_size, inputs):
        if not any(inputs):  # the blank inputs: the worker pauses next
            failed.set()
        fail()

    with serve(fake(fail_and_tell), fake(name="fake:1")) as s:
        s.pool.pause_s = 1e6
        while not failed.is_set():
            s.submit(x(1)).exception(WAIT_S)
        s.remove_worker("fake:0")
        assert state(s)["state"] == "removed"


def test_a_removed_worker_that_is_stuck_is_abandoned():
    with fakes.held(2, stall_s=0.05) as (s, _, first):
        busy = next(w["name"] for w in s.health()["per_worker"] if w["state"] == "running")
        s.remove_worker(busy)
        assert state(s, busy)["state"] == "abandoned"
        assert f"superserve-{busy}" in [t.name for t in threading.enumerate()]
        assert first.result(WAIT_S).output == (0.0, 0)


def test_a_removed_worker_whose_last_batch_fails_gives_it_back():
    gate = Gate()

    def burn(*a):
        gate(*a)
        fail()

    with serve(fake(burn)) as s:
        first = s.submit(x(0))
        assert gate.entered.wait(WAIT_S)
        s.add_worker(fake(name="fresh"))
        threading.Timer(0.02, gate.opened.set).start()
        s.remove_worker("fake:0")
        assert first.result(WAIT_S).output == (0.0, 0)


def test_a_callback_may_remove_its_own_worker():
    with fakes.held(2) as (s, gate, first):
        busy = next(w["name"] for w in s.health()["per_worker"] if w["state"] == "running")
        first.add_done_callback(lambda f: s.remove_worker(busy))
        gate.opened.set()
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 0)
    assert s.health()["abandoned"] == 0


def test_neither_the_last_worker_nor_an_unknown_one_can_be_removed():
    with serve(fake(), fake(name="gpu:1")) as s:
        with pytest.raises(errors.UnknownNameError, match="unknown worker 'gpu:0': did you mean 'gpu:1'"):
            s.remove_worker("gpu:0")
        s.remove_worker("gpu:1")
        with pytest.raises(errors.ConfigError, match="fake:0 is the last worker; add another"):
            s.remove_worker("fake:0")
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 0)


def test_workers_of_the_same_name_get_numbers():
    with serve(fake(), fake()) as s:
        assert s.add_worker(fake()) == "fake:0 (3)"
        assert [w["name"] for w in s.health()["per_worker"]] == ["fake:0", "fake:0 (2)", "fake:0 (3)"]
        s.remove_worker("fake:0 (2)")
        assert s.add_worker(fake()) == "fake:0 (2)"


def test_a_server_that_has_lost_its_workers_serves_again_with_a_new_one():
    with serve(fake(fail), max_failures=1) as s:
        with pytest.raises(errors.WorkersLostError, match="add a worker or open a new server"):
            s.submit(x(1)).result(WAIT_S)
        assert s.add_worker(fake()) == "fake:0"
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 0)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (FakeEngine(PROFILE, input_shape=(3,), name="odd"), r"odd takes .*shape=\(3,\).* must agree"),
        ("gpu:0", "expected an engine, got 'gpu:0'"),
    ],
    ids=["other inputs", "no engine"],
)
def test_a_worker_that_does_not_fit_is_refused(new, message):
    with serve() as s, pytest.raises(errors.ConfigError, match=message):
        s.add_worker(new)
    with pytest.raises(errors.ServerClosedError):
        s.add_worker(fake())


@pytest.mark.parametrize("how", ["removed", "left"])
def test_the_engine_of_a_worker_that_has_gone_is_released(how, caplog):
    caplog.set_level("CRITICAL", logger="superserve_jax.serving")  # pytest keeps what is logged
    with serve(fake(), slo_ms=1, max_failures=1) as s:
        new = fake(fail if how == "left" else None, name="other")
        held = weakref.ref(new)
        s.add_worker(new)
        del new
        if how == "removed":
            s.remove_worker("other")
        while state(s, "other")["state"] != how:
            outcomes(s.submit_many([x(i) for i in range(50)], slo_ms=LONG_MS))
        end_s = time.monotonic() + WAIT_S
        while held() is not None:
            assert time.monotonic() < end_s
            gc.collect()
        assert state(s, "other")["max_batch"] == 16


def test_a_device_is_added_to_a_server_of_an_export_and_relieves_the_first(export):
    images = random_images(TINY, 2)
    with Server(export, batch_sizes=(2,), devices=jax.devices()[:1], slo_ms=LONG_MS) as s:
        [first] = s.health()["per_worker"]
        added = s.add_worker(jax.devices()[0])
        assert added == f"{first['name']} (2)"
        s.remove_worker(first["name"])
        outputs = [f.result(WAIT_S).output for f in s.submit_many(list(images))]
        assert state(s, added)["batches"] >= 1
    expected = np.asarray(export(images, export.subnets[0]))
    np.testing.assert_allclose(outputs, expected, atol=1e-5 * np.abs(expected).max())


def test_a_worker_with_the_index_of_a_gone_worker_keeps_its_speed_through_a_swap():
    with serve(fake(name="a"), fake(name="b")) as s:
        s.remove_worker("a")
        s.add_worker(fake(name="c"))
        s.pool.swap(s.pool.swappable(), [fake(name="d"), fake(name="e")], [PROFILE, PROFILE])
        s.pool.wait_for_swap()
        assert s.pool.members.fleet.strength() == (2.0, 2)


def test_a_less_accurate_worker_makes_only_queries_with_higher_floors_fail_until_it_leaves():
    two = Profile(SIZES, (ROW, Row(Subnet((1,)), 0.9, ROW.latency_ms)))
    gate = Gate()
    first_engine, second = (FakeEngine(p, speed=math.inf, on_run=gate, name=n) for p, n in ((two, "a"), (PROFILE, "b")))
    with Server.from_engines([first_engine], two, policy=largest, slo_ms=LONG_MS, tune_runtime=False) as s:
        first = s.submit(x(0))
        assert gate.entered.wait(WAIT_S)
        demanding, modest = s.submit(x(1), min_accuracy=0.8), s.submit(x(2))
        s.add_worker(second, profile=PROFILE)
        with pytest.raises(errors.AccuracyFloorError, match="that every worker serves now"):
            demanding.result(WAIT_S)
        assert modest.result(WAIT_S).output[0] == 2.0
        s.remove_worker("b")
        gate.opened.set()
        assert first.result(WAIT_S).output[0] == 0.0
        assert s.submit(x(3), min_accuracy=0.8).result(WAIT_S).accuracy == 0.9
