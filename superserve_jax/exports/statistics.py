"""The SubnetNorm rows of an export in one npz file: the subnets as JSON text, and their rows end to end."""

import io
import json
import math
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig

Rows = Mapping[Subnet, np.ndarray]


def pack(rows: Rows) -> bytes:
    """The file's content; rows are float32 (2, n)."""
    buffer = io.BytesIO()
    order = json.dumps([s.to_json() for s in rows])
    widths = np.array([r.shape[1] for r in rows.values()], np.int64)
    np.savez(buffer, subnets=np.array(order), widths=widths, rows=np.concatenate(list(rows.values()), axis=1))
    return buffer.getvalue()


def read(file: pathlib.Path, config: FamilyConfig) -> dict[Subnet, np.ndarray]:
    """The rows, of as many channels as a family's config has for each subnet. Raises ExportError for any other content."""
    try:
        with errors.refusing(errors.ExportError, f"{file} does not hold SubnetNorm statistics; export again"):
            return _read(file, config)
    except (
        errors.SubnetError,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as e:  # of damaged or odd archives
        raise errors.ExportError(f"{file} does not hold SubnetNorm statistics: {e}; export again") from e


def _read(file: pathlib.Path, config: FamilyConfig) -> dict[Subnet, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            _check_size(archive, entry, file.stat().st_size)
    with np.load(file, allow_pickle=False) as arrays:
        order = [Subnet.from_json(s) for s in json.loads(str(arrays["subnets"]))]
        widths, rows = arrays["widths"], arrays["rows"]
    space = config.space()
    expected = [sum(config.norm_sizes(config.sizes(space.validate(s))).values()) for s in order]
    if widths.tolist() != expected or rows.shape != (2, sum(expected)) or rows.dtype != np.float32:
        raise errors.ExportError(f"{file} has rows of {rows.shape} that do not fit its {len(order)} subnets; export again")
    ends = np.cumsum(expected, dtype=np.int64)
    return {s: rows[:, end - n : end].copy() for s, n, end in zip(order, expected, ends, strict=True)}


def _check_size(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file_bytes: int) -> None:
    """Raises ValueError where an array claims to be larger than its file: numpy would ask for the memory first."""
    with archive.open(entry) as f:
        np.lib.format.read_magic(f)
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    if not math.prod(shape) * dtype.itemsize <= entry.file_size <= file_bytes:
        raise ValueError(f"{entry.filename} claims the shape {shape} in a file of {file_bytes} bytes")
