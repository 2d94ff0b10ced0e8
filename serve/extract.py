"""Writes one served subnet of an export as a file of its own: ONNX, StableHLO or safetensors.

    python serve/extract.py runs/digits_resnet/export --subnet 0 --out smallest.onnx

The same as `superserve extract`. superserve_jax/commands/extract.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.extract import main

if __name__ == "__main__":
    cli.run(main)
