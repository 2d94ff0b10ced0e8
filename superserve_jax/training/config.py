"""Configs of a training run: frozen dataclasses, one Python file per experiment in configs/."""

import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import traceback
from typing import Any, Literal

from superserve_jax import errors, families
from superserve_jax.training import fields
from superserve_jax.training.data import check_kind, data_from_json, data_to_json
from superserve_jax.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of training with a freedom of its own. Progressive shrinking opens one axis after another:

        phases=(Phase(share=0.2, elastic=()), Phase(share=0.3, elastic=("depth",)), Phase(share=0.5))

    Args:
      share: of the run's steps, in proportion to the other phases' shares.
      elastic: axes that vary, "depth" among them; the others stay at their largest. All, where it is None; none, where it
        is empty: then the largest subnet is trained alone.
      choices: so many of the largest choices of an axis are open; 0 opens all.
      tied: blocks take the choice that their stage's depth implies (CompOFA).
      rewire: before the phase, sort what the family can sort by importance (for DynaBERT heads and neurons).
    """

    share: float = 1.0
    elastic: tuple[str, ...] | None = None
    choices: int = 0
    tied: bool = False
    rewire: bool = False

    def __post_init__(self):
        fields.demand_number("phases.share", self.share, least=1e-6)
        fields.demand_whole("phases.choices", self.choices, 0)
        fields.demand_bool("phases.tied", self.tied)
        fields.demand_bool("phases.rewire", self.rewire)
        names = self.elastic
        if names is not None and not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
            raise errors.ConfigError(f"phases.elastic must be a tuple of axes, or None for all, got {names!r}")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What subnets learn from beside labels. Without a teacher the largest subnet of the same step teaches the others.

    Args:
      teacher: a run's folder or an export, own or converted, for the same inputs and classes; its largest subnet's soft
        output teaches every subnet, the largest as well.
      weight: of the teacher's soft output in the largest subnet's loss, beside the labels.
      hidden: weight of the mean squared distance between hidden states of kept blocks and the teacher's, in every loss;
        for families that offer them, such as DynaBERT.
    """

    teacher: str | None = None
    weight: float = 1.0
    hidden: float = 0.0

    def __post_init__(self):
        fields.demand_path("distill.teacher", self.teacher)
        fields.demand_number("distill.weight", self.weight)
        fields.demand_number("distill.hidden", self.hidden)


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
            fields.demand_whole(f"search.{name}", getattr(self, name), least)
        if self.cost not in ("flops", "latency"):
            raise errors.unknown_name("search.cost", self.cost, ("flops", "latency"))
        if self.tolerance is not None:
            fields.demand_number("search.tolerance", self.tolerance, below=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment.

    Args:
      name: names the run's folder, runs/NAME.
      model: a family's config, such as OFAResNetConfig.
      data: the dataset and its augmentation: a DataConfig, FolderConfig or TextConfig; None where the dataset is given beside
        the config, see `loop.train`.
      optim: optimiser and schedule.
      phases: parts of training with different freedom; one with all of it, where it is empty.
      distill: what teaches the subnets.
      epochs: passes over the training examples; may be a fraction.
      batch_size: global batch, whatever the number of devices, which must divide it.
      buckets: subnet buckets that random subnets are drawn from; each costs one compilation.
      random_subnets: random subnets per step, beside the largest and the smallest.
      label_smoothing: of the largest subnet's labels.
      ema: decay per step of an exponential moving average of the parameters, which then are the result; 0 keeps none.
      compute_dtype: "bfloat16" computes in it, with float32 parameters, losses and statistics.
      eval_every: every so many steps the smallest, a middle and the largest subnet are calibrated and evaluated on
        validation examples, as the search does it; 0 never.
      calibration_examples: training images for the statistics of a served subnet.
      search: which subnets to serve.
      seed: of weights, data order and subnet sampling.
      checkpoint_every, log_every: in steps.
    """

    name: str
    model: Any
    data: Any = None
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    phases: tuple[Phase, ...] = ()
    distill: DistillConfig = DistillConfig()
    epochs: float = 7.0
    batch_size: int = 64
    buckets: int = 8
    random_subnets: int = 1
    label_smoothing: float = 0.0
    ema: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    eval_every: int = 0
    calibration_examples: int = 4096
    search: SearchConfig = SearchConfig()
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50

    @errors.refusing(errors.ConfigError, "TrainConfig: a field is of another type than its default")
    def __post_init__(self):
        if not isinstance(self.name, str):
            raise errors.ConfigError(f"name must be text, got {self.name!r}")
        if not self.name or pathlib.Path(self.name).name != self.name:
            raise errors.ConfigError(f"name must be usable as a folder's name, got '{self.name}'")
        if not hasattr(self.model, "family"):
            raise errors.ConfigError(f"model must be a family's config such as OFAResNetConfig, got {self.model!r}")
        fields.demand_number("epochs", self.epochs, least=1e-6)
        fields.demand_number("label_smoothing", self.label_smoothing, below=1)
        fields.demand_number("ema", self.ema, below=1)
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise errors.unknown_name("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        for name, kind in (("optim", OptimConfig), ("distill", DistillConfig), ("search", SearchConfig), ("phases", tuple)):
            if not isinstance(getattr(self, name), kind):
                raise errors.ConfigError(f"{name} must be of {kind.__name__}, got {getattr(self, name)!r}")
        if self.data is not None:
            check_kind(self.data)
        for phase in self.phases:
            if not isinstance(phase, Phase):
                raise errors.ConfigError(f"phases must be a tuple of Phase, got {phase!r}")
            self.model.space().narrowed(phase.elastic, choices=phase.choices)  # raises for an unknown axis
            if phase.rewire and not hasattr(self.model, "units"):
                raise errors.ConfigError(
                    f"phases.rewire: family '{self.model.family}' has no units to sort (its config has no method units)"
                )
        fields.demand_whole("eval_every", self.eval_every, 0)
        fields.demand_whole("random_subnets", self.random_subnets, 0)
        fields.demand_whole("seed", self.seed, 0)
        for name in ("batch_size", "buckets", "calibration_examples", "checkpoint_every", "log_every"):
            fields.demand_whole(name, getattr(self, name), 1)


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """The config that a Python file's `get_config()` returns. Raises ConfigError where the file cannot give one."""
    with errors.refusing(errors.ConfigError, f"expected the path of a config file, got {path!r}"):
        path = pathlib.Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; the examples are in configs/"
        raise errors.ConfigError(f"no config file {path}{hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise errors.ConfigError(f"{path} is no Python file; a config's name ends in .py, as those in configs/")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise errors.ConfigError(f"{path} has no function get_config(); it must return a TrainConfig")
        config = module.get_config()
    except errors.SuperServeError:
        raise
    except Exception as e:  # of any kind: the file is the user's code
        line = traceback.extract_tb(e.__traceback__)[-1]
        raise errors.ConfigError(f"{path} fails, see {line.filename}:{line.lineno}: {type(e).__name__}: {e}") from e
    if not isinstance(config, TrainConfig):
        raise errors.ConfigError(f"get_config() of {path} must return a TrainConfig, got {type(config).__name__}")
    return config


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as a dict of plain values, as `json.load` would give it back."""
    parts = {"model": families.config_to_json(config.model), "data": config.data and data_to_json(config.data)}
    as_dict = {**dataclasses.asdict(config), **parts}
    return json.loads(json.dumps(as_dict))


@errors.refusing(errors.ConfigError, "not a config as `to_json` gives it")
def config_from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. A field that an older version did not have is left at its default.

    Raises:
      UnknownNameError: a field that this version does not have. ConfigError: a value that does not fit.
    """
    readers = {
        "model": families.config_from_json,
        "data": lambda v: v and data_from_json(v),
        "optim": lambda v: _read(OptimConfig, v),
        "phases": lambda v: tuple(_read(Phase, {**p, "elastic": _tuple(p.get("elastic"))}) for p in v),
        "distill": lambda v: _read(DistillConfig, v),
        "search": lambda v: _read(SearchConfig, v),
    }
    return _read(TrainConfig, {name: readers.get(name, lambda v: v)(value) for name, value in values.items()})


def _read(config_class: Any, values: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(config_class)}
    if surplus := sorted(set(values) - known):
        raise errors.unknown_name(f"field of {config_class.__name__}", surplus[0], known)
    try:
        return config_class(**values)
    except TypeError as e:
        raise errors.ConfigError(f"the config does not fit: {e}") from e


def _tuple(names: list[str] | None) -> tuple[str, ...] | None:
    """A list as JSON has it, which may be empty, as a tuple."""
    return None if names is None else tuple(names)


def config_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two resolved configs differ, as "optim.lr: 0.004 -> 0.01"."""
    result = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += config_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append(f"{prefix}{key}: {a} -> {b}")
    return result
