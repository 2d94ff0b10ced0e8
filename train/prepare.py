"""Prepares the dataset mnist or fashion_mnist for training, without TensorFlow.

    python train/prepare.py fashion_mnist
    python train/prepare.py fashion_mnist --files ~/downloads/fashion

The same as `superserve prepare`. superserve_jax/commands/prepare.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.prepare import main

if __name__ == "__main__":
    cli.run(main)
