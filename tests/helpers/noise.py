"""A dataset of noise, a short run on it, and a program that trains on it.

Tests kill the program, fill its disk or give it 8 devices:

    python tests/helpers/noise.py WORKDIR SPEC.json

SPEC holds changes to the config and two more keys. "pause_s" is the time to wait before each step. "log" is a file that gets
one line per step: the step, a hash of its batch, and its subnets.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
import time

import jax
import numpy as np
from mlp_family import MLPConfig
from tiny import assert_same_arrays, batches_of

from superserve_jax import errors
from superserve_jax.supernets import programs
from superserve_jax.training import loop
from superserve_jax.training.config import config_from_json, config_to_json, load_config
from superserve_jax.training.step import SandwichStep

DEBUG = load_config(pathlib.Path(__file__).parents[2] / "configs" / "debug.py")
RESNET = dataclasses.replace(DEBUG, epochs=1.2, checkpoint_every=4, log_every=2, eval_every=0, ema=0.5)  # 12 steps
MODEL = MLPConfig(image_size=32, depths=(0, 1, 2, 3), widths=(4, 8, 12, 16))
CONFIG = dataclasses.replace(RESNET, model=MODEL)  # an MLP compiles in less time


class Noise:
    """Noise with labels that depend on it. It has the interface of `data.Dataset`. Batch k is a function of (seed, k)."""

    name, num_classes, class_names, vocabulary = "noise", 10, tuple("0123456789"), None

    def __init__(self, config=None, model=None, *, decode=True):
        self.config = config

    def num_examples(self, split):
        return {"train": 640, "validation": 250, "test": 300}[split]

    def _make(self, rng, n):
        images = rng.integers(0, 256, (n, 32, 32, 1), dtype=np.uint8)
        return images, (images[:, :16].mean((1, 2, 3)) > 127.5).astype(np.int32)

    def train(self, batch_size, *, seed, start_step=0):
        k = start_step
        while True:
            images, labels = self._make(np.random.default_rng([seed, k]), batch_size)
            yield {"inputs": images, "label": labels}
            k += 1

    def arrays(self, split, limit=None):
        n = self.num_examples(split)
        return self._make(np.random.default_rng(len(split)), n if limit is None else min(limit, n))

    def eval(self, split, batch_size):
        images, labels = self.arrays(split)
        yield from batches_of(images, labels, batch_size)()


def state_of(run, step=None):
    """Parameters, optimiser state and average of a checkpoint, by default of the last one, by path."""
    sandwich = SandwichStep(run.config.optim.create(1), ema=run.config.ema)
    specs = jax.eval_shape(sandwich.init, programs.param_spec(run.config.model))
    with run.checkpoints() as saved:
        found = specs._replace(**saved.restore(step or saved.latest(), **specs._asdict()))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def metrics_of(run):
    """The training metrics, without times."""
    return [{name: value for name, value in line.items() if name != "examples_per_s"} for line in run.metrics()]


def assert_same_state(a, b):
    """Checks that the last checkpoints of two runs are equal, bit by bit. Each is a run, or what `state_of` returned."""
    assert_same_arrays(*(each if isinstance(each, dict) else state_of(each) for each in (a, b)))


def main() -> None:
    workdir, spec = sys.argv[1], json.loads(pathlib.Path(sys.argv[2]).read_text())
    log, pause_s = spec.pop("log", None), spec.pop("pause_s", 0.0)
    real = SandwichStep.__call__

    def logged(self, state, inputs, labels, choices, **options):
        digest = hashlib.sha256(np.asarray(inputs).tobytes() + np.asarray(labels).tobytes()).hexdigest()
        line = {"step": options["step"], "batch": digest, "subnets": [c.subnet.to_json() for c in choices]}
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(pause_s)
        return real(self, state, inputs, labels, choices, **options)

    if log:
        SandwichStep.__call__ = logged
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        loop.train(config_from_json({**config_to_json(DEBUG), **spec}), workdir, dataset=Noise())
    except errors.SuperServeError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
