"""Tests of the real server under load, and the comparison of server and simulator.

`loadgen` submits the queries of a trace when they are due. `storm` injects random failures, and `agents` make the code around
the server misbehave (`acts`, `parts`). In a storm, `recorder` notes what clients and engines see. `checker` finds broken
guarantees in these notes, and `leftovers` finds what stays in the process. `endurance` serves traffic for hours.
`sim_vs_real` repeats a replay in the simulator, also one in which workers are killed. Read `loadgen` first. No jax.
"""

from superserve_jax.loadtest.checker import CheckResult
from superserve_jax.loadtest.loadgen import Replay, replay, submit_when_due
from superserve_jax.loadtest.storm import Storm, StormResult, run_storm

__all__ = ["CheckResult", "Replay", "Storm", "StormResult", "replay", "run_storm", "submit_when_due"]
