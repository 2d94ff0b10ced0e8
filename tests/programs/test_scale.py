"""The program that simulates cells: that its tables agree with each other, and that it draws them."""

import pytest

SMALL = "--cells 1 2 --workers 4 --rate 4000 --seconds 1.2"


def test_cells_are_simulated_and_drawn(run_program, tmp_path):
    plot = tmp_path / "scale.png"
    done = run_program("serve/bench/scale.py", *SMALL.split(), "--only", "growth", "loss", "--plot", plot, json_file=True)
    one, *two = done.json["growth"]
    assert [(row["cells"], row["routing"]) for row in two] == [(2, "one queue"), (2, "random"), (2, "two choices")]
    assert one["queries"] == pytest.approx(4800, rel=0.1)
    loss = {row["fault"]: row for row in done.json["loss"]}
    nothing, soon, late, host, choices = loss.values()
    assert (nothing["attainment"], nothing["accuracy"]) == (two[1]["attainment"], two[1]["accuracy"])
    assert nothing["missed"] < soon["missed"] < late["missed"]
    assert host["cell_later"] < choices["cell_later"]
    assert "1 workers of a cell, two choices" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_one_queue_is_split_into_more_and_more_cells(run_program):
    found = run_program("serve/bench/scale.py", "--seconds", "0.005", "--only", "split", json_file=True).json["split"]
    assert [row["cells"] for row in found if row["routing"] == "random"] == 2 * [2, 4, 8, 16, 32]
    assert len(found) == 2 * (1 + 5 * 3)


def test_round_trips_cost_accuracy_unless_they_are_hidden(run_program):
    found = run_program("serve/bench/scale.py", "--seconds", "0.1", "--only", "trips", json_file=True).json["trips"]
    hidden = {(row["load"], row["trip_ms"]): row["accuracy"] for row in found if row["lead_ms"] == row["trip_ms"]}
    waited = {(row["load"], row["trip_ms"]): row["accuracy"] for row in found if not row["lead_ms"]}
    assert all(hidden[0.8, trip] == pytest.approx(hidden[0.8, 0.0], abs=0.3) for trip in (0.5, 1.1, 2.5))
    assert waited[0.8, 0.0] == hidden[0.8, 0.0] > waited[0.8, 2.5] + 0.5
