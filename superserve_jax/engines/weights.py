"""The weights that the executables of a subnet bucket read, on one device or on several CPU devices."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax

from superserve_jax.engines import cpu_clients
from superserve_jax.engines.cache import Executable
from superserve_jax.engines.keys import Device
from superserve_jax.supernets.programs import Program


class Placed:
    """Arrays on one device, and the same memory as arrays of other CPU devices.

    Args:
      arrays: the arrays.
    """

    def __init__(self, arrays: Sequence[jax.Array]):
        self.arrays = tuple(arrays)
        self._on: dict[Device, tuple[jax.Array, ...]] = {}

    def on(self, device: Device) -> tuple[jax.Array, ...]:
        """The arrays on a device: their own one, or a CPU device if they are on a CPU."""
        if not self.arrays or self.arrays[0].device == device:
            return self.arrays
        if device not in self._on:
            self._on[device] = cpu_clients.on_device(self.arrays, device)
        return self._on[device]


@dataclasses.dataclass(frozen=True, eq=False)
class SubnetBucket:
    """A subnet bucket on a device.

    Args:
      program: the program of its subnets.
      weights: the SuperNet's parameters that the program reads, in the order of the executables' arguments.
      slicer: makes the slices. None if the executables take the SuperNet's parameters.
      sources: the SuperNet's parameters that the slicer reads, in the order of its arguments.
      is_folded: whether the slicer takes statistics, too.
    """

    program: Program
    weights: Mapping[str, jax.Array]
    slicer: Executable | None = None
    sources: tuple[jax.Array, ...] = ()
    is_folded: bool = False

    @functools.cached_property
    def whole(self) -> Placed:
        """The first argument of the executables, if there is no slicer."""
        return Placed(tuple(self.weights.values()))

    @functools.cached_property
    def slice_bytes(self) -> int:
        """Bytes of the slices."""
        cut = self.slicer.leaves if self.slicer is not None else ()
        return sum(self.weights[name].dtype.itemsize * math.prod(shape) for name, shape in cut)

    def sliced(self, statistics: jax.Array) -> Placed:
        """The first argument of the executables, if there is a slicer. `statistics` (2, N) are folded into it or ignored."""
        assert self.slicer is not None
        slices = self.slicer.call(self.sources, statistics) if self.is_folded else self.slicer.call(self.sources)
        names = (name for name, _ in self.slicer.leaves)
        return Placed(tuple({**self.weights, **dict(zip(names, slices, strict=True))}.values()))
