"""The export: the one artefact between training and serving, a self-describing directory.

    manifest.json            what it is: config, space, served subnets, how they were measured, a SHA-256 of every file
    payload-<digest>/        named by its content
        weights/             Orbax
        statistics.npz       SubnetNorm rows
        vocabulary.txt       of a model of texts: its tokens, one a line
    profiles/<device>.json   latency profiles, one per kind of device; made later, not part of the manifest

It is data only: nothing in it is executed or unpickled. Replacing manifest.json is the commit, so whoever is killed while
writing leaves the old export or the new one. Every file is checked against its digest before it is read.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from superserve_jax import errors, files, supernets
from superserve_jax import subnet as subnets
from superserve_jax import vocabulary as vocabularies
from superserve_jax.supernets import programs, supernet

FORMAT = "superserve_jax export"
SCHEMA = 1

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_VOCABULARY = "vocabulary.txt"
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_BYTES = 1 << 40  # of one payload file; more than any device holds


@dataclasses.dataclass(frozen=True)
class Served:
    """A subnet that the export offers for serving.

    Args:
      subnet: the subnet.
      accuracy: top-1 on test data with its own statistics, a fraction.
      accuracy_shared: the same with the largest subnet's statistics, or None where it was not measured.
      flops: multiply-adds per input. params: weights of the subnet on its own.
    """

    subnet: subnets.Subnet
    accuracy: float
    accuracy_shared: float | None
    flops: int
    params: int

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        return {**dataclasses.asdict(self), "subnet": self.subnet.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Served":
        """The inverse of `to_json`."""
        return Served(**{**data, "subnet": subnets.Subnet.from_json(data["subnet"])})


class Model(supernet.SuperNet):
    """A loaded export: a SuperNet that knows which of its subnets to serve.

    Attributes:
      path: the export's directory.
      served: the subnets to serve with their accuracies, in ascending order of FLOPs.
      class_names: names of the logits, empty where unknown.
      manifest: the whole manifest, as plain values.
    """

    def __init__(
        self,
        path: pathlib.Path,
        manifest: dict[str, Any],
        served: tuple[Served, ...],
        vocabulary: vocabularies.Vocabulary | None,
        *args: Any,
    ):
        super().__init__(*args)
        self.path = path
        self.served = served
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.manifest = manifest
        self._vocabulary = vocabulary

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The token of each id, empty where the model is not one of texts."""
        return self._vocabulary.tokens if self._vocabulary else ()

    def encode(
        self, text: str | Sequence[str], second: str | Sequence[str] | None = None, *, length: int | None = None
    ) -> np.ndarray:
        """Inputs out of text, exactly as in training.

        One text becomes one input, such as `Server.submit` takes; a list of them a batch, such as the model takes.

        Args:
          text: a text, or a list of texts.
          second: the second text of a pair (such as a hypothesis), or a list of them.
          length: pad up to so many tokens; `config.max_length` if left out.

        Raises:
          InputError: the export has no vocabulary, or this text cannot be encoded.
        """
        if self._vocabulary is None:
            raise errors.InputError(f"{self.path} has no vocabulary, so it cannot encode text; give arrays to the model")
        single = isinstance(text, str)
        if second is not None and isinstance(second, str) != single:
            raise errors.InputError("text and second must be one text each, or a list of texts each")
        inputs = self._vocabulary.encode(
            [text] if isinstance(text, str) else text,
            [second] if isinstance(second, str) else second,
            length=self.config.input_spec(1, length=length).shape[1],
            token_types=self.config.token_types,
        )
        return inputs[0] if single else inputs

    @property
    def subnets(self) -> tuple[subnets.Subnet, ...]:
        """The served subnets, in ascending order of FLOPs."""
        return tuple(s.subnet for s in self.served)


