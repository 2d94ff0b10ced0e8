"""Traffic: when queries arrive, and what each of them asks for. No jax.

Every trace is a pure function of its arguments, the seed among them. A renewal process with mean rate r whose gaps have a
squared coefficient of variation c (`cv2`) has gamma gaps of shape 1/c and scale c/r: c = 0 is evenly spaced, c = 1 is
Poisson, and larger is burstier. Rates that change over time stretch and squeeze the same process, which keeps its `cv2`.
"""

import csv
import dataclasses
import math
import numbers
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from superserve_jax import errors

_STEP_S = 1e-3  # resolution of rates that change continuously
_MAX_QUERIES = 50_000_000  # of a trace, which is made in memory
_MAX_CV2 = 1e6  # above it a process hardly ever has an arrival, below its inverse it is evenly spaced
_MAX_LENGTH, _MAX_NUMBER = 1 << 40, 1e12


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Queries in the order of arrival.

    Args:
      arrivals_s: float64, ascending, from 0.
      slo_ms: allowed latency, one for all or one per query.
      floors: lowest accuracy accepted, one for all or one per query; 0 accepts any.
      lengths: tokens, one for all or one per query; 0 where inputs have one shape, or are padded to the longest.
      name: for tables and plots.
    """

    arrivals_s: np.ndarray
    slo_ms: float | np.ndarray = 36.0
    floors: float | np.ndarray = 0.0
    name: str = "trace"
    lengths: int | np.ndarray = 0

    @errors.refusing(errors.ConfigError, "a trace is of numbers: arrivals in seconds, SLOs, floors and lengths")
    def __post_init__(self):
        arrivals = np.asarray(self.arrivals_s, np.float64)
        object.__setattr__(self, "arrivals_s", arrivals)
        if arrivals.ndim != 1 or not np.isfinite(arrivals).all() or (arrivals < 0).any() or (np.diff(arrivals) < 0).any():
            raise errors.ConfigError("arrivals must be a vector of finite, ascending seconds from 0; sort them, start at 0")
        for what in ("slo_ms", "floors", "lengths"):
            values = getattr(self, what)
            if np.ndim(values) and np.shape(values) != arrivals.shape:
                raise errors.ConfigError(
                    f"{what} must be one number or one per query, got {np.shape(values)} for {arrivals.shape}"
                )
        if not (np.isfinite(self.slo_ms).all() and np.greater(self.slo_ms, 0).all()):
            raise errors.DeadlineError(f"SLOs must be positive, finite milliseconds, got {self.slo_ms}")
        if not (np.greater_equal(self.floors, 0).all() and np.less_equal(self.floors, 1).all()):
            raise errors.ConfigError(f"accuracy floors are fractions from 0 to 1, got {self.floors}")
        small = np.greater_equal(self.lengths, 0).all() and np.less_equal(self.lengths, _MAX_LENGTH).all()
        if not (small and np.equal(self.lengths, np.rint(self.lengths)).all()):
            raise errors.ConfigError(f"lengths are whole numbers of tokens, 0 where unknown, got {self.lengths}")
        object.__setattr__(self, "lengths", np.asarray(self.lengths, np.int64) if np.ndim(self.lengths) else int(self.lengths))

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @property
    def deadlines_s(self) -> np.ndarray:
        """When each query must be answered."""
        return self.arrivals_s + 1e-3 * np.asarray(self.slo_ms)

    @property
    def mean_qps(self) -> float:
        """Arrivals per second, from 0 to the last."""
        return len(self) / float(self.arrivals_s[-1]) if len(self) and self.arrivals_s[-1] > 0 else 0.0

    @errors.refusing(errors.ConfigError, "a mix is a dict of values and their shares, the seed a whole number from 0 up")
    def mixed(
        self,
        *,
        slo_ms: Mapping[float, float] | None = None,
        floors: Mapping[float, float] | None = None,
        lengths: Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> "Trace":
        """The same arrivals with SLOs, floors or lengths drawn at random from values and their shares.

        >>> trace = gamma(rate_qps=100.0, duration_s=10.0).mixed(slo_ms={20.0: 3, 100.0: 1})
        >>> sorted(set(trace.slo_ms)), bool(0.7 < (trace.slo_ms == 20).mean() < 0.8)
        ([np.float64(20.0), np.float64(100.0)], True)
        """
        rng = np.random.default_rng([seed, len(self)])
        changes = {}
        for what, mix in (("slo_ms", slo_ms), ("floors", floors), ("lengths", lengths)):
            if mix is not None:
                shares = np.array(list(mix.values()), np.float64)
                if not (len(shares) and np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
                    raise errors.ConfigError(f"a mix of {what} needs shares of at least 0 and one above, got {dict(mix)}")
                changes[what] = rng.choice(np.array(list(mix), np.float64), len(self), p=shares / shares.sum())
        return dataclasses.replace(self, **changes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes CSV with the columns arrival_s, slo_ms and floor, and where there are lengths, length; `load` gives the same
        trace back, bit for bit."""
        names, values = ["arrival_s", "slo_ms", "floor"], [self.arrivals_s, self.slo_ms, self.floors]
        if np.any(self.lengths):
            names, values = [*names, "length"], [*values, np.asarray(self.lengths)]
        columns = np.broadcast_arrays(*values)
        with pathlib.Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(zip(*(c.tolist() for c in columns), strict=True))


