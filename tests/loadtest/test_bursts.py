"""The traffic of a replay follows from the profile, and leaves a gain for an adaptive policy on machines of all kinds."""

import dataclasses

import numpy as np
import pytest

from superserve_jax.loadtest import bursts
from superserve_jax.loadtest.verdict import Outcome, compare_with_fixed
from superserve_jax.profile import Profile, Row
from superserve_jax.simulation import simulator
from superserve_jax.simulation.cluster import Cluster, Slowdown
from superserve_jax.subnet import Subnet

# Ten subnets like those of the demo: accuracy from 90 to 94.9 %, latency from 0.6 to 2.2 ms at batch size 16.
SHARES = np.linspace(0, 1, 10)
DEMO = Profile(
    (1, 4, 16),
    tuple(
        Row(Subnet((i,)), 0.90 + 0.049 * share**0.8, tuple(ms * 3.6**share for ms in (0.19, 0.33, 0.6)))
        for i, share in enumerate(SHARES)
    ),
)


def rates(trace):
    """Arrivals per second in the calm and in the bursts of 36 s of traffic."""
    steps = np.histogram(trace.arrivals_s, bins=72, range=(0, 36))[0] / bursts.STEP_S
    in_burst = np.tile(np.array(bursts.PERIOD, bool), 6)
    return steps[~in_burst].mean(), steps[in_burst].mean()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_burst_is_half_way_between_the_most_accurate_and_the_fastest_subnet(workers):
    calm_qps, burst_qps = rates(bursts.make([DEMO] * workers, seconds=36.0, cv2=0.0))
    best, fast = (workers * DEMO.throughput_qps(DEMO.rows[i].subnet) for i in (-1, 0))
    assert calm_qps == pytest.approx(best / 2, rel=0.01)
    assert burst_qps == pytest.approx((best + fast) / 2, rel=0.02)


@pytest.mark.parametrize(("burst", "place"), [(0.0, -1), (1.0, 0)])
def test_the_ends_of_the_option_burst_are_the_two_throughputs(burst, place):
    trace = bursts.make([DEMO], seconds=36.0, cv2=0.0, burst=burst)
    assert rates(trace)[1] == pytest.approx(DEMO.throughput_qps(DEMO.rows[place].subnet), rel=0.02)


def verdict(profile, factor, seed):
    """The verdict on a simulated replay on a machine that is `factor` times as slow as its profile says."""
    trace = bursts.make([profile], seconds=12.0, seed=seed)
    machine = Cluster(1, overhead_ms=0.05, noise=0.1, slowdowns=(Slowdown(factor, 0.0),))
    rows = []
    for name in ("slackfit", *(f"fixed:{i}" for i in range(len(profile.rows)))):
        run = simulator.simulate(profile, name, trace, cluster=machine, seed=seed)
        rows.append(Outcome(name, name, run.attainment, 100 * run.mean_accuracy, 100 * run.mean_accuracy))
    return compare_with_fixed(rows)


@pytest.mark.slow
@pytest.mark.parametrize("overhead_ms", [0.0, 0.4], ids=["latencies differ 3.6 times", "2.6 times"])
@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_the_default_policy_gains_also_if_the_machine_is_not_as_fast_as_its_profile(overhead_ms, factor):
    rows = tuple(dataclasses.replace(r, latency_ms=tuple(ms + overhead_ms for ms in r.latency_ms)) for r in DEMO.rows)
    found = verdict(Profile(DEMO.batch_sizes, rows), factor, seed=round(10 * factor))
    assert found.policy.attainment >= 0.999
    assert found.failing is not None
    assert found.gain >= 1.5
