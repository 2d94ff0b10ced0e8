"""SubNetAct's actuation: one device that holds the weights once, and runs any served subnet by a look-up.

A subnet runs in the executables of its **subnet bucket**, the envelope of the subnets that share them; alone in one, it is a
static slice of the weights. What a program reads of the weights is sliced in one of two ways:

- `in_call`: by the executable, in every call. Nothing else is resident, but every call copies the slices.
- `kept`: when the subnet changes. The slices are kept under a byte budget, the least recently used go first; calls run at the
  speed of the subnet extracted on its own, and a change to a bucket whose slices are gone costs one copy of them.

While serving nothing can compile, since an engine holds compiled objects only.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from superserve_jax import errors
from superserve_jax.engines import base, executables
from superserve_jax.engines.base import Launched
from superserve_jax.engines.cache import Device, Executable
from superserve_jax.lengths import length_bucket
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import SequenceConfig
from superserve_jax.supernets.programs import Program
from superserve_jax.supernets.supernet import SuperNet

Slicing = Literal["kept", "in_call"]

_BUDGET = 0.25  # of the weights' bytes: more would take from what sharing the weights saves,
_LEAST_BUDGET_BYTES = 16 << 20  # and less would take speed and save little
_ROWS_KEPT = 32  # about as many as are in use at a time,
_LEAST_ROWS_BYTES = 4 << 20  # and more as long as they are small
_SLOW_CALL_S = 0.05  # the first call of an executable costs less than that over a usual one


class LeastRecentlyUsed:
    """Values that can be made again, kept as long as all of them fit into a byte budget.

    One that is larger than the whole budget is kept alone.

    >>> kept = LeastRecentlyUsed(10)
    >>> [kept.get(key, 6, lambda: print("makes", key) or key.upper()) for key in ("a", "a", "b", "a")]
    makes a
    makes b
    makes a
    ['A', 'A', 'B', 'A']
    >>> kept.nbytes, kept.makes
    (6, 3)
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0  # of what is kept
        self.makes = 0  # since the beginning
        self._values: collections.OrderedDict[Any, tuple[int, Any]] = collections.OrderedDict()

    def get(self, key: Any, nbytes: int, make: Callable[[], Any]) -> Any:
        """The value of `key`, which `make()` gives and which takes `nbytes`."""
        found = self._values.get(key)
        if found is not None:
            self._values.move_to_end(key)
            return found[1]
        while self._values and self.nbytes + nbytes > self.budget_bytes:  # first, or both would exist for a moment
            self.nbytes -= self._values.popitem(last=False)[1][0]
        value = make()
        self._values[key] = nbytes, value
        self.nbytes += nbytes
        self.makes += 1
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class _Bucket:
    """A subnet bucket on the device.

    Args:
      program: of its subnets.
      leaves: the SuperNet's parameters that it reads, on the device.
      cut: places in `leaves` of those that are larger than what is read of them.
      slicer: makes the slices of those; None where they are sliced in the call.
      slice_bytes: of the slices.
    """

    program: Program
    leaves: tuple[jax.Array, ...]
    cut: tuple[int, ...]
    slicer: Callable[..., tuple[jax.Array, ...]] | None
    slice_bytes: int

    def sliced(self) -> tuple[jax.Array, ...]:
        """What its executables take."""
        assert self.slicer is not None
        leaves = list(self.leaves)
        for place, value in zip(self.cut, self.slicer(tuple(leaves[i] for i in self.cut)), strict=True):
            leaves[place] = value
        return tuple(leaves)


