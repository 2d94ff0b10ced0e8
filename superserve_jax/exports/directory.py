"""Writes and loads an export, the only thing that training hands to serving: a directory that describes itself.

One file, because the writer and the reader share this layout:

    manifest.json            config, size of the search space, served subnets, how they were measured, SHA-256 of every file
    payload-<digest>/        the digest is computed from its files
        weights/             written by Orbax
        statistics.npz       SubnetNorm statistics
        vocabulary.txt       the tokens of a text model, one per line
    profiles/<device>.json   latency profiles, one per kind of device and dtype; made later, not part of the manifest

It holds only data: nothing in it is executed or unpickled. Replacing manifest.json commits the export. So a process that is
killed at any moment leaves the old export or the new one. `load` checks every file against its digest before it reads the
file. We compute digests ourselves because Orbax does not notice a flipped bit (see `manifest.py`).
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from superserve_jax import errors, families, files
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.exports import statistics
from superserve_jax.exports.model import Model, Served
from superserve_jax.manifest import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    VOCABULARY,
    files_of,
    find,
    is_manifest,
    read_manifest,
    verify_files,
)
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

_PAYLOAD = re.compile(r"payload-([0-9a-f]{16}|part\.[0-9]+)")
# Limits on the files of an export: by which factor they may be smaller than the weights (Orbax compresses), how many bytes
# they may hold besides weights and statistics, and how many bytes the description of one subnet may take.
_MAX_RATIO, _MAX_OTHER_BYTES, _MAX_SUBNET_BYTES = 10_000, 64 << 20, 64 << 10
_MAX_INPUT_BYTES = 1 << 30  # of one input; no weight depends on the size of an image


def export(
    path: str | os.PathLike[str],
    model: SuperNet,
    served: Sequence[Served],
    *,
    measured: str,
    class_names: Sequence[str] = (),
    vocabulary: Vocabulary | None = None,
    training: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes an export. It replaces an older one in the same directory atomically.

    Args:
      path: the directory. It is created if it does not exist.
      model: the SuperNet, calibrated for every served subnet.
      served: the subnets to serve.
      measured: how and on what data the accuracies were measured, in words.
      class_names: names of the logits.
      vocabulary: the vocabulary of a text model.
      training: the training config, kept as a record.

    Raises:
      NotCalibratedError: a served subnet has no statistics. SubnetError: a served subnet is not one of the model.
      ExportError: the directory holds something else, or cannot be written.
      ConfigError: there is nothing to serve, the vocabulary does not fit the model, or an argument has a wrong type.
    """
    _check_arguments(model, served, measured, class_names, vocabulary, training)
    kept = {s.subnet for s in served} | ({model.space.largest()} & set(model.statistics))
    calibrated = {subnet: model.statistics_of(subnet) for subnet in sorted(kept, key=model.config.flops)}
    _check_finite(model.params, calibrated, "the model")
    path = _make_folder(path)
    spec = model.config.input_spec(1)
    size = math.prod(spec.shape) * spec.dtype.itemsize
    manifest = {
        "format": MANIFEST_FORMAT,
        "schema": MANIFEST_SCHEMA,
        "config": families.config_to_json(model.config),
        "input": {"shape": [None, *spec.shape[1:]], "dtype": str(spec.dtype), "bytes": size},  # for people who read it
        "class_names": list(class_names),
        "vocabulary": vocabulary.settings if vocabulary is not None else None,
        "space_size": model.space.size,
        "served": [s.to_json() for s in sorted(served, key=lambda s: s.flops)],
        "measured": measured,
        "training": dict(training or {}),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint", "numpy")},
    }
    try:
        with files.locked(path):
            _check_ours(path)
            payload, contents = _write_payload(path, model, calibrated, vocabulary)
            manifest |= {"payload": payload.name, "files": contents}
            _commit(path, {**manifest, "sha256": files.digest(manifest)})
            for stale in path.iterdir():
                if stale != payload and _is_payload(stale):
                    shutil.rmtree(stale, ignore_errors=True)
    except BlockingIOError as e:
        raise errors.ExportError(f"another process exports to {path} now; wait for it, or choose another path") from e
    except OSError as e:
        raise errors.ExportError(
            f"cannot export to {path}: {e}. An export that was there before is still intact. Free space there, or choose "
            "another directory"
        ) from e
    return path


