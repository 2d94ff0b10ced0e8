"""Recorded arrivals: reads a CSV file of your own traffic. No jax.

docs/traces.md describes the format. In short: one row per query and one column of arrival times. The times may be seconds from
any zero, Unix timestamps in s, ms, us or ns, or dates in ISO 8601.
"""

import array
import csv
import datetime
import io
import logging
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from superserve_jax import errors, files
from superserve_jax.simulation import traces
from superserve_jax.simulation.traces import Trace

_log = logging.getLogger(__name__)

_USUAL = "arrival_s"  # the column, if none is named
_OPTIONAL = {"slo_ms", "floor", "length"}
_SHOWN = 20  # columns that a message lists
_LEAD_S = 60.0  # a trace that begins later than this is shifted to its first arrival
_LEAST_UNIX_S, _MOST_UNIX_S = 1e9, 1e10  # of Unix timestamps: in the years 2001 and 2286
_MOST_S = 1e8  # no recording is longer than three years
_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


class _Recording(NamedTuple):
    column: str  # of the arrivals
    dates: bool  # whether they are dates; if so, they are in seconds
    lines: np.ndarray  # the line of each row
    values: dict[str, np.ndarray]  # the columns that matter


def trace(
    path: str | os.PathLike[str], *, column: str | None = None, speed: float = 1.0, slo_ms: float = 36.0, quiet: bool = False
) -> Trace:
    """Reads recorded arrivals, and logs how it understood them. The rows need not be sorted.

    Times from one clock, such as Unix timestamps, are shifted, so that the first arrival is at 0. Seconds from about 0 are
    kept as they are. The optional columns slo_ms, floor and length hold the SLO, the accuracy floor and the number of tokens.

    Args:
      path: the CSV file, with a header.
      column: the column of the arrivals. By default "arrival_s", or the only column of the file.
      speed: how many times as fast the arrivals come as they were recorded. SLOs stay the same.
      slo_ms: the SLO of all queries, if the file has no column slo_ms.
      quiet: do not log.

    Raises DataError for a missing file, a missing column, or a bad row. The message names the line of the row.
    """
    traces.check(slo_ms=slo_ms, speed=speed)
    try:
        found = _read(path, column)
        arrivals, kind = _seconds(found)
        usual = (("slo_ms", slo_ms), ("floor", 0.0), ("length", 0.0))
        slos, floors, lengths = (found.values.get(name, np.array(value)) for name, value in usual)
        for _, expected, values, right in traces.expectations(np.zeros(1), slos, floors, lengths):
            if not right.all():
                i = np.argmin(right)
                raise errors.DataError(f"line {found.lines[i]}: {expected}, got {values[i]:g}; mend or remove the row")
    except errors.DataError as e:
        raise errors.DataError(f"{path}, {e}") from None
    except (OSError, TypeError, ValueError, csv.Error) as e:
        raise errors.DataError(f"cannot read arrivals from {path}: {e}") from e
    unsorted = int((np.diff(arrivals) < 0).sum())
    order = np.argsort(arrivals, kind="stable")
    slos, floors, lengths = (values[order] if values.ndim else values.item() for values in (slos, floors, lengths))
    if not quiet:
        sped = "" if speed == 1 else f", {speed:g} times as fast as recorded"
        disorder = f"; {unsorted:,} rows come before an earlier one and are sorted in" if unsorted else ""
        _log.info("%s: %s arrivals, column '%s' holds %s%s%s", path, f"{len(order):,}", found.column, kind, sped, disorder)
    stem = pathlib.Path(path).stem
    name = stem if speed == 1 else f"{stem}, {speed:g} times as fast"
    return Trace(arrivals[order] / speed, slos, floors, name, lengths if np.any(lengths) else 0)


