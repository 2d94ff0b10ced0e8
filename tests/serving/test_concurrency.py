"""Server and queue under random failures, with thread switches every 10 us. serve/bench/storm.py runs this longer.

The check uses what clients and engines saw, not what the server counts. The last tests break the server on purpose, and the
check must notice.
"""

import dataclasses
import functools
import logging
import math

import pytest

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import storm
from superserve_jax.loadtest.storm import Storm
from superserve_jax.scheduling.queue import DeadlineQueue
from superserve_jax.serving.futures import Future
from superserve_jax.serving.retries import Retries

STORM = Storm(
    **{"queries": 10_000, "poisoned": 200, "failing": 0.03, "slow": 0.02, "full": 0.02, "hanging": 0.003},
    **{"broken": 0.2, "changed_every_s": 0.02, "stall_s": 0.1},
)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="superserve_jax")  # thousands of batches fail


def run(**options):
    return storm.run_storm(dataclasses.replace(STORM, **options))


@pytest.mark.parametrize(
    ("overlap", "expire", "seed"), [(False, False, 0), (False, True, 1), (True, True, 0), (True, False, 1)]
)
def test_every_guarantee_holds_while_everything_goes_wrong_at_once(overlap, expire, seed):
    result = run(overlap=overlap, expire=expire, seed=seed)
    found = result.check
    assert not found.examples
    assert (found.lost, found.twice, found.violations) == (0, 0, 0)
    assert found.offered == STORM.queries == sum(found.outcomes.values())
    assert found.compared > 100
    assert {"poisoned", "failing", "slow", "full"} <= set(result.failures)
    assert {"answered", "cancelled", "InferenceError of ValueError"} <= set(found.outcomes)
    assert ("DeadlineExpiredError" in found.outcomes) == expire
    assert result.workers["replaced"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"strict": False},
        {"strict": False, "overlap": True},
        {"workers": 1},
        {"workers": 1, "overlap": True},
        {"workers": 12, "clients": 2},
        {"max_queue": 50},
        {"broken": 1.0, "queries": 2_000},
        {"broken": 1.0, "queries": 2_000, "changed_every_s": math.inf},
        {"slos_ms": (0.1, 1.0), "queries": 2_000, "expire": True},
        {"slos_ms": (0.1,), "queries": 2_000},
        {"closed_after": 2_000},
    ],
    ids=str,
)
def test_every_guarantee_holds_with_another_policy_by_few_workers_or_many_when_it_is_full_or_closes(options):
    found = run(**options).check
    assert not found.examples
    assert found.offered == sum(found.outcomes.values()) == options.get("queries", STORM.queries)
    if "closed_after" in options:
        assert found.outcomes["refused: ServerClosedError"] > 0
    if "max_queue" in options:
        assert found.outcomes["refused: QueueFullError"] > 0


# -- servers that are broken --------------------------------------------------------------------------------------------------


def test_a_queue_out_of_order_is_noticed(monkeypatch):
    pop = DeadlineQueue.pop

    def pop_one_too_many(self, n, accuracy=math.inf):
        items = pop(self, n + (n > 1), accuracy)  # one at a time, what is done is dropped
        if len(items) > n:  # the first goes back, so the last goes ahead of it
            first = items.pop(0)
            self.push(first.deadline_s, first, first.floor)
        return items

    monkeypatch.setattr(DeadlineQueue, "pop", pop_one_too_many)
    found = run(queries=2_000).check
    assert found.violations > 0
    assert all("passed over" in text for text in found.examples)


def test_a_future_that_resolves_again_is_noticed(monkeypatch):
    add = Future.add_done_callback

    def add_twice(self, fn):
        for _ in range(1 + isinstance(fn, functools.partial)):  # the recorder's
            add(self, fn)

    monkeypatch.setattr(Future, "add_done_callback", add_twice)
    assert run(queries=500).check.twice > 0


def test_a_batch_that_is_forgotten_is_noticed(monkeypatch):
    monkeypatch.setattr(Retries, "_add", lambda *_: None)
    found = run(queries=1_000, hanging=0.0, failing=0.1, window=100, slos_ms=(30_000.0,), patience_s=0.2).check
    assert found.lost > 0
    assert any("never resolved" in text for text in found.examples)


def test_answers_that_are_mixed_up_are_noticed(monkeypatch):
    compute = FakeEngine.run
    monkeypatch.setattr(FakeEngine, "run", lambda *args: compute(*args)[::-1])
    found = run(queries=500).check
    assert any("got the answer of" in text for text in found.examples)
