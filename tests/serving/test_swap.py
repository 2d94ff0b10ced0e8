"""Swaps on engines without a model: no query is lost, and nothing of the old engines stays.

One file because the tests share the two exports and the checks after a swap.
"""

import functools
import gc
import threading
import time
import weakref
from typing import Any

import fakes
import pytest
from fakes import BUCKETED, FASTER, PROFILE, SUBNETS, WAIT_S, Cramped, fail, fake, outcomes, threads, tokens, wait_until, x

from superserve_jax import errors
from superserve_jax.loadtest.acts import BadReprBase
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.futures import Query
from superserve_jax.subnet import Subnet

OTHER = Profile((1, 2, 4), tuple(Row(Subnet((10 + i,)), 0.6 + 0.1 * i, (1.0, 2.0, 3.0)) for i in range(2)))
OLD, NEW = (2, SUBNETS[2], 0.8), (1, Subnet((11,)), 0.7)  # what the best subnets of both reply


def best(profile, state):
    return Decision(profile.rows[-1].subnet, 4)


serve = functools.partial(fakes.serve, policy=best)
held = functools.partial(fakes.held, policy=best)
other = functools.partial(fake, name="other", profile=OTHER)


def start_swap(s, make=other, profile=OTHER):
    """Swaps the engines of all workers. Does not wait until they have changed over."""
    members = s.pool.swaps.swappable()
    s.pool.swaps.swap(members, [make() for _ in members], [profile] * len(members))


def swap(s, make=other, profile=OTHER):
    start_swap(s, make, profile)
    s.pool.swaps.wait()


def workers_of(s) -> Any:
    return s.pool.members.workers


def whose(future):
    reply = future.result(WAIT_S)
    return reply.output[1], reply.subnet, reply.accuracy


# -- the change-over, on engines without a model ------------------------------------------------------------------------------


def test_under_traffic_no_query_is_lost_and_every_reply_comes_from_one_export():
    futures = []
    with serve(*fakes.several(3, lambda *_: time.sleep(0.0003))) as s:
        with fakes.traffic(lambda: futures.extend(s.submit_many(x(range(5)))), clients=3):
            wait_until(lambda: futures)
            for make, profile, expected in [(other, OTHER, NEW), (fake, PROFILE, OLD)] * 5:
                start_swap(s, make, profile)
                assert whose(s.submit(x(1))) == expected  # from now on, not only once all have changed over
                s.pool.swaps.wait()
        assert {whose(f) for f in futures} <= {OLD, NEW}
        assert whose(s.submit(x(1), min_accuracy=0.8)) == OLD
        assert s.pool.backlog.fastest_s == 0.001
        assert (s.health()["failures"], s.health()["alive"]) == (0, 3)


def test_a_batch_that_runs_ends_on_the_old_engine_while_the_others_have_changed_over():
    with held(2) as (s, gate, first):
        start_swap(s)
        with threads(s.pool.swaps.wait) as [waiter]:
            assert [whose(s.submit(x(i))) for i in range(5)] == [NEW] * 5
            waiter.join(0.01)
            assert waiter.is_alive()
            gate.opened.set()
        assert whose(first) == OLD


def test_a_policy_given_by_name_is_made_for_the_new_profile():
    with serve(policy="fixed:1") as s:
        swap(s)
        assert whose(s.submit(x(1))) == NEW
        with pytest.raises(errors.ConfigError, match="name one of them"):
            swap(s, profile=OTHER.only([OTHER.rows[0].subnet]))
        assert whose(s.submit(x(1))) == NEW
        assert s.pool.make_policy(OTHER) is workers_of(s)[0].policy  # which a worker that joins shares


def test_a_policy_that_fails_with_the_new_profile_leaves_the_old_engines_serving():
    with serve(policy=fakes.always(1)) as s:
        with pytest.raises(errors.ConfigError, match=r"policy fails with the profile.*policies\.ByProfile"):
            swap(s)
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 1)


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, KeyboardInterrupt, BadReprBase])
def test_whatever_a_policy_raises_when_a_swap_tries_it_the_swap_fails_with_a_documented_error(error):
    caught = []

    def policy(profile, state):
        if profile is OTHER:
            raise error()
        return best(profile, state)

    def swap_and_catch():
        with pytest.raises(errors.ConfigError, match="policy fails with the profile"):
            swap(s)
        caught.append(1)

    with serve(policy=policy) as s:
        with threads(swap_and_catch):  # not in the main thread, where KeyboardInterrupt is Ctrl-C
            pass
        assert caught
        assert whose(s.submit(x(1))) == OLD