def load(path: str | os.PathLike[str], *, slo_ms: float = 36.0) -> Trace:
    """Recorded arrivals: CSV with a column arrival_s, and slo_ms, floor and length where they differ between queries.

    The rows need not be sorted. Raises DataError for a file that is missing or has another form, and names the line.

    Args:
      slo_ms: of a file without that column.
    """
    check(slo_ms=slo_ms)
    rows: list[tuple[float, ...]] = []
    try:
        path = pathlib.Path(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "arrival_s" not in (reader.fieldnames or ()):
                raise errors.DataError(f"{path}: the header needs a column 'arrival_s', got {reader.fieldnames}")
            for row in reader:
                try:
                    asked = (float(row.get(name, usual)) for name, usual in (("slo_ms", slo_ms), ("floor", 0), ("length", 0)))
                    rows.append((float(row["arrival_s"]), *asked))
                except (TypeError, ValueError):
                    raise errors.DataError(f"{path}, line {reader.line_num}: not numbers: {list(row.values())}") from None
                if problem := _problem(*rows[-1]):
                    raise errors.DataError(f"{path}, line {reader.line_num}: {problem}; mend or remove the row")
    except errors.DataError:
        raise
    except (OSError, TypeError, ValueError, csv.Error) as e:
        raise errors.DataError(f"cannot read arrivals from {path}: {e}") from e
    rows.sort(key=lambda r: r[0])
    arrivals, slos, floors, lengths = np.array(rows, np.float64).reshape(-1, 4).T
    return Trace(arrivals, slos, floors, path.stem, lengths if lengths.any() else 0)


def _problem(arrival_s: float, slo_ms: float, floor: float, length: float) -> str:
    """What is wrong with a query; empty where nothing is."""
    if not 0 <= arrival_s < math.inf:
        return f"arrivals are finite seconds from 0, got {arrival_s:g}"
    if not 0 < slo_ms < math.inf:
        return f"SLOs must be positive, finite milliseconds, got {slo_ms:g}"
    if not 0 <= floor <= 1:
        return f"accuracy floors are fractions from 0 to 1, got {floor:g}"
    if not (0 <= length <= _MAX_LENGTH and length == int(length)):
        return f"lengths are whole numbers of tokens, 0 where unknown, got {length:g}"
    return ""


def bursty(
    *,
    base_qps: float = 1500.0,
    burst_qps: float = 5550.0,
    cv2: float = 8.0,
    duration_s: float = 60.0,
    slo_ms: float = 36.0,
    seed: int = 0,
) -> Trace:
    """The paper's bursty traffic (its Section 6.3): evenly spaced arrivals, plus a gamma process.

    >>> trace = bursty(duration_s=1.0)
    >>> trace.name, bool(6500 < len(trace) < 7600)
    ('bursty 1500+5550 cv2=8', True)
    """
    check(duration_s=duration_s, burst_qps=burst_qps)
    check(0, base_qps=base_qps)
    base = np.arange(1, count(base_qps, duration_s) + 1) / base_qps if base_qps else np.zeros(0)
    burst = _renewal(burst_qps * duration_s, cv2, seed) / burst_qps
    return Trace(np.sort(np.concatenate([base, burst])), slo_ms, name=f"bursty {base_qps:g}+{burst_qps:g} cv2={cv2:g}")


def gamma(*, rate_qps: float, cv2: float = 1.0, duration_s: float = 60.0, slo_ms: float = 36.0, seed: int = 0) -> Trace:
    """A gamma process; Poisson arrivals with the default `cv2`, evenly spaced ones with 0."""
    check(duration_s=duration_s, rate_qps=rate_qps)
    arrivals = _renewal(rate_qps * duration_s, cv2, seed) / rate_qps
    return Trace(arrivals, slo_ms, name=f"gamma {rate_qps:g} cv2={cv2:g}")


def accelerating(
    *,
    from_qps: float = 2500.0,
    to_qps: float = 7800.0,
    qps_per_s: float = 5000.0,
    cv2: float = 8.0,
    ramp_at_s: float = 10.0,
    duration_s: float = 60.0,
    slo_ms: float = 36.0,
    seed: int = 0,
) -> Trace:
    """The paper's accelerating traffic (its Section 6.3): one rate, from `ramp_at_s` on a linear ramp, then another rate."""
    check(duration_s=duration_s, from_qps=from_qps, to_qps=to_qps, qps_per_s=qps_per_s)
    check(0, ramp_at_s=ramp_at_s)
    t = _grid(duration_s)
    ramp = np.clip((t - ramp_at_s) * qps_per_s, 0, abs(to_qps - from_qps))
    rate = from_qps + math.copysign(1, to_qps - from_qps) * ramp
    return _modulated(t, rate, cv2, slo_ms, seed, f"accelerating {from_qps:g}-{to_qps:g} at {qps_per_s:g}")


def sine(
    *,
    mean_qps: float,
    amplitude_qps: float,
    period_s: float = 10.0,
    cv2: float = 1.0,
    duration_s: float = 60.0,
    slo_ms: float = 36.0,
    seed: int = 0,
) -> Trace:
    """A rate that swings around a mean."""
    check(duration_s=duration_s, mean_qps=mean_qps, period_s=period_s)
    check(0, amplitude_qps=amplitude_qps)
    if not amplitude_qps <= mean_qps:
        raise errors.ConfigError(f"amplitude_qps must lie from 0 to mean_qps={mean_qps:g}, got {amplitude_qps}")
    t = _grid(duration_s)
    rate = mean_qps + amplitude_qps * np.sin(2 * math.pi * t / period_s)
    return _modulated(t, rate, cv2, slo_ms, seed, f"sine {mean_qps:g}+-{amplitude_qps:g}")


def steps(*, rates_qps: Sequence[float], step_s: float, cv2: float = 1.0, slo_ms: float = 36.0, seed: int = 0) -> Trace:
    """One rate after another, each for `step_s` seconds.

    >>> steps(rates_qps=(10.0, 0.0, 20.0), step_s=1.0, cv2=0).arrivals_s[[9, 10, -1]].tolist()
    [1.0, 2.05, 3.0]
    """
    check(step_s=step_s)
    with errors.refusing(errors.ConfigError, f"rates_qps needs at least one rate, got {rates_qps!r}"):
        first, *others = rates_qps
    for rate in (first, *others):
        check(0, rates_qps=rate)
    expected = np.concatenate([[0.0], np.cumsum([first, *others]) * step_s])
    t = step_s * np.arange(len(expected))
    arrivals = np.interp(_renewal(expected[-1], cv2, seed), *_invertible(expected, t))
    return Trace(arrivals, slo_ms, name=f"steps {'-'.join(f'{r:g}' for r in rates_qps)}")


def _modulated(t: np.ndarray, rate: np.ndarray, cv2: float, slo_ms: float, seed: int, name: str) -> Trace:
    """Arrivals at a rate given on a grid: a process of rate 1 in the time that counts expected arrivals."""
    expected = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(t))])
    unit = _renewal(expected[-1], cv2, seed)
    return Trace(np.interp(unit, *_invertible(expected, t)), slo_ms, name=f"{name} cv2={cv2:g}")


