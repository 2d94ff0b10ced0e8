"""Computes the SubnetNorm statistics of a run's served subnets over training data.

    python train/calibrate.py runs/digits_resnet

The same as `superserve calibrate`. superserve_jax/commands/calibrate.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.calibrate import main

if __name__ == "__main__":
    cli.run(main)
