"""Measures test accuracies of a run's served subnets, with their own statistics and with the largest subnet's.

    python train/evaluate.py runs/digits_resnet

The same as `superserve evaluate`. superserve_jax/commands/evaluate.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.evaluate import main

if __name__ == "__main__":
    cli.run(main)
