"""Traces: when queries arrive, and the SLO, accuracy floor and length of each query. No jax.

Every trace is a pure function of its arguments, including the seed. Arrivals are renewal processes: at a mean rate r and a
squared coefficient of variation c (`cv2`), the gaps have a gamma distribution of shape 1/c and scale c/r. c = 0 is evenly
spaced, c = 1 is Poisson, and a larger c is burstier. For a changing rate, the time of a process with a steady rate is
stretched, which keeps its `cv2`.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors

_STEP_S = 1e-3  # resolution of rates that change continuously
MAX_QUERIES = 50_000_000  # limit on the queries of a trace, since the whole trace is in memory
_MAX_CV2 = 1e6  # above this, hardly anything arrives; a `cv2` below 1 / _MAX_CV2 counts as evenly spaced
_MAX_LENGTH, _MAX_NUMBER = 1 << 40, 1e12


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Queries in the order of arrival.

    Args:
      arrivals_s: times of arrival in seconds, float64, ascending, from 0 to 1e12.
      slo_ms: allowed latency in milliseconds, up to 1e12, one for all queries or one per query.
      floors: lowest accepted accuracy, one for all queries or one per query. 0 accepts any.
      name: the name in tables and plots.
      lengths: number of tokens, one for all queries or one per query. 0 if inputs have one shape, or are padded to the longest
        length.
    """

    arrivals_s: np.ndarray
    slo_ms: float | np.ndarray = 36.0
    floors: float | np.ndarray = 0.0
    name: str = "trace"
    lengths: int | np.ndarray = 0

    @errors.refusing(errors.ConfigError, "a trace needs numbers: arrivals in seconds, SLOs, floors and lengths")
    def __post_init__(self):
        arrivals = np.asarray(self.arrivals_s, np.float64)
        object.__setattr__(self, "arrivals_s", arrivals)
        if arrivals.ndim != 1 or (np.diff(arrivals) < 0).any():
            raise errors.ConfigError("arrivals must be a vector of ascending seconds from 0 up; sort them")
        for what in ("slo_ms", "floors", "lengths"):
            values = getattr(self, what)
            if np.ndim(values) and np.shape(values) != arrivals.shape:
                raise errors.ConfigError(
                    f"{what} must be one number or one per query, got {np.shape(values)} for {arrivals.shape}"
                )
        for error, expected, values, right in expectations(arrivals, self.slo_ms, self.floors, self.lengths):
            if not right.all():
                raise error(f"{expected}, got {values[~right].flat[0]:g}")
        object.__setattr__(self, "lengths", np.asarray(self.lengths, np.int64) if np.ndim(self.lengths) else int(self.lengths))

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @property
    def deadlines_s(self) -> np.ndarray:
        """The deadline of each query, in seconds."""
        return self.arrivals_s + 1e-3 * np.asarray(self.slo_ms)

    @property
    def mean_qps(self) -> float:
        """Arrivals per second, from time 0 to the last arrival."""
        return len(self) / float(self.arrivals_s[-1]) if len(self) and self.arrivals_s[-1] > 0 else 0.0

    def first(self, count: int) -> "Trace":
        """The first `count` queries, or all if there are fewer.

        >>> len(gamma(rate_qps=100.0, duration_s=1.0, cv2=0).mixed(slo_ms={20.0: 1, 50.0: 1}).first(3).slo_ms)
        3
        """
        return self.some(slice(count))

    def some(self, which: np.ndarray | slice) -> "Trace":
        """Some of the queries: their numbers in ascending order, or a slice.

        >>> gamma(rate_qps=10.0, cv2=0, duration_s=0.5).some(np.array([0, 4])).arrivals_s.tolist()
        [0.1, 0.5]
        """
        values = {name: getattr(self, name) for name in ("arrivals_s", "slo_ms", "floors", "lengths")}
        return dataclasses.replace(self, **{name: v[which] if np.ndim(v) else v for name, v in values.items()})

    @errors.refusing(errors.ConfigError, "a mix must be a dict from values to shares, and the seed a whole number from 0 up")
    def mixed(
        self,
        *,
        slo_ms: Mapping[float, float] | None = None,
        floors: Mapping[float, float] | None = None,
        lengths: Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> "Trace":
        """The same arrivals with SLOs, floors or lengths drawn at random. Each argument maps values to their shares.

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
                    raise errors.ConfigError(f"a mix of {what} needs shares from 0 up, one above 0; got {dict(mix)}")
                changes[what] = rng.choice(np.array(list(mix), np.float64), len(self), p=shares / shares.sum())
        return dataclasses.replace(self, **changes)

    def in_groups(self, size: int) -> "Trace":
        """The same queries from clients that send `size` queries at once. A group arrives with its last query.

        A group that is not full at the end of the trace arrives with the last query.

        >>> gamma(rate_qps=10.0, cv2=0, duration_s=0.5).in_groups(2).arrivals_s.tolist()
        [0.2, 0.2, 0.4, 0.4, 0.5]
        """
        if not (isinstance(size, int) and size >= 1):
            raise errors.ConfigError(f"a group must have a whole number of queries from 1 up, got {size!r}")
        last = np.minimum(np.arange(len(self)) // size * size + size - 1, len(self) - 1)
        return dataclasses.replace(self, arrivals_s=self.arrivals_s[last])


def bursty(
    *,
    base_qps: float = 1500.0,
    burst_qps: float = 5550.0,
    cv2: float = 8.0,
    duration_s: float = 60.0,
    slo_ms: float = 36.0,
    seed: int = 0,
) -> Trace:
    """The paper's bursty traffic (its Section 6.3): evenly spaced arrivals plus a gamma process.

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
    """A gamma process. The default `cv2` of 1 gives Poisson arrivals, 0 gives evenly spaced ones."""
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
    """The paper's accelerating traffic (its Section 6.3): one rate until `ramp_at_s`, a linear ramp, then another rate."""
    check(duration_s=duration_s, from_qps=from_qps, to_qps=to_qps, qps_per_s=qps_per_s)
    check(0, ramp_at_s=ramp_at_s)
    count(1 / _STEP_S, duration_s)
    t = np.linspace(0, duration_s, math.ceil(duration_s / _STEP_S) + 1)
    ramp = np.clip((t - ramp_at_s) * qps_per_s, 0, abs(to_qps - from_qps))
    rate = from_qps + math.copysign(1, to_qps - from_qps) * ramp
    expected = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(t))])
    arrivals = np.interp(_renewal(expected[-1], cv2, seed), *_invertible(expected, t))
    return Trace(arrivals, slo_ms, name=f"accelerating {from_qps:g}-{to_qps:g} at {qps_per_s:g} cv2={cv2:g}")


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


