"""The export: the one artefact between training and serving, a self-describing directory.

    manifest.json            what it is: config, space, served subnets, how they were measured, a SHA-256 of every file
    payload-<digest>/        named by its content
        weights/             Orbax
        statistics.npz       SubnetNorm rows
        vocabulary.txt       of a model of texts: its tokens, one a line
    profiles/<device>.json   latency profiles, one per kind of device; made later, not part of the manifest

It is data only: nothing in it is executed or unpickled. Replacing manifest.json is the commit, so whoever is killed while
writing leaves the old export or the new one. Every file is checked against its digest before it is read (`manifest.py`).
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
import numpy as np
import orbax.checkpoint as ocp

from superserve_jax import errors, families, files
from superserve_jax.exports import statistics
from superserve_jax.manifest import MANIFEST_FORMAT, MANIFEST_NAME, MANIFEST_SCHEMA, files_of, read_manifest, verify_files
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig, SequenceConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

_VOCABULARY = "vocabulary.txt"
# How much larger than its files the weights of an export can be, and what may be in its files beside weights and rows.
_MAX_RATIO, _MAX_OTHER_BYTES, _MAX_SUBNET_BYTES = 10_000, 64 << 20, 64 << 10


@dataclasses.dataclass(frozen=True)
class Served:
    """A subnet that the export offers for serving.

    Args:
      subnet: the subnet.
      accuracy: top-1 on test data with its own statistics, a fraction.
      accuracy_shared: the same with the largest subnet's statistics, or None where it was not measured.
      flops: multiply-adds per input. params: weights of the subnet on its own.
    """

    subnet: Subnet
    accuracy: float
    accuracy_shared: float | None
    flops: int
    params: int

    def __post_init__(self):
        if not isinstance(self.subnet, Subnet):
            raise errors.ConfigError(f"a served subnet must be a Subnet, got {self.subnet!r}")
        for name, value in (("accuracy", self.accuracy), ("accuracy_shared", self.accuracy_shared)):
            known = isinstance(value, int | float) or (value is None and name == "accuracy_shared")
            if not known or not 0 <= (value or 0) <= 1:
                raise errors.ConfigError(f"{name} of a served subnet must be a fraction from 0 to 1, got {value!r}")
        for name, value in (("flops", self.flops), ("params", self.params)):
            if not isinstance(value, int) or value < 0:
                raise errors.ConfigError(f"{name} of a served subnet must be a whole number from 0 up, got {value!r}")

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        return {**dataclasses.asdict(self), "subnet": self.subnet.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Served":
        """The inverse of `to_json`. Raises ConfigError where `data` has not that form."""
        with errors.refusing(errors.ConfigError, "not a served subnet as `Served.to_json` gives it"):
            return Served(**{**data, "subnet": Subnet.from_json(data["subnet"])})


class Model(SuperNet):
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
        vocabulary: Vocabulary | None,
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
        if self._vocabulary is None or not isinstance(self.config, SequenceConfig):
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
    def subnets(self) -> tuple[Subnet, ...]:
        """The served subnets, in ascending order of FLOPs."""
        return tuple(s.subnet for s in self.served)


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
      NotCalibratedError: a served subnet has no statistics. SubnetError: it is not of the model.
      ExportError: the place holds something else, or cannot be written to.
      ConfigError: nothing to serve, a vocabulary that is not the model's, or an argument of another type.
    """
    _check_arguments(model, served, measured, class_names, vocabulary, training)
    kept = {s.subnet for s in served} | ({model.space.largest()} & set(model.statistics))
    calibrated = {subnet: model.statistics_of(subnet) for subnet in sorted(kept, key=model.config.flops)}
    path = _make_folder(path)
    part = path / f"payload-part.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((part / "weights").absolute(), model.params)
    statistics.write(part / "statistics.npz", calibrated)
    if vocabulary is not None:
        (part / _VOCABULARY).write_bytes(vocabulary.to_text().encode())
    contents = {str(f.relative_to(part)): _describe(f) for f in files_of(part)}
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]
    payload = path / f"payload-{digest}"
    if payload.exists():
        shutil.rmtree(payload)
    os.rename(part, payload)
    _sync_directory(path)
    manifest = {
        "format": MANIFEST_FORMAT,
        "schema": MANIFEST_SCHEMA,
        "config": families.config_to_json(model.config),
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
    manifest["sha256"] = files.digest(manifest)
    new = path / f"{MANIFEST_NAME}.part"
    with new.open("w") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path / MANIFEST_NAME)
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
    manifest = read_manifest(path)
    path = pathlib.Path(path)
    payload = path / manifest["payload"]
    file = path / MANIFEST_NAME
    try:
        with errors.refusing(errors.ExportError, "its fields do not fit together"):
            config = families.config_from_json(manifest["config"])
            served = tuple(Served.from_json(s) for s in manifest["served"])
            if not served or len({config.space().validate(s.subnet) for s in served}) < len(served):
                raise errors.ExportError("it must serve at least one subnet, each of them once")
            _check_sizes(config, len(served), sum(f["bytes"] for f in manifest["files"].values()))
    except errors.SuperServeError as e:
        raise errors.ExportError(f"{file} does not describe a SuperNet that this version can build: {e}; export again") from e
    verify_files(payload, manifest["files"])
    calibrated = statistics.read(payload / "statistics.npz", config)
    if missing := [s.subnet for s in served if s.subnet not in calibrated]:
        raise errors.ExportError(
            f"{payload / 'statistics.npz'} lacks those of the served {missing[0].to_json()}; export again"
        )
    vocabulary = _read_vocabulary(payload / _VOCABULARY, manifest.get("vocabulary"), config)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in programs.param_spec(config).items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((payload / "weights").absolute(), target)
    except Exception as e:  # Orbax raises many kinds; digests matched, so the weights are not those of this config
        raise errors.ExportError(f"{payload / 'weights'} does not hold the weights of its own config: {e}") from e
    return Model(path, manifest, served, vocabulary, config, params, calibrated)


