"""The traffic of `superserve replay`: calm and bursts in turn, at rates that fit the latencies of this machine. No jax.

Let `best` and `fast` be the throughput of all workers with the most accurate and with the fastest subnet.

    calm rate = best / 2        burst rate = (best + fast) / 2

So the most accurate subnet carries the calm with half of its capacity. A burst is half-way between what this subnet carries
and what the fastest one carries. Example: with best = 4,000 and fast = 16,000 queries/s, a burst has 10,000. A moment in which
the machine is 20 % faster or slower does not change which of the two keeps up. A fixed share of `fast` has no such margin: if
the throughputs differ by less than a factor of 2.2, then 0.45 * fast is below `best`, and there is nothing to gain.

Bursts of 0.5 s are long compared with the SLO. A subnet that is a little too slow for a burst cannot hide in the queue. One
burst comes every 6 s. Rare peaks are the case in which an adaptive policy gains most. It needs an inaccurate subnet only for
the queries of a burst. A fixed model that keeps up is always inaccurate. With a burst every 4 s, the gain in the simulator
is about 0.2 points smaller. The first burst ends after 4 s, so shorter traffic is refused.
"""

import dataclasses
import math
from collections.abc import Sequence

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.simulation import traces
from superserve_jax.simulation.traces import Trace

STEP_S, PERIOD = 0.5, (*7 * (0,), 1, *4 * (0,))
"""Length of a step, and the steps: 0 is calm, 1 is a burst."""

LEAST_S = STEP_S * (PERIOD.index(1) + 1)
"""When the first burst ends."""


def check_seconds(seconds: float) -> None:
    """Raises ConfigError for traffic that ends before its first burst does.

    >>> check_seconds(3.0)
    Traceback (most recent call last):
    superserve_jax.errors.ConfigError: seconds must be a number from 4 up, because the first burst ends after 4 s, got 3.0
    """
    if not LEAST_S <= seconds < math.inf:
        why = f"because the first burst ends after {LEAST_S:g} s"
        raise errors.ConfigError(f"seconds must be a number from {LEAST_S:g} up, {why}, got {seconds}")


def intervals(seconds: float) -> list[tuple[float, float]]:
    """Start and end of each burst of `make`, in seconds.

    >>> intervals(12.0)
    [(3.5, 4.0), (9.5, 10.0)]
    """
    steps = range(round(seconds / STEP_S))
    return [(STEP_S * i, STEP_S * (i + 1)) for i in steps if PERIOD[i % len(PERIOD)]]


def make(
    profiles: Sequence[Profile],
    *,
    seconds: float,
    calm: float = 0.5,
    burst: float = 0.5,
    cv2: float = 4.0,
    slo_ms: float = 36.0,
    tokens: Sequence[int] = (),
    seed: int = 0,
) -> Trace:
    """A trace for the workers with these profiles.

    Args:
      profiles: one profile per worker.
      seconds: the length of the traffic, at least `LEAST_S`.
      calm: calm rate / `best`.
      burst: the rate of a burst: 0 is `best`, 1 is `fast`.
      cv2: squared coefficient of variation of the gaps between arrivals.
      slo_ms: the SLO of every query.
      tokens: the lengths of the texts that arrive; `()` if all inputs have one shape.
      seed: the seed of the arrivals.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> make([paper_profile()], seconds=6.0).name
    'bursts of 1,349 queries/s on 261, CV^2 4'
    """
    check_seconds(seconds)
    best, fast = (sum(p.throughput_qps(p.rows[place].subnet, tokens) for p in profiles) for place in (-1, 0))
    calm_qps, burst_qps = calm * best, best + burst * (fast - best)
    steps = [PERIOD[i % len(PERIOD)] for i in range(round(seconds / STEP_S))]
    rates = [(calm_qps, burst_qps)[step] for step in steps]
    trace = traces.steps(rates_qps=rates, step_s=STEP_S, cv2=cv2, slo_ms=slo_ms, seed=seed)
    return dataclasses.replace(trace, name=f"bursts of {burst_qps:,.0f} queries/s on {calm_qps:,.0f}, CV^2 {cv2:g}")
