"""The public names of superserve_jax.engines, for type checkers and for `__init__.py`."""

from .base import (
    Engine as Engine,
    Launched as Launched,
    Overlapping as Overlapping,
    Wrapper as Wrapper,
    check_outputs as check_outputs,
)
from .device import DeviceEngine as DeviceEngine
from .fake import FakeDevice as FakeDevice, FakeEngine as FakeEngine
