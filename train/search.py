"""Searches a trained run for Pareto-optimal subnets and chooses the subnets to serve.

    python train/search.py runs/digits_resnet --candidates 1000
    python train/search.py runs/digits_resnet --candidates 1000 --served 500 --tolerance 0.02
    python train/search.py runs/digits_resnet --cost latency --latency-batch 16

The same as `superserve search`. superserve_jax/commands/search.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.search import main

if __name__ == "__main__":
    cli.run(main)
