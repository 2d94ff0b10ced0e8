"""A planner like Proteus: it solves a small integer programme every few seconds. No jax."""

import importlib
import math

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import Decision, State, Table
from superserve_jax.scheduling.policies.paper import Fixed
from superserve_jax.subnet import Subnet

_TIME_LIMIT_S = 1.0  # a plan takes milliseconds, and no other decision is made meanwhile


class Planner:
    """A policy that assigns a subnet to each worker, so that the workers carry the forecast traffic at the highest accuracy.

    It represents Proteus (Ahmad et al., ASPLOS 2024), which solves a mixed integer linear programme periodically. The forecast
    is the recent mean rate (`State.rate_qps`) plus some headroom. A subnet's throughput is taken at its best batch within half
    of the shortest SLO, because a query may wait for one batch and then run in another. Between two plans each worker acts
    like `Fixed`. All workers share one queue.

    A burst shorter than the period is served by the plan made before the burst. The first call after the period makes the next
    plan, which takes milliseconds. Unlike the other policies, a `Planner` has a memory: make one for each server or
    simulation.

    If the solver finds no plan, fails, or takes longer than a second, all workers run the fastest subnet until the next plan.
    These decisions have the reason "unplanned", and `failure` says why.

    Args:
      profile: the profile of the workers.
      period_s: time between two plans.
      headroom: share added to the forecast. On the paper's profile, 0.1 is enough to meet the deadlines of traffic with CV^2 2
        at low load, and 0.3 is enough for CV^2 4 at high load.

    Attributes:
      failure: why the last plan is not the solver's; "" if it is.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> policy = Planner(profile)
    >>> for rate_qps in 2000.0, 9000.0:
    ...     [profile.row(subnet).accuracy for subnet in policy.plan(rate_qps, workers=3, slo_ms=36.0)]
    [0.7669, 0.7944, 0.7944]
    [0.7382, 0.7382, 0.7382]
    """

    name = "proteus"

    def __init__(self, profile: Profile, *, period_s: float = 5.0, headroom: float = 0.3):
        # Imported late: it takes 0.4 s, and only planners need it.
        self._optimize = importlib.import_module("scipy.optimize")
        if not (period_s > 0 and headroom >= 0):
            raise errors.ConfigError(f"period_s must be positive and headroom 0 or more, got {period_s} and {headroom}")
        self.period_s, self.headroom, self.failure = period_s, headroom, ""
        self._table = table = Table(profile)
        self._fixed = {subnet: Fixed(profile, subnet) for subnet in table.subnets}
        self._plan = (table.subnets[0],)
        self._from_s, self._until_s, self._workers = math.inf, -math.inf, 0  # the plan's start, end, workers

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        workers = max(round(state.workers), 1)
        holds = self._from_s <= state.now_s < self._until_s and workers == self._workers
        if not holds and state.rate_qps:
            self._plan = self.plan(state.rate_qps, workers=workers, slo_ms=state.slo_ms)
            # The first plan is made from the first moments of the traffic only, so it lasts at most 1 s.
            lasts_s = self.period_s if self._workers else min(self.period_s, 1.0)
            self._from_s, self._until_s, self._workers = state.now_s, state.now_s + lasts_s, workers
        decision = self._fixed[self._plan[state.worker % len(self._plan)]](profile, state)
        return decision._replace(reason="unplanned") if self.failure else decision

    def plan(self, rate_qps: float, *, workers: int, slo_ms: float) -> tuple[Subnet, ...]:
        """The subnet of each worker, in ascending order of accuracy. Sets `failure`.

        For each subnet s, n_s workers run it and carry the share x_s of the forecast F = rate * (1 + headroom):

            maximise    sum of x_s * (accuracy_s + 100)
            subject to  x_s <= n_s * throughput_s / F,   sum of x_s <= 1,   sum of n_s = workers,   n_s integer

        The term 100 makes one more carried query worth more than any gain in accuracy. A tiny weight on n_s gives the best
        subnets to spare workers, because these take queries too.
        """
        self.failure = ""
        try:
            return self._solve(rate_qps, workers=workers, slo_ms=slo_ms)
        except Exception as error:  # any exception: the solver is another project's
            self.failure = f"{type(error).__name__}: {error}"
            return (self._table.subnets[0],) * workers

    def _solve(self, rate_qps: float, *, workers: int, slo_ms: float) -> tuple[Subnet, ...]:
        table = self._table
        latency_ms = np.array(table.rows)
        qps = np.where(latency_ms <= slo_ms / 2, 1e3 * np.array(table.sizes) / latency_ms, 0.0).max(axis=1)
        if not qps.any():
            return (table.subnets[0],) * workers
        n, share = len(qps), qps / (rate_qps * (1 + self.headroom))
        worth = np.array(table.accuracies) + 100
        carried = self._optimize.LinearConstraint(np.hstack([np.eye(n), -np.diag(share)]), ub=0)
        forecast = self._optimize.LinearConstraint(np.repeat([1.0, 0.0], n), ub=1)
        all_workers = self._optimize.LinearConstraint(np.repeat([0.0, 1.0], n), lb=workers, ub=workers)
        solution = self._optimize.milp(
            -np.concatenate([worth, 1e-6 * worth * (qps > 0)]),
            integrality=np.repeat([0, 1], n),
            constraints=[carried, forecast, all_workers],
            options={"mip_rel_gap": 1e-6, "time_limit": _TIME_LIMIT_S},
        )
        counts = np.rint(np.zeros(n) if solution.x is None else solution.x[n:])
        if not (counts >= 0).all() or counts.sum() != workers:  # also if one is NaN
            raise RuntimeError(f"no plan for {workers} workers and {rate_qps:g} queries/s: {solution.message}")
        return tuple(subnet for subnet, count in zip(table.subnets, counts.astype(int), strict=True) for _ in range(count))