def export(
    path: str | os.PathLike[str],
    model: supernet.SuperNet,
    served: Sequence[Served],
    *,
    measured: str,
    class_names: Sequence[str] = (),
    vocabulary: vocabularies.Vocabulary | None = None,
    training: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes an export, replacing an older one in the same place at once or not at all.

    Args:
      path: the directory, made if need be.
      model: the SuperNet, calibrated for every served subnet.
      served: the subnets to serve.
      measured: how and on what the accuracies were measured, in words.
      class_names: names of the logits.
      vocabulary: of a model of texts.
      training: the training config, kept for the record.

    Raises:
      NotCalibratedError: a served subnet has no statistics. ExportError: the place holds something else.
      ConfigError: nothing to serve, or a vocabulary that is not the model's.
    """
    if not served:
        raise errors.ConfigError("an export needs at least one subnet to serve; got an empty list")
    if vocabulary is not None:
        vocabulary.check_fit(model.config)
    path = pathlib.Path(path)
    if path.exists() and not (path / _MANIFEST).exists() and not all(map(_is_leftover, path.iterdir())):
        raise errors.ExportError(f"{path} is not empty and holds no export; choose another directory")
    kept = {s.subnet for s in served} | ({model.space.largest()} & set(model.rows))
    rows = {subnet: model.row(subnet) for subnet in sorted(kept, key=model.config.flops)}
    path.mkdir(parents=True, exist_ok=True)
    part = path / f"payload-part.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((part / "weights").absolute(), model.params)
    (part / "statistics.npz").write_bytes(_pack_rows(rows))
    if vocabulary is not None:
        (part / _VOCABULARY).write_bytes(vocabulary.to_text().encode())
    contents = {str(f.relative_to(part)): _describe(f) for f in _files(part)}
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]
    payload = path / f"payload-{digest}"
    if payload.exists():
        shutil.rmtree(payload)
    os.rename(part, payload)
    _sync_directory(path)
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "config": supernets.config_to_json(model.config),
        "input": _input_contract(model.config),
        "class_names": list(class_names),
        "vocabulary": vocabulary.settings if vocabulary is not None else None,
        "space_size": model.space.size,
        "served": [s.to_json() for s in sorted(served, key=lambda s: s.flops)],
        "measured": measured,
        "training": dict(training or {}),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint", "numpy")},
        "payload": payload.name,
        "files": contents,
    }
    manifest["sha256"] = _digest_of_manifest(manifest)
    new = path / f"{_MANIFEST}.part"
    with new.open("w") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path / _MANIFEST)
    _sync_directory(path)
    for stale in path.glob("payload-*"):
        if stale != payload:
            shutil.rmtree(stale, ignore_errors=True)
    return path


def load(path: str | os.PathLike[str]) -> Model:
    """Reads an export; needs the directory and nothing else.

    Raises:
      ExportError: the directory is missing, foreign, from a newer version, truncated or edited; says what and where.
    """
    path = pathlib.Path(path)
    manifest = _read_manifest(path)
    payload = path / manifest["payload"]
    _verify(payload, manifest["files"])
    try:
        config = supernets.config_from_json(manifest["config"])
        served = tuple(Served.from_json(s) for s in manifest["served"])
        for s in served:
            config.space().validate(s.subnet)
    except (errors.SuperServeError, KeyError, TypeError) as e:
        raise errors.ExportError(f"{path / _MANIFEST} does not describe a SuperNet that this version can build: {e}") from e
    rows = _unpack_rows(payload / "statistics.npz")
    vocabulary = _read_vocabulary(payload / _VOCABULARY, manifest.get("vocabulary"), config)
    spec = programs.param_spec(config)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in spec.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((payload / "weights").absolute(), target)
    except Exception as e:  # Orbax raises many kinds; digests matched, so the weights are not those of this config
        raise errors.ExportError(f"{payload / 'weights'} does not hold the weights of its own config: {e}") from e
    return Model(path, manifest, served, vocabulary, config, params, rows)


def profile_path(path: str | os.PathLike[str], device_kind: str) -> pathlib.Path:
    """Where an export keeps its latency profile for a kind of device.

    >>> str(profile_path("export", "NVIDIA H100 80GB HBM3"))
    'export/profiles/nvidia-h100-80gb-hbm3.json'
    """
    return pathlib.Path(path) / "profiles" / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")


# -- reading ------------------------------------------------------------------------------------------------------------


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    file = path / _MANIFEST
    if not file.is_file():
        what = "has no manifest.json" if path.is_dir() else "does not exist" if not path.exists() else "is not a directory"
        raise errors.ExportError(f"{path} is not an export: it {what}; make one with train/export.py")
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise errors.ExportError(f"{file} is larger than the {_MAX_MANIFEST_BYTES >> 20} MiB that a manifest may have")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise errors.ExportError(f"{file} is damaged: {e}; export again") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise errors.ExportError(f"{file} is not the manifest of a {FORMAT}; export again with train/export.py")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise errors.ExportError(
            f"{file} has schema {schema}, newer than the {SCHEMA} that this version reads; upgrade superserve-jax"
        )
    if manifest.get("sha256") != _digest_of_manifest(manifest):
        raise errors.ExportError(f"{file} is damaged or was edited: its SHA-256 does not match; export again")
    for key, kind in (("files", dict), ("served", list), ("class_names", list), ("config", dict), ("payload", str)):
        if not isinstance(manifest.get(key), kind):
            raise errors.ExportError(f"{file} is damaged: '{key}' is missing or no {kind.__name__}; export again")
    if not re.fullmatch(r"payload-[0-9a-f]{16}", manifest["payload"]):
        raise errors.ExportError(f"{file} names a payload folder that cannot be one: {manifest['payload']!r}")
    return manifest


def _verify(payload: pathlib.Path, contents: Mapping[str, Any]) -> None:
    """Raises ExportError unless the payload holds exactly these files, with these sizes and digests."""
    if not payload.is_dir() or payload.is_symlink():
        raise errors.ExportError(f"{payload} is missing; the export is not whole, copy or export it again")
    found = {str(f.relative_to(payload)): f for f in _files(payload)}
    if odd := sorted(set(found) ^ set(contents)):
        state = "missing" if odd[0] in contents else "not in the manifest"
        raise errors.ExportError(f"{payload / odd[0]} is {state}; the export is not whole, copy or export it again")
    sizes = [f.get("bytes") if isinstance(f, dict) else None for f in contents.values()]
    if not all(isinstance(s, int) and 0 <= s <= _MAX_BYTES for s in sizes):
        raise errors.ExportError(f"the manifest of {payload.parent} gives impossible file sizes; export again")
    for name, expected in contents.items():
        size = found[name].stat().st_size
        if found[name].is_symlink() or size != expected["bytes"]:
            raise errors.ExportError(f"{found[name]} has {size} bytes instead of {expected['bytes']}; copy or export it again")
        if files.sha256(found[name]) != expected.get("sha256"):
            raise errors.ExportError(f"{found[name]} is damaged: its SHA-256 does not match; copy or export it again")


def _pack_rows(rows: Mapping[subnets.Subnet, np.ndarray]) -> bytes:
    """One npz: the subnets as JSON text, and their rows end to end."""
    buffer = io.BytesIO()
    order = json.dumps([s.to_json() for s in rows])
    widths = np.array([r.shape[1] for r in rows.values()], np.int64)
    np.savez(buffer, subnets=np.array(order), widths=widths, rows=np.concatenate(list(rows.values()), axis=1))
    return buffer.getvalue()


def _unpack_rows(file: pathlib.Path) -> dict[subnets.Subnet, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            order = [subnets.Subnet.from_json(s) for s in json.loads(str(arrays["subnets"]))]
            widths, rows = arrays["widths"], arrays["rows"]
    except (OSError, ValueError, KeyError, errors.SuperServeError) as e:
        raise errors.ExportError(f"{file} does not hold SubnetNorm statistics: {e}; export again") from e
    if len(order) != len(widths) or rows.shape != (2, int(widths.sum())) or rows.dtype != np.float32:
        raise errors.ExportError(f"{file} is not consistent: {len(order)} subnets, rows {rows.shape}; export again")
    ends = np.cumsum(widths)
    return {s: rows[:, end - w : end].copy() for s, w, end in zip(order, widths, ends, strict=True)}


def _read_vocabulary(file: pathlib.Path, settings: Any, config: Any) -> vocabularies.Vocabulary | None:
    """The vocabulary, by its settings in the manifest, which older exports and those of other models do not have."""
    if settings is None:
        return None
    try:
        vocabulary = vocabularies.Vocabulary.read(file, **settings)
        vocabulary.check_fit(config)
    except (errors.SuperServeError, TypeError) as e:
        raise errors.ExportError(f"{file} is not the vocabulary that the manifest describes: {e}; export again") from e
    return vocabulary


def _is_leftover(file: pathlib.Path) -> bool:
    """Whether a file is what an interrupted first export leaves behind."""
    return file.name.startswith(("payload-", _MANIFEST))


# -- files and digests --------------------------------------------------------------------------------------------------


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (f for f in sorted(folder.rglob("*")) if f.is_symlink() or not f.is_dir())


def _describe(file: pathlib.Path) -> dict[str, Any]:
    with file.open("rb") as f:
        os.fsync(f.fileno())
    return {"bytes": file.stat().st_size, "sha256": files.sha256(file)}


def _digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_directory(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _input_contract(config: Any) -> dict[str, Any]:
    """The raw input in words and numbers, for whoever reads the manifest."""
    spec = config.input_spec(1)
    return {"shape": [None, *spec.shape[1:]], "dtype": str(spec.dtype), "bytes": math.prod(spec.shape) * spec.dtype.itemsize}
