"""How good a policy can get on a trace: upper bounds that know all arrivals. No jax.

The fluid bound forgets that queries and batches come in wholes and that arrivals fluctuate: subnets are mixed at their best
throughput within the SLO, so that the workers just carry the traffic, at the highest accuracy. It is a linear programme. The
optimum is the paper's zero-one programme, exact and for small instances.
"""

import dataclasses

import numpy as np
from scipy import optimize, sparse

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.simulation.traces import Trace


@dataclasses.dataclass(frozen=True)
class Bound:
    """No policy attains more; and none that attains as much is more accurate.

    Args:
      attainment: share of the queries that can be answered by their deadline.
      accuracy: mean accuracy over those, as a fraction of 1; NaN where there are none.
    """

    attainment: float
    accuracy: float


def fluid(profile: Profile, rate_qps: float, *, workers: int = 8, slo_ms: float = 36.0) -> Bound:
    """The fluid bound of a steady rate.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> bound = fluid(paper_profile().scaled(1.9), 1500 + 5550)
    >>> bound.attainment, round(bound.accuracy, 4)
    (1.0, 0.7539)
    """
    if not rate_qps > 0:
        raise errors.ConfigError(f"rate_qps must be positive, got {rate_qps}")
    return _solve(profile, np.array([[slo_ms, 0.0, 0.0]]), np.array([[rate_qps]]), workers)


def fluid_of_trace(profile: Profile, trace: Trace, *, workers: int = 8, window_s: float | None = None) -> Bound:
    """The fluid bound of a trace; each kind of query (SLO, floor and length) may be served by what suits it.

    Args:
      window_s: None lets the workers carry the mean rate of the whole trace, as though it had always been even. A length
        bounds window by window: what arrives in a window must be done in it or within the longest SLO after it. That is
        tighter where the rate changes, and looser where it does not, so let a window be many SLOs long. Without windows, too,
        the last arrivals may be answered within the longest SLO after them.
    """
    if not len(trace):
        return Bound(1.0, float("nan"))
    _, *per_query = np.broadcast_arrays(trace.arrivals_s, trace.slo_ms, trace.floors, trace.lengths)
    kinds, kind = np.unique(np.stack(per_query, axis=1), axis=0, return_inverse=True)
    end_s = float(trace.arrivals_s[-1])
    if window_s is not None and not 0 < window_s < np.inf:
        raise errors.ConfigError(f"window_s must be positive and finite, got {window_s}")
    length_s = end_s if window_s is None else window_s
    windows = 1 if window_s is None else int(end_s / window_s) + 1
    window = np.zeros(len(trace), int) if window_s is None else (trace.arrivals_s / window_s).astype(int)
    counts = np.bincount(window * len(kinds) + kind.ravel(), minlength=windows * len(kinds)).reshape(windows, len(kinds))
    usable_s = length_s + 1e-3 * kinds[:, 0].max()
    return _solve(profile, kinds, counts / usable_s, workers)


def _solve(profile: Profile, kinds: np.ndarray, rates_qps: np.ndarray, workers: int) -> Bound:
    """Serves as much as the workers can carry; of all ways to do that, the most accurate.

    Args:
      kinds: [kinds, 3]: SLO in milliseconds, floor, and length, 0 where it is not known.
      rates_qps: [windows, kinds].
    """
    if workers < 1:
        raise errors.ConfigError(f"workers must be 1 or more, got {workers}")
    accuracy = np.array([row.accuracy for row in profile.rows])
    # [subnets, kinds]: worker-seconds per query at the best throughput within the SLO, infinite where that is not allowed
    cost_s = 1e-3 * np.stack([_query_ms(profile.at_length(n or np.inf), slo) for slo, _, n in kinds.tolist()], axis=1)
    cost_s[accuracy[:, None] < kinds[:, 1]] = np.inf
    subnet, kind = np.nonzero(np.isfinite(cost_s))
    answered = correct = 0.0
    for rates in rates_qps[rates_qps.any(axis=1)]:
        # Of each kind at most what arrives; of all, at most the time of the workers.
        limits = sparse.vstack(
            [
                sparse.csr_array((np.ones(len(kind)), (kind, np.arange(len(kind)))), shape=(len(rates), len(kind))),
                sparse.csr_array(cost_s[subnet, kind][None]),
            ]
        )
        available = np.append(rates, workers)
        most = -float(optimize.linprog(-np.ones(len(kind)), A_ub=limits, b_ub=available).fun) if len(kind) else 0.0
        if most > 0:
            # A hair less than the most, lest rounding make it infeasible.
            everything = sparse.vstack([limits, sparse.csr_array(-np.ones((1, len(kind))))])
            solution = optimize.linprog(-accuracy[subnet], A_ub=everything, b_ub=np.append(available, -most * (1 - 1e-9)))
            answered, correct = answered + most, correct - float(solution.fun)
    total = float(rates_qps.sum())
    return Bound(min(answered / total, 1.0), correct / answered if answered else float("nan"))


