"""A storm in which the code around the server misbehaves. Then servers that are broken on purpose, which it must notice.

The longer storm is in tests/programs/test_storm.py. tests/serving/test_concurrency.py has storms without such code.
"""

import os
import random
import threading

import numpy as np
import pytest

from superserve_jax import foreign
from superserve_jax.loadtest import acts, agents, endurance, parts, storm
from superserve_jax.loadtest.storm import Storm
from superserve_jax.serving.futures import Future
from superserve_jax.serving.pool import Pool
from superserve_jax.serving.runtime import ProcessTies
from superserve_jax.serving.server import Server

pytestmark = pytest.mark.usefixtures("no_test_hangs")


def run(*names, seconds=0.5, **options):
    return storm.run_storm(Storm(**{"seconds": seconds, "rate_qps": 1_000, "agents": names, "patience_s": 30.0, **options}))


@pytest.mark.parametrize(("overlap", "expire", "strict"), [(False, False, True), (True, True, False)])
def test_every_guarantee_holds_while_everything_around_the_server_misbehaves(overlap, expire, strict):
    result = run(*agents.ALL, seconds=3.0, overlap=overlap, expire=expire, strict=strict)
    found = result.check
    assert not found.examples
    assert not result.undocumented
    # Threads that Python does not know may be other libraries', which start them when they like.
    assert not [text for text in result.left if not text.endswith("more threads of the system")]
    assert (found.lost, found.twice, found.violations) == (0, 0, 0)
    assert found.offered == sum(found.outcomes.values()) > 500
    assert {"finalizers", "signals", "log records", "odd decisions", "other_server", "ask"} <= set(result.acts)


# -- servers that are broken --------------------------------------------------------------------------------------------------


def test_an_undocumented_error_is_noticed(monkeypatch):
    monkeypatch.setattr(Server, "snapshot", lambda self: {}["queries"])
    result = run("asking")
    assert "KeyError: 'queries'" in result.undocumented[0]


def test_a_log_handler_whose_error_ends_a_thread_is_noticed(monkeypatch):
    def log(logger, level, message, *values, error=None):
        logger.log(level, message, *values)

    monkeypatch.setattr(foreign, "log", log)
    monkeypatch.setattr(parts.AskingHandler, "emit", lambda self, record: acts.raise_one(random.Random(0)))
    result = run("log handler", failing=0.9)
    assert any("an error ended" in text for text in result.undocumented)


def test_a_server_whose_threads_stay_is_noticed(monkeypatch):
    ended = Pool.ended
    monkeypatch.setattr(Pool, "ended", lambda self: False)
    result = storm.run_storm(Storm(queries=100, patience_s=0.2))
    monkeypatch.setattr(Pool, "ended", ended)
    assert [text for text in result.left if "watchdog" in text]


def test_a_server_that_leaves_file_descriptors_open_is_noticed(monkeypatch):
    opened, add = [], Pool.add

    def add_and_open(self, *args):
        opened.append(os.open(os.devnull, os.O_RDONLY))
        return add(self, *args)

    monkeypatch.setattr(Pool, "add", add_and_open)
    result = storm.run_storm(Storm(queries=100, patience_s=0.2))
    for descriptor in opened:
        os.close(descriptor)
    assert len(opened) == len([text for text in result.left if "/dev/null" in text]) > 0


def test_a_server_that_leaves_settings_of_the_process_is_noticed(monkeypatch):
    ties, release = [], ProcessTies.release
    monkeypatch.setattr(ProcessTies, "release", lambda self: ties.append(self))
    result = run("servers", patience_s=0.2)
    monkeypatch.undo()  # some servers end later
    for each in ties:
        release(each)
    assert ties
    assert any("garbage collection" in text for text in result.left)


def test_a_server_that_keeps_every_answer_is_noticed(monkeypatch):
    kept, set_result = [], Future.set_result

    def keep(self, value):
        kept.append(b"x" * 400_000)
        return set_result(self, value)

    monkeypatch.setattr(Future, "set_result", keep)
    result = run(sample_s=0.05)
    growth, chance = endurance.growth(result.memory_mb)
    assert growth * np.median(result.memory_mb) > 8  # in MB, since the process of all tests is large already
    assert chance < 0.01


def test_an_outcome_that_changes_is_noticed(monkeypatch):
    result_of = Future.result

    def fail_in_clients(self, timeout=None):
        if threading.current_thread().name.startswith("ThreadPool"):
            raise TypeError
        return result_of(self, timeout)

    monkeypatch.setattr(Future, "result", fail_in_clients)
    found = storm.run_storm(Storm(queries=100)).check
    assert any("but result()" in text for text in found.examples)


def test_a_close_that_exceeds_its_time_limit_is_noticed(monkeypatch):
    close = Server.close
    monkeypatch.setattr(storm, "LATE_S", 0.0)
    monkeypatch.setattr(Server, "close", lambda self, drain=True, timeout_s=None: close(self, drain=drain))
    result = run(stall_s=2.0)
    assert any(text.startswith("close(timeout_s=") for text in result.undocumented)
