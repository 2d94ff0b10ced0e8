"""Exports an evaluated run: one self-describing directory with weights, statistics and the list of served subnets.

    python train/export.py runs/digits_resnet --out exports/digits

The same as `superserve export`. superserve_jax/commands/export.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.export import main

if __name__ == "__main__":
    cli.run(main)
