"""serve/bench/worker_kills.py, shortened to a second."""

import pytest

PROGRAM = "serve/bench/worker_kills.py"


def test_half_of_the_workers_are_left_and_the_run_is_drawn(run_program, tmp_path):
    plot = tmp_path / "new" / "p.png"
    done = run_program(PROGRAM, "--every", 0.2, "--plot", plot, json_file=True)
    assert "4 of 8 workers were left" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    [result] = done.json["policies"]
    assert [i["workers"] for i in result["intervals"]] == [8, 7, 6, 5, 4, 4]
    assert result["health"]["alive"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--policies", "slakfit"], "did you mean 'slackfit'"), (["--every", 0], "every must be above 0, got 0")],
)
def test_bad_options_are_refused_before_anything_runs(run_program, options, message):
    assert message in run_program(PROGRAM, *options, status=2).stderr