def profile_path(path: str | os.PathLike[str], device_kind: str) -> pathlib.Path:
    """Where an export keeps its latency profile for a kind of device.

    >>> str(profile_path("export", "NVIDIA H100 80GB HBM3"))
    'export/profiles/nvidia-h100-80gb-hbm3.json'
    """
    return pathlib.Path(path) / "profiles" / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")


@errors.refusing(errors.ConfigError, "export takes a SuperNet, `Served` subnets, texts, and a training config as plain values")
def _check_arguments(
    model: SuperNet,
    served: Sequence[Served],
    measured: str,
    class_names: Sequence[str],
    vocabulary: Vocabulary | None,
    training: Mapping[str, Any] | None,
) -> None:
    """Raises before anything is written."""
    if not isinstance(model, SuperNet) or not all(isinstance(s, Served) for s in served):
        raise errors.ConfigError(
            f"an export is of a SuperNet and a list of `Served`, got {type(model).__name__} and {served!r}"
        )
    if not served or len({s.subnet for s in served}) < len(served):
        raise errors.ConfigError(f"an export needs at least one subnet to serve, each of them once; got {len(served)}")
    if not isinstance(measured, str) or not all(isinstance(name, str) for name in class_names):
        raise errors.ConfigError(f"measured and class_names are texts, got {measured!r} and {class_names!r}")
    json.dumps(dict(training or {}))
    for s in served:
        model.space.validate(s.subnet)
    if vocabulary is not None:
        vocabulary.check_fit(model.config)


def _make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    try:
        path = pathlib.Path(path)
        if path.exists() and not (path / MANIFEST_NAME).exists() and not all(map(_is_leftover, path.iterdir())):
            raise errors.ExportError(f"{path} is not empty and holds no export; choose another directory")
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError) as e:
        raise errors.ExportError(f"cannot export to {path!r}: {e}; choose another directory") from e
    return path


def _check_sizes(config: FamilyConfig, num_served: int, payload_bytes: int) -> None:
    """Raises ExportError unless files of so many bytes can hold a network of this config; before they are read, and before
    memory is taken for it."""
    weights = sum(math.prod(s.shape) * s.dtype.itemsize for s in programs.param_spec(config).values())
    row = 8 * sum(config.norm_sizes(config.sizes(config.space().largest())).values())
    most = 2 * weights + (num_served + 1) * (row + _MAX_SUBNET_BYTES) + _MAX_OTHER_BYTES
    if not weights / _MAX_RATIO <= payload_bytes <= most:
        raise errors.ExportError(f"weights of {weights:,} bytes do not fit files of {payload_bytes:,} bytes")


def _read_vocabulary(file: pathlib.Path, settings: Any, config: FamilyConfig) -> Vocabulary | None:
    """The vocabulary, by its settings in the manifest, which older exports and those of other models do not have."""
    if settings is None:
        return None
    try:
        vocabulary = Vocabulary.read(file, **settings)
        vocabulary.check_fit(config)
    except (errors.SuperServeError, TypeError) as e:
        raise errors.ExportError(f"{file} is not the vocabulary that the manifest describes: {e}; export again") from e
    return vocabulary


def _is_leftover(file: pathlib.Path) -> bool:
    """Whether a file is what an interrupted first export leaves behind."""
    return file.name.startswith(("payload-", MANIFEST_NAME))


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


def _input_contract(config: FamilyConfig) -> dict[str, Any]:
    """The raw input in words and numbers, for whoever reads the manifest."""
    spec = config.input_spec(1)
    return {"shape": [None, *spec.shape[1:]], "dtype": str(spec.dtype), "bytes": math.prod(spec.shape) * spec.dtype.itemsize}
