"""How workers join and leave a server."""

import gc
import threading
import time
import weakref

import fakes
import jax
import numpy as np
import pytest
from fakes import LONG_MS, WAIT_S, Gate, fail, outcomes, threads, traffic, wait_until, worker, x
from one_subnet import PROFILE, ROW, SIZES, fake, largest, serve, several
from tiny import TINY, random_images

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet


def busy_worker(s):
    return next(w["name"] for w in s.health()["per_worker"] if w["state"] == "running")


def test_workers_come_and_go_while_traffic_runs():
    engines, answers = several(3, lambda *_: time.sleep(0.0002)), []
    with serve(*engines) as s:
        with traffic(lambda: answers.append(s.submit_many(x(range(5))))):
            for i in range(20):
                s.remove_worker(f"fake:{i % 3}")
                assert s.health()["alive"] == 2
                assert s.add_worker(engines[i % 3]) == f"fake:{i % 3}"
        for five in answers:
            assert outcomes(five) == list(range(5))
        assert (s.health()["workers"], s.health()["alive"], s.health()["failures"]) == (3, 3, 0)


@pytest.mark.parametrize(("make", "running"), [(FakeEngine, 4), (FakeDevice, 8)])
def test_a_removed_worker_finishes_its_batches_and_its_thread_ends(make, running):
    gate, busy = Gate(), Gate()
    with fakes.serve(fakes.fake(gate, make=make)) as s:
        futures = s.submit_many(x(range(16)))
        with gate.holding():
            s.add_worker(fakes.fake(busy, name="fake:1"))
            [removed, _] = [member.thread for member in s.pool.members.workers]
            with busy.holding(), threads(lambda: s.remove_worker("fake:0")):
                wait_until(lambda: worker(s)["state"] == "removed")
                gate.opened.set()
        assert outcomes(futures) == list(range(16))
        assert [i for batch in gate.batches for i in batch] == list(range(running))  # the others waited for the busy worker
        assert not removed.is_alive()
        assert outcomes([s.submit(x(1))]) == [1]
        assert s.snapshot()["queries"]["requeued"] == 0


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
        assert worker(s)["state"] == "removed"


def test_a_removed_worker_that_is_stuck_is_abandoned():
    with fakes.held(2, stall_s=0.3) as (s, _, first):
        busy = busy_worker(s)
        s.remove_worker(busy)
        assert worker(s, busy)["state"] == "abandoned"
        assert f"superserve-{busy}" in [t.name for t in threading.enumerate()]
        assert outcomes([first]) == [0]


def test_a_removed_worker_whose_last_batch_fails_gives_it_back():
    with fakes.held(then=fail) as (s, gate, first):
        s.add_worker(fakes.fake(name="fresh"))
        with threads(lambda: s.remove_worker("fake:0")):
            wait_until(lambda: worker(s)["state"] == "removed")
            gate.opened.set()
        assert outcomes([first]) == [0]


def test_a_callback_may_remove_its_own_worker():
    with fakes.held(2) as (s, gate, first):
        busy = busy_worker(s)
        first.add_done_callback(lambda f: s.remove_worker(busy))
        gate.opened.set()
        assert outcomes([s.submit(x(1))]) == [1]
    assert s.health()["abandoned"] == 0


def test_callbacks_on_two_workers_may_remove_each_others_worker():
    batches, callbacks, names, removed = threading.Barrier(2), threading.Barrier(2), set(), []

    def remove_the_other(_):
        mine = threading.current_thread().name.removeprefix("superserve-")
        names.add(mine)
        callbacks.wait(WAIT_S)
        [other] = names - {mine}
        s.remove_worker(other)
        removed.append(other)

    def run_together(subnet, batch_size, inputs):
        if inputs[0]:
            batches.wait(WAIT_S)

    with fakes.serve(*fakes.several(3, run_together), policy=fakes.always(0, batch=1)) as s:
        for i in (1, 2):
            s.submit(x(i)).add_done_callback(remove_the_other)
        wait_until(lambda: len(removed) == 2)
        assert s.health()["alive"] == 1
        assert outcomes([s.submit(x(0))]) == [0]