def _invertible(expected: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strictly ascending in what is expected: where nothing is for a while, only the ends of that while are kept."""
    grows = np.diff(expected) > 0
    keep = np.concatenate([[True], grows]) | np.concatenate([grows, [True]])
    expected, t = expected[keep], t[keep]
    jumps = np.flatnonzero(np.diff(expected) <= 0) + 1
    expected[jumps] = np.nextafter(expected[jumps], np.inf)
    return expected, t


def _renewal(expected: float, cv2: float, seed: int) -> np.ndarray:
    """Arrivals up to `expected` of a process with mean gap 1, in ascending order."""
    rng = generator(seed)
    if not (_is_number(cv2) and 0 <= cv2 <= _MAX_CV2):
        raise errors.ConfigError(f"cv2 must be a number from 0 (evenly spaced) to {_MAX_CV2:g}, got {cv2!r}")
    evenly = count(expected, 1.0)
    if cv2 < 1 / _MAX_CV2:
        return np.arange(1, evenly + 1, dtype=np.float64)
    gaps, more = [rng.gamma(1 / cv2, cv2, math.ceil(expected) + 1)], math.ceil(expected / 8) + 1
    while sum(g.sum() for g in gaps) <= expected:
        gaps.append(rng.gamma(1 / cv2, cv2, more))
        more *= 2
    arrivals = np.cumsum(np.concatenate(gaps))
    return arrivals[arrivals <= expected]


def _grid(duration_s: float) -> np.ndarray:
    count(1 / _STEP_S, duration_s)
    return np.linspace(0, duration_s, math.ceil(duration_s / _STEP_S) + 1)


# -- checks ---------------------------------------------------------------------------------------------------------------


def check(least: float = math.nextafter(0, 1), **values: float) -> None:
    """Raises ConfigError, with its name, for a value that is not a number of at least `least`, by default any above 0."""
    for name, value in values.items():
        if not (_is_number(value) and least <= value <= _MAX_NUMBER):
            kind = "positive number" if least else "number from 0"
            raise errors.ConfigError(f"{name} must be a {kind} up to {_MAX_NUMBER:g}, got {value!r}")


def count(rate: float, duration_s: float) -> int:
    """Arrivals at a rate. Raises ConfigError for more than a trace may have, before memory is taken for them."""
    if not rate * duration_s <= _MAX_QUERIES:
        raise errors.ConfigError(
            f"a trace may have {_MAX_QUERIES:,} queries, got {rate * duration_s:.3g}; lower rate or duration"
        )
    return math.floor(rate * duration_s + 1e-9)


def generator(seed: int) -> np.random.Generator:
    """The random numbers of a seed. Raises ConfigError for one that cannot be."""
    with errors.refusing(errors.ConfigError, f"seed must be a whole number from 0 up, got {seed!r}"):
        return np.random.default_rng(seed)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real)
