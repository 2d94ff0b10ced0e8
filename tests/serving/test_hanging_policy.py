"""A policy object may be slow or hang: it is called without the pool's lock, for one worker at a time."""

import threading
import time

import pytest
from bad import within
from fakes import (
    BUCKETED,
    LONG_MS,
    PROFILE,
    SUBNETS,
    WAIT_S,
    always,
    fake,
    idle_worker,
    outcomes,
    serve,
    several,
    threads,
    tokens,
    wait_until,
    worker,
    x,
)

from superserve_jax import errors
from superserve_jax.scheduling.policies import Decision

STALL_S = 0.3
FASTEST = always(0)


class Hanging:
    """A policy that hangs in the calls whose numbers are given, until `release` is set."""

    def __init__(self, *calls, then=FASTEST):
        self.calls, self.then = set(calls), then
        self.count = self.inside = self.most = 0
        self.entered, self.release = threading.Event(), threading.Event()

    def __call__(self, profile, state):
        self.count += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            if self.count in self.calls:
                self.entered.set()
                self.release.wait(WAIT_S)
            return self.then(profile, state)
        finally:
            self.inside -= 1


@pytest.fixture
def hanging():
    """Makes policies, and ends their calls after the test."""
    made = []
    yield lambda *calls, **options: made.append(Hanging(*calls, **options)) or made[-1]
    for policy in made:
        policy.release.set()


@pytest.mark.parametrize("drain", [True, False])
def test_a_server_whose_policy_hangs_still_answers_its_clients_and_closes_in_time(hanging, drain):
    policy = hanging(1)
    with within(60), serve(policy=policy, stall_s=60.0) as s:
        futures = [s.submit(x(0))]
        assert policy.entered.wait(WAIT_S)
        start_s = time.monotonic()
        futures += [s.submit(x(1)), *s.submit_many(x([2, 3]))]
        assert s.health()["waiting"] == s.snapshot()["waiting"] == 4
        assert worker(s)["state"] == "deciding"
        s.close(drain=drain, timeout_s=0.2)
        assert time.monotonic() - start_s < WAIT_S / 2  # the policy hangs for twice as long
        assert {type(outcome) for outcome in outcomes(futures)} == {errors.ServerClosedError}


def test_other_workers_go_on_when_the_policy_hangs_for_one(hanging):
    policy = hanging(1)
    with within(100), serve(*several(2), policy=policy, stall_s=STALL_S) as s:
        assert outcomes(s.submit_many(x(range(20)))) == list(range(20))
        wait_until(lambda: {w["state"] for w in s.health()["per_worker"]} == {"abandoned", "idle"})
        states = {w["state"]: w["last_error"] for w in s.health()["per_worker"]}
        assert "the policy, called by" in states["abandoned"]
        assert s.snapshot()["queries"]["requeued"] == 0  # no batch had been taken
        policy.release.set()
        assert outcomes(s.submit_many(x(range(20)))) == list(range(20))
    assert policy.most == 2  # the abandoned call does not count any more


def test_when_the_policy_hangs_for_the_last_worker_all_queries_fail_with_the_cause(hanging):
    policy = hanging(1, 2)
    with within(100), serve(*several(2), policy=policy, stall_s=STALL_S) as s:
        for error in outcomes(s.submit_many(x(range(5)))):
            assert isinstance(error, errors.WorkersLostError)
            assert "the policy" in str(error)
        s.add_worker(fake(name="new"))
        assert outcomes([s.submit(x(7))]) == [7]


@pytest.mark.parametrize("drain", [True, False])
def test_close_without_a_timeout_returns_when_the_policy_hangs(hanging, drain):
    policy = hanging(1)
    with within(100), serve(policy=policy, stall_s=STALL_S) as s:
        future = s.submit(x(0))
        assert policy.entered.wait(WAIT_S)
        s.close(drain=drain)
        assert isinstance(future.exception(WAIT_S), errors.WorkersLostError if drain else errors.ServerClosedError)


def test_all_workers_help_to_drain_although_one_decides_slowly(hanging):
    policy = hanging(1, then=always(0, 1))
    with within(100), serve(*several(3), policy=policy) as s:
        futures = s.submit_many(x(range(30)))
        assert policy.entered.wait(WAIT_S)
        s.pool.stop(drain=True)
        assert s.health()["alive"] == 3  # they wait for the policy, since queries wait
        policy.release.set()
        assert outcomes(futures) == list(range(30))


def submit_and_remove(s, policy):
    """Submits a query, and removes the worker that decides about it. Returns the query and the worker's name."""
    future = s.submit(x(5))
    assert policy.entered.wait(WAIT_S)
    name = next(w["name"] for w in s.health()["per_worker"] if w["state"] == "deciding")
    with threads(lambda: s.remove_worker(name)):
        wait_until(lambda: worker(s, name)["state"] == "removed")
        assert not future.done()
        policy.release.set()
    return future, name


def test_a_worker_that_is_removed_while_its_policy_decides_takes_no_batch(hanging):
    policy = hanging(1)
    with within(100), serve(*several(2), policy=policy, stall_s=60.0) as s:
        future, name = submit_and_remove(s, policy)
        assert outcomes([future]) == [5]
        assert worker(s, name)["batches"] == 0


def test_an_error_that_comes_too_late_is_dropped_without_the_lock(hanging):
    held = []

    class LateError(Exception):
        def __del__(self):
            held.append(s.pool.is_held_here())

    def then(profile, state):
        if policy.count == 1:
            raise LateError
        return Decision(SUBNETS[0], 4)

    policy = hanging(1, then=then)
    with within(100), serve(*several(2), policy=policy, stall_s=60.0) as s:
        future, _ = submit_and_remove(s, policy)
        assert outcomes([future]) == [5]
        wait_until(lambda: held)
    assert held == [False]