def _query_ms(profile: Profile, slo_ms: float) -> np.ndarray:
    """[subnets]: a worker's time per query at the best throughput within the SLO, infinite where that is not allowed."""
    latency_ms = np.array([row.latency_ms for row in profile.rows])
    return np.where(latency_ms <= slo_ms, latency_ms / np.array(profile.batch_sizes), np.inf).min(axis=1)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best that can be done with a trace when all arrivals are known.

    Args:
      value: the paper's objective, the sum of accuracies over the queries that met their deadline, per query of the trace.
        That of a policy is its attainment times its accuracy; what it lacks is its regret.
      attainment, accuracy: of the schedule that reaches it. Among those that do, HiGHS picks one.
    """

    value: float
    attainment: float
    accuracy: float


def optimum(profile: Profile, trace: Trace, *, workers: int = 2, tick_ms: float = 1.0, limit_s: float = 60.0) -> Optimum:
    """The paper's zero-one programme, solved exactly; for tens of queries on a few workers, all of the longest length.

    Constraint 1c takes the latest arrival of a batch. A batch is a subnet, a batch size, a start and any queries that have
    arrived by the start and allow its end. They need not be neighbours in the order of deadlines: an optimum may need a long
    batch that spans a short one, whose queries came both before and after. Equal workers need no names: at each moment at
    most so many batches run.

    Time goes in ticks, and that loses nothing where the ticks divide all arrivals and latencies: in any schedule every batch
    may start earlier until its last arrival or the end of another batch stops it, and then all starts are sums of those.
    So the programme has one whole number per (subnet, size, start), and which query goes where is a transport problem, whose
    linear programme has whole solutions anyway.

    Raises ConfigError where arrivals or latencies are no multiples of `tick_ms`, and SuperServeError where HiGHS cannot prove
    an optimum within `limit_s`.

    >>> from superserve_jax.profile import Row
    >>> from superserve_jax.subnet import Subnet
    >>> row = Row(Subnet((1,)), 0.7, (2.0, 3.0))
    >>> two = Trace(np.array([0.0, 0.001]), slo_ms=4.0)
    >>> optimum(Profile((1, 2), (row,)), two, workers=1)  # together: from 1 to 4 ms
    Optimum(value=0.7, attainment=1.0, accuracy=0.7)
    """
    if not len(trace):
        return Optimum(0.0, 1.0, float("nan"))
    latencies = np.array([row.latency_ms for row in profile.rows])
    ticks, arrivals = (_in_ticks(ms, tick_ms) for ms in (latencies, 1e3 * trace.arrivals_s))
    # Nothing can end between two ticks, so that a deadline between them is as good as the tick before it.
    deadlines = np.floor(1e3 * trace.deadlines_s / tick_ms + 1e-6).astype(int)
    accuracy = np.array([row.accuracy for row in profile.rows])
    floors = np.broadcast_to(trace.floors, arrivals.shape)

    # Batches that may be run: [kinds of batch] subnet, size, start, end; and who may ride in which.
    starts = np.arange(arrivals.min(), deadlines.max())
    subnet, size, start = (axis.ravel() for axis in np.meshgrid(*map(np.arange, ticks.shape), starts, indexing="ij"))
    end = start + ticks[subnet, size]
    rides = (arrivals <= start[:, None]) & (end[:, None] <= deadlines) & (floors <= accuracy[subnet][:, None])
    useful = rides.any(axis=1)
    subnet, size, start, end, rides = subnet[useful], size[useful], start[useful], end[useful], rides[useful]
    batch, query = np.nonzero(rides)
    if not len(batch):
        return Optimum(0.0, 0.0, float("nan"))

    batches, seats = len(start), len(batch)
    seat = np.arange(seats)
    ones = np.ones(seats)
    capacity = np.array(profile.batch_sizes)[size]
    running = (start <= starts[:, None]) & (starts[:, None] < end)
    once = sparse.hstack(
        [sparse.csr_array((len(trace), batches)), sparse.csr_array((ones, (query, seat)), shape=(len(trace), seats))]
    )
    seated = sparse.hstack(
        [sparse.diags_array(-capacity.astype(float)), sparse.csr_array((ones, (batch, seat)), shape=(batches, seats))]
    )
    at_once = sparse.hstack([sparse.csr_array(running.astype(float)), sparse.csr_array((len(starts), seats))])
    cost = np.concatenate([np.zeros(batches), -accuracy[subnet[batch]]])
    solution = optimize.milp(
        cost,
        integrality=np.repeat([1, 0], [batches, seats]),
        constraints=[
            optimize.LinearConstraint(once, ub=1),
            optimize.LinearConstraint(seated, ub=0),
            optimize.LinearConstraint(at_once, ub=workers),
        ],
        options={"time_limit": limit_s, "mip_rel_gap": 0},
    )
    if solution.status:
        raise errors.SuperServeError(f"no proven optimum in {limit_s:g} s: {solution.message}; take fewer queries")
    met, value = round(float(solution.x[batches:].sum()), 6), round(-float(solution.fun), 6)
    return Optimum(value / len(trace), met / len(trace), value / met if met else float("nan"))


def _in_ticks(ms: np.ndarray, tick_ms: float) -> np.ndarray:
    ticks = np.rint(ms / tick_ms)
    if not tick_ms > 0 or (abs(ticks * tick_ms - ms) > 1e-6).any():
        raise errors.ConfigError(
            f"arrivals and latencies must be multiples of tick_ms={tick_ms:g}; round them, or take a finer tick"
        )
    return ticks.astype(int)
