"""Workers that run out of memory with a batch."""

import pytest
from fakes import WAIT_S, Cramped, fail, outcomes, worker, x
from one_subnet import OUT_OF_MEMORY, ROW, SIZES, fake, serve

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision, State
from superserve_jax.serving.options import make_policy
from superserve_jax.subnet import Subnet


@pytest.mark.parametrize("error", [RuntimeError(OUT_OF_MEMORY), MemoryError()], ids=["jax", "python"])
def test_a_worker_without_the_memory_for_a_batch_runs_smaller_ones_from_then_on(error):
    cramped, asked = Cramped(4, error), []

    def policy(profile, state):
        asked.append(profile.max_batch)
        return Decision(ROW.subnet, 16)  # whatever profile it is shown

    with serve(fake(cramped), policy=policy) as s:
        for _ in range(2):
            assert outcomes(s.submit_many(x(range(16)))) == list(range(16))
        assert (worker(s)["max_batch"], worker(s)["failures"], s.health()["alive"]) == (4, 2, 1)
    for sizes in (cramped.sizes, asked):
        assert sizes[:2] == [16, 8]
        assert set(sizes[2:]) == {4}


def test_a_named_policy_plans_with_the_batches_that_are_left():
    table = Profile(SIZES, (ROW, Row(Subnet((1,)), 0.8, (10.0, 10.0, 10.0, 10.0, 100.0))))
    made = make_policy("max-batch", table.at(SIZES[:4]))
    cramped, ran = Cramped(8), []

    def on_run(subnet, batch_size, inputs):
        ran.append((subnet, batch_size))
        cramped(subnet, batch_size, inputs)

    options = {"policy": "max-batch", "clock": lambda: 0.0, "slo_ms": 50.0}
    with serve(fake(on_run, profile=table), profile=table, **options) as s:
        outcomes(s.submit_many(x(range(16))))
    decision = made(table, State(now_s=0.0, slack_ms=50.0, waiting=16))
    assert ran[:2] == [(ROW.subnet, 16), (decision.subnet, decision.batch)]
    assert decision.subnet != ROW.subnet  # in 50 ms all 16 can have only the fast one


def test_without_memory_for_a_single_query_a_worker_fails_as_with_any_error():
    with serve(fake(Cramped(0, RuntimeError(OUT_OF_MEMORY))), max_failures=2) as s:
        for f in s.submit_many(x(range(16))):
            with pytest.raises(errors.WorkersLostError, match="RESOURCE_EXHAUSTED"):
                f.result(WAIT_S)
        assert (worker(s)["state"], worker(s)["max_batch"]) == ("left", 1)


def test_being_out_of_memory_uses_up_no_try():
    cramped, failures = Cramped(1), iter([fail])

    def on_run(*batch):
        cramped(*batch)
        next(failures, lambda: None)()

    with serve(fake(on_run), max_tries=2) as s:
        assert outcomes(s.submit_many(x([1, 2]))) == [1, 2]


def test_a_worker_with_less_memory_counts_with_its_remaining_throughput():
    cheap = Profile(SIZES, (Row(ROW.subnet, 0.7, tuple(1.0 + 0.1 * b for b in SIZES)),))
    with serve(fake(Cramped(1), profile=cheap), profile=cheap) as s:
        full, _ = s.pool.members.fleet.strength()
        outcomes(s.submit_many(x(range(8))))
        assert worker(s)["max_batch"] == 1
        assert s.pool.members.fleet.strength()[0] < full
