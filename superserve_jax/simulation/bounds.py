"""Upper bounds on the attainment and accuracy of any policy, from knowing all arrivals. No jax.

The fluid bound treats traffic as a steady flow: it ignores fluctuations, and that queries and batches are whole. A linear
programme mixes subnets, each at its best throughput within the SLO, for the highest accuracy at which the workers carry the
traffic. The optimum is the exact solution of the paper's zero-one programme, for small instances.
"""

import dataclasses

import numpy as np
from scipy import optimize, sparse

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.simulation.traces import Trace


@dataclasses.dataclass(frozen=True)
class Bound:
    """An upper bound. No policy attains more, and no policy that attains as much is more accurate.

    Args:
      attainment: fraction of the queries that can meet their deadline.
      accuracy: mean accuracy over these queries, as a fraction of 1; NaN if there are none.
    """

    attainment: float
    accuracy: float


def fluid(profile: Profile, trace: Trace, *, workers: int = 8) -> Bound:
    """The fluid bound for a trace: serve as many queries as the workers can carry, as accurately as possible.

    Queries of different SLO, floor or length may use different subnets. The workers have the time from 0 to the longest SLO
    after the last arrival.

    Args:
      profile: the profile of all workers.
      trace: the traffic.
      workers: number of workers.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> from superserve_jax.simulation import traces
    >>> bound = fluid(paper_profile().scaled(1.9), traces.gamma(rate_qps=1500 + 5550, cv2=0))
    >>> bound.attainment, round(bound.accuracy, 4)
    (1.0, 0.7539)
    """
    if workers < 1:
        raise errors.ConfigError(f"workers must be 1 or more, got {workers}")
    if not len(trace):
        return Bound(1.0, float("nan"))
    _, *per_query = np.broadcast_arrays(trace.arrivals_s, trace.slo_ms, trace.floors, trace.lengths)
    kinds, counts = np.unique(np.stack(per_query, axis=1), axis=0, return_counts=True)
    rates_qps = counts / (trace.arrivals_s[-1] + 1e-3 * kinds[:, 0].max())
    accuracy = np.array([row.accuracy for row in profile.rows])
    # [subnets, kinds] worker-seconds per query at the best throughput within the SLO, infinite if the subnet is not allowed
    cost_s = 1e-3 * np.stack([_query_ms(profile.at_length(n or np.inf), slo) for slo, _, n in kinds.tolist()], axis=1)
    cost_s[accuracy[:, None] < kinds[:, 1]] = np.inf
    subnet, kind = np.nonzero(np.isfinite(cost_s))
    if not len(kind):
        return Bound(0.0, float("nan"))
    # Serve at most the arrivals of each kind, and use at most the time of the workers.
    of_kind = sparse.csr_array((np.ones(len(kind)), (kind, np.arange(len(kind)))), shape=(len(kinds), len(kind)))
    limits, available = sparse.vstack([of_kind, cost_s[subnet, kind][None]]), np.append(rates_qps, workers)
    most = -float(optimize.linprog(-np.ones(len(kind)), A_ub=limits, b_ub=available).fun)
    # Ask for slightly less than the maximum, so that rounding does not make the programme infeasible.
    everything = sparse.vstack([limits, -np.ones((1, len(kind)))])
    solution = optimize.linprog(-accuracy[subnet], A_ub=everything, b_ub=np.append(available, -most * (1 - 1e-9)))
    return Bound(min(most / float(rates_qps.sum()), 1.0), -float(solution.fun) / most)


