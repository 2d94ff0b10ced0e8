"""Extracts a subnet, checks its file and writes it."""

import dataclasses
import hashlib
import os
import pathlib

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
      paths: the file. For StableHLO, also the file of its contract, since the format has no place for it.
      kind: the format.
      size: bytes of the first file.
      check: how its logits compare with the server's, or None if it was not run.
      subnet: the subnet.
    """

    paths: tuple[pathlib.Path, ...]
    kind: Format
    size: int
    check: Check | None
    subnet: Extraction


def write(path: str | os.PathLike[str], model: Model, index: int = -1, *, kind: str | None = None) -> Written:
    """Writes a served subnet as a file of its own. An older file is replaced atomically.

    Args:
      path: the file.
      model: the export.
      index: the place of the subnet in `model.served`, which ascends in FLOPs. -1 is the largest.
      kind: "onnx", "stablehlo" or "safetensors"; the ending of the file's name if left out.

    Raises:
      SubnetError: there is no such subnet.
      ConfigError, UnknownNameError: the format is not known.
      ExportError: the family cannot have this format, its package is missing, or the file's logits differ from the server's.
      WriteError: the file cannot be written.

    >>> import tempfile, superserve_jax as ss
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/smallest.safetensors", ss.load("digits"), 0).kind
    'safetensors'
    """
    path, kind = files.user_path(path), formats.format_of(path, kind)
    subnet = take(model, index)
    content = formats.content(subnet, kind)
    check = checking.check(model, subnet, kind, content)
    if check is not None and not check.is_equal:
        raise errors.ExportError(
            f"the logits of the {kind} file, run with {check.ran_with}, differ from the server's by {check.difference:.1e} of "
            f"the largest logit, at most {TOLERANCE:g} is allowed; nothing was written. Please report this"
        )
    files.write_bytes(path, content)
    paths = (path,)
    if kind == "stablehlo":
        paths = (path, path.with_name(f"{path.name}.json"))
        files.write_json(paths[1], {**subnet.contract, "sha256": hashlib.sha256(content).hexdigest()})
    return Written(paths, kind, len(content), check, subnet)
