"""Configs of a training run: frozen dataclasses, one Python file per experiment in configs/."""

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import pathlib
from typing import Any, Literal

import optax

from superserve_jax import errors, supernets
from superserve_jax.training import data


def _demand_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise errors.ConfigError(f"{name} must be a whole number from {least} up, got {value!r}")


def _demand_number(name: str, value: Any, *, least: float = 0.0, below: float = math.inf) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value < below:
        limit = f" and below {below}" if below < math.inf else ""
        raise errors.ConfigError(f"{name} must be a finite number of at least {least:g}{limit}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule.

    Args:
      name: "adamw" or "sgd" (with Nesterov momentum).
      lr: peak learning rate.
      schedule: "cosine" to zero, or "constant"; both after a linear warm-up over `warmup` (a fraction of all steps).
      weight_decay: decoupled; norms and biases (parameters of fewer than two axes) are spared.
      clip_norm: gradients are scaled down to this global norm; 0 leaves them.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 4e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 1e-2
    momentum: float = 0.9
    clip_norm: float = 0.0

    def __post_init__(self):
        for name, known in (("name", ("adamw", "sgd")), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) not in known:
                raise errors.unknown_name(f"optim.{name}", getattr(self, name), known)
        _demand_number("optim.lr", self.lr, least=1e-12)
        _demand_number("optim.warmup", self.warmup, below=1)
        _demand_number("optim.weight_decay", self.weight_decay)
        _demand_number("optim.momentum", self.momentum, below=1)
        _demand_number("optim.clip_norm", self.clip_norm)

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


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The search for the subnets to serve.

    Args:
      candidates: subnets to try, the smallest and the largest among them.
      calibration_examples, examples: training examples for a candidate's statistics, validation examples for its accuracy.
      cost: what accuracy is weighed against: "flops", or "latency", measured on this machine.
      latency_batch: the batch size whose latency counts.
      served: at most this many subnets are chosen, spread evenly over the logarithm of the cost.
      tolerance: how much less accurate than a cheaper subnet a served one may be, a fraction such as 0.02; all that are chosen
        are exported then. None: by the standard error, and the export keeps those that test images confirm to be better than
        every cheaper one.
    """

    candidates: int = 60
    calibration_examples: int = 512
    examples: int = 1000
    cost: Literal["flops", "latency"] = "flops"
    latency_batch: int = 1
    served: int = 12
    tolerance: float | None = None

    def __post_init__(self):
        for name, least in (
            ("candidates", 2),
            ("calibration_examples", 1),
            ("examples", 1),
            ("latency_batch", 1),
            ("served", 2),
        ):
            _demand_whole(f"search.{name}", getattr(self, name), least)
        if self.cost not in ("flops", "latency"):
            raise errors.unknown_name("search.cost", self.cost, ("flops", "latency"))
        if self.tolerance is not None:
            _demand_number("search.tolerance", self.tolerance, below=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment.

    Args:
      name: names the run's folder, runs/NAME.
      model: a family's config, such as OFAResNetConfig.
      data: the dataset and its augmentation.
      optim: optimiser and schedule.
      epochs: passes over the training images; may be a fraction.
      batch_size: global batch.
      buckets: subnet buckets that random subnets are drawn from; each costs one compilation.
      random_subnets: random subnets per step, beside the largest and the smallest.
      label_smoothing: of the largest subnet's labels.
      calibration_examples: training images for the statistics of a served subnet.
      search: which subnets to serve.
      seed: of weights, data order and subnet sampling.
      checkpoint_every, log_every: in steps.
    """

    name: str
    model: Any
    data: data.DataConfig
    optim: OptimConfig = OptimConfig()
    epochs: float = 7.0
    batch_size: int = 64
    buckets: int = 8
    random_subnets: int = 1
    label_smoothing: float = 0.0
    calibration_examples: int = 4096
    search: SearchConfig = SearchConfig()
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50

    def __post_init__(self):
        if not self.name or pathlib.Path(self.name).name != self.name:
            raise errors.ConfigError(f"name must be usable as a folder's name, got '{self.name}'")
        if not hasattr(self.model, "family"):
            raise errors.ConfigError(f"model must be a family's config such as OFAResNetConfig, got {self.model!r}")
        _demand_number("epochs", self.epochs, least=1e-6)
        _demand_number("label_smoothing", self.label_smoothing, below=1)
        _demand_whole("random_subnets", self.random_subnets, 0)
        _demand_whole("seed", self.seed, 0)
        for name in ("batch_size", "buckets", "calibration_examples", "checkpoint_every", "log_every"):
            _demand_whole(name, getattr(self, name), 1)


def load(path: str | os.PathLike[str]) -> TrainConfig:
    """The config that a Python file's `get_config()` returns. Raises ConfigError where the file cannot give one."""
    path = pathlib.Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; the examples are in configs/"
        raise errors.ConfigError(f"no config file {path}{hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise errors.ConfigError(f"{path} has no function get_config(); it must return a TrainConfig")
    config = module.get_config()
    if not isinstance(config, TrainConfig):
        raise errors.ConfigError(f"get_config() of {path} must return a TrainConfig, got {type(config).__name__}")
    return config


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as a dict of plain values, as `json.load` would give it back."""
    as_dict = {**dataclasses.asdict(config), "model": supernets.config_to_json(config.model)}
    return json.loads(json.dumps(as_dict))


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`."""
    parts = {
        "model": supernets.config_from_json(values["model"]),
        "data": data.DataConfig(**values["data"]),
        "optim": OptimConfig(**values["optim"]),
        "search": SearchConfig(**values["search"]),
    }
    return TrainConfig(**{**values, **parts})


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two resolved configs differ, as "optim.lr: 0.004 -> 0.01"."""
    result = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append(f"{prefix}{key}: {a} -> {b}")
    return result


def _decayed(params: Any) -> dict[str, bool]:
    return {name: value.ndim > 1 for name, value in params.items()}
