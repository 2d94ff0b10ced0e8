"""Workers that run out of memory with a batch."""

import math

import pytest
from fakes import LONG_MS, WAIT_S, x
from one_subnet import OUT_OF_MEMORY, ROW, SIZES, fake, largest, outcomes, serve, state

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision, State
from superserve_jax.serving import server
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet


@pytest.mark.parametrize("error", [RuntimeError(OUT_OF_MEMORY), MemoryError()], ids=["jax", "python"])
def test_a_worker_without_the_memory_for_a_batch_runs_smaller_ones_from_then_on(error):
    sizes, asked = [], []

    def on_run(subnet, batch_size, inputs):
        sizes.append(batch_size)
        if batch_size > 4:
            raise error

    def policy(profile, state):
        asked.append(profile.max_batch)
        return Decision(ROW.subnet, 16)  # whatever profile it is shown

    with serve(fake(on_run), policy=policy) as s:
        for _ in range(2):
            assert outcomes(s.submit_many([x(i) for i in range(16)])) == list(range(16))
        assert (state(s)["max_batch"], state(s)["failures"], s.health()["alive"]) == (4, 2, 1)
    assert sizes[:2] == [16, 8]
    assert set(sizes[2:]) == {4}
    assert asked[:2] == [16, 8]
    assert set(asked[2:]) == {4}


def test_a_named_policy_plans_with_the_batches_that_are_left():
    table = Profile(SIZES, (ROW, Row(Subnet((1,)), 0.8, (10.0, 10.0, 10.0, 10.0, 100.0))))
    made = server.make_policy("max-batch", table.at(SIZES[:4]))
    ran = []

    def on_run(subnet, batch_size, inputs):
        ran.append((subnet, batch_size))
        if batch_size > 8:
            raise MemoryError

    engines, options = [FakeEngine(table, speed=math.inf, on_run=on_run)], {"slo_ms": 50.0, "tune_runtime": False}
    with Server.from_engines(engines, table, policy="max-batch", clock=lambda: 0.0, **options) as s:
        outcomes(s.submit_many([x(i) for i in range(16)]))
    decision = made(table, State(now_s=0.0, slack_ms=50.0, waiting=16))
    assert ran[:2] == [(ROW.subnet, 16), (decision.subnet, decision.batch)]
    assert decision.subnet != ROW.subnet  # in 50 ms all 16 can have only the fast one


def test_without_memory_for_a_single_query_a_worker_fails_as_with_any_error():
    def on_run(subnet, batch_size, inputs):
        raise RuntimeError(OUT_OF_MEMORY)

    with serve(fake(on_run), max_failures=2) as s:
        for f in s.submit_many([x(i) for i in range(16)]):
            with pytest.raises(errors.WorkersLostError, match="RESOURCE_EXHAUSTED"):
                f.result(WAIT_S)
        assert (state(s)["state"], state(s)["max_batch"]) == ("left", 1)


def test_being_out_of_memory_uses_up_no_try():
    def on_run(subnet, batch_size, inputs):
        if batch_size > 1:
            raise MemoryError

    with serve(fake(on_run), max_tries=1) as s:
        assert outcomes(s.submit_many([x(i) for i in range(16)])) == list(range(16))


def test_a_worker_with_less_memory_counts_with_its_remaining_throughput():
    def on_run(subnet, batch_size, inputs):
        if batch_size > 1:
            raise MemoryError

    cheap = Profile(SIZES, (Row(ROW.subnet, 0.7, tuple(1.0 + 0.1 * b for b in SIZES)),))
    engines = [FakeEngine(cheap, speed=math.inf, on_run=on_run)]
    with Server.from_engines(engines, cheap, policy=largest, slo_ms=LONG_MS, tune_runtime=False) as s:
        full, _ = s.pool.members.fleet.strength()
        for future in s.submit_many([x(i) for i in range(8)]):
            future.result(WAIT_S)
        assert s.health()["per_worker"][0]["max_batch"] == 1
        assert s.pool.members.fleet.strength()[0] < full
