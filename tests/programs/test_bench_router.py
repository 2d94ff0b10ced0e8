"""serve/bench/router.py, overload.py and stages.py: that they run, and that their figures are consistent."""

import json
import pathlib
import runpy
import sys

import pytest

SERVE = pathlib.Path(__file__).parents[2] / "serve" / "bench"
SMALL = ("--workers", "2", "--speed", "50", "--callers", "8", "--seconds", "0.2", "--rate", "2000")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a program with options, and returns what it wrote as JSON."""

    def run(program, *options):
        monkeypatch.setattr(sys, "argv", [program, *options, "--json", str(tmp_path / "figures.json")])
        runpy.run_path(str(SERVE / program))["main"]()
        return json.loads((tmp_path / "figures.json").read_text())

    return run


@pytest.mark.parametrize("clients", ["open", "blocking", "await", "bulk"])
def test_the_router_is_measured_with_every_kind_of_client(run, clients, capsys):
    found = run("router.py", *SMALL, "--clients", clients)
    assert found["queries"] > 50
    assert 0.0 <= found["attainment"] <= 1.0
    assert 0.0 < found["cpu_us_per_query"] <= found["process_us_per_query"]
    assert found["decision_us"]["p50"] <= found["decision_us"]["p99"]
    assert 1 <= found["batch"] <= 16
    assert f"of {found['queries']:,} queries" in capsys.readouterr().out


def test_the_generator_s_own_share_is_told_apart_from_the_router_s(run):
    found = run("router.py", *SMALL, "--slo-ms", "20", "60")
    parts = ("cpu_us_per_query", "engine_us_per_query", "generator_us_per_query")
    assert sum(found[part] for part in parts) == pytest.approx(found["process_us_per_query"])
    assert 0.0 < found["submit_us_per_query"] < found["cpu_us_per_query"]
    assert found["lateness_ms"]["p50"] >= 0.0


def test_a_rate_must_be_positive(run, capsys):
    with pytest.raises(SystemExit):
        run("router.py", "--rate", "0")
    assert "rate must be above 0, got 0" in capsys.readouterr().err


def test_of_an_overload_every_query_is_counted_and_a_full_queue_is_seen(run, capsys):
    found = run(
        "overload.py",
        "--seconds",
        "0.4",
        "--calm-s",
        "0.3",
        "--workers",
        "2",
        "--max-queue",
        "50",
        "--slo-ms",
        "20",
        "40",
    )
    over, each = found["served"]["overload"], found["served"]["by_slo"].values()
    assert over["arrived"] == found["simulated"]["overload"]["arrived"] > found["served"]["calm"]["arrived"] > 0
    assert {what: sum(of[what] for of in each) for what in ("arrived", "refused")} == {
        what: over[what] for what in ("arrived", "refused")
    }
    assert over["refused"] > 0 < found["us_per_refusal"]
    assert found["waiting_at_most"] <= 50
    assert "of 50 allowed" in capsys.readouterr().out


def test_the_stages_of_a_query_add_up(run, capsys):
    found = run("stages.py", "--rounds", "1")
    for size in ("one", "full"):
        *stages, total = found[size].values()
        assert sum(stages) == pytest.approx(total)
    assert "the client wakes up" in capsys.readouterr().out