def test_neither_the_last_worker_nor_an_unknown_one_can_be_removed():
    with serve(fake(), fake(name="gpu:1")) as s:
        with pytest.raises(errors.UnknownNameError, match="unknown worker 'gpu:0': did you mean 'gpu:1'"):
            s.remove_worker("gpu:0")
        s.remove_worker("gpu:1")
        with pytest.raises(errors.ConfigError, match="fake:0 is the last worker; add another"):
            s.remove_worker("fake:0")
        assert outcomes([s.submit(x(1))]) == [1]


def test_workers_of_the_same_name_get_numbers():
    with serve(fake(), fake()) as s:
        assert s.add_worker(fake()) == "fake:0 (3)"
        assert [w["name"] for w in s.health()["per_worker"]] == ["fake:0", "fake:0 (2)", "fake:0 (3)"]
        s.remove_worker("fake:0 (2)")
        assert s.add_worker(fake()) == "fake:0 (2)"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (fake(input_shape=(3,), name="odd"), r"odd takes .*shape=\(3,\).* must agree"),
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
        while worker(s, "other")["state"] != how:
            outcomes(s.submit_many(x(range(50)), slo_ms=LONG_MS))
        wait_until(lambda: gc.collect() >= 0 and held() is None)
        assert worker(s, "other")["max_batch"] == 16


def test_a_device_is_added_to_a_server_of_an_export_and_relieves_the_first(export, compilations):
    images = random_images(TINY, 2)
    with Server(export, batch_sizes=(2,), devices=jax.devices()[:1], slo_ms=LONG_MS) as s:
        [first] = s.health()["per_worker"]
        before = len(compilations())
        with pytest.raises(errors.ConfigError, match="the same batch sizes"):
            s.add_worker(jax.devices()[0], profile=Profile((4,), (Row(export.subnets[0], 0.5, (1.0,)),)))
        with pytest.raises(errors.ProfileError, match="does not fit the network"):
            s.add_worker(jax.devices()[0], profile=Profile((2,), (Row(Subnet((1,)), 0.5, (1.0,)),)))
        assert len(compilations()) == before
        added = s.add_worker(jax.devices()[0])
        assert added == f"{first['name']} (2)"
        s.remove_worker(first["name"])
        outputs = [f.result(WAIT_S).output for f in s.submit_many(images)]
        assert worker(s, added)["batches"] >= 1
    expected = np.asarray(export(images, export.subnets[0]))
    np.testing.assert_allclose(outputs, expected, atol=1e-5 * np.abs(expected).max())


def test_a_worker_with_the_index_of_a_gone_worker_keeps_its_speed_through_a_swap():
    with serve(fake(name="a"), fake(name="b")) as s:
        s.remove_worker("a")
        s.add_worker(fake(name="c"))
        s.pool.swaps.swap(s.pool.swaps.swappable(), [fake(name="d"), fake(name="e")], [PROFILE, PROFILE])
        s.pool.swaps.wait()
        assert s.pool.members.fleet.strength() == (2.0, 2)


def test_a_less_accurate_worker_makes_only_queries_with_higher_floors_fail_until_it_leaves():
    two = Profile(SIZES, (ROW, Row(Subnet((1,)), 0.9, ROW.latency_ms)))
    with fakes.held(profile=two, policy=largest) as (s, gate, first):
        demanding, modest = s.submit(x(1), min_accuracy=0.8), s.submit(x(2))
        s.add_worker(fake(name="b"), profile=PROFILE)
        with pytest.raises(errors.AccuracyFloorError, match="that every worker serves now"):
            demanding.result(WAIT_S)
        assert outcomes([modest]) == [2]
        s.remove_worker("b")
        gate.opened.set()
        assert outcomes([first]) == [0]
        assert s.submit(x(3), min_accuracy=0.8).result(WAIT_S).accuracy == 0.9
