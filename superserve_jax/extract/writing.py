"""Extracts a subnet, checks its file and writes it."""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

from superserve_jax import errors, files
from superserve_jax.exports import Model
from superserve_jax.extract import checking, formats
from superserve_jax.extract.checking import TOLERANCE, Check
from superserve_jax.extract.extraction import Extraction, take
from superserve_jax.extract.formats import Format


@dataclasses.dataclass(frozen=True)
class Written:
    """What `write` has written.

    Args:
      paths: the file. For StableHLO, also the file of its contract.
      format: the format.
      size: bytes of the first file.
      check: how its logits compare with the server's, or why they were not compared.
      subnet: the subnet.
      contract: the contract in the file.
    """

    paths: tuple[pathlib.Path, ...]
    format: Format
    size: int
    check: Check
    subnet: Extraction
    contract: dict[str, Any]


def paths_of(path: pathlib.Path, format: Format) -> tuple[pathlib.Path, ...]:
    """The files to write: PATH, and for StableHLO also PATH.json, since that format has no place for the contract."""
    return (path, path.with_name(f"{path.name}.json")) if format == "stablehlo" else (path,)


def write(path: str | os.PathLike[str], model: Model, index: int = -1, *, format: str | None = None) -> Written:
    """Writes a served subnet as a file of its own. An older file is replaced atomically.

    Args:
      path: the file.
      model: the export.
      index: the place of the subnet in `model.served`, which ascends in FLOPs. -1 is the largest.
      format: "onnx", "stablehlo" or "safetensors"; the ending of the file's name if left out.

    Raises:
      SubnetError: there is no such subnet.
      ConfigError, UnknownNameError: the format is not known.
      ExportError: the family cannot have this format, its package is missing, or the file's logits differ from the server's.
      WriteError: the file cannot be written.

    >>> import tempfile, superserve_jax as ss
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/smallest.safetensors", ss.load("digits"), 0).format
    'safetensors'
    """
    path, format = files.user_path(path), formats.format_of(path, format)
    subnet = take(model, index)
    content, contract = formats.content(subnet, format), formats.contract_of(subnet, format)
    check = checking.check(model, subnet, format, content)
    if check.is_wrong:
        raise errors.ExportError(
            f"the logits of the {format} file, run with {check.ran_with}, differ from the server's by {check.difference:.1e} "
            f"of the largest logit; at most {TOLERANCE:g} is allowed. Nothing was written. Please report this"
        )
    files.write_bytes(path, content)
    paths = paths_of(path, format)
    for beside in paths[1:]:
        files.write_json(beside, {**contract, "sha256": hashlib.sha256(content).hexdigest()})
    return Written(paths, format, len(content), check, subnet, contract)
