"""Recorded arrivals: reads a CSV file of your own traffic. No jax.

docs/traces.md describes the format. In short: one row per query and one column of arrival times. The times may be seconds from
any zero, Unix timestamps in s, ms, us or ns, or dates in ISO 8601.
"""

import csv
import datetime
import io
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from superserve_jax import errors, files
from superserve_jax.simulation import traces
from superserve_jax.simulation.traces import Trace

_log = logging.getLogger(__name__)

_USUAL = "arrival_s"  # the column, if none is named
_SHOWN = 20  # columns that a message lists
_LEAD_S = 60.0  # a trace that begins later than this is shifted to its first arrival
_LEAST_UNIX = 1e8  # numbers from here up are Unix timestamps: as seconds, this is in 1973
_MOST_S = 1e8  # no recording is longer than three years
_PER_STEP = 1e3  # from seconds to ms, us and ns
_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


class _Row(NamedTuple):
    line: int
    arrival: str
    slo_ms: float
    floor: float
    length: float


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
        path = pathlib.Path(path).expanduser()
        header, column, rows = _read(path, column, slo_ms)
    except errors.DataError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, csv.Error) as e:
        raise errors.DataError(f"cannot read arrivals from {path}: {e}") from e
    if not rows:
        raise errors.DataError(f"{path} has no arrivals; expected a header and one row per query")
    try:
        arrivals, kind = _seconds(column, rows)
        _check(rows)
    except errors.DataError as e:
        raise errors.DataError(f"{path}, {e}") from None
    unsorted = int((np.diff(arrivals) < 0).sum())
    order = np.argsort(arrivals, kind="stable")
    slos, floors, lengths = np.array([row[2:] for row in rows])[order].T
    arrivals = arrivals[order] / speed
    if not quiet:
        sped = "" if speed == 1 else f", {speed:g} times as fast as recorded"
        disorder = f"; {unsorted:,} rows come before an earlier one and are sorted in" if unsorted else ""
        _log.info("%s: %s arrivals, column '%s' holds %s%s%s", path, f"{len(rows):,}", column, kind, sped, disorder)
    name = path.stem if speed == 1 else f"{path.stem}, {speed:g} times as fast"
    return Trace(arrivals, slos if "slo_ms" in header else slo_ms, floors, name, lengths if lengths.any() else 0)


def _read(path: pathlib.Path, column: str | None, slo_ms: float) -> tuple[list[str], str, list[_Row]]:
    """The header, the name of the column of arrivals, and the rows of the file."""
    with io.TextIOWrapper(files.open_regular(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        header = list(reader.fieldnames or ())
        column = _column(path, column, header)
        return header, column, [_row(path, reader.line_num, cells, column, slo_ms) for cells in reader]


def _column(path: pathlib.Path, column: str | None, header: Sequence[str]) -> str:
    wanted = column or (header[0] if len(header) == 1 else _USUAL)
    if header and all(_is_number(cell) for cell in header):
        raise errors.DataError(
            f"{path}: the first line names the columns, got {header[:_SHOWN]}; add a line such as '{_USUAL}'"
        )
    if wanted not in header or not wanted:
        more = f" and {len(header) - _SHOWN} more" if len(header) > _SHOWN else ""
        hint = "choose one of them" if column else "name the column of the arrival times (--trace-column NAME)"
        raise errors.DataError(f"{path}: there is no column '{wanted}', only {list(header[:_SHOWN])}{more}; {hint}")
    return wanted


def _row(path: pathlib.Path, line: int, cells: dict[str, str], column: str, slo_ms: float) -> _Row:
    values = []
    for name, usual in (("slo_ms", slo_ms), ("floor", 0.0), ("length", 0.0)):
        try:
            values.append(float(cells.get(name, usual)))
        except (TypeError, ValueError):
            raise errors.DataError(
                f"{path}, line {line}: column '{name}' must be a number, got {cells[name]!r}; mend or remove the row"
            ) from None
    return _Row(line, cells[column] or "", *values)


def _check(rows: Sequence[_Row]) -> None:
    """Checks SLOs, floors and lengths. Raises DataError with a message that begins with the line."""
    lines, slos, floors, lengths = np.array([(row.line, *row[2:]) for row in rows]).T
    for _, expected, values, right in traces.expectations(np.zeros(len(rows)), slos, floors, lengths):
        if not right.all():
            i = np.argmin(right)
            raise errors.DataError(f"line {lines[i]:g}: {expected}, got {values[i]:g}; mend or remove the row")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _seconds(column: str, rows: Sequence[_Row]) -> tuple[np.ndarray, str]:
    """Arrivals in seconds, in the order of the rows, and in words what the column holds."""
    read = _numbers if _is_number(rows[0].arrival) else _dates
    times = np.array(list(read(column, rows)))
    least, latest = int(np.argmin(times)), int(np.argmax(times))
    first, last = float(times[least]), float(times[latest])
    if read is _dates:
        unit, kind = 1.0, "dates"
    elif first >= _LEAST_UNIX:
        step = int(np.log10(first / _LEAST_UNIX) // np.log10(_PER_STEP))
        if step >= len(_UNITS):
            raise errors.DataError(
                f"line {rows[least].line}: column '{column}' has {first:g}, too much for a time; is it the right one?"
            )
        name, unit = _UNITS[step]
        kind = f"Unix timestamps in {name}"
    else:
        name, unit = next((u for u in _UNITS[1:] if column.endswith(f"_{u[0]}")), _UNITS[0])
        kind = f"times in {name}"
    if not (last - first) * unit <= _MOST_S:
        years, low, high = (last - first) * unit / (365.25 * 86_400), rows[least], rows[latest]
        raise errors.DataError(
            f"line {high.line}: {high.arrival!r} is {years:.3g} years after {low.arrival!r} in line {low.line}; "
            "give all times in one unit and from one zero"
        )
    if first * unit <= _LEAD_S:
        return times * unit, kind
    return (times - first) * unit, f"{kind}, shifted to the first arrival"


def _numbers(column: str, rows: Sequence[_Row]) -> Iterator[float]:
    for row in rows:
        try:
            value = float(row.arrival)
        except ValueError:
            value = np.nan
        if not 0 <= value < np.inf:
            raise errors.DataError(
                f"line {row.line}: column '{column}' must be a finite number from 0 up, got {row.arrival!r}; mend or remove it"
            )
        yield value


def _dates(column: str, rows: Sequence[_Row]) -> Iterator[float]:
    for row in rows:
        try:
            date = datetime.datetime.fromisoformat(row.arrival.strip())
        except ValueError:
            raise errors.DataError(
                f"line {row.line}: column '{column}' must be a number, or a date such as 2026-11-27T12:30:05.25Z, "
                f"got {row.arrival!r}; mend or remove the row"
            ) from None
        # Without a time zone, a date counts as UTC, so that no hour is missing or double.
        yield (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
