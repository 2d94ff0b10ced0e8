"""Configs of a training run: frozen dataclasses, one Python file per experiment in configs/."""

import dataclasses
import difflib
import json
import os
from typing import Any, Literal

import jax
import optax

from superserve_jax import errors, families, files, foreign, manifest, shipped
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.space import SearchSpace
from superserve_jax.supernets.family import FamilyConfig, RewirableConfig
from superserve_jax.training import fields
from superserve_jax.training.data import AnyDataConfig, check_kind, data_from_json, data_to_json
from superserve_jax.training.fields import AboveZero, AtLeastTwo, BatchSize, Count, Finite, Fraction, Positive, Seed
from superserve_jax.training.template import ModelTemplate

_MAX_NAME = 255  # bytes of a folder's name


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule.

    Args:
      name: "adamw", or "sgd" with Nesterov momentum.
      lr: peak learning rate.
      schedule: "cosine" falls to zero, "constant" stays. Both follow a linear warm-up.
      warmup: length of the warm-up, as a fraction of all steps.
      weight_decay: weight decay, decoupled from the gradient with adamw, added to it with sgd. Norms and biases (parameters
        with fewer than two axes) do not decay.
      momentum: momentum of sgd.
      clip_norm: larger gradients are scaled down to this global norm; 0 does not clip.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: AboveZero = 4e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.05
    weight_decay: Finite = 1e-2
    momentum: Fraction = 0.9
    clip_norm: Finite = 0.0

    def __post_init__(self):
        fields.check(self, "optim.")

    def create(self, steps: int) -> optax.GradientTransformation:
        """The Optax transformation for a run of `steps` steps."""
        warmup = round(self.warmup * steps)
        cosine = self.schedule == "cosine"
        main = optax.cosine_decay_schedule(self.lr, max(steps - warmup, 1)) if cosine else optax.constant_schedule(self.lr)
        schedule = optax.join_schedules(
            [optax.linear_schedule(self.lr / (warmup + 1), self.lr, max(warmup, 1)), main], [warmup]
        )
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        if self.name == "adamw":
            return optax.chain(clip, optax.adamw(schedule, weight_decay=self.weight_decay, mask=_decayed))
        decay = optax.add_decayed_weights(self.weight_decay, mask=_decayed)
        return optax.chain(clip, decay, optax.sgd(schedule, momentum=self.momentum, nesterov=True))


