"""Trains a SuperNet from a config, then searches, calibrates, evaluates and exports it.

    python train/supernet.py configs/digits_resnet.py
    python train/supernet.py configs/digits_resnet.py --optim.lr 0.01 --epochs 3 --workdir runs/mine

The same as `superserve train`. superserve_jax/commands/train.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.train import main

if __name__ == "__main__":
    cli.run(main)
