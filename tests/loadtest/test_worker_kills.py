"""The paper's fault-tolerance experiment on the real server, shortened to a second."""

import json
import logging
import pathlib
import runpy
import sys

import numpy as np
import pytest

from superserve_jax import errors
from superserve_jax.experiments import presets
from superserve_jax.loadtest import worker_kills
from superserve_jax.simulation import paper_profile

PROGRAM = str(pathlib.Path(__file__).parents[2] / "serve" / "replay.py")


@pytest.fixture
def replay(monkeypatch):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["replay.py", *map(str, options)])
        runpy.run_path(PROGRAM)["main"]()

    yield run
    logging.getLogger("superserve_jax.serving").setLevel(logging.NOTSET)


def test_the_workers_that_are_killed_leave_the_server_and_the_others_answer():
    trace = presets.PRESETS["worker_kills"][0].traffics[0].create(0, duration_s=1.0)
    run = worker_kills.run(trace, paper_profile.paper_profile(), "slackfit", cluster=presets.killed(0.2), slo_ms=36.0)
    assert [w["state"] == "left" for w in run.health["per_worker"]] == [True] * 4 + [False] * 4
    assert all("killed" in w["last_error"] for w in run.health["per_worker"][:4])
    assert [o.worker for o in run.cluster.outages] == [0, 1, 2, 3]
    assert np.isfinite(run.real.finish_s).any()
    *parts, whole = worker_kills.intervals(run)
    assert [i.workers for i in (*parts, whole)] == [8, 7, 6, 5, 4, 4]
    assert sum(i.real.queries for i in parts) == whole.real.queries == whole.simulated.queries == len(trace)
    assert whole.simulated.attainment > 0.9  # 1 where the machine is quiet, and workers go when they should
    assert parts[-1].simulated.accuracy < parts[0].simulated.accuracy


def test_the_program_needs_no_export_for_it_and_draws_it(replay, tmp_path, capsys):
    replay("--kill-every", 0.2, "--json", tmp_path / "r.json", "--plot", tmp_path / "new" / "p.png")
    assert "4 of 8 workers were left" in capsys.readouterr().out
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    [result] = json.loads((tmp_path / "r.json").read_text())["policies"]
    assert [i["workers"] for i in result["intervals"]] == [8, 7, 6, 5, 4, 4]
    assert result["health"]["alive"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "which export"),
        (["runs/some/export", "--kill-every", "12"], "leave runs/some/export out"),
        (["--kill-every", "0"], "positive number of seconds, got 0"),
        (["--kill-every", "12", "--policies", "slakfit"], "did you mean 'slackfit'"),
    ],
)
def test_what_it_cannot_do_it_says_at_once(replay, options, message):
    with pytest.raises(errors.SuperServeError, match=message):
        replay(*options)
