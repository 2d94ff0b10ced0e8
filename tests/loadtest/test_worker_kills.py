"""The paper's fault-tolerance experiment on the real server, shortened to a second."""

import numpy as np

from superserve_jax.experiments import presets
from superserve_jax.loadtest import worker_kills
from superserve_jax.simulation import paper_profile


def test_killed_workers_leave_the_server_and_the_others_answer():
    trace = presets.PRESETS["worker_kills"][0].traffics[0].create(0, duration_s=1.0)
    run = worker_kills.run(trace, paper_profile.paper_profile(), "slackfit", cluster=presets.killed(0.2), slo_ms=36.0)
    assert [w["state"] == "left" for w in run.health["per_worker"]] == [True] * 4 + [False] * 4
    assert all("killed" in w["last_error"] for w in run.health["per_worker"][:4])
    assert [o.worker for o in run.cluster.outages] == [0, 1, 2, 3]
    assert np.isfinite(run.real.finish_s).any()
    *parts, whole = worker_kills.intervals(run)
    assert [i.workers for i in (*parts, whole)] == [8, 7, 6, 5, 4, 4]
    assert sum(i.real.queries for i in parts) == whole.real.queries == whole.simulated.queries == len(trace)
    assert whole.simulated.attainment > 0.9  # 1 on a quiet machine, where workers are killed on time
    assert parts[-1].simulated.accuracy < parts[0].simulated.accuracy
