"""The file `statistics.npz` of SubnetNorm statistics, in an export and in the folder of a run.

subnets   the subnets, as one JSON text
widths    int64 (number of subnets,): n, the number of channels in the norms of each subnet
rows      float32 (2, sum of widths): means and variances of all subnets, one subnet after another
"""

import io
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from superserve_jax import errors, files
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig


def write(file: str | os.PathLike[str], statistics: Mapping[Subnet, np.ndarray]) -> None:
    """Writes statistics, each float32 (2, n), as `SuperNet.statistics` holds them. Replaces an older file atomically."""
    arrays = [np.zeros((2, 0), np.float32), *statistics.values()]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        subnets=np.array(json.dumps([s.to_json() for s in statistics])),
        widths=np.array([a.shape[1] for a in arrays[1:]], np.int64),
        rows=np.concatenate(arrays, axis=1),
    )
    files.write_bytes(file, buffer.getvalue())


def read(file: str | os.PathLike[str], config: FamilyConfig) -> dict[Subnet, np.ndarray]:
    """Reads statistics.

    Also reads the older format of runs, which has one array for each subnet: `row0`, `row1`, ...

    Args:
      file: a file that `write` made.
      config: the family's config. It says how many channels each subnet must have.

    Raises:
      ExportError: the file is missing, damaged, or from another network.
    """
    path = pathlib.Path(file)
    try:
        return _read(path, config)
    except errors.ExportError:
        raise
    except Exception as e:  # zipfile and NumPy raise many kinds of errors for damaged archives
        raise errors.ExportError(
            f"{path} does not hold SubnetNorm statistics: {errors.one_line(e)}; calibrate or export again"
        ) from e


def _read(file: pathlib.Path, config: FamilyConfig) -> dict[Subnet, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise ValueError("its arrays claim to be larger than the file")
        space = config.space()
        subnets = [space.validate(Subnet.from_json(s)) for s in json.loads(str(_array(archive, "subnets")))]
        if "rows.npy" in names:
            widths, statistics = _array(archive, "widths").tolist(), _array(archive, "rows")
        else:
            each = [np.zeros((2, 0), np.float32), *(_array(archive, f"row{i}") for i in range(len(subnets)))]
            widths, statistics = [a.shape[1] for a in each[1:]], np.concatenate(each, axis=1)
    expected = [sum(config.norm_sizes(config.sizes(s)).values()) for s in subnets]
    if widths != expected or statistics.shape != (2, sum(expected)) or statistics.dtype != np.float32:
        raise errors.ExportError(
            f"{file} has statistics of shape {statistics.shape} and dtype {statistics.dtype}, which do not fit its "
            f"{len(subnets)} subnets: expected shape {(2, sum(expected))} and float32; calibrate or export again"
        )
    ends = np.cumsum(expected, dtype=np.int64)
    return {s: statistics[:, end - n : end].copy() for s, n, end in zip(subnets, expected, ends, strict=True)}


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an archive. Raises ValueError if it claims to be larger than its file.

    `np.load` would first allocate memory for the claim. It also takes memory for zeros that are packed into few bytes.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{entry.filename} has an unknown version of NumPy's format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if not 0 <= math.prod(shape) * max(dtype.itemsize, 1) <= entry.file_size:
            raise ValueError(f"{entry.filename} claims the shape {shape} in {entry.file_size} bytes")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
