"""Makes a run from published weights, so that search, calibration, evaluation and export work as after training.

    python train/convert.py configs/ofa_resnet50.py ofa_resnet50.pth --workdir runs/ofa_resnet50

The same as `superserve convert`. superserve_jax/commands/convert.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.convert import main

if __name__ == "__main__":
    cli.run(main)
