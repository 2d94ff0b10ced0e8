"""SubNetAct's actuation: a device holds the weights of a SuperNet once, and runs any served subnet without loading it.

One file because staging, actuation and the start of a batch share the state of an engine.

The subnets of a **subnet bucket** share executables, which have the size of their envelope. A subnet alone in its subnet
bucket uses a static slice of the weights. There are two ways to slice the weights:

- `in_call`: the executable slices the weights in every call. Nothing else takes memory, but every call copies the slices.
- `kept`: the weights are sliced when the subnet changes, and the slices are kept. Calls then run at the speed of the extracted
  subnet. The slices have a byte budget, and the least recently used are dropped first. A change to a subnet whose slices were
  dropped costs one copy.

On a CPU, an engine may compute a batch in **parts**, which run on several lanes at the same time (see `cpu_clients`). That is
faster than one call with all cores for most networks: a lane does not wait for other cores after every operation, and the
activations of a part fit into its caches.

An engine holds compiled objects only. So nothing can compile while serving.
"""

import collections
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from superserve_jax import dtypes, errors
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines import base, cpu_clients, executables, profiling
from superserve_jax.engines.base import Launched
from superserve_jax.engines.budget import LeastRecentlyUsed
from superserve_jax.engines.cache import Executable
from superserve_jax.engines.cpu_clients import Share
from superserve_jax.engines.executables import Form, Key
from superserve_jax.engines.keys import Device
from superserve_jax.engines.weights import SubnetBucket
from superserve_jax.lengths import length_bucket
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import compiler, programs
from superserve_jax.supernets.family import SequenceConfig
from superserve_jax.supernets.programs import Program
from superserve_jax.supernets.supernet import SuperNet

_log = logging.getLogger(__name__)

Slicing = Literal["kept", "in_call"]

# On a CPU, kept slices may take a quarter of the weights' bytes. With more, sharing the weights would save little memory. The
# budget is at least 16 MiB, because a smaller one would cost speed and save little for small networks. On a GPU, they may take
# a quarter of the memory that jax may allocate.
SLICES_SHARE = 0.25
_MIN_SLICES_BYTES = 16 << 20
# On a CPU, statistics of 32 subnets are kept, about as many as are in use at a time, or of more subnets if all fit into 4 MiB.
# On a GPU, the statistics of all subnets are kept.
_STATISTICS_KEPT = 32
_MIN_STATISTICS_BYTES = 4 << 20
_SLOW_CALL_S = 0.05  # longer than the extra time of an executable's first call