def test_a_removed_worker_finishes_its_batch_and_gets_no_engine():
    made, counted = [], []

    def policy(profile, state):
        counted.append(state.workers)
        return best(profile, state)

    with held(2, policy=policy) as (s, gate, first):
        [busy] = [w["name"] for w in s.health()["per_worker"] if w["state"] == "running"]
        with threads(lambda: s.remove_worker(busy)):
            fakes.wait_until(lambda: fakes.worker(s, busy)["state"] == "removed")
            swap(s, lambda: made.append(1) or other())  # waits for none that has been removed
            assert whose(s.submit(x(1))) == NEW
            assert counted[-1] == 1.0
            gate.opened.set()
        assert (len(made), whose(first), whose(s.submit(x(1)))) == (1, OLD, NEW)


def test_a_stuck_worker_is_abandoned_and_keeps_no_swap_waiting():
    with held(2, stall_s=0.3) as (s, _, first):
        swap(s)
        assert s.health()["abandoned"] == 1
        assert whose(first) == NEW  # the other ran it again
        assert not any(w.successor for w in workers_of(s))


def test_after_a_swap_a_worker_that_ran_out_of_memory_has_all_batch_sizes_again():
    with serve(fake(Cramped(1))) as s:
        outcomes(s.submit_many(x(range(4))))
        assert fakes.worker(s)["max_batch"] == 1
        swap(s)
        assert fakes.worker(s)["max_batch"] == 4


def test_after_a_swap_counters_by_outcome_go_on_and_counters_by_subnet_restart():
    with held(2) as (s, gate, first):
        outcomes(s.submit_many(x(range(8))))
        start_swap(s)
        gate.opened.set()
        s.pool.swaps.wait()
        outcomes([first, *s.submit_many(x(range(8)))])
        fakes.wait_until(lambda: not s.health()["running"])
        snapshot = s.snapshot()
    assert (snapshot["queries"]["met"], snapshot["queries"]["cancelled"]) == (17, 0)
    assert {i: (row["accuracy"], row["met"]) for i, row in snapshot["subnets"].items()} == {"1": (0.7, 8)}


def test_failures_of_the_old_engine_do_not_count_against_the_new_one():
    with serve(fake(fail), max_tries=1, max_failures=2) as s:
        for _ in range(3):
            assert isinstance(s.submit(x(1)).exception(WAIT_S), errors.InferenceError)
            swap(s, lambda: other(fail))
        assert s.health()["alive"] == 1


def test_after_a_swap_speeds_follow_the_new_profiles():
    seen = []

    def policy(profile, state):
        seen.append(state.workers)
        return best(profile, state)

    with serve(*fakes.several(3), policy=policy) as s:
        members = s.pool.swaps.swappable()
        s.pool.swaps.swap(members, [other() for _ in members], [OTHER, OTHER.scaled(2.0), OTHER.scaled(2.0)])
        s.pool.swaps.wait()
        seen.clear()
        while len(set(seen)) < 2:
            outcomes(s.submit_many(x(range(12))))
    assert set(seen) == {2.0, 4.0}


# -- floors -------------------------------------------------------------------------------------------------------------------


def test_after_a_swap_admission_uses_the_new_profile():
    slow = OTHER.scaled(1000.0)
    with serve(fake(), admission=True) as s:
        assert s.submit(x(1), slo_ms=500.0).result(WAIT_S).met_slo
        swap(s, lambda: fake(profile=slow), slow)
        with pytest.raises(errors.AdmissionError):
            s.submit(x(2), slo_ms=500.0)