def _write_payload(
    path: pathlib.Path, model: SuperNet, calibrated: Mapping[Subnet, np.ndarray], vocabulary: Vocabulary | None
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Writes the payload. Returns its folder, and the size and digest of every file in it.

    After an error, no partial payload is left.
    """
    part = path / f"payload-part.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((part / "weights").absolute(), model.params)
        except Exception as e:  # Orbax passes on whatever its storage layer raises
            problem = errors.one_line(e)[:300]
            raise errors.ExportError(f"the weights could not be written to {path}: {problem}; make room on the disk") from e
        statistics.write(part / "statistics.npz", calibrated)
        if vocabulary is not None:
            (part / VOCABULARY).write_bytes(vocabulary.to_text().encode())
        contents = {str(f.relative_to(part)): _describe(f) for f in files_of(part)}
        for folder in (part, *(f for f in part.rglob("*") if f.is_dir())):
            _sync_directory(folder)
        digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]
        payload = path / f"payload-{digest}"
        os.rename(part, payload)
    except (Exception, KeyboardInterrupt):
        files.remove_trees(lambda: [part])  # Orbax raises the first error while its other threads still write
        raise
    _sync_directory(path)
    return payload, contents


def _commit(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest. This commits the export."""
    new = path / f"{MANIFEST_NAME}.part"
    try:
        with new.open("w") as f:
            json.dump(manifest, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path / MANIFEST_NAME)
    except (Exception, KeyboardInterrupt):
        new.unlink(missing_ok=True)
        raise
    _sync_directory(path)


def load(path: str | os.PathLike[str]) -> Model:
    """Loads an export. It needs nothing but the directory.

    >>> model = load("digits")
    >>> model(np.zeros((1, 32, 32, 1), np.uint8), model.subnets[0]).shape
    (1, 10)

    Args:
      path: the export's directory. If it does not exist, the name of an export that comes with the package, such as "digits".

    Raises:
      ExportError: the directory is missing, is not an export, is from a newer version, or was damaged or edited. The message
        names the file and the reason.
    """
    while True:
        manifest = read_manifest(path)
        try:
            return _load(find(path), manifest)
        except errors.ExportError:
            if read_manifest(path)["sha256"] == manifest["sha256"]:
                raise
            # Another process has replaced the export meanwhile, and removed the files of the old one.


def _load(path: pathlib.Path, manifest: dict[str, Any]) -> Model:
    payload = path / manifest["payload"]
    file = path / MANIFEST_NAME
    try:
        with errors.refusing(errors.ExportError, "its fields do not fit together"):
            config = families.config_from_json(manifest["config"])
            listed, space = [Served.from_json(s) for s in manifest["served"]], config.space()
            served = tuple(dataclasses.replace(s, subnet=space.validate(s.subnet)) for s in listed)
            if not served or len({s.subnet for s in served}) < len(served):
                raise errors.ExportError("it must serve at least one subnet, and none of them twice")
            _check_sizes(config, len(served), sum(f["bytes"] for f in manifest["files"].values()))
    except errors.SuperServeError as e:
        reason = errors.one_line(e)
        remedy = "" if isinstance(e, errors.UnknownNameError) or reason.endswith("export again") else "; export again"
        raise errors.ExportError(f"{file} does not describe a SuperNet that this version can build: {reason}{remedy}") from e
    verify_files(payload, manifest["files"])
    calibrated = statistics.read(payload / "statistics.npz", config)
    if missing := [s.subnet for s in served if s.subnet not in calibrated]:
        raise errors.ExportError(
            f"{payload / 'statistics.npz'} lacks the statistics of the served {missing[0].to_json()}; export again"
        )
    vocabulary = _read_vocabulary(payload / VOCABULARY, manifest.get("vocabulary"), config)
    params = _read_weights((payload / "weights").absolute(), config)
    _check_finite(params, calibrated, str(path))
    return Model(path, manifest, served, vocabulary, config, params, calibrated)


def profile_path(path: str | os.PathLike[str], device_kind: str, compute_dtype: ComputeDtype = "float32") -> pathlib.Path:
    """The file of an export's latency profile for a kind of device and a dtype.

    >>> str(profile_path("export", "NVIDIA H100 80GB HBM3"))
    'export/profiles/nvidia-h100-80gb-hbm3.json'
    >>> profile_path("export", "NVIDIA L4", "bfloat16").name
    'nvidia-l4-bfloat16.json'
    """
    name = device_kind.lower() + ("" if compute_dtype == "float32" else f"-{compute_dtype}")
    return files.user_path(path) / "profiles" / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


@errors.refusing(errors.ConfigError, "export takes a SuperNet, `Served` subnets, strings, and a config of plain values")
def _check_arguments(
    model: SuperNet,
    served: Sequence[Served],
    measured: str,
    class_names: Sequence[str],
    vocabulary: Vocabulary | None,
    training: Mapping[str, Any] | None,
) -> None:
    """Raises the errors of wrong arguments. `export` calls it before it writes anything."""
    if not isinstance(model, SuperNet) or not all(isinstance(s, Served) for s in served):
        raise errors.ConfigError(f"export takes a SuperNet and a list of `Served`, got {type(model).__name__} and {served!r}")
    if not served or len({s.subnet for s in served}) < len(served):
        raise errors.ConfigError(f"an export must serve at least one subnet, and none of them twice; got {len(served)}")
    if not isinstance(measured, str) or not all(isinstance(name, str) for name in class_names):
        raise errors.ConfigError(f"measured and class_names must be strings, got {measured!r} and {class_names!r}")
    json.dumps(dict(training or {}))
    for s in served:
        model.space.validate(s.subnet)
    if vocabulary is not None:
        vocabulary.check_fit(model.config)


def _check_finite(params: Mapping[str, Any], calibrated: Mapping[Subnet, np.ndarray], where: str) -> None:
    """Raises ExportError if weights or statistics are NaN or infinite, or a variance is negative."""
    for name, value in params.items():
        if not np.isfinite(np.asarray(value)).all():
            raise errors.ExportError(
                f"the weights {name!r} of {where} are NaN or infinite; train again from an earlier checkpoint"
            )
    for subnet, value in calibrated.items():
        if not np.isfinite(value).all() or (value[1] < 0).any():
            raise errors.ExportError(
                f"the statistics of {where} for {subnet.to_json()} are NaN, infinite or negative variances; calibrate again"
            )


def _make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    try:
        path = files.user_path(path)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError) as e:
        raise errors.ExportError(f"cannot export to {str(path)!r}: {e}; choose another directory") from e
    return path


