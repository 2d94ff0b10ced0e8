"""Changing over to another export while serving: nothing is lost, and nothing of the old one stays."""

import contextlib
import dataclasses
import gc
import math
import shutil
import threading
import time
import types
import weakref
from typing import Any

import fakes
import jax
import numpy as np
import pytest
from fakes import LONG_MS, PROFILE, SUBNETS, WAIT_S, Gate, fake, held, x
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY, live_bytes, random_images, random_params, random_statistics

import superserve_jax as ss
from superserve_jax import errors
from superserve_jax.engines import prepare
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.exports import Served, export, profile_path
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import length_queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.futures import Query
from superserve_jax.serving.retries import Retries
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.supernet import SuperNet

OTHER = Profile((1, 2, 4), tuple(Row(Subnet((10 + i,)), 0.6 + 0.1 * i, (1.0, 2.0, 3.0)) for i in range(2)))
OLD, NEW = (2, SUBNETS[2], 0.8), (1, Subnet((11,)), 0.7)  # what the best subnets of both reply


def best(profile, state):
    return Decision(profile.rows[-1].subnet, 4)


def other(on_run=None, *, name="other"):
    return FakeEngine(OTHER, speed=math.inf, on_run=on_run, name=name)


def serve(*engines, policy=best, **options):
    return fakes.serve(*engines, policy=policy, **options)


def swap(s, make=other, profile=OTHER):
    """Changes all workers of a server of engines over."""
    members = s.pool.swappable()
    s.pool.swap(members, [make() for _ in members], [profile] * len(members))


def workers_of(s) -> Any:
    return s.pool.members.workers


def whose(reply):
    return reply.output[1], reply.subnet, reply.accuracy


# -- the change-over, on engines without a model ------------------------------------------------------------------------------


def test_under_traffic_no_query_is_lost_and_every_reply_is_wholly_of_one_or_the_other():
    stop, futures = threading.Event(), []

    def submit():
        while not stop.is_set():
            futures.extend(s.submit_many([x(i) for i in range(5)]))
            time.sleep(0.0002)

    with serve(*(fake(lambda *_: time.sleep(0.0003), name=f"fake:{i}") for i in range(3))) as s:
        clients = [threading.Thread(target=submit) for _ in range(3)]
        for t in clients:
            t.start()
        for make, profile, expected in [(other, OTHER, NEW), (fake, PROFILE, OLD)] * 5:
            swap(s, make, profile)
            assert whose(s.submit(x(1)).result(WAIT_S)) == expected  # from now on, not only once all have changed over
            s.pool.wait_for_swap()
        stop.set()
        for t in clients:
            t.join(WAIT_S)
        seen = {whose(f.result(WAIT_S)) for f in futures}
        assert seen == {OLD, NEW}
        health = s.health()
        assert whose(s.submit(x(1), min_accuracy=0.8).result(WAIT_S)) == OLD
        assert s.pool.backlog.fastest_s == 0.001
    assert (health["failures"], health["alive"]) == (0, 3)


def test_a_batch_that_runs_ends_on_the_old_engine_while_the_others_have_changed_over():
    with held(2, policy=best) as (s, gate, first):
        swap(s)
        waiter = threading.Thread(target=s.pool.wait_for_swap)
        waiter.start()
        assert [whose(s.submit(x(i)).result(WAIT_S)) for i in range(5)] == [NEW] * 5
        waiter.join(0.01)
        assert waiter.is_alive()
        gate.opened.set()
        waiter.join(WAIT_S)
        assert not waiter.is_alive()
        assert whose(first.result(WAIT_S)) == OLD


def test_a_policy_given_by_name_is_made_for_the_new_profile():
    with serve(policy="fixed:1") as s:
        swap(s)
        assert whose(s.submit(x(1)).result(WAIT_S)) == NEW
        with pytest.raises(errors.ConfigError, match="name one of them"):
            swap(s, profile=OTHER.only([OTHER.rows[0].subnet]))
        assert whose(s.submit(x(1)).result(WAIT_S)) == NEW
        assert s.pool.make_policy(OTHER) is workers_of(s)[0].policy  # which a worker that joins shares


def test_a_policy_that_cannot_do_with_the_new_profile_leaves_the_old_one_serving():
    with serve(policy=fakes.always(1)) as s:
        with pytest.raises(errors.ConfigError, match=r"policy fails with the profile.*policies\.ByProfile"):
            swap(s)
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 1)


