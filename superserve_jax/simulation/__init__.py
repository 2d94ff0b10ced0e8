"""Simulation: traffic, a server on a virtual clock, metrics, and upper bounds for comparison. No jax.

Read `simulator` first: it runs the code of `scheduling` with latencies from a profile. `cluster` describes the simulated
server and its failures. `cells` puts several servers side by side. `traces` makes traffic. `recorded` and `azure` read
recorded traffic. `metrics` computes SLO attainment and the other metrics of a run, real or simulated. `bounds` computes upper
bounds on any policy. `paper_profile` is a profile of the paper's GPU, from memory.
"""

from superserve_jax.simulation.cells import Cells, CellsResult, LostCell
from superserve_jax.simulation.cluster import Cluster, Outage, Slowdown, Stall
from superserve_jax.simulation.metrics import ReplaySummary, Series
from superserve_jax.simulation.simulator import SimulationResult
from superserve_jax.simulation.traces import Trace

__all__ = [
    "Cells",
    "CellsResult",
    "Cluster",
    "LostCell",
    "Outage",
    "ReplaySummary",
    "Series",
    "SimulationResult",
    "Slowdown",
    "Stall",
    "Trace",
]
