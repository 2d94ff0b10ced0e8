"""Azure Functions 2019 as traffic: the reader of its invocation counts, and the day shrunk to minutes. No jax.

The Azure Public Dataset (CC-BY; Shahrad et al., "Serverless in the Wild", USENIX ATC 2020) has one CSV file per day: a row
per function with HashOwner, HashApp, HashFunction, Trigger and the invocations in minutes 1 to 1440. The paper (its
Section 6.2) shrinks a day to 120 s keeping the shape, at a mean of 6400 queries/s.
"""

import csv
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from superserve_jax import errors
from superserve_jax.simulation import traces
from superserve_jax.simulation.traces import Trace

Path = str | os.PathLike[str]

# "7", "007", "7.0", "minute 7", "Min_7", "m7"; of a table that joins days "day2 minute 7", "d02_7", and as pandas marks
# columns of the same name "7.1", "7_y".
_MINUTE = re.compile(
    r"(?:d(?:ay)?[ _.-]?(?P<day>\d{1,9})[ _.:-]+)?(?:m(?:in(?:ute)?s?)?[ _.-]?)?"
    r"(?P<minute>\d{1,9})(?:\.(?P<copy>\d{1,9})|_(?P<side>[xy]))?",
    re.IGNORECASE,
)


_EXACT = 2.0**53  # up to which a float holds every whole number


def invocations_per_minute(paths: Path | Sequence[Path]) -> np.ndarray:
    """Invocations of all functions together in each minute, int64.

    Reads the files as published and as samples of them circulate. A column is a minute if its header is a number, alone or
    after "minute", "min" or "m"; all other columns are ignored. The minutes that are there count as consecutive, in the order
    of their numbers. Several days may come as several files, in the order given; as parts of one file that repeats its
    header; or as columns with the day before the minute, or with a minute named twice. An empty cell is 0, as joining
    tables leaves it.

    Raises DataError for a file without minutes, and for a bad row with its line.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    with errors.refusing(errors.ConfigError, f"expected the path of a CSV file, or a list of paths, got {paths!r}"):
        files = [pathlib.Path(path) for path in paths or ()]
    if not files:
        raise errors.ConfigError("no files given; name at least one CSV file of invocations per minute")
    return np.concatenate([day for file in files for day in _days(file)])


def trace(
    paths: Path | Sequence[Path],
    *,
    mean_qps: float = 6400.0,
    duration_s: float = 120.0,
    slo_ms: float = 36.0,
    seed: int = 0,
) -> Trace:
    """The recorded time shrunk to `duration_s` and scaled to a mean rate, keeping its shape.

    Each minute keeps its share of the queries, to within one. Inside its slice of time arrivals are uniformly random, a
    Poisson process given its count: the files say nothing about times within a minute.
    """
    traces.check(mean_qps=mean_qps, duration_s=duration_s)
    traces.count(mean_qps, duration_s)
    rng = traces.generator(seed)
    minutes = invocations_per_minute(paths)
    if not minutes.sum():
        raise errors.DataError(f"{paths}: not one invocation in {len(minutes)} minutes; there is no shape to keep")
    ends = np.rint(np.cumsum(minutes) / minutes.sum() * mean_qps * duration_s).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    within = rng.random(int(ends[-1]))
    arrivals = (np.repeat(np.arange(len(minutes)), counts) + within) * (duration_s / len(minutes))
    return Trace(np.sort(arrivals), slo_ms, name=f"MAF {mean_qps:g} qps")


def _days(path: pathlib.Path) -> list[np.ndarray]:
    """The sum of the rows under each header of a file."""
    days: list[np.ndarray] = []
    header: list[str] = []
    names: set[str] = set()
    columns: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if not any(row):
                    continue
                where = f"{path}, line {reader.line_num}"
                # Parts may have their columns in another order, or other minutes. A row of data may have a name in common with
                # the header, such as a function called "function".
                repeated = sorted(row) == sorted(header) or (len(names) > 1 and names <= set(row))
                if not header or repeated:
                    header, columns = row, _minute_columns(row, where)
                    names = {cell for cell in row if cell and not _MINUTE.fullmatch(cell.strip())}
                    days.append(np.zeros(len(columns)))
                else:
                    days[-1] += _counts(row, columns, len(header), where)
    except errors.DataError:
        raise
    except (OSError, ValueError, csv.Error) as e:
        raise errors.DataError(f"cannot read invocations from {path}: {e}") from e
    if not days:
        raise errors.DataError(f"{path} is empty; expected a header and a row of invocations per function")
    if not sum(day.sum() for day in days) < _EXACT:
        raise errors.DataError(f"{path} counts more than {_EXACT:g} invocations; that cannot be")
    return [day.astype(np.int64) for day in days]


def _minute_columns(header: Sequence[str], where: str) -> list[int]:
    """Indices of the columns that are minutes, in the order of time."""
    found: list[tuple[int, int, int, int]] = []  # (day, copy, minute, column)
    copies: dict[tuple[int, int, int], int] = {}
    for column, cell in enumerate(header):
        if match := _MINUTE.fullmatch(cell.strip()):
            copy = int(match["copy"] or 0) + ((match["side"] or "").lower() == "y")
            key = (int(match["day"] or 0), copy, int(match["minute"]))
            copies[key] = copies.get(key, 0) + 1
            found.append((key[0], copy + copies[key] - 1, key[2], column))
    if not found:
        raise errors.DataError(f"{where}: no column is a minute; expected headers such as 1, 2, 3, got {list(header)[:6]}")
    return [column for *_, column in sorted(found)]


def _counts(row: Sequence[str], columns: Sequence[int], width: int, where: str) -> np.ndarray:
    """The invocations of one function."""
    if len(row) != width:
        raise errors.DataError(f"{where}: {len(row)} cells where the header has {width}; mend or remove the row")
    try:
        counts = np.array([row[c] or "0" for c in columns], np.float64)
    except ValueError as e:
        raise errors.DataError(f"{where}: invocations are whole numbers, {e}; mend or remove the row") from None
    bad = ~((counts >= 0) & (counts < _EXACT) & (counts == np.floor(counts)))
    if bad.any():
        value = row[columns[int(np.argmax(bad))]]
        raise errors.DataError(f"{where}: invocations are whole numbers from 0 up, got {value!r}; mend or remove the row")
    return counts