def test_a_removed_worker_finishes_its_batch_and_gets_no_engine():
    made, counted = [], []

    def policy(profile, state):
        counted.append(state.workers)
        return best(profile, state)

    with held(2, policy=policy) as (s, gate, first):
        [busy] = [w["name"] for w in s.health()["per_worker"] if w["state"] == "running"]
        remover = threading.Thread(target=s.remove_worker, args=(busy,))
        remover.start()
        while all(w["state"] != "removed" for w in s.health()["per_worker"]):
            time.sleep(0.001)
        swap(s, lambda: made.append(1) or other())
        s.pool.wait_for_swap()  # for none that has been removed
        s.submit(x(1)).result(WAIT_S)
        assert counted[-1] == 1.0
        gate.opened.set()
        remover.join(WAIT_S)
        assert (len(made), whose(first.result(0)), whose(s.submit(x(1)).result(WAIT_S))) == (1, OLD, NEW)


def test_a_stuck_worker_is_abandoned_and_keeps_no_swap_waiting():
    with held(2, policy=best, stall_s=0.05) as (s, gate, first):
        swap(s)
        s.pool.wait_for_swap()
        assert s.health()["abandoned"] == 1
        assert whose(first.result(WAIT_S)) == NEW  # the other ran it again
        assert not any(w.successor for w in workers_of(s))
        gate.opened.set()


def test_a_worker_whose_memory_did_not_suffice_starts_afresh():
    def too_large(subnet, batch_size, inputs):
        if batch_size > 1:
            raise MemoryError

    with serve(fake(too_large)) as s:
        [f.result(WAIT_S) for f in s.submit_many([x(i) for i in range(4)])]
        assert s.health()["per_worker"][0]["max_batch"] == 1
        swap(s)
        s.pool.wait_for_swap()
        assert s.health()["per_worker"][0]["max_batch"] == 4


def test_counters_go_on_and_those_of_subnets_start_afresh():
    with held(2, policy=best) as (s, gate, first):
        [f.result(WAIT_S) for f in s.submit_many([x(i) for i in range(8)])]
        swap(s)
        gate.opened.set()
        first.result(WAIT_S)
        s.pool.wait_for_swap()
        [f.result(WAIT_S) for f in s.submit_many([x(i) for i in range(8)])]
        while s.health()["running"]:
            time.sleep(0.001)
        snapshot = s.snapshot()
    assert (snapshot["queries"]["met"], snapshot["queries"]["cancelled"]) == (17, 0)
    assert {i: (row["accuracy"], row["met"]) for i, row in snapshot["subnets"].items()} == {"1": (0.7, 8)}


def test_failures_of_the_old_engine_do_not_count_against_the_new_one():
    with serve(fake(fakes.fail), max_tries=1, max_failures=2) as s:
        for _ in range(3):
            assert isinstance(s.submit(x(1)).exception(WAIT_S), errors.InferenceError)
            swap(s, lambda: other(fakes.fail))
            s.pool.wait_for_swap()
        assert s.health()["alive"] == 1


def test_speeds_are_those_of_the_new_profiles():
    seen = []

    def policy(profile, state):
        seen.append(state.workers)
        return best(profile, state)

    with serve(fake(), fake(name="1"), fake(name="2"), policy=policy) as s:
        members = s.pool.swappable()
        s.pool.swap(members, [other() for _ in members], [OTHER, OTHER.scaled(2.0), OTHER.scaled(2.0)])
        s.pool.wait_for_swap()
        seen.clear()
        while len(set(seen)) < 2:
            [f.result(WAIT_S) for f in s.submit_many([x(i) for i in range(12)])]
    assert set(seen) == {2.0, 4.0}


# -- floors -------------------------------------------------------------------------------------------------------------------


def test_who_is_admitted_goes_by_the_new_profile():
    slow = OTHER.scaled(1000.0)
    with serve(fake(), admission=True) as s:
        assert s.submit(x(1), slo_ms=500.0).result(WAIT_S).met_slo
        swap(s, lambda: FakeEngine(slow, speed=math.inf), slow)
        s.pool.wait_for_swap()
        with pytest.raises(errors.AdmissionError):
            s.submit(x(2), slo_ms=500.0)


