"""The training loop: one flat function. Every random choice is a pure function of (seed, step), so a resumed run repeats
an undisturbed one exactly."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from superserve_jax import errors, plots, progress
from superserve_jax.supernets import programs
from superserve_jax.training import config as configs
from superserve_jax.training import data, runs, sampling, step

_log = logging.getLogger(__name__)


def train(config: configs.TrainConfig, workdir: str | os.PathLike[str]) -> runs.Run:
    """Trains a SuperNet in `workdir`, or goes on from its last checkpoint; returns the run.

    Args:
      config: the experiment.
      workdir: the run's folder, made if need be.

    Raises:
      KeyboardInterrupt: on Ctrl-C, after saving a checkpoint; call again to go on.
      ConfigError: the folder holds a run of another config. DataError: the dataset is not there.
    """
    dataset = data.open(config.data)  # first, since without data no folder should be left behind
    if dataset.num_classes != config.model.num_classes:
        raise errors.ConfigError(
            f"model.num_classes is {config.model.num_classes}, but {config.data.name} has {dataset.num_classes} classes"
        )
    run = runs.Run.create(config, workdir)
    num_steps = max(1, int(config.epochs * dataset.num_examples("train") / config.batch_size))

    optimiser = config.optim.create(num_steps)
    sampler = sampling.Sampler(config.model, buckets=config.buckets, random_subnets=config.random_subnets, seed=config.seed)
    sandwich = step.SandwichStep(optimiser, label_smoothing=config.label_smoothing)

    with run.checkpoints() as manager, _stop_signal() as stopped:
        start, params, opt_state = _restore(manager, config, optimiser)
        if start >= num_steps:
            return run
        if start:
            _log.info("going on from step %d of %d", start, num_steps)
        metrics = _MetricsFile(run.workdir / "metrics.jsonl", start)
        batches = dataset.train(config.batch_size, seed=config.seed, start_step=start)
        bar = progress.track(range(start, num_steps), "training", total=num_steps, completed=start, note=lambda: metrics.note)
        saved = start
        try:
            for k in bar:
                batch = next(batches)
                params, opt_state, scalars = sandwich(params, opt_state, batch["inputs"], batch["label"], sampler.step(k))
                done = k + 1
                metrics.add(scalars)
                if done % config.log_every == 0 or done == num_steps:
                    metrics.flush(done, images=config.batch_size)
                if done % config.checkpoint_every == 0 or done == num_steps or stopped():
                    # On disk before the next step, which gives these buffers away.
                    runs.save(manager, done, params=params, opt_state=opt_state)
                    saved = done
                if stopped():
                    break
        finally:
            metrics.close()
    plots.metrics(run.metrics(), run.workdir / "metrics.png")
    if saved < num_steps:
        raise KeyboardInterrupt(f"stopped after step {saved} of {num_steps}; run the same command to go on from there")
    return run


def _restore(
    manager: ocp.CheckpointManager, config: configs.TrainConfig, optimiser: optax.GradientTransformation
) -> tuple[int, dict[str, jax.Array], Any]:
    """(steps done, parameters, optimiser state): of the last checkpoint, or fresh."""
    latest = manager.latest_step()
    if latest is None:
        params = programs.initial_params(config.model, config.seed)
        return 0, params, optimiser.init(params)
    params = programs.param_spec(config.model)
    restored = runs.restore(manager, latest, params=params, opt_state=jax.eval_shape(optimiser.init, params))
    return latest, restored["params"], restored["opt_state"]


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C into a flag that the loop reads between steps; a second Ctrl-C raises at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_):
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class _MetricsFile:
    """JSON lines, one per `flush`, each the mean since the last. Lines beyond the step gone on from are dropped."""

    def __init__(self, path, start: int):
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._pending: list[dict[str, jax.Array]] = []
        self._since = time.monotonic()
        self.note = ""

    def add(self, scalars: dict[str, jax.Array]) -> None:
        self._pending.append(scalars)

    def flush(self, done: int, *, images: int) -> None:
        means = {k: float(np.mean([float(s[k]) for s in self._pending])) for k in self._pending[0]}
        now = time.monotonic()
        rate = images * len(self._pending) / (now - self._since)
        self._file.write(json.dumps({"step": done, **means, "images_per_s": rate}) + "\n")
        self._file.flush()
        self.note = f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.3f}"
        self._pending, self._since = [], now

    def close(self) -> None:
        self._file.close()
