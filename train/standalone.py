"""Trains subnets of a run as standalone networks, and prints how much accuracy sharing weights costs.

    python train/standalone.py runs/digits_resnet
    python train/standalone.py runs/digits_resnet --subnets smallest 3 largest

The same as `superserve standalone`. superserve_jax/commands/standalone.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.standalone import main

if __name__ == "__main__":
    cli.run(main)