class DeviceEngine:
    """An `engine.Engine`: one device with the weights once, the statistics and executables of the served subnets.

    Args:
      model: the SuperNet, calibrated for every subnet.
      device: where to run.
      subnet_list, batch_sizes: what can be run,
      lengths: and of a family whose inputs have a length, at each of these.
      envelopes: the subnet bucket of each subnet that shares one (see `subnet_buckets`); the others have their own.
      slicing: see above.
      slice_bytes: the byte budget of kept slices; None takes a quarter of the weights' bytes, which is about what slicing in
        the call needs for its temporaries, or 16 MiB if that is more. A bucket whose own slices exceed it is sliced in the
        call. With a budget of several buckets' slices, changes between these cost nothing either.
    """

    def __init__(
        self,
        model: SuperNet,
        device: Device,
        *,
        subnet_list: Sequence[Subnet],
        batch_sizes: Sequence[int],
        lengths: Sequence[int] = (),
        envelopes: Mapping[Subnet, Subnet] | None = None,
        slicing: Slicing = "kept",
        slice_bytes: int | None = None,
    ):
        check_slicing(slicing, slice_bytes)
        self.lengths, self.pad_id = tuple(lengths), getattr(model.config, "pad_id", 0)
        spec = executables.input_spec(model.config, 1, self.lengths[-1] if self.lengths else 0)
        self.name = f"{device.platform}:{device.id}"
        self.input_shape = tuple(spec.shape[1:])
        self.input_dtype = np.dtype(spec.dtype)
        self.device, self._model = device, model

        if slice_bytes is None:
            slice_bytes = max(int(_BUDGET * sum(v.nbytes for v in model.params.values())), _LEAST_BUDGET_BYTES)
        self.slices = LeastRecentlyUsed(slice_bytes)
        self.slicing = slicing
        program_of = bucket_programs(model.config, subnet_list, envelopes or {})
        made, slicers = executables.build(
            dict.fromkeys(program_of.values()),
            batch_sizes,
            device,
            lengths=self.lengths,
            kept=lambda p: slicing == "kept" and _fits(model.config, p.envelope, slice_bytes),
        )
        leaves = {program: [name for name, _ in e.leaves] for (program, _, _), e in made.items()}
        weights = {
            name: jax.device_put(model.params[name], device)
            for name in sorted({n for names in leaves.values() for n in names})
        }
        buckets = {
            program: _bucket(program, [weights[name] for name in names], names, slicers.get(program))
            for program, names in leaves.items()
        }
        self._calls = {
            (s, b, length): (made[program, b, length].call, buckets[program])
            for s, program in program_of.items()
            for b in batch_sizes
            for length in self.lengths or (0,)
        }
        largest_row_bytes = 8 * max(program.statistics_size for program in buckets)
        self.rows = LeastRecentlyUsed(max(_ROWS_KEPT * largest_row_bytes, _LEAST_ROWS_BYTES))
        self.subnets, self.executables = tuple(program_of), tuple(e.call for e in made.values())
        self._subnet: Subnet | None = None  # whose slices, row and sizes those are:
        self._actuated: tuple[Any, ...] = ()

        self.overlap = device.platform != "cpu"
        if self.lengths and isinstance(model.config, SequenceConfig):
            [self._padding] = model.config.pack(np.zeros((1, 0), np.int32), length=self.lengths[-1])
        # Free staging buffers: one belongs to a batch until its output is ready, since the device may read it until then.
        self._staging = {
            (b, length): [self._make_staging(b, length) for _ in range(2)]
            for b in batch_sizes
            for length in self.lengths or (0,)
        }
        self._warm_up(program_of)

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """See `engine.Engine.run`: one array of logits, float32 (num_classes,), for each input."""
        return _outputs(*self._launch(subnet, batch_size, inputs))

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `engine.Overlapping.launch`."""
        launched = self._launch(subnet, batch_size, inputs)
        return Launched(launched[0].block_until_ready, functools.partial(_outputs, *launched))

    def _launch(
        self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]
    ) -> tuple[jax.Array, int, np.ndarray, list[np.ndarray]]:
        """What `_outputs` takes."""
        length = length_bucket(self.lengths, inputs) if self.lengths else 0
        call, bucket = self._calls[subnet, batch_size, length]
        free = self._staging[batch_size, length]
        staged = free.pop() if free else self._make_staging(batch_size, length)  # those of a batch given up go with it
        try:
            if not length:
                for i, x in enumerate(inputs):
                    staged[i] = x
            else:
                for i, x in enumerate(inputs):
                    staged[i, : len(x)] = x
                    staged[i, len(x) :] = self._padding[len(x) : length]
            if subnet is not self._subnet:
                self._actuate(subnet, bucket)
            leaves, row, active = self._actuated
            computed = call(leaves, staged, row, active)
        except BaseException:
            free.append(staged)
            raise
        return computed, len(inputs), staged, free

    def _make_staging(self, batch_size: int, length: int) -> np.ndarray:
        staged = np.zeros(executables.input_spec(self._model.config, batch_size, length).shape, self.input_dtype)
        if length:
            staged[:] = self._padding[:length]
        return staged

    def _actuate(self, subnet: Subnet, bucket: _Bucket) -> None:
        """Makes the next calls run `subnet`."""
        self._subnet, self._actuated = None, ()  # or the slices that it holds could not go
        program = bucket.program

        def row() -> tuple[jax.Array, jax.Array]:
            values = program.pad_statistics(self._model.statistics_of(subnet), subnet), program.active(subnet)
            return jax.device_put(values, self.device)

        leaves = bucket.leaves
        if bucket.slicer is not None:
            leaves = self.slices.get(bucket, bucket.slice_bytes, bucket.sliced)
        self._actuated = (leaves, *self.rows.get(subnet, 8 * program.statistics_size, row))
        self._subnet = subnet

    def _warm_up(self, program_of: Mapping[Subnet, Program]) -> None:
        """Calls the executables once, since the first call is slow and no query should pay for it. Where every call is, the
        first does not matter, and larger batches are left alone: that would take minutes. What is slow of one subnet is taken
        to be so of a larger one, unless its own call shows that it is not."""

        def flops(subnet: Subnet) -> int:
            return self._model.config.flops(subnet.computed_in(program_of[subnet].envelope))

        slow: set[tuple[int, int]] = set()
        for subnet in sorted({program: s for s, program in program_of.items()}.values(), key=flops):
            for batch, length in sorted(self._staging):
                if any(batch >= b and length >= n and (batch, length) != (b, n) for b, n in slow):
                    continue
                call = subnet, batch, [self._staging[batch, length][0][0]]
                if self._time_s(*call) <= _SLOW_CALL_S:
                    slow.discard((batch, length))
                elif (batch, length) not in slow and self._time_s(*call) > _SLOW_CALL_S:
                    slow.add((batch, length))

    def _time_s(self, subnet: Subnet, batch: int, inputs: list[np.ndarray]) -> float:
        start_s = time.perf_counter()
        self.run(subnet, batch, inputs)
        return time.perf_counter() - start_s


def _outputs(computed: jax.Array, count: int, staged: np.ndarray, free: list[np.ndarray]) -> list[np.ndarray]:
    try:
        logits = np.asarray(computed)  # waits for them
    finally:
        free.append(staged)
    base.check_outputs(logits[:count], count)
    return [logits[i].copy() for i in range(count)]  # a view would pin the batch for as long as a reply lives


def bucket_programs(config: Any, subnet_list: Iterable[Subnet], envelopes: Mapping[Subnet, Subnet]) -> dict[Subnet, Program]:
    """The program that each subnet runs in: its bucket's, or where it has none, its own."""
    members: dict[Subnet, list[Subnet]] = {}
    for s in subnet_list:
        members.setdefault(envelopes.get(s, s), []).append(s)
    made = {envelope: programs.bucketed(config, of, envelope=envelope) for envelope, of in members.items()}
    return {s: made[envelope] for envelope, of in members.items() for s in of}