def test_waiting_queries_whose_floor_the_new_one_cannot_meet_fail_and_the_others_do_not():
    with held(1, policy=best) as (s, gate, first):
        floors = [0.0, 0.75, 0.7, 0.8, 0.0]
        waiting = [s.submit(x(i), min_accuracy=floor) for i, floor in enumerate(floors)]
        swap(s)
        for future, floor in zip(waiting, floors, strict=True):
            if floor > 0.7:
                with pytest.raises(errors.AccuracyFloorError, match=rf"min_accuracy={floor}.*has 0\.7"):
                    future.result(WAIT_S)
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.75.*has 0\.7"):
            s.submit(x(1), min_accuracy=0.75)
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.75.*has 0\.7"):  # whoever was checked before the swap
            s.pool.admit([Query(x(1), 0.0, 1e9, 0.75)])
        gate.opened.set()
        assert whose(first.result(WAIT_S)) == OLD
        assert [whose(f.result(WAIT_S)) for f, floor in zip(waiting, floors, strict=True) if floor <= 0.7] == [NEW] * 3


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_batch_of_the_old_engine_that_fails_is_given_back_by_the_floors_of_the_new(error):
    def fail_late(*args):
        if len(args[2]) == 2:
            entered.set()
            assert opened.wait(WAIT_S)
            raise error

    entered, opened = threading.Event(), threading.Event()
    with serve(fake(fail_late)) as s:
        with s.pool.lock:  # so that both are in one batch
            futures = [Query(x(floor), 0.0, 1e9, floor) for floor in (0.8, 0.7)]
            for query in futures:
                s.pool.backlog.queue.push(query.deadline_s, query, query.floor)
            s.pool.locked_wake_one()
        assert entered.wait(WAIT_S)
        swap(s)
        opened.set()
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.8.*has 0\.7"):
            futures[0].result(WAIT_S)
        assert whose(futures[1].result(WAIT_S)) == NEW
        assert s.health()["last_error"] == repr(error())


# -- who may swap when --------------------------------------------------------------------------------------------------------


def test_a_closed_server_cannot_be_swapped():
    s = serve()
    members = s.pool.swappable()
    s.close()
    for ask in (s.pool.swappable, lambda: s.pool.swap(members, [other()], [OTHER])):
        with pytest.raises(errors.ServerClosedError, match="cannot be swapped"):
            ask()


@pytest.mark.parametrize("drain", [True, False])
def test_a_server_that_closes_amid_a_swap_answers_everything_and_lets_the_swap_return(drain):
    with held(2, policy=best) as (s, gate, first):
        swap(s)
        waiter = threading.Thread(target=s.pool.wait_for_swap)
        waiter.start()
        waiting = s.submit_many([x(i) for i in range(50)])
        closer = threading.Thread(target=s.close, kwargs={"drain": drain})
        closer.start()
        gate.opened.set()
        for t in (closer, waiter):
            t.join(WAIT_S)
            assert not t.is_alive()
        assert whose(first.result(0)) == OLD
        assert {whose(f.result(0)) for f in waiting if not f.exception(0)} <= {NEW}
        assert not (drain and any(f.exception(0) for f in waiting))


def test_a_server_without_workers_says_so():
    with serve(fake(fakes.fail), max_failures=1) as s:
        s.submit(x(1)).exception(WAIT_S)
        while s.health()["alive"]:
            time.sleep(0.001)
        with pytest.raises(errors.WorkersLostError, match="add a worker"):
            s.pool.swappable()


def test_a_done_callback_may_not_swap():
    caught = []

    def callback(_):
        try:
            s.pool.swappable()
        except errors.ConfigError as error:
            caught.append(error)

    with held() as (s, _, first):
        first.add_done_callback(callback)
    assert "call it in another thread" in str(caught[0])


def test_a_server_of_engines_has_no_export_to_swap():
    with serve() as s, pytest.raises(errors.ConfigError, match="has no model"):
        s.swap("somewhere")


def test_the_old_engine_goes_though_a_client_keeps_the_error_of_a_batch(caplog):
    caplog.set_level("CRITICAL", logger="superserve_jax.serving")  # or pytest would keep the record, with the traceback

    def fail_on(subnet, batch_size, inputs):
        if any(inputs):
            try:
                raise ValueError("the first")
            except ValueError:
                raise RuntimeError("the second")  # noqa: B904 (an implicit context is what is tested)

    gone = []
    with serve(fake(fail_on)) as s:
        gone.append(weakref.ref(workers_of(s)[0].engine))
        s.submit(x(0)).result(WAIT_S)
        failed = s.submit(x(1))
        assert getattr(failed.exception(WAIT_S), "__cause__", None) is not None
        gc.disable()
        try:
            swap(s)
            s.pool.wait_for_swap()
            assert gone[0]() is None
        finally:
            gc.enable()
        assert "the second" in repr(failed.exception(0))


