"""superserve-jax: train one weight-shared SuperNet, and serve any of its subnets in place so that every burst is met.

SuperServe (Khare et al., NSDI 2025) in JAX and Flax:

    import superserve_jax as ss

    run = ss.train(config, "runs/mine")             # a SuperNet from a config
    model = ss.load("runs/mine/export")             # an export
    logits = model(images, model.subnets[-1])       # any calibrated subnet
    with ss.Server(model, slo_ms=36) as server:     # SlackFit over precompiled executables
        reply = server.submit(images[0]).result()

What needs jax is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from superserve_jax.errors import (
    AccuracyFloorError,
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
from superserve_jax.profile import Profile
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet

if TYPE_CHECKING:
    from superserve_jax.exports import export, load
    from superserve_jax.serving.server import Server
    from superserve_jax.supernets.supernet import SuperNet
    from superserve_jax.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "AccuracyFloorError",
    "ConfigError",
    "ConversionError",
    "DataError",
    "DeadlineError",
    "DeadlineExpiredError",
    "ExportError",
    "InferenceError",
    "InputError",
    "NotCalibratedError",
    "Profile",
    "ProfileError",
    "QueueFullError",
    "SearchSpace",
    "Server",
    "ServerClosedError",
    "SpaceTooLargeError",
    "Subnet",
    "SubnetError",
    "SuperNet",
    "SuperServeError",
    "UnknownNameError",
    "WorkersLostError",
    "export",
    "load",
    "train",
]

_LAZY = {
    "export": "superserve_jax.exports.directory",
    "load": "superserve_jax.exports.directory",
    "Server": "superserve_jax.serving.server",
    "SuperNet": "superserve_jax.supernets.supernet",
    "train": "superserve_jax.training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'superserve_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
