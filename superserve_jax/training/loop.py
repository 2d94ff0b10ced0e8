"""The training loop: one flat function, `train`.

Every random choice is a pure function of (seed, step). So a run that was interrupted ends with the same bits as an undisturbed
one: the checkpoint restores parameters, optimiser state and average, and the step number gives everything else.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from superserve_jax import errors, manifest, plots, progress, supernets
from superserve_jax.supernets import programs, registry
from superserve_jax.supernets.family import RewirableConfig
from superserve_jax.training import data, rewiring, runs, sampling, teacher, validation, wandb_log
from superserve_jax.training.checkpoints import Checkpoints
from superserve_jax.training.config import TrainConfig
from superserve_jax.training.data import DatasetLike, fit
from superserve_jax.training.metrics_log import MetricsLog
from superserve_jax.training.runs import Run
from superserve_jax.training.step import Recipe, SandwichStep, TrainState
from superserve_jax.training.validation import Validation

_log = logging.getLogger(__name__)

_PLOT = "metrics.png"


def train(config: TrainConfig, workdir: str | os.PathLike[str], *, dataset: DatasetLike | None = None) -> Run:
    """Trains a SuperNet in `workdir`, or goes on from its last checkpoint; returns the run.

    The batch is split over all devices. Statistics and gradients are computed over the whole batch.

    Args:
      config: the experiment.
      workdir: the run's folder. It is made if it does not exist.
      dataset: the dataset, such as `data.from_arrays` makes; the config's dataset if left out.

    Raises:
      KeyboardInterrupt: on Ctrl-C, after a checkpoint was saved. Call again to go on.
      ConfigError: the folder holds a run of another config.
      DataError: the dataset is missing, or has changed since the run began. Or the last checkpoint could not be written, for
        example because the disk is full.
      WriteError: another file of the run cannot be written.
    """
    if not isinstance(config, TrainConfig):
        raise errors.ConfigError(f"expected a TrainConfig, such as `load_config` returns, got {config!r}")
    if dataset is not None and not isinstance(dataset, DatasetLike):
        raise errors.ConfigError(f"dataset must be a Dataset, such as `data.from_arrays` makes, got {type(dataset).__name__}")
    workdir = runs.check_workdir(workdir)
    given = dataset
    if dataset is not None:
        config = dataclasses.replace(config, data=None)  # so that no later stage takes another dataset
    before = Run.open(workdir) if manifest.is_run(workdir) else None
    if before is not None:
        before.check_data(config)  # before the data is opened, which may take minutes
    if dataset is None and config.data is not None:
        # Before the folder is made: if there is no data, no folder is left behind.
        dataset = data.open(config.data, config.model)
    if dataset is None:
        raise errors.ConfigError("the config names no dataset: set its `data`, or pass train(..., dataset=...)")
    inputs: dict[str, Any] = {"data": data.fingerprint(dataset)}
    if before is not None:
        before.check_inputs(inputs)  # before the values that its data gave are taken as those of this data
    config, derived = _complete(config, dataset, before)
    supernets.check(config.model, run=False)
    fit.check(dataset, config.model)
    validated = _can_validate(config, dataset)
    wandb_log.check(config.wandb)
    if not registry.is_built_in(type(config.model)) and before is None:
        supernets.check(config.model)  # slower than the other checks
    recipe = Recipe(config.label_smoothing, config.distill.weight, config.distill.hidden, config.compute_dtype)
    outside = teacher.load(config.distill.teacher, config.model) if config.distill.teacher else None
    teacher.check_hidden(recipe, config.model, outside)
    replicated, split = _shardings(config.batch_size)
    if outside is not None:
        outside = outside._replace(params=jax.device_put(outside.params, replicated))

    inputs["teacher"] = outside and teacher.fingerprint(outside)
    run = Run.create(config, workdir, dataset=given)
    num_steps = max(1, int(config.epochs * dataset.num_examples("train") / config.batch_size))
    parts = sampling.plan(config, num_steps)
    eval_every = validation.interval(config, num_steps) if validated else 0
    sandwich = SandwichStep(config.optim.create(num_steps), recipe=recipe, ema=config.ema)

    with run.training_lock(), run.checkpoints() as saved, _stop_signal() as stopped, contextlib.ExitStack() as stack:
        run.check_inputs(inputs)
        start, state = _restore(saved, run, sandwich)
        run.write_inputs(inputs, start)
        if start >= num_steps:
            if not (run.workdir / _PLOT).exists():  # a kill came between the last checkpoint and the plot
                _plot(run)
            return run
        _log.info("data: %s%s", data.describe(dataset), "".join(f"; {name} {value}" for name, value in derived.items()))
        run.forget_stages()
        (run.workdir / _PLOT).unlink(missing_ok=True)
        if start:
            _log.info("going on from step %d of %d", start, num_steps)
        state = jax.device_put(state, replicated)
        last, unsaved = start, None
        record = MetricsLog(run.workdir, start, send=stack.enter_context(wandb_log.sending(config, run.workdir)))
        validate = Validation(config, dataset) if eval_every else None
        batches = dataset.train(config.batch_size, seed=config.seed, start_step=start)
        steps = range(start, num_steps)
        _log.info("compiling the programs of the first steps, which can take a minute")
        for k in progress.track(steps, "training", total=num_steps, completed=start, note=lambda: record.note):
            # Which subnets: depends on (seed, k) alone.
            part = sampling.at(parts, k)
            if part.phase.rewire and k == part.first:
                state = jax.device_put(_rewire(config, state, dataset), replicated)
            choices = part.sampler.step(k)

            # Which examples, and an outside teacher's output for them.
            batch = jax.device_put(next(batches), split)
            lesson = None if outside is None else outside(recipe, batch["inputs"])

            # The gradients of every subnet, and one update.
            state, scalars = sandwich(state, batch["inputs"], batch["label"], choices, step=k, lesson=lesson)
            done = k + 1

            # Metrics, validation, checkpoint. The checkpoint is last: a run that goes on from it repeats none of them.
            record.add(scalars)
            if done % config.log_every == 0 or done == num_steps:
                record.flush(done, examples=config.batch_size)
            if validate and (done % eval_every == 0 or done == num_steps):
                record.validation(done, validate(state))
            if done % config.checkpoint_every == 0 or done == num_steps or stopped():
                # It must be on disk before the next step, which donates these buffers.
                try:
                    saved.save(done, **state._asdict())
                    last, unsaved = done, None
                except errors.DataError as e:  # for example, the disk is full
                    _log.warning("%s. Training goes on", e)
                    unsaved = e
            if stopped():
                break
    if unsaved is not None:
        raise errors.DataError(f"{unsaved} and run the same command to go on from step {last} of {num_steps}") from unsaved
    _plot(run)
    if last < num_steps:
        raise KeyboardInterrupt(f"stopped after step {last} of {num_steps}; run the same command to go on from there")
    return run


def _complete(config: TrainConfig, dataset: DatasetLike, before: Run | None) -> tuple[TrainConfig, dict[str, Any]]:
    """The config with the values of its model that the data tells, and these values by name."""
    model, names = fit.complete(config.model, dataset, known=before and before.config.model)
    return dataclasses.replace(config, model=model), {name: getattr(model, name) for name in names}


def _shardings(batch_size: int) -> tuple[jax.sharding.Sharding, jax.sharding.Sharding]:
    """The sharding of arrays that every device holds whole, and of arrays that are split along the batch."""
    devices = jax.devices()
    if batch_size % len(devices):
        raise errors.ConfigError(
            f"batch_size must be a multiple of the number of devices, which is {len(devices)}; got {batch_size}"
        )
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("batch")
    return jax.sharding.NamedSharding(mesh, whole), jax.sharding.NamedSharding(mesh, split)


def _can_validate(config: TrainConfig, dataset: DatasetLike) -> bool:
    """Whether to validate. Raises DataError if the config asks for it, but there are no validation examples."""
    if config.eval_every == 0:
        return False
    try:
        dataset.num_examples("validation")
    except errors.DataError as e:
        if config.eval_every is not None:
            raise
        _log.warning("no validation curves: %s", e)
        return False
    return True


def _restore(saved: Checkpoints, run: Run, sandwich: SandwichStep) -> tuple[int, TrainState]:
    """(steps done, state) from the last checkpoint, or a fresh state."""
    latest, config = saved.latest(clean=True), run.config
    if latest is None and run.converted:
        raise errors.DataError(
            f"{run.workdir} began with converted weights, but has no undamaged checkpoint; remove it and convert them again"
        )
    if latest is None:
        return 0, sandwich.init(programs.initial_params(config.model, config.seed))
    specs = jax.eval_shape(sandwich.init, programs.param_spec(config.model))
    return latest, TrainState(**saved.restore(latest, **specs._asdict()))


def _rewire(config: TrainConfig, state: TrainState, dataset: DatasetLike) -> TrainState:
    """The state with its units in order of importance. It depends on the state alone, so a resumed run repeats it."""
    assert isinstance(config.model, RewirableConfig)  # a config whose phases rewire checks it
    params = jax.device_put(state.params, jax.devices()[0])
    return rewiring.reorder(config.model, state, rewiring.orders_on(config.model, params, dataset, seed=config.seed))


def _plot(run: Run) -> None:
    lines, validated = run.metrics(), run.metrics("validation")
    steps = f", {lines[-1]['step']:,} steps" if lines else ""
    plots.metrics(lines, run.workdir / _PLOT, validation=validated, title=f"Training of {run.config.name}{steps}")


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C into a flag that the loop reads after every step. A second Ctrl-C raises at once."""
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