# -- queues -------------------------------------------------------------------------------------------------------------------

LENGTHS = (16, 64)
BUCKETED, FASTER = (
    Profile((1, 4), rows_at={n: (Row(Subnet((0,)), 0.7, (ms, 2 * ms)),) for n, ms in zip(LENGTHS, each, strict=True)})
    for each in ((1.0, 4.0), (0.5, 3.0))
)
ITEMS = st.lists(st.tuples(st.floats(0, 10), st.sampled_from([0.0, 0.5, 0.7, 0.9]), st.integers(1, 64)), max_size=20)


def filled(profile, items, defer_s=-1.0):
    q = length_queue.make_queue(profile)
    for i, (deadline_s, floor, length) in enumerate(items):
        q.push(deadline_s, i, floor, length)
    q.defer(defer_s)
    return q


@pytest.mark.parametrize("profile", [PROFILE, BUCKETED])
@given(items=ITEMS, defer_s=st.floats(-1, 10), accuracy=st.sampled_from([0.0, 0.6, 0.7, 1.0]))
def test_a_queue_gives_up_just_the_floors_above_and_keeps_its_order(profile, items, defer_s, accuracy):
    q, whole = filled(profile, items, defer_s), filled(profile, items, defer_s)
    above = {i for i, (_, floor, _) in enumerate(items) if floor > accuracy}
    assert set(q.pop_above(accuracy)) == above
    assert (len(q), q.pop_above(accuracy)) == (len(items) - len(above), [])
    if profile is PROFILE:  # else the head's batch takes only some
        kept = q.head_floors(99)
        assert any(kept) == any(0 < floor <= accuracy for _, floor, _ in items)
        assert any(kept) == bool(kept)
    assert q.drain() == [i for i in whole.drain() if i not in above]


@given(ITEMS, st.floats(0, 10))
def test_a_queue_that_counts_by_another_profile_is_as_one_that_always_did(items, time_s):
    q, expected = filled(BUCKETED, items), filled(FASTER, items)
    q.retime(FASTER)
    assert (q.pushed, q.dispersion, q.head_work, q.due_by(time_s)) == (
        expected.pushed,
        expected.dispersion,
        expected.head_work,
        expected.due_by(time_s),
    )
    assert q.pop_before(time_s) == expected.pop_before(time_s)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers(0, 8), st.floats(0.1, 10))
def test_a_meter_reads_the_same_in_other_units(arrivals, change, factor):
    meter, expected, total = ArrivalMeter(), ArrivalMeter(), 0
    for i, count in enumerate(arrivals):
        total += count
        if i == change:
            meter.rescale(factor)
        unit = factor if i >= change else 1.0
        reading, plain = meter.read(0.03 * i, total * unit, unit), expected.read(0.03 * i, total)
        assert reading == pytest.approx((plain[0] * unit, plain[1] * unit**2), abs=1e-9)


def test_what_has_failed_is_run_again_by_the_new_profile():
    again = Retries(BUCKETED, max_tries=3)
    query = Query(tokens(5), 0.0, 1.0, 0.0)
    query.length = 5
    again.give_back([query], None, 0)
    again.retime(FASTER)
    again.give_back([query], None, 0)
    assert [group.waiting.head_work for group in again.groups] == [filled(FASTER, [(1.0, 0.0, 5)]).head_work] * 2


def tokens(length):
    return np.full(length, length, np.int32)


@contextlib.contextmanager
def serve_texts(policy, on_run=None, **options):
    def make(profile, on_run=None):
        return FakeEngine(profile, speed=math.inf, on_run=on_run, input_shape=(64,), input_dtype=np.int32)

    options = {"policy": policy, "slo_ms": LONG_MS, "tune_runtime": False, **options}
    with Server.from_engines([make(BUCKETED, on_run)], BUCKETED, **options) as s:
        yield s, lambda: s.pool.swap(s.pool.swappable(), [make(FASTER)], [FASTER])


def test_queries_wait_with_their_length_bucket_through_a_swap():
    gate = Gate()
    with serve_texts("slackfit", lambda subnet, size, inputs: gate(subnet, size, [i[0] for i in inputs])) as (s, swap_texts):
        first = s.submit(tokens(5))
        assert gate.entered.wait(WAIT_S)
        waiting = s.submit_many([tokens(n) for n in (1, 20, 3, 64)])
        swap_texts()
        gate.opened.set()
        assert [f.result(WAIT_S).output[0] for f in (first, *waiting)] == [5, 1, 20, 3, 64]


