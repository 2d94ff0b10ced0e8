"""serve/bench/storm.py: what it judges, and that a broken guarantee ends it with status 1."""

import functools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from superserve_jax.loadtest import agents
from superserve_jax.loadtest.checker import CheckResult
from superserve_jax.loadtest.storm import Storm, StormResult
from superserve_jax.serving.futures import Future

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def program(run_program):
    """Runs the program with options. Returns what it wrote and what it printed."""

    def run(*options, **how):
        done = run_program("serve/bench/storm.py", *options, json_file=True, **how)
        return done.json, done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_every_guarantee_holds_for_30_s_while_everything_around_the_server_misbehaves(program, tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSERVE_CACHE", str(tmp_path))
    written, printed = program("--minutes", 0.5, "--rate", 500, "--growth", 0.2, fresh=True)  # 30 s say little
    assert all(guarantee["holds"] for guarantee in written["guarantees"]), printed
    assert len(written["guarantees"]) == 8
    done = set(written["acts"])
    assert done >= {act.__name__ for act, _ in agents.AGENTS.values()}
    assert done >= {"finalizers", "signals", "interrupts", "log records", "odd decisions", "callbacks that raise"}
    outcomes = set(written["check"]["outcomes"])
    assert outcomes >= {"answered", "cancelled", "ServerClosedError", "refused: Deliberate"}
    assert any(outcome.startswith("InferenceError of ") for outcome in outcomes)  # of what, is left to chance


@pytest.mark.parametrize("options", [(), ("--expire",)])
def test_a_storm_of_queries_ends_with_status_0_and_its_results(program, options):
    written, _ = program("--queries", 3_000, *options, fresh=True)  # with no other test's threads and files
    assert written["storm"]["expire"] == bool(options)
    assert written["check"]["offered"] == sum(written["check"]["outcomes"].values()) == 3_000
    assert all(guarantee["holds"] for guarantee in written["guarantees"])


def test_a_storm_that_loses_a_query_ends_with_status_1(program, monkeypatch):
    set_result = Future.set_result

    def forget(self, value):
        return self.inputs != 7 and set_result(self, value)

    monkeypatch.setattr(Future, "set_result", forget)
    impatient = functools.partial(Storm, patience_s=0.2)
    written, _ = program("--queries", 100, status=1, patches={"Storm": impatient})
    assert written["check"]["lost"] == 1
    assert written["check"]["examples"] == ["query 7 was lost: it never resolved"]


def judged(monkeypatch, memory_mb, blocks):
    """Which guarantees about memory hold."""
    monkeypatch.syspath_prepend(ROOT / "serve" / "bench")
    import storm

    result = StormResult(CheckResult(), 1.0, {}, {}, {}, {}, [], [], memory_mb, blocks)
    return [guarantee.holds for guarantee in storm.of_memory(result, 0.05)]


def test_growth_of_memory_is_noticed_behind_noise_and_after_the_warm_up(monkeypatch):
    noise = np.random.default_rng(0).normal(0, 5, 100)
    steady, growing = 500 + noise, 500 + noise + np.linspace(0, 60, 100)
    warming = np.concatenate([np.linspace(300, 500, 20), steady[20:]])
    assert judged(monkeypatch, list(steady), list(warming)) == [True, True]
    assert judged(monkeypatch, list(growing), list(steady)) == [False, True]
    assert judged(monkeypatch, list(steady), list(growing)) == [True, False]


HUNG = """
import threading
from superserve_jax.loadtest import storm
from superserve_jax.serving.server import Server

{}.{} = lambda self: threading.Event().wait()
storm.run_storm(storm.Storm(seconds=60, rate_qps=500, agents=["signals"], hung_s=1))
"""


@pytest.mark.parametrize("hangs", [("Server", "health"), ("storm.Agents", "turn")])
def test_a_storm_in_which_nothing_resolves_shows_all_stacks_and_ends(hangs):
    program = [sys.executable, "-c", HUNG.format(*hangs)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "in <lambda>" in done.stderr