@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_a_decision_for_the_old_engine_is_dropped_after_a_swap(hanging, ends):
    def then(profile, state):
        if ends == "raises" and len(seen) == 0:
            seen.append(profile)
            raise RuntimeError("too late to matter")
        return Decision(SUBNETS[0], 1)

    seen, policy = [], hanging(1, then=then)
    with within(100), serve(policy=policy, stall_s=60.0) as s:
        future = s.submit(x(5))
        assert policy.entered.wait(WAIT_S)
        [member] = s.pool.swaps.swappable()
        swapper = threading.Thread(target=s.pool.swaps.swap, args=([member], [fake(name="new")], [PROFILE]))
        swapper.start()  # it waits for the policy, to try it with the new profile
        time.sleep(0.05)
        policy.release.set()
        swapper.join(WAIT_S)
        s.pool.swaps.wait()
        assert isinstance(future.exception(WAIT_S), errors.InferenceError) == (ends == "raises")
        assert outcomes([s.submit(x(6))]) == [6]


def test_a_swap_whose_policy_hangs_blocks_nobody_else(hanging):
    policy = hanging(2)
    with within(100), serve(policy=policy, stall_s=STALL_S) as s:
        assert outcomes([s.submit(x(1))]) == [1]
        [member] = s.pool.swaps.swappable()
        swapper = threading.Thread(target=s.pool.swaps.swap, args=([member], [fake(name="new")], [PROFILE]))
        swapper.start()
        assert policy.entered.wait(WAIT_S)
        assert outcomes([s.submit(x(2))]) == [2]  # after stall_s
        policy.release.set()
        swapper.join(WAIT_S)
        assert not swapper.is_alive()


def test_a_swap_gets_its_turn_although_workers_ask_a_slow_policy_all_the_time(hanging):
    policy = hanging(then=lambda profile, state: time.sleep(2e-3) or Decision(SUBNETS[0], 1))
    with within(100), serve(*several(3), policy=policy) as s:
        futures = s.submit_many(x(range(1000)))
        wait_until(lambda: policy.count > 20)
        members = s.pool.swaps.swappable()
        s.pool.swaps.swap(members, several(3), [PROFILE] * 3)
        assert sum(f.done() for f in futures) < 500
        assert outcomes(futures) == list(range(1000))


def test_a_swap_that_waits_for_the_policy_ends_when_the_server_is_closed(hanging):
    def swap():
        with pytest.raises(errors.ServerClosedError):
            s.pool.swaps.swap(members, [fake(name="new")], [PROFILE])
        ended.append(policy.inside)

    policy, ended = hanging(1), []
    with within(100), serve(policy=policy, stall_s=60.0) as s:
        future, members = s.submit(x(5)), s.pool.swaps.swappable()
        assert policy.entered.wait(WAIT_S)
        with threads(swap):
            time.sleep(0.05)
            s.pool.stop(drain=True)
        assert ended == [1]  # it did not wait for the policy
        policy.release.set()
        assert outcomes([future]) == [5]


def test_the_time_in_the_policy_does_not_count_against_the_engine():
    now_s = [0.0]
    looked = []

    def clock():
        if not looked and now_s[0] and not s.pool.is_held_here():  # the worker is about to call the engine
            looked.append(True)
            with threads(s.pool.abandon_stuck):
                pass
        return now_s[0]

    def policy(profile, state):
        now_s[0] = 0.11 + STALL_S  # the watchdog does not notice, since it looks at the server now and then
        return Decision(SUBNETS[0], 4)

    with within(100), serve(policy=policy, stall_s=STALL_S, clock=clock) as s:
        assert outcomes([s.submit(x(1))]) == [1]
        assert looked
        assert idle_worker(s)["last_error"] is None


def test_one_worker_at_a_time_calls_the_policy(hanging):
    policy = hanging(then=lambda profile, state: time.sleep(1e-4) or Decision(SUBNETS[0], 1))
    with within(100), serve(*several(4), policy=policy) as s:
        assert outcomes(s.submit_many(x(range(200)))) == list(range(200))
    assert policy.most == 1


def test_queries_that_come_during_a_decision_are_served_in_the_order_of_their_deadlines(hanging):
    batches = []
    policy = hanging(1, then=always(0, 1))
    with within(100), serve(fake(lambda _, __, inputs: batches.append(float(inputs[0]))), policy=policy) as s:
        futures = [s.submit(x(2), slo_ms=LONG_MS)]
        assert policy.entered.wait(WAIT_S)
        futures.append(s.submit(x(1), slo_ms=LONG_MS / 2))
        policy.release.set()
        assert outcomes(futures) == [2, 1]
    assert batches == [1, 2]


def test_a_query_of_another_length_that_comes_during_a_decision_is_decided_anew(hanging):
    lengths = []

    def then(profile, state):
        lengths.append(profile.lengths[-1])
        return Decision(profile.rows[0].subnet, 4)

    policy = hanging(1, then=then)
    with within(100), serve(profile=BUCKETED, policy=policy) as s:
        futures = [s.submit(tokens(5), slo_ms=LONG_MS)]
        assert policy.entered.wait(WAIT_S)
        futures.append(s.submit(tokens(60), slo_ms=LONG_MS / 2))
        policy.release.set()
        assert outcomes(futures) == [5, 60]
    assert lengths[:2] == [16, 64]
