"""Measures the latency profile of an export on this machine, and saves it in the export's directory.

    python serve/measure.py runs/digits_resnet/export --plot latency.png

The same as `superserve measure`. superserve_jax/commands/measure.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.measure import main

if __name__ == "__main__":
    cli.run(main)
