"""Prepares an export for a server: makes an engine for each device, and loads or measures its latency profile.

One file because every function checks or completes the arguments of `prepare`.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from superserve_jax import errors, exports, machine, manifest
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines import cpu_clients, default_batch_sizes, executables, keys, measuring, subnet_buckets, threads
from superserve_jax.engines.cpu_clients import Share
from superserve_jax.engines.device import DeviceEngine, Slicing, check_slicing
from superserve_jax.engines.keys import Device
from superserve_jax.engines.profiling import Background
from superserve_jax.exports import Model
from superserve_jax.lengths import check_length_buckets, default_lengths
from superserve_jax.profile import Profile, check_batch_sizes
from superserve_jax.supernets.family import FamilyConfig, SequenceConfig
from superserve_jax.supernets.supernet import SuperNet

_log = logging.getLogger(__name__)

MAX_SUBNET_BUCKETS = 32
"""The largest number of subnet buckets (executables per batch size) of an export without a latency profile."""


def prepare(
    path_or_model: Any,
    *,
    batch_sizes: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    devices: Sequence[Device | Share] | None = None,
    slicing: Slicing | None = None,
    slice_bytes: int | None = None,
    compute_dtype: ComputeDtype = "float32",
    cpu_workers: int | None = None,
    background: Background | None = None,
) -> tuple[Model, list[DeviceEngine], list[Profile]]:
    """Returns the model, an engine for each device, and the latency profile of each engine.

    Devices of one kind share a profile. The export may have one for this kind and dtype, with these batch sizes and lengths.
    Otherwise it is measured.

    Args:
      path_or_model: an export's directory, or the model that `exports.load` returned.
      batch_sizes: the batch sizes to serve with, ascending; None takes `default_batch_sizes.to_serve`.
      lengths: the length buckets to serve with; None takes `lengths.default_lengths` for a model of sequences.
      devices: the devices to serve on; None takes all. With shares of the cores of a CPU, all are shares.
      slicing: see `DeviceEngine`; None slices as when the profile was measured.
      slice_bytes: see `DeviceEngine`.
      compute_dtype: see `DeviceEngine`.
      cpu_workers: how many workers divide the cores of a CPU; None takes as many as when the profile was measured. Give it
        without `devices`.
      background: the load to run while a profile is measured (see `profiling.measure`).

    Raises:
      ExportError: the export is missing or damaged.
      ConfigError: an argument is wrong, or the export has no accuracies in `compute_dtype`.
      NotCalibratedError: a served subnet has no statistics.
      ProfileError: the profile beside the export is malformed.
    """
    chosen, are_given = None if batch_sizes is None else check_batch_sizes(batch_sizes), devices is not None
    check_slicing(slicing or "kept", slice_bytes)
    model = load(path_or_model)
    model.accuracies(compute_dtype)
    devices = _check_devices(devices)
    cpu_workers = _check_cpu_workers(cpu_workers, devices, are_given=are_given)
    lengths = check_lengths(model.config, lengths)

    kinds = [machine.device_kind(d.device if isinstance(d, Share) else d) for d in devices]
    of_kinds = {kind: jax.devices("cpu")[0] if isinstance(d, Share) else d for kind, d in zip(kinds, devices, strict=True)}
    batch_sizes = chosen or default_batch_sizes.to_serve(model.path, of_kinds, compute_dtype)
    stored = {kind: stored_profile(model, kind, batch_sizes, lengths, compute_dtype) for kind in of_kinds}
    if cpu_workers is None:
        cpu_workers = next((profile.cpu_workers for profile in stored.values() if profile is not None), 1)
    profiles = {kind: profile for kind, profile in stored.items() if profile and profile.cpu_workers == cpu_workers}
    if cpu_workers > 1 and not isinstance(devices[0], Share):
        devices = [Share(i, cpu_workers) for i in range(cpu_workers)]
        kinds = [*stored] * cpu_workers
    envelopes, needs_measuring = None, len(profiles) < len(stored)
    if chosen is None and not needs_measuring:
        profiles = default_batch_sizes.without_useless(profiles)
    if needs_measuring:
        envelopes = subnet_buckets.choose(model.subnets, model.config.flops, MAX_SUBNET_BUCKETS)

    engines: dict[int, DeviceEngine] = {}

    def make(i: int) -> DeviceEngine:
        shares = engines[0] if cpu_workers > 1 and i > 0 else None
        return make_engine(model, devices[i], profiles[kinds[i]], slicing=slicing, slice_bytes=slice_bytes, shares=shares)

    for i, kind in enumerate(kinds):
        if kind in kinds[:i]:
            continue
        if kind in profiles:
            engines[i] = make(i)
            continue
        how = _warn(model, kind, batch_sizes, lengths, compute_dtype, cpu_workers, stored[kind])
        shapes = {"batch_sizes": batch_sizes, "lengths": lengths, "envelopes": envelopes}
        way: dict[str, Any] = {"slicing": slicing or how["slicing"], "slice_bytes": slice_bytes, "parts": how["parts"]}
        way |= {"subnet_list": model.subnets, "compute_dtype": compute_dtype}
        engines[i] = DeviceEngine(model, devices[i], **shapes, **way)
        if cpu_workers > 1:
            more = range(1, len(devices))
            engines |= {j: DeviceEngine(model, devices[j], shares=engines[i], **shapes, **way) for j in more}
        beside = [engine for j, engine in engines.items() if j != i and cpu_workers > 1]
        measured = measuring.measure(model, engines[i], background=background, beside=beside)
        profiles[kind] = dataclasses.replace(measuring.worth_serving(measured), cpu_workers=cpu_workers)
    if chosen is None and needs_measuring:
        profiles = default_batch_sizes.without_useless(profiles)
    # The first engine of each kind is made alone. The others reuse the results of its tuning.
    others = [i for i in range(len(devices)) if i not in engines]
    engines.update(zip(others, threads.each(make, others, workers=len(others)), strict=True))
    if len(engines) > 1:
        for engine in engines.values():
            if engine.command_buffers:  # XLA drops all of them when it compiles for another engine
                engine.warm_up()
    return model, [engines[i] for i in range(len(devices))], [profiles[kind] for kind in kinds]


def on_first_device(path: str, **options: Any) -> tuple[DeviceEngine, Profile]:
    """An engine for an export on the first device of this process, and its profile. `options` are those of `prepare`."""
    _, [engine], [profile] = prepare(path, devices=jax.devices()[:1], **options)
    return engine, profile


def kept_settings() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Returns a function whose context manager applies the settings that jax has in this thread now."""
    return functools.partial(keys.with_settings, keys.settings())


