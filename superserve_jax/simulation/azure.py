"""The Azure Functions 2019 trace: read its invocation counts, and shrink a day to a short trace. No jax.

The Azure Public Dataset (CC-BY; Shahrad et al., "Serverless in the Wild", USENIX ATC 2020) has one CSV file per day. Each row
is a function: HashOwner, HashApp, HashFunction, Trigger, and the invocations in minutes 1 to 1440. The paper (its Section 6.2)
shrinks a day to 120 s, with the same shape and a mean of 6400 queries/s.
"""

import csv
import io
import itertools
import os
import re
from collections.abc import Sequence

import numpy as np

from superserve_jax import errors, files
from superserve_jax.simulation import traces
from superserve_jax.simulation.traces import Trace

_MINUTE = re.compile(r"(?:m(?:in(?:ute)?)?[ _]?)?(\d{1,9})(?:\.0)?", re.IGNORECASE)  # "7", "007", "7.0", "minute 7", "Min_7"
_EXACT = 2.0**53  # a float holds every whole number up to this


def invocations_per_minute(path: str | os.PathLike[str]) -> np.ndarray:
    """Invocations of all functions together in each minute, int64 [minutes].

    A column holds a minute if its header is a number, alone or after "minute", "min" or "m". All other columns are ignored.
    The minutes are sorted by their numbers, and gaps between the numbers are ignored. An empty cell is 0.

    Args:
      path: the CSV file of a day.

    Raises DataError for a file without minutes, and for a bad row. The message names the line of the row.
    """
    total = None
    try:
        with io.TextIOWrapper(files.open_regular(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            columns = _minute_columns(header, f"{path}, line 1")
            for row in filter(any, rows):
                where = f"{path}, line {rows.line_num}"
                if row == header:
                    raise errors.DataError(f"{where}: the header again; keep the rows of one day")
                counts = _counts(row, columns, len(header), where)
                total = counts if total is None else total + counts
    except errors.DataError:
        raise
    except (OSError, TypeError, ValueError, csv.Error) as e:
        raise errors.DataError(f"cannot read invocations from {path}: {e}") from e
    if total is None:
        raise errors.DataError(f"{path} has no rows; expected a header and one row of invocations per function")
    if not total.sum() < _EXACT:
        raise errors.DataError(f"{path} counts {_EXACT:g} invocations or more, which is impossible; mend the file")
    return total.astype(np.int64)


def trace(
    path: str | os.PathLike[str], *, mean_qps: float = 6400.0, duration_s: float = 120.0, slo_ms: float = 36.0, seed: int = 0
) -> Trace:
    """Traffic with the shape of the recorded time, shrunk to `duration_s` and scaled to a mean rate.

    Each recorded minute becomes an equal slice of `duration_s`, and keeps its share of the queries, to within one query. The
    file does not contain times within a minute. So the arrivals of a slice are uniformly random, like a Poisson process with a
    given count.

    Args:
      path: the CSV file of a day.
      mean_qps: mean number of arrivals per second.
      duration_s: length of the traffic.
      slo_ms: the SLO of all queries.
      seed: seed of the arrivals within the slices.
    """
    traces.check(mean_qps=mean_qps, duration_s=duration_s)
    traces.count(mean_qps, duration_s)
    rng = traces.generator(seed)
    minutes = invocations_per_minute(path)
    if not minutes.sum():
        raise errors.DataError(f"{path}: not one invocation in {len(minutes)} minutes; give a file with invocations")
    ends = np.rint(np.cumsum(minutes) / minutes.sum() * mean_qps * duration_s).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    within = rng.random(int(ends[-1]))
    arrivals = (np.repeat(np.arange(len(minutes)), counts) + within) * (duration_s / len(minutes))
    return Trace(np.sort(arrivals), slo_ms, name=f"MAF {mean_qps:g} qps")


def _minute_columns(header: Sequence[str], where: str) -> list[int]:
    """Indices of the columns that hold minutes, in ascending order of the minutes."""
    found = sorted((int(match[1]), i) for i, cell in enumerate(header) if (match := _MINUTE.fullmatch(cell.strip())))
    if not found:
        raise errors.DataError(f"{where}: no column is a minute; expected headers such as 1, 2, 3, got {list(header)[:6]}")
    for (minute, _), (following, _) in itertools.pairwise(found):
        if minute == following:
            raise errors.DataError(f"{where}: two columns are minute {minute}; keep the rows of one day")
    return [i for _, i in found]


def _counts(row: Sequence[str], columns: Sequence[int], width: int, where: str) -> np.ndarray:
    """The invocations of one function in each minute."""
    if len(row) != width:
        raise errors.DataError(f"{where}: {len(row)} cells where the header has {width}; mend or remove the row")
    try:
        counts = np.array([row[c] or "0" for c in columns], np.float64)
    except ValueError as e:
        raise errors.DataError(f"{where}: invocations must be whole numbers ({e}); mend or remove the row") from None
    bad = ~((counts >= 0) & (counts < _EXACT) & (counts == np.floor(counts)))
    if bad.any():
        value = row[columns[int(np.argmax(bad))]]
        raise errors.DataError(f"{where}: invocations must be whole numbers from 0 up, got {value!r}; mend or remove the row")
    return counts