def test_the_policy_sees_no_leap_of_the_arrivals_and_the_new_weight_of_long_queries():
    states, now_s = [], [100.0]

    def policy(profile, state):
        states.append(state)
        return Decision(profile.rows[0].subnet, 1)

    with serve_texts(policy, clock=lambda: now_s[0]) as (s, swap_texts):
        for i in range(20):
            now_s[0] += 0.03
            if i == 10:
                swap_texts()
                del states[10:]  # it asks once for each length whether the policy can do with the new profile
            s.submit(tokens(5)).result(WAIT_S)
        assert [state.rate_qps for state in states[5:]] == pytest.approx([1 / 0.03] * 15)
        assert [state.last_subnet is None for state in states] == [i in (0, 10) for i in range(20)]
        states.clear()
        s.pool.admit([text(5), text(50)])
        while len(states) < 2:
            time.sleep(0.001)
    assert states[0].near == pytest.approx(1 + 0.5 / 3.0)  # the long one is the head


def text(length):
    query = Query(tokens(length), 100.0, 200.0, 0.0)
    query.length = length
    return query


# -- exports ------------------------------------------------------------------------------------------------------------------


def write(folder, seed, *, accuracy, config=TINY, which="smallest"):
    """An export of made-up weights, one subnet, with a latency profile beside it."""
    subnet = getattr(config.space(), which)()
    model = SuperNet(config, random_params(config, seed), {subnet: random_statistics(config, subnet, seed)})
    export(folder, model, [Served(subnet, accuracy, None, 1, 1)], measured="made up")
    place = profile_path(folder, prepare.device_kind(jax.devices()[0]))
    place.parent.mkdir(exist_ok=True)
    Profile((1,), (Row(subnet, accuracy, (1.0,)),), prepare.device_kind(jax.devices()[0])).save(place)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERSERVE_CACHE", str(folder / "cache"))  # so that only the first test compiles
        yield write(folder / "old", 1, accuracy=0.5), write(folder / "new", 2, accuracy=0.6, which="largest")


@contextlib.contextmanager
def opened(path, **options):
    with Server(path, batch_sizes=(1,), slo_ms=LONG_MS, **options) as s:
        yield s


IMAGES = random_images(TINY, 6)


def answers(s):
    replies = [f.result(WAIT_S) for f in s.submit_many(IMAGES)]
    return np.stack([r.output for r in replies]), {r.accuracy for r in replies}


def expected(path):
    model = ss.load(path)
    return np.asarray(model(IMAGES, model.subnets[0]))


def test_after_a_swap_answers_are_the_new_models_and_nothing_of_the_old_one_is_left(exports):
    compiled_in = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled_in.append(threading.current_thread().name) if "compile" in name else None
    )
    stop, futures = threading.Event(), []

    def submit():
        while not stop.is_set():
            futures.extend(s.submit_many(IMAGES))
            time.sleep(0.002)

    old, new = map(expected, exports)
    assert np.abs(old - new).max() > 0.1
    gc.collect()
    with opened(exports[0]) as s:
        np.testing.assert_allclose(answers(s)[0], old, atol=1e-4)
        taken, gone = live_bytes(), [weakref.ref(s.model), weakref.ref(workers_of(s)[0].engine)]
        gone += [weakref.ref(e) for e in gone[1]().executables]
        client = threading.Thread(target=submit)
        client.start()
        compiled_in.clear()
        s.swap(exports[1])
        after = len(futures)
        stop.set()
        client.join(WAIT_S)
        # Without a collection, since those skip what the open server has frozen.
        assert [ref() for ref in gone] == [None] * len(gone)
        assert live_bytes() <= taken
        got, accuracies = answers(s)
        np.testing.assert_allclose(got, new, atol=1e-4)
        assert (accuracies, s.profile.rows[0].accuracy, s.model.path) == ({0.6}, 0.6, exports[1])
        for i, reply in enumerate(f.result(WAIT_S) for f in futures):
            assert reply.accuracy in ((0.5, 0.6) if i < after else (0.6,))
            np.testing.assert_allclose(reply.output, (old if reply.accuracy == 0.5 else new)[i % len(IMAGES)], atol=1e-4)
    assert compiled_in
    assert not [name for name in compiled_in if name.startswith("superserve")]


