"""The weights that a subnet bucket reads on a device: the SuperNet's own, or slices kept within a byte budget."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from superserve_jax.engines.cache import Executable
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs, reads
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.programs import Program


class LeastRecentlyUsed:
    """Keeps values within a byte budget, and drops the least recently used first. `get` makes a dropped value again.

    A value that is larger than the whole budget is kept alone. We do not use `cachetools.LRUCache`, because it makes a value
    before it drops others, so that all of them take memory for a moment.

    >>> kept = LeastRecentlyUsed(10)
    >>> [kept.get(key, 6, lambda: print("makes", key) or key.upper()) for key in ("a", "a", "b", "a")]
    makes a
    makes b
    makes a
    ['A', 'A', 'B', 'A']
    >>> kept.nbytes, kept.makes
    (6, 3)

    Attributes:
      budget_bytes: the byte budget.
      nbytes: the bytes of all values that are kept now.
      makes: the number of values that have been made so far.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.makes = 0
        self._values: collections.OrderedDict[Any, tuple[int, Any]] = collections.OrderedDict()

    def get(self, key: Any, nbytes: int, make: Callable[[], Any]) -> Any:
        """The value of `key`. If the value is not kept, `make()` makes it; `nbytes` is its size."""
        found = self._values.get(key)
        if found is not None:
            self._values.move_to_end(key)
            return found[1]
        while self._values and self.nbytes + nbytes > self.budget_bytes:
            self.nbytes -= self._values.popitem(last=False)[1][0]
        value = make()
        self._values[key] = nbytes, value
        self.nbytes += nbytes
        self.makes += 1
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class SubnetBucket:
    """A subnet bucket on a device.

    Args:
      program: the program of its subnets.
      weights: the SuperNet's parameters that the program reads, in the order of the executables' arguments.
      slicer: makes the slices of parameters that the program reads only in part. None if the program slices them itself.
    """

    program: Program
    weights: Mapping[str, jax.Array]
    slicer: Executable | None

    @functools.cached_property
    def whole(self) -> tuple[jax.Array, ...]:
        """The first argument of the executables, if the program slices the parameters."""
        return tuple(self.weights.values())

    @functools.cached_property
    def slice_bytes(self) -> int:
        """Bytes of the slices."""
        cut = self.slicer.leaves if self.slicer is not None else ()
        return sum(self.weights[name].dtype.itemsize * math.prod(shape) for name, shape in cut)

    def sliced(self) -> tuple[jax.Array, ...]:
        """The first argument of the executables, if the slicer slices the parameters."""
        assert self.slicer is not None
        names = [name for name, _ in self.slicer.leaves]
        slices = self.slicer.call(tuple(self.weights[name] for name in names))
        return tuple({**self.weights, **dict(zip(names, slices, strict=True))}.values())


def bucket_programs(
    config: FamilyConfig, subnet_list: Iterable[Subnet], envelopes: Mapping[Subnet, Subnet]
) -> dict[Subnet, Program]:
    """The program that runs each subnet: its subnet bucket's program, or its own if it shares no subnet bucket."""
    members: dict[Subnet, list[Subnet]] = {}
    for s in subnet_list:
        members.setdefault(envelopes.get(s, s), []).append(s)
    made = {envelope: programs.bucketed(config, group, envelope=envelope) for envelope, group in members.items()}
    return {s: made[envelope] for envelope, group in members.items() for s in group}


def fit(config: FamilyConfig, envelope: Subnet, slice_bytes: int) -> bool:
    """Whether the slices of a subnet bucket fit into `slice_bytes`.

    Parameters that no subnet slices, such as embeddings, do not count. Finding them requires tracing a program, for half a
    second. Two bounds often avoid this: the bytes of these parameters are between 0 and the bytes of the smallest subnet.
    """
    read_bytes = 4 * config.num_params(envelope)
    if read_bytes <= slice_bytes:
        return True
    smallest = config.space().smallest()
    if read_bytes - 4 * config.num_params(smallest) > slice_bytes:
        return False
    full, read = programs.param_spec(config), reads.used_leaves(programs.sliced(config, smallest))
    whole_bytes = 4 * sum(math.prod(shape) for name, shape in read.items() if shape == full[name].shape)
    return read_bytes - whole_bytes <= slice_bytes
