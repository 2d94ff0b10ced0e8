"""The executables of one device, compiled ahead of time, in parallel and with a cache; and the weights that they read.

An executable contains no weights. It takes the weights that its program reads as a flat tuple of arguments. There are two
kinds of these arguments:

- Kept slices have the sizes of the program's envelope. A slicer, another executable, makes them ahead of the calls.
- The SuperNet's own parameters are larger. The program slices them in every call.
"""

import collections
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from superserve_jax.engines import threads
from superserve_jax.engines.cache import Executable, ExecutableCache, Leaves, Traced
from superserve_jax.engines.keys import Device
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig, SequenceConfig
from superserve_jax.supernets.programs import Program

Key = tuple[Program, int, int]
"""Program, batch size and length. The length is 0 if all inputs have one shape."""


def build(
    program_list: Iterable[Program],
    batch_sizes: Iterable[int],
    device: Device,
    *,
    lengths: Sequence[int] = (),
    kept: Callable[[Program], bool] = lambda program: False,
) -> tuple[dict[Key, Executable], dict[Program, Executable]]:
    """Loads or compiles executables in parallel, with a progress bar.

    Args:
      program_list: the programs, all with one config.
      batch_sizes: the batch sizes of every program.
      device: the device that runs them.
      lengths: the length buckets of every program; `()` if all inputs have one shape.
      kept: a function that tells whether a program takes kept slices.

    Returns:
      The executables by program, batch size and length, and the slicers of the programs with kept slices.
    """
    program_list = list(program_list)
    store = ExecutableCache(program_list[0].config, device)

    def program_executable(program: Program, batch: int, length: int) -> Executable:
        about = {**_about(program), "batch": batch, "length": length, "kept": kept(program)}
        about["options"] = programs.compiler_options(device.platform)
        return store.get(about, lambda: trace_program(program, batch, device, length=length, kept=kept(program)))

    def slicer(program: Program) -> Executable:
        about = {**_about(program), "slicer": True}
        return store.get(about, lambda: trace_slicer(program, leaves[program], device))

    full, workers = programs.param_spec(program_list[0].config), os.cpu_count() or 1
    keys = list(itertools.product(program_list, batch_sizes, lengths or (0,)))
    description = f"executables for {device.platform}:{device.id}"
    executables = threads.each(lambda key: program_executable(*key), keys, workers=workers, description=description)
    made = dict(zip(keys, executables, strict=True))
    leaves = {
        program: e.leaves for (program, _, _), e in made.items() if any(shape != full[name].shape for name, shape in e.leaves)
    }
    slicers = dict(zip(leaves, threads.each(slicer, leaves, workers=workers), strict=True))
    store.shrink()
    return made, slicers


def trace_program(program: Program, batch: int, device: Device, *, length: int = 0, kept: bool = False) -> Traced:
    """Traces a program. `length` is 0 if all inputs have one shape. `kept`: it takes kept slices."""
    full = programs.param_spec(program.config)
    leaves = tuple((name, shape if kept else full[name].shape) for name, shape in programs.used_leaves(program).items())
    names = tuple(name for name, _ in leaves)

    def infer(values: tuple[jax.Array, ...], inputs: jax.Array, statistics: jax.Array, active: jax.Array) -> jax.Array:
        return program.infer(dict(zip(names, values, strict=True)), inputs, statistics, active)

    values = tuple(jax.ShapeDtypeStruct(shape, full[name].dtype) for name, shape in leaves)
    inputs = input_spec(program.config, batch, length)
    statistics = jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    active = jax.ShapeDtypeStruct((len(program.traced),), jnp.int32)
    traced = jax.jit(infer, in_shardings=SingleDeviceSharding(device)).trace(values, inputs, statistics, active)
    return Traced(traced, leaves, programs.compiler_options(device.platform))


def trace_slicer(program: Program, leaves: Leaves, device: Device) -> Traced:
    """Traces the function that makes a program's slices. Its arguments are the parameters that are larger than `leaves`."""
    full = programs.param_spec(program.config)
    cut = tuple((name, shape) for name, shape in leaves if shape != full[name].shape)

    def slices(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.slice(v, (0,) * v.ndim, shape) for v, (_, shape) in zip(values, cut, strict=True))

    traced = jax.jit(slices, in_shardings=SingleDeviceSharding(device)).trace(tuple(full[name] for name, _ in cut))
    return Traced(traced, cut)


def _about(program: Program) -> dict[str, Any]:
    return {"envelope": program.envelope.to_json(), "traced": list(program.traced)}


def input_spec(config: FamilyConfig, batch: int, length: int = 0) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a batch; `length` is 0 if all inputs have one shape."""
    if length and isinstance(config, SequenceConfig):
        return config.input_spec(batch, length=length)
    return config.input_spec(batch)


class LeastRecentlyUsed:
    """Keeps values within a byte budget, and drops the least recently used first. `get` makes a dropped value again.

    A value that is larger than the whole budget is kept alone. We do not use `cachetools.LRUCache`, because it makes a value
    before it drops others, so that all of them take memory for a moment.

    >>> kept = LeastRecentlyUsed(15)
    >>> [kept.get(key, 6, lambda: print("makes", key) or key.upper()) for key in ("a", "b", "a", "c", "a")]
    makes a
    makes b
    makes c
    ['A', 'B', 'A', 'C', 'A']
    >>> kept.nbytes, kept.makes
    (12, 3)

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
    full, read = programs.param_spec(config), programs.used_leaves(programs.sliced(config, smallest))
    whole_bytes = 4 * sum(math.prod(shape) for name, shape in read.items() if shape == full[name].shape)
    return read_bytes - whole_bytes <= slice_bytes