def _read(path: str | os.PathLike[str], column: str | None) -> _Recording:
    """Reads a file. Keeps only the numbers, 8 bytes each, since there may be millions of rows."""
    with io.TextIOWrapper(files.open_regular(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        header = list(reader.fieldnames or ())
        column = _column(column, header)
        reads = dict.fromkeys(_OPTIONAL & set(header), _number)
        lines, columns = array.array("q"), {name: array.array("d") for name in (column, *reads)}
        for cells in reader:
            line = reader.line_num
            if not lines:
                reads[column] = _arrival if _is_number(cells[column]) else _date
            if len(lines) >= traces.MAX_QUERIES:
                raise errors.DataError(f"line {line}: a trace may have at most {traces.MAX_QUERIES:,} queries; cut the file")
            lines.append(line)
            for name, values in columns.items():
                values.append(reads[name](line, name, cells[name]))
    if not lines:
        raise errors.DataError("line 1: the file has no arrivals; expected one row per query below the header")
    values = {name: np.asarray(numbers) for name, numbers in columns.items()}
    return _Recording(column, reads[column] is _date, np.asarray(lines), values)


def _column(column: str | None, header: Sequence[str]) -> str:
    wanted = column or (header[0] if len(header) == 1 else _USUAL)
    if header and all(_is_number(cell) for cell in header):
        raise errors.DataError(f"line 1: it must name the columns, got {header[:_SHOWN]}; add a line such as '{_USUAL}'")
    if wanted not in header or not wanted:
        more = f" and {len(header) - _SHOWN} more" if len(header) > _SHOWN else ""
        hint = "choose one of them" if column else "name the column of the arrival times (--trace-column NAME)"
        raise errors.DataError(f"line 1: there is no column '{wanted}', only {list(header[:_SHOWN])}{more}; {hint}")
    return wanted


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _number(line: int, column: str, text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise errors.DataError(
            f"line {line}: column '{column}' must be a number, got {text!r}; mend or remove the row"
        ) from None


def _arrival(line: int, column: str, text: str | None) -> float:
    value = float(text or "") if _is_number(text) else math.nan
    if not 0 <= value < math.inf:
        raise errors.DataError(
            f"line {line}: column '{column}' must be a finite number from 0 up, got {text!r}; mend or remove the row"
        )
    return value


def _date(line: int, column: str, text: str | None) -> float:
    try:
        date = datetime.datetime.fromisoformat((text or "").strip())
    except ValueError:
        raise errors.DataError(
            f"line {line}: column '{column}' must be a number, or a date such as 2026-11-27T12:30:05.25Z, "
            f"got {text!r}; mend or remove the row"
        ) from None
    # Without a time zone, a date counts as UTC, so that no hour is missing or double.
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


def _seconds(found: _Recording) -> tuple[np.ndarray, str]:
    """Arrivals in seconds, in the order of the rows, and in words what the column holds."""
    times = found.values[found.column]
    least, latest = int(np.argmin(times)), int(np.argmax(times))
    first, last = float(times[least]), float(times[latest])
    name, unit = ("s", 1.0) if found.dates else _unit(found.column, first)
    if not found.dates and first * unit >= _MOST_UNIX_S:
        raise errors.DataError(
            f"line {found.lines[least]}: column '{found.column}' has {first:g}, too much for a time in {name}; "
            "choose another column, or let its name end in its unit: _ms, _us or _ns"
        )
    kind = "dates" if found.dates else f"{'Unix timestamps' if first * unit >= _LEAST_UNIX_S else 'times'} in {name}"
    if not (last - first) * unit <= _MOST_S:
        years = (last - first) * unit / (365.25 * 86_400)
        raise errors.DataError(
            f"line {found.lines[latest]}: this arrival is {years:.3g} years after the one in line {found.lines[least]}; "
            "give all times in one unit and from one zero"
        )
    if first * unit <= _LEAD_S:
        return times * unit, kind
    return (times - first) * unit, f"{kind}, shifted to the first arrival"


def _unit(column: str, first: float) -> tuple[str, float]:
    """The unit of a column, with its length in seconds: from the column's name, or from the size of a Unix timestamp."""
    named = next((unit for unit in _UNITS[1:] if column.endswith(f"_{unit[0]}")), None)
    step = int(math.log10(max(first / _LEAST_UNIX_S, 1)) / 3)
    return named or _UNITS[min(step, len(_UNITS) - 1)]
