"""Replays bursty traffic on the real server, once per policy, and prints one table.

    python serve/replay.py runs/digits_resnet/export
    python serve/replay.py runs/digits_resnet/export --policies slackfit fixed:largest --seconds 30 --slo-ms 50
    python serve/replay.py runs/digits_resnet/export --policies slackfit --simulate
    python serve/replay.py runs/digits_resnet/export --policies slackfit --slow-factor 1.5

The same as `superserve replay`. superserve_jax/commands/replay.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.replay import main

if __name__ == "__main__":
    cli.run(main)