def test_an_export_that_cannot_be_served_leaves_the_old_one_serving(exports, tmp_path):
    larger = write(tmp_path / "larger", 3, accuracy=0.9, config=dataclasses.replace(TINY, image_size=11))
    damaged = shutil.copytree(exports[1], tmp_path / "damaged")
    [statistics] = damaged.glob("payload-*/statistics.npz")
    statistics.write_bytes(statistics.read_bytes()[:-1] + b"x")
    bare = SuperNet(TINY, random_params(TINY))
    with opened(exports[0]) as s:
        before, _ = answers(s)
        for path, kind, message in (
            (tmp_path / "nowhere", errors.ExportError, "is not an export"),
            (damaged, errors.ExportError, "statistics.npz"),
            (larger, errors.ConfigError, r"\(11, 11, 1\).*\(9, 9, 1\)"),
            (bare, errors.ConfigError, "export the SuperNet first"),
        ):
            with pytest.raises(kind, match=message):
                s.swap(path)
            after, accuracies = answers(s)
            np.testing.assert_array_equal(after, before)
            assert accuracies == {0.5}
        assert s.model.path == exports[0]


def test_other_vocabularies_and_lengths_are_refused():
    def text(vocabulary, **changes) -> Any:
        config = types.SimpleNamespace(
            family="text",
            **{"max_length": 64, "pad_id": 0, **changes},
            input_spec=lambda batch, length: jax.ShapeDtypeStruct((batch, length), np.int32),
        )
        return types.SimpleNamespace(path="here", config=config, vocabulary=vocabulary)

    prepare.check_same_inputs(text(("a",)), text(("a",), max_length=32), (16, 32))
    for other_model, message in (
        (text(("b",)), "another vocabulary"),
        (text(("a",), max_length=16), "exceeds the model's max_length=16"),
        (text(("a",), pad_id=1), "padded with 1, this server .*padded with 0"),
        (types.SimpleNamespace(path="there", config=TINY, vocabulary=()), r"there takes inputs of shape \(9, 9, 1\)"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            prepare.check_same_inputs(text(("a",)), other_model, (16, 32))


def test_a_swap_returns_when_what_runs_has_been_answered(exports, monkeypatch):
    with opened(exports[0]) as s:
        old, entered, go_on = workers_of(s)[0].engine, threading.Event(), threading.Event()

        def run_slowly(*args, run=old.run):
            entered.set()
            assert go_on.wait(WAIT_S)
            return run(*args)

        monkeypatch.setattr(old, "run", run_slowly)
        running = s.submit(IMAGES[0])
        assert entered.wait(WAIT_S)
        swapping = threading.Thread(target=s.swap, args=(exports[1],))
        swapping.start()
        while s.model.path != exports[1]:
            time.sleep(0.001)
        swapping.join(0.01)
        assert swapping.is_alive()
        go_on.set()
        swapping.join(WAIT_S)
        assert running.result(0).accuracy == 0.5


def test_swaps_and_a_worker_that_joins_come_one_after_the_other(exports, monkeypatch):
    def load_slowly(path, load=prepare.load):
        loading.set()
        assert go_on.wait(WAIT_S)
        return load(path)

    loading, go_on = threading.Event(), threading.Event()
    with opened(exports[0]) as s:
        device = workers_of(s)[0].engine.device
        monkeypatch.setattr(prepare, "load", load_slowly)
        changes = [threading.Thread(target=s.swap, args=(path,)) for path in (exports[1], exports[0], exports[1])]
        changes[0].start()
        assert loading.wait(WAIT_S)
        changes += [threading.Thread(target=s.add_worker, args=(device,))]
        for t in changes[1:]:
            t.start()
        assert answers(s)[1] == {0.5}
        changes[-1].join(0.2)
        assert all(t.is_alive() for t in changes)
        assert s.health()["alive"] == 1
        go_on.set()
        for t in changes:
            t.join(WAIT_S)
        health = s.health()
        assert (health["alive"], health["failures"]) == (2, 0)
        assert {w.engine._model for w in workers_of(s)} == {s.model}
        accuracy = s.profile.rows[0].accuracy
        assert answers(s)[1] == {accuracy}


def test_a_worker_with_an_engine_that_was_given_stands_in_the_way(exports):
    with opened(exports[0]) as s:
        given = FakeEngine(s.profile, name="mine", input_shape=(9, 9, 1), input_dtype=np.uint8)
        s.add_worker(given)
        with pytest.raises(
            errors.ConfigError, match="worker mine has left, or has an engine that was given to it; remove it first"
        ):
            s.swap(exports[1])
        s.remove_worker("mine")
        s.swap(exports[1])
        assert answers(s)[1] == {0.6}
