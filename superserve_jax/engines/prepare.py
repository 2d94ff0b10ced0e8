"""What a server of an export needs: engines, one per device, and the latency profile of each, measured once per kind."""

import dataclasses
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from superserve_jax import errors, exports
from superserve_jax.engines import cache, executables, profiling, subnet_buckets
from superserve_jax.engines.cache import Device
from superserve_jax.engines.device import DeviceEngine, Slicing, check_slicing
from superserve_jax.engines.profiling import Background
from superserve_jax.exports import Model
from superserve_jax.lengths import check_length_buckets, default_lengths
from superserve_jax.profile import Profile, check_batch_sizes
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.supernet import SuperNet

_log = logging.getLogger(__name__)

MAX_BUCKETS = 32
"""Subnet buckets, and so executables per batch size, that a server makes for an export without a profile."""

_WORTH_KEEPING = 1.03
_MIN_ACCURACY_GAP, _MIN_LATENCY_RATIO = 0.003, 1.1  # nearer neighbours than this are not worth an executable


def prepare(
    path_or_model: Any,
    *,
    batch_sizes: Sequence[int],
    lengths: Sequence[int] | None = None,
    devices: Sequence[Device] | None = None,
    slicing: Slicing | None = None,
    slice_bytes: int | None = None,
    background: Background | None = None,
) -> tuple[Model, list[DeviceEngine], list[Profile]]:
    """What a server needs: the model, one engine per device, and the latency profile of each.

    Devices of one kind share a profile. It is read from beside the export; where that has none for this kind and these
    shapes, one is measured.

    Args:
      lengths: None takes `padding.default_lengths`, where inputs have a length.
      slicing, slice_bytes: see `device_engine.DeviceEngine`; None takes what the profile was measured with.
      background: what runs beside an engine whose profile is measured (see `profiling.measure`).

    Raises:
      ExportError, ConfigError, NotCalibratedError. ProfileError: the profile beside the export is malformed.
    """
    batch_sizes = check_batch_sizes(batch_sizes)
    check_slicing(slicing or "kept", slice_bytes)
    model = load(path_or_model)
    devices = jax.devices() if devices is None else devices
    if not isinstance(devices, Sequence) or not devices or not all(isinstance(d, jax.Device) for d in devices):
        raise errors.ConfigError(
            f"devices is empty or no list of jax devices, got {devices!r}; give at least one, or None for all"
        )
    lengths = check_lengths(model.config, lengths)
    stored = of_each_kind(devices, lambda device: stored_profile(model, device, batch_sizes, lengths))
    envelopes: Mapping[Subnet, Subnet] = {}  # where no profile says which
    if None in stored:
        envelopes = subnet_buckets.choose(model.subnets, model.config.flops, MAX_BUCKETS)
    engines = [
        make_engine(model, device, profile, slicing=slicing, slice_bytes=slice_bytes)
        if profile is not None
        else DeviceEngine(
            *(model, device),
            subnet_list=model.subnets,
            batch_sizes=batch_sizes,
            lengths=lengths,
            envelopes=envelopes,
            slicing=slicing or "kept",
            slice_bytes=slice_bytes,
        )
        for device, profile in zip(devices, stored, strict=True)
    ]
    made = dict(zip(devices, zip(engines, stored, strict=True), strict=True))

    def stored_or_measured(device: Device) -> Profile:
        engine, profile = made[device]
        if profile is not None:
            return profile
        _log.warning(
            "%s has no latency profile for %s, batch sizes %s%s: measuring one; `python serve/measure.py %s` keeps it",
            model.path,
            device_kind(device),
            list(batch_sizes),
            f" and lengths {list(lengths)}" if lengths else "",
            model.path,
        )
        return measure(model, engine, batch_sizes, device_kind(device), envelopes=envelopes, background=background)

    return model, engines, of_each_kind(devices, stored_or_measured)


def load(path_or_model: Any) -> Model:
    """The model of an export's directory, or as it is. Raises ExportError, or ConfigError for a SuperNet of no export."""
    model = path_or_model if isinstance(path_or_model, SuperNet) else exports.load(path_or_model)
    if not isinstance(model, Model):
        raise errors.ConfigError(
            "a server takes an export's directory or what superserve_jax.load returned; export the "
            "SuperNet first, since only an export knows the accuracies of its subnets"
        )
    return model


def check_same_inputs(old: Model, new: Model, lengths: Sequence[int]) -> None:
    """Raises ConfigError unless what is submitted for one model means the same to the other, at these length buckets.

    For that the shape, the dtype, the padding's id and the vocabulary have to be the same.
    """
    had, has = (_inputs(model.config, lengths) for model in (old, new))
    if had != has:
        raise errors.ConfigError(f"{new.path} takes {has}, this server {had}; open another server for other inputs")
    if old.vocabulary != new.vocabulary:
        raise errors.ConfigError(
            f"{new.path} has another vocabulary than {old.path}: what is being submitted would mean other texts to it; "
            "open another server"
        )


def _inputs(config: Any, lengths: Sequence[int]) -> str:
    if not hasattr(config, "max_length"):
        spec, of_length = executables.input_spec(config, 1), ""
    else:
        longest = check_lengths(config, lengths or None)[-1]
        spec, of_length = (
            executables.input_spec(config, 1, longest),
            f" of up to {longest} tokens, padded with {config.pad_id}",
        )
    return f"inputs of shape {tuple(spec.shape[1:])} and dtype {spec.dtype}{of_length}"


