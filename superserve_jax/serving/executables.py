"""SubNetAct's actuation: a table from (subnet, batch size) to a compiled XLA executable, on one device, over one copy of the
weights. Changing the subnet is a look-up. Of a family whose inputs have a length, the table has that as a third axis.

Executables are made ahead, in parallel, and kept in a private cache of this user; while serving nothing can compile, since an
engine holds compiled objects only. Each takes a flat tuple of just the weights that its subnet uses, as arguments, so that no
weight is copied into an executable.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import checkpoint, errors, progress
from superserve_jax import profile as profiles
from superserve_jax import subnet as subnets
from superserve_jax.serving import cache, measuring, padding
from superserve_jax.supernets import programs, supernet

Device = Any  # a jax.Device, which is a variable to type checkers

_log = logging.getLogger(__name__)

_MIN_ACCURACY_GAP, _MIN_LATENCY_RATIO = 0.003, 1.1  # nearer neighbours than this are not worth an executable


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled program of one subnet at one batch size and, where inputs have a length, one length.

    Args:
      call: compiled, `call(leaves, inputs, row) -> logits`.
      leaves: names of the parameters that it takes, in order.
    """

    call: Callable[..., jax.Array]
    leaves: tuple[str, ...]


class DeviceEngine:
    """An `engine.Engine`: one device with the weights once, the statistics and executables of the served subnets.

    Args:
      model: the SuperNet, calibrated for every subnet.
      device: where to run.
      subnet_list, batch_sizes: an executable is made for every pair,
      lengths: and of a family whose inputs have a length, for each of these.
    """

    def __init__(
        self,
        model: supernet.SuperNet,
        device: Device,
        *,
        subnet_list: Sequence[subnets.Subnet],
        batch_sizes: Sequence[int],
        lengths: Sequence[int] = (),
    ):
        self.lengths, self.pad_id = tuple(lengths), getattr(model.config, "pad_id", 0)
        spec = _input_spec(model.config, 1, self.lengths[-1] if self.lengths else 0)
        self.name = f"{device.platform}:{device.id}"
        self.input_shape = tuple(spec.shape[1:])
        self.input_dtype = np.dtype(spec.dtype)
        rows = {s: jax.device_put(model.row(s), device) for s in subnet_list}
        made = build(model.config, subnet_list, batch_sizes, device, lengths=self.lengths)
        used = {name for e in made.values() for name in e.leaves}
        weights = {name: jax.device_put(model.params[name], device) for name in sorted(used)}
        self._table = {key: (e.call, tuple(weights[name] for name in e.leaves), rows[key[0]]) for key, e in made.items()}
        # One staging buffer per shape is enough: `run` returns only when the output is ready.
        self._staging = {
            (b, length): np.zeros(_input_spec(model.config, b, length).shape, self.input_dtype)
            for b in batch_sizes
            for length in self.lengths or (0,)
        }
        if self.lengths:
            [self._padding] = model.config.pack(np.zeros((1, 0), np.int32), length=self.lengths[-1])
            for staged in self._staging.values():
                staged[:] = self._padding[: len(staged[0])]
        for subnet, batch, length in self._table:  # the first call of an executable is slow; no query should pay for it
            self.run(subnet, batch, [self._staging[batch, length][0]])

    def run(self, subnet: subnets.Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """See `engine.Engine.run`: one array of logits, float32 (num_classes,), for each input."""
        length = padding.of_inputs(self.lengths, inputs) if self.lengths else 0
        call, leaves, row = self._table[subnet, batch_size, length]
        staged = self._staging[batch_size, length]
        if not length:
            for i, x in enumerate(inputs):
                staged[i] = x
        else:
            for i, x in enumerate(inputs):
                staged[i, : len(x)] = x
                staged[i, len(x) :] = self._padding[len(x) : length]
        logits = np.asarray(call(leaves, staged, row))
        return [logits[i].copy() for i in range(len(inputs))]  # a view would pin the batch for as long as a reply lives


def prepare(
    path_or_model: Any,
    *,
    batch_sizes: Sequence[int],
    lengths: Sequence[int] | None = None,
    devices: Sequence[Device] | None = None,
) -> tuple[supernet.SuperNet, list[DeviceEngine], profiles.Profile]:
    """What a server needs: the model, one engine per device, and the latency profile of this kind of device.

    The profile is read from beside the export; where it has none for this device and these shapes, one is measured.

    Args:
      lengths: None takes `padding.default_lengths`, where inputs have a length.

    Raises:
      ExportError, ConfigError, NotCalibratedError. ProfileError: the profile beside the export is malformed.
    """
    batch_sizes = profiles.check_batch_sizes(batch_sizes)
    model = path_or_model if isinstance(path_or_model, supernet.SuperNet) else checkpoint.load(path_or_model)
    if not isinstance(model, checkpoint.Model):
        raise errors.ConfigError(
            "a server takes an export's directory or what superserve_jax.load returned; export the "
            "SuperNet first, since only an export knows the accuracies of its subnets"
        )
    devices = list(devices if devices is not None else jax.devices())
    if not devices:
        raise errors.ConfigError("devices is empty; give at least one jax device, or None for all")
    lengths = check_lengths(model.config, lengths)
    profile = stored_profile(model, devices[0], batch_sizes, lengths)
    served = [r.subnet for r in profile.rows] if profile else model.subnets
    engines = [DeviceEngine(model, d, subnet_list=served, batch_sizes=batch_sizes, lengths=lengths) for d in devices]
    if profile is None:
        _log.warning(
            "%s has no latency profile for %s, batch sizes %s%s: measuring one; `python serve/measure.py %s` keeps it",
            model.path,
            device_kind(devices[0]),
            list(batch_sizes),
            f" and lengths {list(lengths)}" if lengths else "",
            model.path,
        )
        profile = measure(model, engines[0], batch_sizes, device_kind(devices[0]))
    return model, engines, profile


def check_lengths(config: Any, lengths: Sequence[int] | None) -> tuple[int, ...]:
    """The length buckets for a family's config, the default ones for None; `()` for a family whose inputs have one shape.

    Raises ConfigError for lengths that the family does not have.
    """
    longest = getattr(config, "max_length", None)
    if longest is None:
        if lengths:
            raise errors.ConfigError(f"inputs of {config.family} have one shape and no lengths; leave out {list(lengths)}")
        return ()
    buckets = padding.default_lengths(longest) if lengths is None else profiles.check_lengths(lengths)
    if buckets[-1] > longest:
        raise errors.ConfigError(f"length {buckets[-1]} exceeds the model's max_length={longest}; lengths may go up to that")
    return buckets


def stored_profile(
    model: checkpoint.Model, device: Device, batch_sizes: Sequence[int], lengths: Sequence[int] = ()
) -> profiles.Profile | None:
    """The profile beside the export, cut to batch sizes and lengths; None where it does not cover them and this device."""
    path = checkpoint.profile_path(model.path, device_kind(device))
    if not path.exists():
        return None
    profile = profiles.Profile.load(path)
    accuracies = {s.subnet: s.accuracy for s in model.served}
    if not (set(batch_sizes) <= set(profile.batch_sizes) and set(lengths) <= set(profile.lengths)):
        return None
    if any(accuracies.get(r.subnet) != r.accuracy for r in profile.rows):
        _log.warning("%s was measured on another export; ignoring it", path)
        return None
    return profile.at(batch_sizes, lengths)


def measure(
    model: checkpoint.Model,
    engine: DeviceEngine,
    batch_sizes: Sequence[int],
    device: str,
    *,
    repeats: int = 30,
) -> profiles.Profile:
    """Measures the latency profile of an engine: repaired to be monotone, and only the subnets that are worth serving."""
    accuracies = {s.subnet: s.accuracy for s in model.served}
    return worth_serving(measuring.measure(engine, accuracies, batch_sizes, device=device, repeats=repeats)).monotone()


def worth_serving(profile: profiles.Profile) -> profiles.Profile:
    """The rows that a server makes use of: no other is faster and more accurate, and neighbours differ enough to matter."""
    return profile.pareto(min_accuracy_gap=_MIN_ACCURACY_GAP, min_latency_ratio=_MIN_LATENCY_RATIO)


def build(
    config: Any,
    subnet_list: Iterable[subnets.Subnet],
    batch_sizes: Iterable[int],
    device: Device,
    *,
    lengths: Sequence[int] = (),
) -> dict[tuple[subnets.Subnet, int, int], Executable]:
    """Executables for every subnet, batch size and length (0 for inputs of one shape), cached ones or compiled in parallel."""
    keys = list(itertools.product(subnet_list, batch_sizes, lengths or (0,)))
    store = cache.ExecutableCache(config, device)
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [pool.submit(_load_or_compile, store, config, *key, device) for key in keys]
        made = [job.result() for job in progress.track(jobs, f"executables for {device.platform}:{device.id}")]
    return dict(zip(keys, made, strict=True))


def _load_or_compile(
    store: "cache.ExecutableCache", config: Any, subnet: subnets.Subnet, batch: int, length: int, device: Device
) -> Executable:
    found = store.load(subnet, batch, length)
    if found is not None:
        return Executable(*found)
    executable = compile_executable(config, subnet, batch, device, length=length)
    store.save(subnet, batch, length, executable.call, executable.leaves)
    return executable


def _input_spec(config: Any, batch: int, length: int) -> jax.ShapeDtypeStruct:
    return config.input_spec(batch, length=length) if length else config.input_spec(batch)


def compile_executable(config: Any, subnet: subnets.Subnet, batch: int, device: Device, *, length: int = 0) -> Executable:
    """Lowers and compiles the sliced program of a subnet for one device; `length` is 0 where inputs have none."""
    program = programs.sliced(config, subnet)
    sharding = jax.sharding.SingleDeviceSharding(device)

    def on_device(spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    spec = programs.param_spec(config)
    names = _used_leaves(program)

    def infer(leaves: tuple[jax.Array, ...], inputs: jax.Array, row: jax.Array) -> jax.Array:
        return program.infer(dict(zip(names, leaves, strict=True)), inputs, row, jnp.zeros((0,), jnp.int32))

    leaves = tuple(on_device(spec[name]) for name in names)
    row = on_device(jax.ShapeDtypeStruct((2, program.row_size), jnp.float32))
    compiled = jax.jit(infer).lower(leaves, on_device(_input_spec(config, batch, length)), row).compile()
    return Executable(compiled, names)


@functools.lru_cache(maxsize=1024)
def _used_leaves(program: programs.Program) -> tuple[str, ...]:
    """Names of the parameters that a program reads."""
    spec = programs.param_spec(program.config)
    row = jax.ShapeDtypeStruct((2, program.row_size), jnp.float32)
    active = jax.ShapeDtypeStruct((len(program.traced),), jnp.int32)
    jaxpr = jax.make_jaxpr(program.infer)(spec, program.config.input_spec(1), row, active).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return tuple(name for name, v in zip(sorted(spec), jaxpr.invars, strict=False) if id(v) in read)


def device_kind(device: Device) -> str:
    """What a latency profile holds for: the card's name, or for a CPU its model and number of cores."""
    if device.platform != "cpu":
        return device.device_kind
    return f"cpu {cache.cpu_info('model name') or 'unknown'} {os.cpu_count()} cores"