class DeviceEngine:
    """An `engines.base.Engine` with a SuperNet on one device: the weights once, and executables for the served subnets.

    Args:
      model: the SuperNet, calibrated for every served subnet.
      device: the device to run on, or a share of the cores of a CPU. A CPU device means all cores.
      subnet_list: the subnets to prepare.
      batch_sizes: the batch sizes to prepare.
      lengths: the length buckets to prepare; `()` if all inputs have one shape.
      envelopes: the envelope of each subnet that shares a subnet bucket (see `subnet_buckets`). Other subnets have their own.
      slicing: the way to slice the weights, "kept" or "in_call" (see the module).
      slice_bytes: the byte budget of kept slices. None takes a quarter of jax's memory on a GPU. On a CPU it takes a quarter
        of the weights' bytes, but at least 16 MiB; in-call slicing needs about as much for its temporaries. A subnet
        bucket whose slices exceed the budget is sliced in the call.
      prepared: whether kept slices have the statistics of their subnet and the layouts that XLA chooses (see `executables`).
        None prepares them on GPUs. A CPU gains nothing.
      compute_dtype: "float32" or "bfloat16" (see `dtypes`). With bfloat16, the engine's matrices take half the memory.
      parts: on a CPU, the inputs of a part, by batch size. Other batch sizes run in one call.
      shares: another engine of the model on a CPU, with at least these subnets and the same options. This engine reads its
        weights and slices.

    Attributes:
      command_buffers: whether calls on a GPU are recorded as command buffers.
    """

    def __init__(
        self,
        model: SuperNet,
        device: Device | Share,
        *,
        subnet_list: Sequence[Subnet],
        batch_sizes: Sequence[int],
        lengths: Sequence[int] = (),
        envelopes: Mapping[Subnet, Subnet] | None = None,
        slicing: Slicing = "kept",
        slice_bytes: int | None = None,
        prepared: bool | None = None,
        compute_dtype: ComputeDtype = "float32",
        parts: Mapping[int, int] | None = None,
        shares: "DeviceEngine | None" = None,
    ):
        check_slicing(slicing, slice_bytes)
        dtypes.check(compute_dtype)
        config = model.config
        self.lengths, self.pad_id = tuple(lengths), config.pad_id if isinstance(config, SequenceConfig) else 0
        spec = executables.input_spec(config, 1, self.lengths[-1] if self.lengths else 0)
        share = device if isinstance(device, Share) else None
        on: Device = share.device if share else device
        self.place, self.name = device, f"cpu:{share.index}" if share else f"{on.platform}:{on.id}"
        self.input_shape = tuple(spec.shape[1:])
        self.input_dtype = np.dtype(spec.dtype)
        self.class_names: tuple[str, ...] = getattr(model, "class_names", ())
        self.device, self.model, self.batch_sizes, self.envelopes = on, model, tuple(batch_sizes), envelopes or {}

        if shares is not None:
            slice_bytes = shares.slices.budget_bytes
        elif slice_bytes is None:
            slice_bytes = default_slice_bytes(model, on)
        self.slices = LeastRecentlyUsed(slice_bytes) if shares is None else shares.slices
        self._owns_weights, self.buckets = shares is None, {} if shares is None else shares.buckets
        self.parts = {size: part for size, part in (parts or {}).items() if size in batch_sizes}
        self.lanes: tuple[Device, ...] = (share or Share()).lanes if self.parts else ()
        self.slicing: Slicing = slicing
        self.compute_dtype: ComputeDtype = compute_dtype
        self._program_of = executables.bucket_programs(config, subnet_list, self.envelopes)
        self.subnets, users = tuple(self._program_of), collections.Counter(self._program_of.values())
        prepares, itemsize = on.platform == "gpu" if prepared is None else prepared, np.dtype(compute_dtype).itemsize

        def form(program: Program) -> Form:
            kept = slicing == "kept" and executables.fit(config, program.envelope, slice_bytes, itemsize=itemsize)
            # Prepared slices are copies of all weights, also of those that no subnet slices.
            is_prepared = prepares and kept and itemsize * config.num_params(program.envelope) <= slice_bytes
            is_folded = is_prepared and users[program] == 1 and bool(program.folds)
            return Form(kept, laid_out=is_prepared, folded=is_folded, dtype=compute_dtype)

        self._forms = {program: form(program) for program in users}
        largest = 8 * max(program.statistics_size for program in users)
        most = _STATISTICS_KEPT if on.platform == "cpu" else max(_STATISTICS_KEPT, len(self.subnets))
        places = 1 + len(self.lanes)
        self.statistics = LeastRecentlyUsed(places * max(most * largest, _MIN_STATISTICS_BYTES))
        # The subnet that runs next; and its weights, statistics and traced sizes on the device and on each lane.
        self._subnet: Subnet | None = None
        self._actuated: list[tuple[Any, ...]] = []

        self.overlap = on.platform != "cpu"
        if self.lengths and isinstance(config, SequenceConfig):
            [self._padding] = config.pack(np.zeros((1, 0), np.int32), length=self.lengths[-1])
        # Free staging buffers. A buffer is free when the output of its batch is ready; the device may read it until then.
        self._shapes = [(b, length) for b in batch_sizes for length in self.lengths or (0,)]
        self.staging = {shape: [self._make_staging(*shape) for _ in range(2)] for shape in self._shapes}
        self._build()

    def _build(self) -> None:
        """Makes the executables, and calls each of them once.

        If a call fails, it makes them all again: first without those of the cache, then on a GPU without command buffers. A
        stored executable may need an algorithm that the installed libraries do not have. XLA may be unable to record a kernel.
        """
        how: dict[str, bool] = {}
        with_, without = (compiler.options(self.device.platform, command_buffers=b) for b in (True, False))
        self.command_buffers = with_ != without
        while True:
            made = self._executables(**how)
            try:
                self._connect(*made)
                return self.warm_up()
            except Exception as e:  # the runtime can fail in any way
                is_recording = self.command_buffers and "graph" in str(e)  # XLA also reports this as RESOURCE_EXHAUSTED
                if isinstance(e, errors.SuperServeError) or (base.is_out_of_memory(e, str(e)) and not is_recording):
                    raise
                loaded = any(executable.is_from_cache for group in made for executable in group.values())
                if loaded and how.get("use_cache", True):
                    how["use_cache"], remedy = False, "compiling all of them again"
                elif self.command_buffers:
                    self.command_buffers, how = False, {"command_buffers": False}
                    remedy = (
                        "going on without command buffers; XLA_FLAGS=--xla_gpu_enable_command_buffer= does so from the start"
                    )
                else:
                    raise
                _log.warning("an executable of %s failed (%s: %s); %s", self.name, type(e).__name__, e, remedy)
            del made  # before the next ones take memory
            self.calls, self.executables, self._subnet, self._actuated = {}, (), None, []
            if self._owns_weights:
                self.buckets = {}
                self.slices.clear()

    def _executables(self, **how: bool) -> tuple[dict[Key, Executable], dict[Key, Executable], dict[Program, Executable]]:
        """Loads or compiles the executables of whole batches, those of parts (for the first lane), and the slicers.

        `how` are arguments of `executables.build`.
        """
        forms: dict[str, Any] = {"form": self._forms.__getitem__, "use_cache": how.get("use_cache", True)}
        shapes: dict[str, Any] = {**forms, "lengths": self.lengths, **how}
        sizes = [size for size in self.batch_sizes if size not in self.parts]
        whole = executables.build(self._forms, sizes, self.device, **shapes)
        parts = {}
        if self.parts:
            sizes = sorted({*self.parts.values()})
            parts = executables.build(self._forms, sizes, self.lanes[0], others=self.lanes[1:], **shapes)
        if not self._owns_weights:
            return whole, parts, {}
        one_of_each = {program: executable for (program, _, _), executable in (whole | parts).items()}
        return whole, parts, executables.build_slicers(one_of_each, self.device, **forms)

    def _connect(
        self, whole: Mapping[Key, Executable], parts: Mapping[Key, Executable], slicers: Mapping[Program, Executable]
    ) -> None:
        """Puts the weights on the device, and connects them with the executables that read them."""
        if self._owns_weights:
            self.buckets = self._make_buckets({**whole, **parts}, slicers)

        def calls(program: Program, size: int, length: int) -> tuple[Callable[..., jax.Array], ...]:
            made = parts[program, self.parts[size], length] if size in self.parts else whole[program, size, length]
            return made.call, *made.others

        self.calls = {
            (s, *shape): (calls(program, *shape), self.buckets[program])
            for s, program in self._program_of.items()
            for shape in self._shapes
        }
        self.executables = tuple(call for e in (*whole.values(), *parts.values()) for call in (e.call, *e.others))
        self._subnet, self._actuated = None, []

    def _make_buckets(
        self, made: Mapping[Key, Executable], slicers: Mapping[Program, Executable]
    ) -> dict[Program, SubnetBucket]:
        """Puts the weights that the executables and slicers read on the device, and groups them by program."""
        leaves = {program: [name for name, _ in e.leaves] for (program, _, _), e in made.items()}
        read = set().union(*leaves.values(), *(slicer.takes for slicer in slicers.values()))
        stored = programs.cast({name: self.model.params[name] for name in sorted(read)}, self.compute_dtype)
        put = cpu_clients.on_device if isinstance(self.place, Share) else jax.device_put  # the first one never copies
        weights = dict(zip(stored, put([*stored.values()], self.device), strict=True))

        def bucket(program: Program, names: Sequence[str]) -> SubnetBucket:
            params, slicer = {name: weights[name] for name in names}, slicers.get(program)
            if slicer is None:
                return SubnetBucket(program, params)
            sources = tuple(weights[name] for name in slicer.takes)
            return SubnetBucket(program, params, slicer, sources, is_folded=self._forms[program].folded)

        return {program: bucket(program, names) for program, names in leaves.items()}

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """See `Engine.run`. Each output is an array of logits, float32 (num_classes,)."""
        return _outputs(*self._launch(subnet, batch_size, inputs))

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `Overlapping.launch`."""
        launched = self._launch(subnet, batch_size, inputs)
        for computed in launched[0]:
            computed.copy_to_host_async()  # starts the copy now; otherwise it starts only after the wait
        return Launched(functools.partial(jax.block_until_ready, launched[0]), functools.partial(_outputs, *launched))

    def _launch(
        self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]
    ) -> tuple[list[jax.Array], int, np.ndarray, list[np.ndarray]]:
        """Starts a batch. Returns the arguments of `_outputs`."""
        length = length_bucket(self.lengths, inputs) if self.lengths else 0
        calls, bucket = self.calls[subnet, batch_size, length]
        free = self.staging[batch_size, length]
        staged = free.pop() if free else self._make_staging(batch_size, length)  # an abandoned batch keeps its buffer
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
        except BaseException:
            free.append(staged)
            raise
        # If a call fails, the buffer is dropped, since other lanes may read it.
        if batch_size in self.parts:
            return self._start_parts(calls, self.parts[batch_size], staged, len(inputs)), len(inputs), staged, free
        leaves, statistics, active = self._actuated[0]
        return [calls[0](leaves, staged, statistics, active)], len(inputs), staged, free

    def _start_parts(
        self, calls: Sequence[Callable[..., jax.Array]], part: int, staged: np.ndarray, count: int
    ) -> list[jax.Array]:
        """Starts the parts that contain one of the first `count` inputs. Returns their outputs in order.

        The lanes take turns. The first lane computes in this thread, so its parts begin when all others have been started.
        """
        starts, lanes = range(0, count, part), len(calls)
        computed: dict[int, jax.Array] = {}
        for i in sorted(range(len(starts)), key=lambda i: i % lanes == 0):
            leaves, statistics, active = self._actuated[1 + i % lanes]
            computed[i] = calls[i % lanes](leaves, staged[starts[i] : starts[i] + part], statistics, active)
        return [computed[i] for i in range(len(starts))]

    def _make_staging(self, batch_size: int, length: int) -> np.ndarray:
        part = self.parts.get(batch_size, batch_size)
        rows = -(-batch_size // part) * part  # the last part is as large as the others
        staged = np.zeros(executables.input_spec(self.model.config, rows, length).shape, self.input_dtype)
        if length:
            staged[:] = self._padding[:length]
        return staged

    def _actuate(self, subnet: Subnet, bucket: SubnetBucket) -> None:
        """Makes the next calls run `subnet`."""
        self._subnet, self._actuated = None, []  # drops the reference, so that old slices can be freed
        program, places = bucket.program, (self.device, *self.lanes)

        def statistics() -> list[tuple[jax.Array, jax.Array]]:
            values = program.pad_statistics(self.model.statistics_of(subnet), subnet), program.active(subnet)
            return [jax.device_put(values, device) for device in places]

        leaves, rest = bucket.whole, self.statistics.get(subnet, 8 * len(places) * program.statistics_size, statistics)
        if bucket.slicer is not None:
            leaves = self.slices.get(bucket, bucket.slice_bytes, lambda: bucket.sliced(rest[0][0]))
        self._actuated = [(leaves.on(device), *values) for device, values in zip(places, rest, strict=True)]
        self._subnet = subnet

    def warm_up(self) -> None:
        """Calls each executable, since the first call is slow and no query should wait for it. No batch may run then.

        Batch sizes with parts of one size share executables, so one of these batch sizes is enough.

        If one call already takes long, the warm-up skips larger batches and lengths. A slow first call no longer matters
        there, and the warm-up would take minutes. A shape that is slow with one subnet counts as slow with larger subnets,
        unless their own call shows otherwise.
        """

        def flops(subnet: Subnet) -> int:
            return self.model.config.flops(subnet.computed_in(self._program_of[subnet].envelope))

        slow: set[tuple[int, int]] = set()
        for subnet in sorted({program: s for s, program in self._program_of.items()}.values(), key=flops):
            for batch, length in itertools.product(self._sizes_that_call_all(), self.lengths or (0,)):
                if any(batch >= b and length >= n and (batch, length) != (b, n) for b, n in slow):
                    continue
                call = self, subnet, batch, [self.staging[batch, length][0][0]] * batch
                if profiling.time_s(*call) <= _SLOW_CALL_S:
                    slow.discard((batch, length))
                elif (batch, length) not in slow and profiling.time_s(*call) > _SLOW_CALL_S:
                    slow.add((batch, length))

    def _sizes_that_call_all(self) -> list[int]:
        """The smallest batch sizes that call each executable on each lane."""
        chosen: dict[tuple[bool, int], tuple[int, int]] = {}
        for size in self.batch_sizes:
            part = self.parts.get(size, size)
            executable, used_lanes = (size in self.parts, part), min(len(self.lanes), -(-size // part))
            chosen[executable] = max(chosen.get(executable, (-1, 0)), (used_lanes, -size))
        return sorted(-size for _, size in chosen.values())


def default_slice_bytes(model: SuperNet, device: Device) -> int:
    """The byte budget of kept slices: a share of the card's memory, or of the weights on a CPU."""
    memory = device.memory_stats() if device.platform != "cpu" else None
    if memory is not None and "bytes_limit" in memory:
        return int(SLICES_SHARE * memory["bytes_limit"])
    return max(int(SLICES_SHARE * sum(v.nbytes for v in model.params.values())), _MIN_SLICES_BYTES)


def _outputs(computed: Sequence[jax.Array], count: int, staged: np.ndarray, free: list[np.ndarray]) -> list[np.ndarray]:
    """Waits for the parts of a batch, frees its staging buffer, and returns the outputs of its `count` inputs."""
    parts = [np.asarray(part) for part in computed]  # waits until the device has computed them
    free.append(staged)  # after an error it is dropped, since other parts may still read it
    logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
    base.check_outputs(logits[:count], count)
    return [logits[i].copy() for i in range(count)]  # a view in one reply would keep the whole batch in memory


def check_slicing(slicing: str, slice_bytes: int | None) -> None:
    """Raises UnknownNameError or ConfigError for values of `slicing` and `slice_bytes` that are not allowed."""
    errors.check_name("slicing", slicing, ["kept", "in_call"])
    if slice_bytes is not None and not slice_bytes > 0:
        raise errors.ConfigError(f"slice_bytes must be a positive number of bytes, got {slice_bytes}")