def _invertible(expected: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of the function expected(t), made strictly ascending. Of a period without arrivals only the two ends remain."""
    grows = np.diff(expected) > 0
    keep = np.concatenate([[True], grows]) | np.concatenate([grows, [True]])
    expected, t = expected[keep], t[keep]
    jumps = np.flatnonzero(np.diff(expected) <= 0) + 1
    expected[jumps] = np.nextafter(expected[jumps], np.inf)
    return expected, t


def _renewal(expected: float, cv2: float, seed: int) -> np.ndarray:
    """Ascending arrival times up to `expected` of a renewal process with mean gap 1."""
    check(0, _MAX_CV2, cv2=cv2)
    rng, evenly = generator(seed), count(expected, 1.0)
    if cv2 < 1 / _MAX_CV2:
        return np.arange(1, evenly + 1, dtype=np.float64)
    gaps, more = [rng.gamma(1 / cv2, cv2, math.ceil(expected) + 1)], math.ceil(expected / 8) + 1
    while sum(g.sum() for g in gaps) <= expected:
        gaps.append(rng.gamma(1 / cv2, cv2, more))
        more *= 2
    arrivals = np.cumsum(np.concatenate(gaps))
    return arrivals[arrivals <= expected]


# -- checks ---------------------------------------------------------------------------------------------------------------


def check(least: float = math.nextafter(0, 1), most: float = _MAX_NUMBER, **values: float) -> None:
    """Raise ConfigError for a value that is not a number from `least` to `most`. By default any positive number is allowed."""
    for name, value in values.items():
        if not (isinstance(value, numbers.Real) and least <= value <= most):
            kind = "positive number" if least else "number from 0"
            raise errors.ConfigError(f"{name} must be a {kind} up to {most:g}, got {value!r}")


def count(rate: float, duration_s: float) -> int:
    """Number of arrivals at a rate. Raises ConfigError if there are too many, before they take memory."""
    if not rate * duration_s <= MAX_QUERIES:
        raise errors.ConfigError(
            f"a trace may have at most {MAX_QUERIES:,} queries, got {rate * duration_s:.3g}; lower rate or duration"
        )
    return math.floor(rate * duration_s + 1e-9)


def generator(seed: int) -> np.random.Generator:
    """A random generator. Raises ConfigError for a seed that is not a whole number from 0 up."""
    with errors.refusing(errors.ConfigError, f"seed must be a whole number from 0 up, got {seed!r}"):
        return np.random.default_rng(seed)


def expectations(
    arrivals_s: np.ndarray, slo_ms: Any, floors: Any, lengths: Any
) -> Iterator[tuple[type[Exception], str, np.ndarray, Any]]:
    """For each column: the error class, what is expected, the values, and which of the values are right."""
    slos, floors, lengths = (np.asarray(v, np.float64) for v in (slo_ms, floors, lengths))
    most = _MAX_NUMBER  # beyond it the arithmetic of the simulator could overflow
    right = (arrivals_s >= 0) & (arrivals_s <= most)
    yield errors.ConfigError, f"arrivals must be finite seconds from 0 to {most:g}", arrivals_s, right
    right = (slos > 0) & (slos <= most)
    yield errors.DeadlineError, f"SLOs must be positive, finite milliseconds up to {most:g}", slos, right
    yield errors.ConfigError, "accuracy floors must be fractions from 0 to 1", floors, (floors >= 0) & (floors <= 1)
    whole = (lengths >= 0) & (lengths <= _MAX_LENGTH) & (lengths == np.rint(lengths))
    yield errors.ConfigError, "lengths must be whole numbers of tokens, 0 if unknown", lengths, whole
