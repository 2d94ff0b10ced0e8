"""Reads Parquet files, the format of datasets on the Hugging Face Hub."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from superserve_jax import errors, files


def rows(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, as {column: value}.

    Raises DataError if the package pyarrow is missing, and ValueError if the file is damaged.
    """
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise errors.DataError("the format Parquet, which needs the package pyarrow: pip install pyarrow") from e
    with files.open_regular(path) as file:
        yield from pyarrow.parquet.read_table(file).to_pylist()
