"""The paper's evaluation in the simulator: the experiments, their results, and a comparison with the paper's numbers.

`presets` lists the experiments, and `runner` runs them. `summaries` averages the results over seeds, `paper_table` compares
them with the paper, and `figures` draws them. `superserve compare` is the program. Read `presets` first. No jax.
"""

from superserve_jax.experiments.presets import PRESETS, Cell, Grid, Traffic
from superserve_jax.experiments.runner import CellResult, evaluate, run_cell
from superserve_jax.experiments.summaries import Summary, summarize

__all__ = ["PRESETS", "Cell", "CellResult", "Grid", "Summary", "Traffic", "evaluate", "run_cell", "summarize"]
