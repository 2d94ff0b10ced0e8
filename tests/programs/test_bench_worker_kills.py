"""serve/bench/worker_kills.py, shortened to a second."""

import json
import logging
import pathlib
import runpy
import sys

import pytest

from superserve_jax import errors

PROGRAM = str(pathlib.Path(__file__).parents[2] / "serve" / "bench" / "worker_kills.py")


@pytest.fixture
def kill(monkeypatch, caplog):
    """Runs the program with options."""
    caplog.set_level(logging.ERROR, logger="superserve_jax.serving")  # as the program does; this puts it back

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["worker_kills.py", *map(str, options)])
        runpy.run_path(PROGRAM)["main"]()

    return run


def test_half_of_the_workers_are_left_and_the_run_is_drawn(kill, tmp_path, capsys):
    kill("--every", 0.2, "--json", tmp_path / "r.json", "--plot", tmp_path / "new" / "p.png")
    assert "4 of 8 workers were left" in capsys.readouterr().out
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    [result] = json.loads((tmp_path / "r.json").read_text())["policies"]
    assert [i["workers"] for i in result["intervals"]] == [8, 7, 6, 5, 4, 4]
    assert result["health"]["alive"] == 4


def test_bad_options_are_refused_before_anything_runs(kill, capsys):
    with pytest.raises(errors.UnknownNameError, match="did you mean 'slackfit'"):
        kill("--policies", "slakfit")
    with pytest.raises(SystemExit):
        kill("--every", 0)
    assert "every must be above 0, got 0" in capsys.readouterr().err