def make_engine(
    model: SuperNet,
    device: Device,
    profile: Profile,
    *,
    slicing: Slicing | None = None,
    slice_bytes: int | None = None,
) -> DeviceEngine:
    """An engine for what a profile serves, as it was measured unless `slicing` says otherwise."""
    return DeviceEngine(
        *(model, device),
        subnet_list=[r.subnet for r in profile.rows],
        batch_sizes=profile.batch_sizes,
        lengths=profile.lengths,
        envelopes=profile.envelopes,
        slicing=slicing or profile.slicing,
        slice_bytes=slice_bytes,
    )


def of_each_kind(devices: Sequence[Device], make: Callable[[Device], Any]) -> list[Any]:
    """For each device what `make` gives for the first device of its kind."""
    made: dict[str, Any] = {}
    for device in devices:
        if (kind := device_kind(device)) not in made:
            made[kind] = make(device)
    return [made[device_kind(device)] for device in devices]


def check_lengths(config: Any, lengths: Sequence[int] | None) -> tuple[int, ...]:
    """The length buckets for a family's config, the default ones for None; `()` for a family whose inputs have one shape.

    Raises ConfigError for lengths that the family does not have.
    """
    longest = getattr(config, "max_length", None)
    if longest is None:
        if lengths:
            raise errors.ConfigError(f"inputs of {config.family} have one shape and no lengths; leave out {lengths!r}")
        return ()
    buckets = default_lengths(longest) if lengths is None else check_length_buckets(lengths)
    if buckets[-1] > longest:
        raise errors.ConfigError(f"length {buckets[-1]} exceeds the model's max_length={longest}; lengths may go up to that")
    return buckets


def stored_profile(model: Model, device: Device, batch_sizes: Sequence[int], lengths: Sequence[int] = ()) -> Profile | None:
    """The profile beside the export, cut to batch sizes and lengths; None where it does not cover them and this device."""
    path = exports.profile_path(model.path, device_kind(device))
    if not path.exists():
        return None
    profile = Profile.load(path)
    accuracies = {s.subnet: s.accuracy for s in model.served}
    if not (set(batch_sizes) <= set(profile.batch_sizes) and set(lengths) <= set(profile.lengths)):
        return None
    if profile.device != device_kind(device):
        _log.warning("%s was measured on '%s'; ignoring it", path, profile.device)
        return None
    if any(accuracies.get(r.subnet) != r.accuracy for r in profile.rows):
        _log.warning("%s was measured on another export; ignoring it", path)
        return None
    return profile.at(batch_sizes, lengths)


def measure(
    model: Model,
    engine: DeviceEngine,
    batch_sizes: Sequence[int],
    device: str,
    *,
    envelopes: Mapping[Subnet, Subnet] | None = None,
    repeats: int = 30,
    background: Background | None = None,
) -> Profile:
    """Measures the latency profile of an engine: repaired to be monotone, and only the subnets that are worth serving."""
    accuracies = {s.subnet: s.accuracy for s in model.served}
    measured = profiling.measure(engine, accuracies, batch_sizes, device=device, repeats=repeats, background=background)
    measured = dataclasses.replace(measured.with_envelopes(envelopes or {}), slicing=engine.slicing)
    return worth_serving(measured).monotone()


def worth_serving(profile: Profile) -> Profile:
    """The rows that a server makes use of: no other is faster and more accurate, and neighbours differ enough to matter."""
    return profile.pareto(min_accuracy_gap=_MIN_ACCURACY_GAP, min_latency_ratio=_MIN_LATENCY_RATIO)


def faster_slicing(
    model: Model,
    device: Device,
    batch_sizes: Sequence[int],
    *,
    lengths: Sequence[int] = (),
    repeats: int = 10,
) -> tuple[Slicing, float]:
    """Which way of slicing to serve with on a device, and how many times as long slicing in the call takes as kept slices do.

    Kept slices have to gain 3 %, since they take memory while nothing runs.

    Measured on three subnets, from the smallest to the largest, at the smallest and the largest batch, with another subnet in
    every call: kept slices pay for changes, though fewer than among many subnets whose slices do not fit into the budget.
    """
    by_cost = sorted(model.subnets, key=model.config.flops)
    chosen = list(dict.fromkeys((by_cost[0], by_cost[len(by_cost) // 2], by_cost[-1])))
    sizes, lengths = sorted({batch_sizes[0], batch_sizes[-1]}), lengths[-1:]
    ways: tuple[Slicing, ...] = ("kept", "in_call")
    engines = [
        DeviceEngine(model, device, subnet_list=chosen, batch_sizes=sizes, lengths=lengths, slicing=way) for way in ways
    ]
    example = np.zeros(engines[0].input_shape, engines[0].input_dtype)
    log_ratios: dict[tuple[int, Subnet], list[float]] = {}
    for _ in range(repeats):
        for batch in sizes:
            for subnet in chosen:
                seconds = []
                for engine in engines:
                    start_s = time.perf_counter()
                    engine.run(subnet, batch, [example])
                    seconds.append(time.perf_counter() - start_s)
                log_ratios.setdefault((batch, subnet), []).append(math.log(seconds[1] / seconds[0]))
    ratio = math.exp(statistics.fmean(statistics.median(of_case) for of_case in log_ratios.values()))
    return "kept" if ratio > _WORTH_KEEPING else "in_call", ratio


def device_kind(device: Device) -> str:
    """What a latency profile holds for: the card's name, or for a CPU its model and number of cores."""
    if device.platform != "cpu":
        return device.device_kind
    return f"cpu {cache.cpu_info('model name') or 'unknown'} {os.cpu_count()} cores"
