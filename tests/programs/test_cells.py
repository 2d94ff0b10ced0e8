"""The program that measures ways to a router. Without Ray Serve, it measures the gateway and the collector."""

import pytest

pytestmark = pytest.mark.slow


def test_all_answers_are_right_and_have_a_cost(run_program):
    pytest.importorskip("ray")
    options = ("--ways", "gateway", "collector", "--repeats", 1, "--seconds", 0.5, "--rates", 100, "--collector-rates", 200)
    found = run_program("serve/bench/cells.py", *options, json_file=True, fresh=True).json
    [gateway], [collector] = found["gateway, 100 queries/s"], found["collector, 200 queries/s"]
    assert gateway["wrong"] + gateway["lost"] == 0
    assert gateway["queries"] > 20
    assert collector["queries"] > 40
    assert 0 < collector["collector_us"] < collector["server_us"]