def _query_ms(profile: Profile, slo_ms: float) -> np.ndarray:
    """[subnets] time of a worker per query at the best throughput within the SLO; infinite if no batch fits into the SLO."""
    latency_ms = np.array([row.latency_ms for row in profile.rows])
    return np.where(latency_ms <= slo_ms, latency_ms / np.array(profile.batch_sizes), np.inf).min(axis=1)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best schedule for a trace whose arrivals are all known.

    Args:
      value: the paper's objective: (sum of accuracies over the queries that met their deadline) / (number of queries). A
        policy's value is attainment * accuracy. Its regret is this optimum minus its value.
      attainment: SLO attainment of an optimal schedule. If there are several such schedules, the solver HiGHS picks one.
      accuracy: mean accuracy of the same schedule.
    """

    value: float
    attainment: float
    accuracy: float


def optimum(profile: Profile, trace: Trace, *, workers: int = 2, tick_ms: float = 1.0, limit_s: float = 60.0) -> Optimum:
    """Solve the paper's zero-one programme exactly, for tens of queries on a few workers.

    All queries count as queries of the longest length. A batch has a subnet, a size and a start. It may hold any queries that
    have arrived by its start and are due no earlier than its end (the paper's constraint 1c, with the latest arrival). They
    need not be neighbours in the order of deadlines. Workers are equal, so the programme only limits the number of batches
    that run at the same time.

    Time is measured in ticks. This is exact if arrivals and latencies are multiples of a tick. Reason: every batch can be
    moved earlier, until it starts at its last arrival or at the end of another batch. So all starts are sums of arrivals and
    latencies. The unknowns are one whole number for each (subnet, size, start). Assigning queries to batches is a transport
    problem, and the linear programme of a transport problem has whole solutions.

    Args:
      profile: the profile of all workers.
      trace: the traffic.
      workers: number of workers.
      tick_ms: length of a tick.
      limit_s: time limit of the solver.

    Raises ConfigError if arrivals or latencies are not multiples of `tick_ms`, and SuperServeError if HiGHS cannot prove an
    optimum within `limit_s`.

    >>> from superserve_jax.profile import Row
    >>> from superserve_jax.subnet import Subnet
    >>> row = Row(Subnet((1,)), 0.7, (2.0, 3.0))
    >>> two = Trace(np.array([0.0, 0.001]), slo_ms=4.0)
    >>> optimum(Profile((1, 2), (row,)), two, workers=1)  # both queries in one batch, from 1 to 4 ms
    Optimum(value=0.7, attainment=1.0, accuracy=0.7)
    """
    if not len(trace):
        return Optimum(0.0, 1.0, float("nan"))
    latencies = np.array([row.latency_ms for row in profile.rows])
    ticks, arrivals = (_in_ticks(ms, tick_ms) for ms in (latencies, 1e3 * trace.arrivals_s))
    # Batches end at ticks, so a deadline between two ticks equals the earlier tick.
    deadlines = np.floor(1e3 * trace.deadlines_s / tick_ms + 1e-6).astype(int)
    accuracy = np.array([row.accuracy for row in profile.rows])
    floors = np.broadcast_to(trace.floors, arrivals.shape)

    # Possible batches: [batches] subnet, size, start, end. A seat is a possible pair of query and batch: [seats] query, batch.
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
    seat, ones = np.arange(seats), np.ones(seats)
    running = (start <= starts[:, None]) & (starts[:, None] < end)
    # Unknowns: how many batches of each kind run, and which seats are taken. Constraints `left @ unknowns <= right`: a query
    # has at most one seat, a batch has at most `size` seats, and at every moment at most `workers` batches run.
    left = sparse.block_array(
        [
            [None, sparse.csr_array((ones, (query, seat)), shape=(len(trace), seats))],
            [sparse.diags_array(-np.array(profile.batch_sizes, float)[size]), sparse.csr_array((ones, (batch, seat)))],
            [sparse.csr_array(running.astype(float)), None],
        ]
    )
    right = np.repeat([1, 0, workers], [len(trace), batches, len(starts)])
    solution = optimize.milp(
        np.concatenate([np.zeros(batches), -accuracy[subnet[batch]]]),
        integrality=np.repeat([1, 0], [batches, seats]),
        constraints=(left, -np.inf, right),
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
