"""Compares policies on traces in the simulator: the paper's evaluation as tables, JSON and plots.

    python serve/compare.py --preset all --paper --maf-trace invocations_per_function_md.anon.d01.csv
    python serve/compare.py --preset bursty --scale 1.9 --policies slackfit max-batch fixed:all --plots runs/compare
    python serve/compare.py --preset policies --profile runs/digits_resnet/export/profiles/cpu.json --scale 0.1

The same as `superserve compare`. superserve_jax/commands/compare.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.compare import main

if __name__ == "__main__":
    cli.run(main)