def _check_sizes(config: FamilyConfig, num_served: int, payload_bytes: int) -> None:
    """Raises ExportError if files of this size cannot hold a network of this config, or if its inputs are too large.

    Runs before memory is allocated.
    """
    weights = sum(math.prod(s.shape) * s.dtype.itemsize for s in programs.param_spec(config).values())
    of_subnet = 8 * sum(config.norm_sizes(config.sizes(config.space().largest())).values())
    most = 2 * weights + (num_served + 1) * (of_subnet + _MAX_SUBNET_BYTES) + _MAX_OTHER_BYTES
    if not weights / _MAX_RATIO <= payload_bytes <= most:
        raise errors.ExportError(f"its config has weights of {weights:,} bytes, but its files have {payload_bytes:,} bytes")
    spec = config.input_spec(1)
    if (size := math.prod(spec.shape) * spec.dtype.itemsize) > _MAX_INPUT_BYTES:
        raise errors.ExportError(f"its config has inputs of {size:,} bytes, more than {_MAX_INPUT_BYTES:,}")


def _read_weights(folder: pathlib.Path, config: FamilyConfig) -> dict[str, jax.Array]:
    """The parameters in Orbax's folder. Raises ExportError, before memory is taken, for parameters of another config."""
    sharding = jnp.zeros(()).sharding  # that of jax's default device
    target = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in programs.param_spec(config).items()}
    try:
        with errors.StartingThreads(), ocp.StandardCheckpointer() as checkpointer:
            stored: Any = checkpointer.metadata(folder).item_metadata
            if stored is None:
                raise ValueError("its metadata are damaged")
            if odd := sorted(set(stored) ^ set(target)):
                raise ValueError(f"the parameters {odd} are missing or unknown")
            for name, wanted in target.items():
                found = stored[name]
                if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                    raise ValueError(f"{name} has {found.shape} values of {found.dtype}, not {wanted.shape} of {wanted.dtype}")
                # Orbax reads whole chunks. A few bytes can hold a chunk of many equal values.
                if any(chunk > max(size, 1) for chunk, size in zip(found.storage.chunk_shape, wanted.shape, strict=True)):
                    raise ValueError(f"{name} has chunks larger than itself")
            return checkpointer.restore(folder, target)
    except errors.ThreadStartError:
        raise
    except Exception as e:  # Orbax raises many kinds of errors. The digests fit, so the weights are of another config.
        raise errors.ExportError(
            f"{folder} does not fit the config in the manifest: {errors.one_line(e)}; export again"
        ) from e


def _read_vocabulary(file: pathlib.Path, settings: Any, config: FamilyConfig) -> Vocabulary | None:
    """The vocabulary in a file, with the settings in the manifest. None if there are no settings: the export is older, or its
    inputs are not text.
    """
    if settings is None:
        return None
    try:
        vocabulary = Vocabulary.read(file, **settings)
        vocabulary.check_fit(config)
    except (errors.SuperServeError, TypeError) as e:
        raise errors.ExportError(
            f"{file} is not the vocabulary that the manifest describes: {errors.one_line(e)}; export again"
        ) from e
    return vocabulary


def _check_ours(path: pathlib.Path) -> None:
    """Raises ExportError unless a folder holds an export, or nothing but what an interrupted export left."""
    file = path / MANIFEST_NAME
    if file.exists() and not is_manifest(file):
        raise errors.ExportError(f"{file} is damaged or belongs to another program; remove it, or choose another directory")
    if not file.exists() and not all(_is_payload(f) or f.name == f"{MANIFEST_NAME}.part" for f in path.iterdir()):
        raise errors.ExportError(f"{path} is not empty and holds no export; choose another directory")


def _is_payload(folder: pathlib.Path) -> bool:
    """Whether `export` made this folder: it has the name of a payload, and so have all files in it."""
    known = {"weights", "statistics.npz", VOCABULARY}
    return (
        _PAYLOAD.fullmatch(folder.name) is not None
        and folder.is_dir()
        and not folder.is_symlink()
        and all(f.name in known or f.name.startswith(("weights.", "statistics.npz.")) for f in folder.iterdir())
    )


def _describe(file: pathlib.Path) -> dict[str, Any]:
    with file.open("rb") as f:
        os.fsync(f.fileno())
    return {"bytes": file.stat().st_size, "sha256": files.sha256(file)}


def _sync_directory(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
