"""The paper's evaluation in the simulator: which experiments there are, their results, and the paper's numbers beside ours.

`presets` says what is run, and `runner` runs it. `summaries` averages the results over seeds, `paper_table` compares them with
the paper, and `figures` draws them. serve/compare.py is the program. Read `presets` first. No jax.
"""

from superserve_jax.experiments.presets import PRESETS, Cell, Grid, Traffic
from superserve_jax.experiments.runner import CellResult, evaluate, run_cell
from superserve_jax.experiments.summaries import Summary, summarize

__all__ = ["PRESETS", "Cell", "CellResult", "Grid", "Summary", "Traffic", "evaluate", "run_cell", "summarize"]
