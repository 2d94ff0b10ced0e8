"""superserve-jax: train one weight-shared SuperNet, and serve any of its subnets in place, so that bursts meet deadlines.

SuperServe (Khare et al., NSDI 2025) in JAX and Flax:

    import superserve_jax as ss

    run = ss.train(config, "runs/mine")             # a SuperNet from a config
    model = ss.load("runs/mine/export")             # an export
    logits = model(images, model.subnets[-1])       # any calibrated subnet
    with ss.Server(model, slo_ms=36) as server:     # SlackFit over precompiled executables
        reply = server.submit(images[0]).result()

Most names are imported at their first use. So `import superserve_jax` itself does not load jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from superserve_jax.errors import (
    AccuracyFloorError,
    AdmissionError,
    ConfigError,
    ConversionError,
    DataError,
    DeadlineError,
    DeadlineExpiredError,
    ExportError,
    InferenceError,
    InputError,
    NotCalibratedError,
    ProfileError,
    QueueFullError,
    ServerClosedError,
    SpaceTooLargeError,
    SubnetError,
    SuperServeError,
    UnknownNameError,
    WorkersLostError,
)
from superserve_jax.profile import Profile, Row
from superserve_jax.space import Axis, SearchSpace
from superserve_jax.subnet import Subnet

if TYPE_CHECKING:
    from superserve_jax.engines.base import Engine
    from superserve_jax.exports.directory import export, load
    from superserve_jax.exports.model import Model, Served
    from superserve_jax.scheduling.policies.base import Decision, State
    from superserve_jax.serving.futures import Future, Reply
    from superserve_jax.serving.options import ServerOptions
    from superserve_jax.serving.server import Server
    from superserve_jax.supernets.family import FamilyConfig
    from superserve_jax.supernets.supernet import SuperNet
    from superserve_jax.training.config import TrainConfig
    from superserve_jax.training.loop import train
    from superserve_jax.training.runs import Run
    from superserve_jax.vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "AccuracyFloorError",
    "AdmissionError",
    "Axis",
    "ConfigError",
    "ConversionError",
    "DataError",
    "DeadlineError",
    "DeadlineExpiredError",
    "Decision",
    "Engine",
    "ExportError",
    "FamilyConfig",
    "Future",
    "InferenceError",
    "InputError",
    "Model",
    "NotCalibratedError",
    "Profile",
    "ProfileError",
    "QueueFullError",
    "Reply",
    "Row",
    "Run",
    "SearchSpace",
    "Served",
    "Server",
    "ServerClosedError",
    "ServerOptions",
    "SpaceTooLargeError",
    "State",
    "Subnet",
    "SubnetError",
    "SuperNet",
    "SuperServeError",
    "TrainConfig",
    "UnknownNameError",
    "Vocabulary",
    "WorkersLostError",
    "export",
    "load",
    "train",
]

_LAZY = {
    "engines.base": ["Engine"],
    "exports.directory": ["export", "load"],
    "exports.model": ["Model", "Served"],
    "scheduling.policies.base": ["Decision", "State"],
    "serving.futures": ["Future", "Reply"],
    "serving.options": ["ServerOptions"],
    "serving.server": ["Server"],
    "supernets.family": ["FamilyConfig"],
    "supernets.supernet": ["SuperNet"],
    "training.config": ["TrainConfig"],
    "training.loop": ["train"],
    "training.runs": ["Run"],
    "vocabulary": ["Vocabulary"],
}
_MODULES = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"superserve_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'superserve_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
