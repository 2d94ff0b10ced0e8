"""A host that goes away. The program has a cluster of its own, with several hosts on this machine."""

import math

import pytest

pytestmark = pytest.mark.slow


def test_a_host_that_is_gone_costs_no_query_and_its_workers_come_back_elsewhere(run_program):
    pytest.importorskip("ray")
    command = ("serve/bench/remote.py", "--parts", "host", "--repeats", "1", "--seconds", "4")
    [found] = run_program(*command, json_file=True, fresh=True).json["host"]
    assert found["failed"] == found["unanswered"] == 0
    assert found["queries"] > 1_000
    assert math.isfinite(found["back_s"])


def test_a_killed_and_a_stopped_process_cost_no_query_under_load(run_program, tmp_path):
    pytest.importorskip("ray")
    plot = tmp_path / "remote.png"
    command = ("serve/bench/remote.py", "--parts", "faults", "--repeats", "1", "--seconds", "3", "--plot", plot)
    found = run_program(*command, json_file=True, fresh=True).json
    for [fault] in (found["SIGKILL"], found["SIGSTOP for 2 s"]):
        assert fault["failed"] == fault["unanswered"] == 0
        assert math.isfinite(fault["noticed_s"])
        assert math.isfinite(fault["back_s"])
    assert plot.stat().st_size > 10_000
