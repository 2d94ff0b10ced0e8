"""serve/bench/router.py, overload.py and stages.py: that they run, and that their figures are consistent."""

import pytest

SMALL = ("--workers", "2", "--speed", "50", "--callers", "8", "--seconds", "0.2", "--rate", "2000")


@pytest.fixture
def run(run_program):
    """Runs a program with options. Returns what it wrote as JSON and what it printed."""

    def run(name, *options):
        done = run_program(f"serve/bench/{name}", *options, json_file=True)
        return done.json, done.stdout

    return run


@pytest.mark.parametrize("clients", ["open", "blocking", "await", "bulk"])
def test_the_router_is_measured_with_every_kind_of_client(run, clients):
    found, printed = run("router.py", *SMALL, "--clients", clients)
    assert found["queries"] > 50
    assert 0.0 <= found["attainment"] <= 1.0
    assert 0.0 < found["cpu_us_per_query"] <= found["process_us_per_query"]
    assert found["decision_us"]["p50"] <= found["decision_us"]["p99"]
    assert 1 <= found["batch"] <= 16
    assert f"of {found['queries']:,} queries" in printed


def test_the_generator_s_own_share_is_told_apart_from_the_router_s(run):
    found, _ = run("router.py", *SMALL, "--slo-ms", "20", "60")
    parts = ("cpu_us_per_query", "engine_us_per_query", "generator_us_per_query")
    assert sum(found[part] for part in parts) == pytest.approx(found["process_us_per_query"])
    assert 0.0 < found["submit_us_per_query"] < found["cpu_us_per_query"]
    assert found["lateness_ms"]["p50"] >= 0.0


def test_a_rate_must_be_positive(run_program):
    assert "rate must be above 0, got 0" in run_program("serve/bench/router.py", "--rate", "0", status=2).stderr


def test_of_an_overload_every_query_is_counted_and_a_full_queue_is_seen(run):
    options = "--seconds 0.4 --calm-s 0.3 --workers 2 --max-queue 50 --slo-ms 20 40"
    found, printed = run("overload.py", *options.split())
    over, each = found["served"]["overload"], found["served"]["by_slo"].values()
    assert over["arrived"] == found["simulated"]["overload"]["arrived"] > found["served"]["calm"]["arrived"] > 0
    assert {what: sum(of[what] for of in each) for what in ("arrived", "refused")} == {
        what: over[what] for what in ("arrived", "refused")
    }
    assert over["refused"] > 0 < found["us_per_refusal"]
    assert found["waiting_at_most"] <= 50
    assert "of 50 allowed" in printed


def test_the_stages_of_a_query_add_up(run):
    found, printed = run("stages.py", "--rounds", "1")
    for size in ("one", "full"):
        *stages, total = found[size].values()
        assert sum(stages) == pytest.approx(total)
    assert "the client wakes up" in printed