def load(path_or_model: Any) -> Model:
    """The model in an export's directory; a model is returned as it is.

    Raises:
      ExportError: the export is missing or damaged.
      ConfigError: the SuperNet does not come from an export.
    """
    model = path_or_model if isinstance(path_or_model, SuperNet) else exports.load(path_or_model)
    if not isinstance(model, Model):
        raise errors.ConfigError(
            "a server takes an export's directory or a model from superserve_jax.load; export the "
            "SuperNet first, since only an export knows the accuracies of its subnets"
        )
    return model


def _check_devices(devices: Sequence[Device | Share] | None) -> Sequence[Device | Share]:
    """The given devices; None gives all devices. Raises ConfigError for other things than jax devices or shares."""
    devices = jax.devices() if devices is None else devices
    if isinstance(devices, Sequence) and devices and any(all(isinstance(d, c) for d in devices) for c in (jax.Device, Share)):
        return devices
    raise errors.ConfigError(f"devices must be a list of at least one jax device, got {devices!r}; give one, or None for all")


def _check_cpu_workers(cpu_workers: int | None, devices: Sequence[Device | Share], *, are_given: bool) -> int | None:
    """The number of workers: `cpu_workers`, or that of the given shares of the cores. None: the profile decides.

    Raises ConfigError for a number that these devices cannot have.
    """
    cpu_clients.check_workers(cpu_workers)
    if isinstance(devices[0], Share):
        return devices[0].workers
    is_one_cpu = not are_given and len(devices) == 1 and devices[0].platform == "cpu"
    if cpu_workers is not None and not is_one_cpu:
        raise errors.ConfigError(f"cpu_workers divides the cores of a single CPU device, got {list(devices)}; leave it out")
    return cpu_workers if is_one_cpu else 1


def _warn(
    model: Model,
    kind: str,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    compute_dtype: ComputeDtype,
    cpu_workers: int,
    stored: Profile | None,
) -> dict[str, Any]:
    """Warns that a profile must be measured now. Returns how the weights are sliced and batches divided meanwhile."""
    shapes = f"batch sizes {list(batch_sizes)}" + (f" and lengths {list(lengths)}" if lengths else "")
    option = "" if compute_dtype == "float32" else f" --compute-dtype {compute_dtype}"
    if stored is None:
        message = "%s has no latency profile for %s, %s, %s: measuring one; run `superserve measure %s%s` to save one"
        _log.warning(message, model.path, kind, compute_dtype, shapes, model.path, option)
        return {"slicing": "kept", "parts": {}}
    message = (
        "%s was measured with %s worker(s), not %s: measuring again; run `superserve measure %s%s --cpu-workers %s` to save it"
    )
    _log.warning(message, model.path, stored.cpu_workers, cpu_workers, model.path, option, cpu_workers)
    return {"slicing": stored.slicing, "parts": cpu_clients.parts_of_workers(stored.parts, cpu_workers)}


