"""The benchmarks of serve/bench that use fake engines: that they run, and that their figures are consistent."""

import pytest

SMALL = ("--workers", "2", "--speed", "50", "--callers", "8", "--seconds", "0.2", "--rate", "2000")


@pytest.mark.parametrize("clients", ["open", "blocking", "await", "bulk"])
def test_the_router_is_measured_with_every_kind_of_client(run_program, clients):
    printed, _, found = run_program("serve/bench/router.py", *SMALL, "--clients", clients, json_file=True)
    assert found["queries"] >= 8  # one of each caller, even if the machine stands still all the time
    assert 0.0 <= found["attainment"] <= 1.0
    assert 0.0 < found["cpu_us_per_query"] <= found["process_us_per_query"]
    assert found["decision_us"]["p50"] <= found["decision_us"]["p99"]
    assert 1 <= found["batch"] <= 16
    assert f"of {found['queries']:,} queries" in printed


def test_the_generator_s_own_share_is_told_apart_from_the_router_s(run_program):
    found = run_program("serve/bench/router.py", *SMALL, "--slo-ms", "20", "60", json_file=True).json
    parts = ("cpu_us_per_query", "engine_us_per_query", "generator_us_per_query")
    assert sum(found[part] for part in parts) == pytest.approx(found["process_us_per_query"])
    assert 0.0 < found["submit_us_per_query"] < found["cpu_us_per_query"]
    assert found["lateness_ms"]["p50"] >= 0.0


def test_of_an_overload_every_query_is_counted_and_a_full_queue_is_seen(run_program):
    options = "--seconds 0.4 --calm-s 0.3 --workers 2 --max-queue 50 --slo-ms 20 40"
    printed, _, found = run_program("serve/bench/overload.py", *options.split(), json_file=True)
    over, each = found["served"]["overload"], found["served"]["by_slo"].values()
    assert over["arrived"] == found["simulated"]["overload"]["arrived"] > found["served"]["calm"]["arrived"] > 0
    for what in ("arrived", "refused"):
        assert sum(of[what] for of in each) == over[what]
    assert over["refused"] > 0 < found["us_per_refusal"]
    assert found["waiting_at_most"] <= 50
    assert "of 50 allowed" in printed


def test_the_stages_of_a_query_add_up(run_program):
    printed, _, found = run_program("serve/bench/stages.py", "--rounds", "1", json_file=True)
    for size in ("one", "full"):
        *stages, total = found[size].values()
        assert sum(stages) == pytest.approx(total)
    assert "the client wakes up" in printed


def test_half_of_the_workers_are_left_and_the_run_is_drawn(run_program, tmp_path):
    plot = tmp_path / "new" / "p.png"
    # If the machine stands still for a second, kills neither coincide nor come after the end.
    done = run_program("serve/bench/worker_kills.py", "--every", 1.2, "--plot", plot, json_file=True)
    assert "4 of 8 workers were left" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    [result] = done.json["policies"]
    assert [i["workers"] for i in result["intervals"]] == [8, 7, 6, 5, 4, 4]
    assert result["health"]["alive"] == 4