def _bucket(program: Program, leaves: list[jax.Array], names: Sequence[str], slicer: Executable | None) -> _Bucket:
    shapes = {} if slicer is None else dict(slicer.leaves)
    cut = tuple(i for i, name in enumerate(names) if name in shapes)
    slice_bytes = sum(leaves[i].dtype.itemsize * int(np.prod(shapes[names[i]])) for i in cut)
    return _Bucket(program, tuple(leaves), cut, slicer.call if slicer and cut else None, slice_bytes)


def _fits(config: Any, envelope: Subnet, slice_bytes: int) -> bool:
    """Whether the slices of a subnet bucket need no more than `slice_bytes`. Nothing is traced, which takes half a second of a
    start, unless it depends on what no subnet slices."""
    read_bytes = 4 * config.num_params(envelope)
    most_whole_bytes = 4 * config.num_params(config.space().smallest())
    if read_bytes <= slice_bytes or read_bytes - most_whole_bytes > slice_bytes:
        return read_bytes <= slice_bytes
    return read_bytes - _whole_bytes(config) <= slice_bytes


def _whole_bytes(config: Any) -> int:
    """Bytes of the parameters that no subnet slices, such as embeddings."""
    full = programs.param_spec(config)
    read = executables.used_leaves(programs.sliced(config, config.space().smallest()))
    return 4 * sum(math.prod(shape) for name, shape in read.items() if shape == full[name].shape)


def check_slicing(slicing: str, slice_bytes: int | None) -> None:
    """Raises UnknownNameError or ConfigError for what `DeviceEngine` cannot do."""
    if slicing not in ("kept", "in_call"):
        raise errors.unknown_name("slicing", slicing, ["kept", "in_call"])
    if slice_bytes is not None and not slice_bytes > 0:
        raise errors.ConfigError(f"slice_bytes must be a positive number of bytes, got {slice_bytes}")