def check_same_inputs(old: Model, new: Model, lengths: Sequence[int]) -> None:
    """Raises ConfigError unless both models read an input in the same way, at these length buckets.

    Shape, dtype, the token id of padding and the vocabulary must be equal.
    """
    old_inputs, new_inputs = (_inputs(model.config, lengths) for model in (old, new))
    if old_inputs != new_inputs:
        raise errors.ConfigError(
            f"{new.path} takes {new_inputs}, but this server takes {old_inputs}; open another server for it"
        )
    if old.vocabulary != new.vocabulary:
        raise manifest.other_vocabulary(new.path, old.path)


def _inputs(config: FamilyConfig, lengths: Sequence[int]) -> str:
    """A description of a model's inputs, for an error message."""
    longest, padding = 0, ""
    if isinstance(config, SequenceConfig):
        longest = check_lengths(config, lengths or None)[-1]
        padding = f" of up to {longest} tokens, padded with {config.pad_id}"
    spec = executables.input_spec(config, 1, longest)
    return f"inputs of shape {tuple(spec.shape[1:])} and dtype {spec.dtype}{padding}"


def make_engine(
    model: SuperNet,
    device: Device | Share,
    profile: Profile,
    *,
    slicing: Slicing | None = None,
    slice_bytes: int | None = None,
    shares: DeviceEngine | None = None,
) -> DeviceEngine:
    """An engine for the subnets, batch sizes and length buckets of a profile.

    Args:
      model: the SuperNet.
      device: the device to run on.
      profile: the latency profile. Subnets share executables as when it was measured.
      slicing: see `DeviceEngine`; None slices as when the profile was measured.
      slice_bytes: see `DeviceEngine`.
      shares: see `DeviceEngine`.

    Raises ProfileError if the profile is not one of this network. Nothing is compiled then.
    """
    _check_fit(profile, model, "the profile")
    return DeviceEngine(
        *(model, device),
        subnet_list=[r.subnet for r in profile.rows],
        batch_sizes=profile.batch_sizes,
        lengths=profile.lengths,
        envelopes=profile.envelopes,
        slicing=slicing or profile.slicing,
        slice_bytes=slice_bytes,
        compute_dtype=profile.compute_dtype,
        parts=profile.parts if isinstance(device, Share) or device.platform == "cpu" else None,
        shares=shares,
    )


def check_lengths(config: FamilyConfig, lengths: Sequence[int] | None) -> tuple[int, ...]:
    """Checks length buckets. Returns them, the default ones for None, and `()` if all inputs have one shape.

    Raises ConfigError for lengths that the family does not support.
    """
    if not isinstance(config, SequenceConfig):
        if lengths:
            raise errors.ConfigError(f"inputs of {config.family} have one shape and no lengths; leave out {lengths!r}")
        return ()
    longest = config.max_length
    buckets = default_lengths(longest) if lengths is None else check_length_buckets(lengths)
    if buckets[-1] > longest:
        raise errors.ConfigError(
            f"length {buckets[-1]} exceeds the model's max_length={longest}; give lengths up to {longest}"
        )
    return buckets


def stored_profile(
    model: Model,
    kind: str,
    batch_sizes: Sequence[int],
    lengths: Sequence[int] = (),
    compute_dtype: ComputeDtype = "float32",
) -> Profile | None:
    """The profile in the export's directory, cut to these batch sizes and lengths.

    None if there is no profile for this kind of device and dtype, these batch sizes and lengths, or if it belongs to another
    export. Raises ProfileError if it is malformed, or has subnet buckets or lengths that this network does not have.
    """
    path = exports.profile_path(model.path, kind, compute_dtype)
    if not path.exists():
        return None
    profile = Profile.load(path)
    accuracies = model.accuracies(compute_dtype)
    if not (set(batch_sizes) <= set(profile.batch_sizes) and set(lengths) <= set(profile.lengths)):
        return None
    if (profile.device, profile.compute_dtype) != (kind, compute_dtype):
        found = f"{profile.device[:100]!r} in {profile.compute_dtype}"
        _log.warning("%s was measured on %s, not on %r in %s; ignoring it", path, found, kind, compute_dtype)
        return None
    if any(accuracies.get(r.subnet) != r.accuracy for r in profile.rows):
        _log.warning("%s was measured on another export; ignoring it", path)
        return None
    profile = profile.at(batch_sizes, lengths)
    _check_fit(profile, model, str(path))
    return profile


def _check_fit(profile: Profile, model: SuperNet, name: str) -> None:
    """Raises ProfileError if a profile has subnets, subnet buckets or lengths that the network does not have."""
    try:
        for row in profile.rows:
            model.space.validate(row.subnet)
        for envelope in set(profile.envelopes.values()):
            model.space.check_envelope(envelope)
        if profile.lengths:
            check_lengths(model.config, profile.lengths)
    except (errors.SubnetError, errors.ConfigError) as e:
        raise errors.ProfileError(f"{name} does not fit the network: {e}; measure it again with `superserve measure`") from e
