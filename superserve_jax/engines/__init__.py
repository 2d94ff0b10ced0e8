"""Engines. An engine is one device that holds a SuperNet and runs any of its served subnets.

Start with `base.py`, the protocol that the server relies on. `device.py` implements it with jax, and `fake.py` without a
model. `prepare.py` makes the engines and latency profiles for an export. It uses `executables.py` and `cache.py` to compile,
`subnet_buckets.py` to choose the subnets that share an executable, and `profiling.py` to measure latencies.
Importing the package does not import jax. The first use of `DeviceEngine` does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from superserve_jax.engines.base import Engine, Launched, Overlapping, Wrapper, check_outputs
from superserve_jax.engines.fake import FakeDevice, FakeEngine

if TYPE_CHECKING:
    from superserve_jax.engines.device import DeviceEngine

__all__ = [
    "DeviceEngine",
    "Engine",
    "FakeDevice",
    "FakeEngine",
    "Launched",
    "Overlapping",
    "Wrapper",
    "check_outputs",
]


def __getattr__(name: str) -> Any:
    if name == "DeviceEngine":
        return importlib.import_module(f"{__name__}.device").DeviceEngine
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