def _decayed(params: dict[str, jax.Array]) -> dict[str, bool]:
    return {name: value.ndim > 1 for name, value in params.items()}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of training with its own search space. Progressive shrinking opens one axis after another:

        phases=(Phase(share=0.2, elastic=()), Phase(share=0.3, elastic=("depth",)), Phase(share=0.5))

    Args:
      share: this phase's part of the run's steps, relative to the other phases' shares.
      elastic: the axes that vary, such as "depth"; the others stay at their largest choice. None: all axes vary. Empty: only
        the largest subnet is trained.
      choices: how many of the largest choices of each axis are open; 0 opens all.
      tied: every block takes the choice that its stage's depth implies (CompOFA).
      rewire: sort units by importance before the phase (heads and neurons for DynaBERT, channels for OFA-ResNet).
    """

    share: AboveZero = 1.0
    elastic: tuple[str, ...] | None = None
    choices: Count = 0
    tied: bool = False
    rewire: bool = False

    def __post_init__(self):
        fields.check(self, "phases.")

    def space(self, model: FamilyConfig) -> SearchSpace:
        """The part of a model's search space that the phase trains. Raises UnknownNameError for an unknown axis."""
        return model.space().narrowed(self.elastic, choices=self.choices)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What subnets learn from besides labels. Without a teacher, the step's largest subnet teaches the others.

    Args:
      teacher: the folder of a run or an export with the same inputs and classes. Its largest subnet's soft output then
        teaches every subnet, the largest one included.
      weight: with `teacher`, weight of its soft output in the largest subnet's loss. The labels have weight 1.
      hidden: weight of the mean squared distance to the teacher's hidden states, over the blocks that the subnet keeps. It is
        part of the loss of every subnet that has a teacher. Only for families with hidden states of one shape, such as
        DynaBERT.
    """

    teacher: str | None = None
    weight: Finite = 1.0
    hidden: Finite = 0.0

    def __post_init__(self):
        fields.check(self, "distill.")


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The search for the subnets to serve.

    Args:
      candidates: number of subnets to try, the smallest and the largest included.
      calibration_examples: number of training examples for a candidate's statistics.
      examples: number of validation examples for a candidate's accuracy.
      cost: the second objective besides accuracy: "flops", or "latency", which is measured on this machine.
      latency_batch: the batch size at which latency is measured.
      served: the largest number of subnets to choose. They are spread evenly over the logarithm of the cost.
      tolerance: how much less accurate than a cheaper subnet a chosen subnet may be, as a fraction such as 0.02. None chooses
        no subnet if another one is at least as cheap and at least as accurate, except the smallest and the largest.
    """

    candidates: AtLeastTwo = 60
    calibration_examples: Positive = 512
    examples: Positive = 1000
    cost: Literal["flops", "latency"] = "flops"
    latency_batch: BatchSize = 1
    served: AtLeastTwo = 12
    tolerance: Fraction | None = None

    def __post_init__(self):
        fields.check(self, "search.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment.

    Args:
      name: the experiment's name; the run's folder is runs/NAME.
      model: a family's config, such as OFAResNetConfig. `template.from_data` leaves out what the data tells.
      data: the dataset and its augmentation: a DataConfig, FolderConfig, TextConfig or TextFileConfig. None if the dataset is
        an argument of `loop.train`.
      optim: optimiser and learning-rate schedule.
      phases: the parts of training, in order. Empty: one phase in which everything is elastic.
      distill: the teacher of the subnets, and the weights of its losses.
      epochs: number of passes over the training examples; 0.5 is allowed.
      batch_size: number of examples in a step, over all devices. The number of devices must divide it.
      buckets: number of subnet buckets for the random subnets; each costs one compilation.
      random_subnets: number of random subnets per step, besides the largest and the smallest.
      label_smoothing: label smoothing in the largest subnet's loss.
      ema: decay per step of an exponential moving average of the parameters. If kept, the average is the result; 0 keeps none.
      compute_dtype: dtype of activations and products. Parameters, losses and statistics are always float32.
      eval_every: validate the smallest, a middle and the largest subnet every so many steps. None validates about ten times in
        a run, 0 never.
      calibration_examples: number of training examples for the statistics of a served subnet.
      search: the settings of the search for the subnets to serve.
      seed: seed of weights, data order and subnet sampling.
      checkpoint_every: steps between two checkpoints.
      log_every: steps between two lines of metrics.
      wandb: a project of Weights & Biases that also gets the metrics (`pip install 'superserve-jax[wandb]'`).
    """

    name: str
    model: FamilyConfig
    data: AnyDataConfig | None = None
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    phases: tuple[Phase, ...] = ()
    distill: DistillConfig = DistillConfig()
    epochs: AboveZero = 7.0
    batch_size: BatchSize = 64
    buckets: Positive = 8
    random_subnets: Count = 1
    label_smoothing: Fraction = 0.0
    ema: Fraction = 0.0
    compute_dtype: ComputeDtype = "float32"
    eval_every: Count | None = None
    calibration_examples: Positive = 4096
    search: SearchConfig = SearchConfig()
    seed: Seed = 0
    checkpoint_every: Positive = 500
    log_every: Positive = 50
    wandb: str | None = None

    @errors.refusing(errors.ConfigError, "TrainConfig: a field has another type than its default")
    def __post_init__(self):
        fields.check(self, skip=("model", "data"))
        name = self.name
        if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name.encode()) > _MAX_NAME:
            raise errors.ConfigError(
                f"name must be usable as a folder's name: at most {_MAX_NAME} bytes of printable characters without '/', and "
                f"not '..'; got {name[:_MAX_NAME]!r}"
            )
        model = self.model.fill({}) if isinstance(self.model, ModelTemplate) else self.model
        if not isinstance(model, FamilyConfig):
            raise errors.ConfigError(f"model must be a family's config such as OFAResNetConfig, got {model!r}")
        if self.data is not None:
            check_kind(self.data)
        for phase in self.phases:
            phase.space(model)  # raises for an unknown axis
            if phase.rewire and not isinstance(model, RewirableConfig):
                raise errors.ConfigError(
                    f"phases.rewire: family '{model.family}' has no units to sort (its config has no method units)"
                )

    @property
    def last_phase(self) -> Phase:
        """The phase that ends training. Search, validation and export take their subnets from its space."""
        return self.phases[-1] if self.phases else Phase()


# tyro offers the options of a field's own config, such as --model.image-size, only if the field may be anything.
TrainConfig.__annotations__.update(model=Any, data=Any)


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """The config that a Python file's `get_config()` returns. Raises ConfigError if the file cannot give one.

    >>> load_config("debug").name
    'debug'

    Args:
      path: the file. If it does not exist, the name of a config that comes with the package, such as "debug".
    """
    with errors.refusing(errors.ConfigError, f"expected the path of a config file, got {path!r}"):
        path = files.user_path(path)
    named = shipped.configs()
    if manifest.is_run(path):
        raise errors.ConfigError(
            f"{path} is the folder of a run; give a config file, whose function get_config() makes a config. "
            f"`superserve train {path}` trains the run further"
        )
    if not path.is_file() and not (path := named.get(str(path), path)).is_file():
        near = difflib.get_close_matches(path.name, [*named, *(p.name for p in path.parent.glob("*.py"))], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise errors.ConfigError(f"no config file {path}{hint}; configs that come with the package: {', '.join(named)}")
    if path.suffix != ".py":
        raise errors.ConfigError(f"{path} is no Python file; a config's name ends in .py, as in configs/")
    try:
        get_config = getattr(foreign.execute(path), "get_config", None)
        if not callable(get_config):
            raise errors.ConfigError(f"{path} has no function get_config(); it must return a TrainConfig")
        config = get_config()
    except errors.SuperServeError:
        raise
    except (Exception, SystemExit) as e:  # any exception: the file is the user's code
        raise errors.ConfigError(f"{path} fails{foreign.place(e)}: {type(e).__name__}: {getattr(e, 'msg', e)}") from e
    if not isinstance(config, TrainConfig):
        raise errors.ConfigError(f"get_config() of {path} must return a TrainConfig, got {type(config).__name__}")
    return config


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as a dict of plain values, equal to what `json.load` gives back."""
    parts = {"model": families.config_to_json(config.model), "data": config.data and data_to_json(config.data)}
    return json.loads(json.dumps({**dataclasses.asdict(config), **parts}))


@errors.refusing(errors.ConfigError, "not a config as config_to_json writes it")
def config_from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `config_to_json`. A missing field gets its default, since an older version may not have had it.

    Raises:
      UnknownNameError: a field that this version does not have. ConfigError: a value that does not fit.
    """
    readers = {
        "model": families.config_from_json,
        "data": lambda v: v and data_from_json(v),
        "optim": lambda v: fields.read(OptimConfig, v),
        "phases": lambda v: tuple(fields.read(Phase, p) for p in v),
        "distill": lambda v: fields.read(DistillConfig, v),
        "search": lambda v: fields.read(SearchConfig, v),
    }
    return fields.read(TrainConfig, {name: readers.get(name, lambda v: v)(value) for name, value in values.items()})


def config_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two resolved configs differ, such as "optim.lr: 0.004 -> 0.01"."""
    result = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += config_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append(f"{prefix}{key}: {a} -> {b}")
    return result