def test_after_a_swap_only_waiting_queries_with_a_floor_above_the_new_best_fail():
    with held() as (s, gate, first):
        floors = [0.0, 0.75, 0.7, 0.8, 0.0]
        waiting = [s.submit(x(i), min_accuracy=floor) for i, floor in enumerate(floors)]
        start_swap(s)
        for future, floor in zip(waiting, floors, strict=True):
            if floor > 0.7:
                with pytest.raises(errors.AccuracyFloorError, match=rf"min_accuracy={floor}.*has 0\.7"):
                    future.result(WAIT_S)
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.75.*has 0\.7"):
            s.submit(x(1), min_accuracy=0.75)
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.75.*has 0\.7"):  # a query that was checked before the swap
            s.pool.admit([Query(x(1), 0.0, 1e9, 0.75)])
        gate.opened.set()
        assert whose(first) == OLD
        assert [whose(f) for f, floor in zip(waiting, floors, strict=True) if floor <= 0.7] == [NEW] * 3


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_queries_that_fail_on_the_old_engine_are_checked_against_the_new_best_accuracy(error):
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
        start_swap(s)
        opened.set()
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.8.*has 0\.7"):
            futures[0].result(WAIT_S)
        assert whose(futures[1]) == NEW
        assert s.health()["last_error"] == repr(error())


# -- who may swap when --------------------------------------------------------------------------------------------------------


def test_a_closed_server_cannot_be_swapped():
    s = serve()
    members = s.pool.swaps.swappable()
    s.close()
    for ask in (s.pool.swaps.swappable, lambda: s.pool.swaps.swap(members, [other()], [OTHER])):
        with pytest.raises(errors.ServerClosedError, match="cannot be swapped"):
            ask()


@pytest.mark.parametrize("drain", [True, False])
def test_a_server_that_closes_amid_a_swap_answers_everything_and_lets_the_swap_return(drain):
    with held(2) as (s, gate, first):
        start_swap(s)
        waiting = s.submit_many(x(range(50)))
        with threads(s.pool.swaps.wait, lambda: s.close(drain=drain)):
            gate.opened.set()
        assert whose(first) == OLD
        assert {whose(f) for f in waiting if not f.exception(0)} <= {NEW}
        assert not (drain and any(f.exception(0) for f in waiting))


def test_a_done_callback_may_not_swap():
    caught = []

    def callback(_):
        try:
            s.pool.swaps.swappable()
        except errors.ConfigError as error:
            caught.append(error)

    with held() as (s, _, first):
        first.add_done_callback(callback)
    assert "call it in another thread" in str(caught[0])


def test_a_server_of_engines_has_no_export_to_swap():
    with serve() as s, pytest.raises(errors.ConfigError, match="has no model"):
        s.swap("somewhere")


def test_the_old_engine_is_released_even_if_a_client_keeps_the_error_of_a_batch(caplog):
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
            wait_until(lambda: gone[0]() is None)  # its worker drops it a moment after it has taken up the new one
        finally:
            gc.enable()
        assert "the second" in repr(failed.exception(0))


# -- texts --------------------------------------------------------------------------------------------------------------------


def test_queries_wait_with_their_length_bucket_through_a_swap():
    with held(profile=BUCKETED, policy="slackfit", query=tokens(5)) as (s, gate, first):
        waiting = s.submit_many([tokens(n) for n in (1, 20, 3, 64)])
        start_swap(s, lambda: fake(profile=FASTER), FASTER)
        gate.opened.set()
        assert outcomes([first, *waiting]) == [5, 1, 20, 3, 64]


def test_after_a_swap_the_arrival_rate_does_not_jump_and_long_queries_have_their_new_weight():
    states, now_s = [], [100.0]

    def policy(profile, state):
        states.append(state)
        return Decision(profile.rows[0].subnet, 1)

    with serve(profile=BUCKETED, policy=policy, clock=lambda: now_s[0]) as s:
        for i in range(20):
            now_s[0] += 0.03
            if i == 10:
                start_swap(s, lambda: fake(profile=FASTER), FASTER)
                del states[10:]  # it asks once for each length whether the policy can do with the new profile
            s.submit(tokens(5)).result(WAIT_S)
        assert [state.rate_qps for state in states[5:]] == pytest.approx([1 / 0.03] * 15)
        assert [state.last_subnet is None for state in states] == [i in (0, 10) for i in range(20)]
        states.clear()
        s.pool.admit([text(5), text(50)])
        fakes.wait_until(lambda: len(states) == 2)
    assert states[0].near == pytest.approx(1 + 0.5 / 3.0)  # the long one is the head


def text(length):
    query = Query(tokens(length), 100.0, 200.0, 0.0)
    query.length = length
    return query
