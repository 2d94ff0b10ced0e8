"""Profiles, states, a policy and a simulation for tests of scheduling."""

import math
import pathlib

import numpy as np
from hypothesis import strategies as st

from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision, State
from superserve_jax.simulation import paper_profile, simulator
from superserve_jax.simulation.cluster import Cluster
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

PAPER = paper_profile.paper_profile()
MAF_SAMPLE = pathlib.Path(__file__).parents[1] / "data" / "maf2019_100fn.csv"
SLOWED = PAPER.scaled(1.9)


def make_profile(latencies, accuracies=None, batch_sizes=(1, 2, 4)):
    accuracies = accuracies or [0.5 + 0.01 * i for i in range(len(latencies))]
    rows = tuple(
        Row(Subnet((1,), (("width", (float(i),)),)), a, tuple(ms))
        for i, (a, ms) in enumerate(zip(accuracies, latencies, strict=True))
    )
    return Profile(batch_sizes, rows)


@st.composite
def profiles(draw):
    """Any profile at all: noisy, not monotone, with subnets that no one should use."""
    sizes = (1, 2, 4, 8)
    rows = draw(st.lists(st.lists(st.floats(0.1, 40.0), min_size=4, max_size=4), min_size=1, max_size=6))
    accuracies = draw(st.lists(st.floats(0.0, 1.0), min_size=len(rows), max_size=len(rows)))
    return make_profile(rows, accuracies, sizes)


@st.composite
def states(draw, profile, floors=False):
    waiting = draw(st.integers(1, 300))
    head = ()
    if floors:
        values = st.sampled_from([0.0, *(row.accuracy for row in profile.rows)])
        head = tuple(draw(st.lists(values, min_size=1, max_size=min(waiting, profile.max_batch))))
        waiting = max(len(head), waiting) if len(head) == profile.max_batch else len(head)
    return State(1.0, draw(st.floats(-50.0, 100.0)), waiting, head, draw(st.integers(1, 16)))


def choose(policy, profile, slack_ms, waiting=400, workers=8, floors=(), **more):
    decision = policy(profile, State(0.0, slack_ms, waiting, floors, workers, **more))
    return [r.subnet for r in profile.rows].index(decision.subnet), decision.batch


def qps(profile, decision, waiting=math.inf):
    """Throughput of one worker that repeats a decision."""
    return 1e3 * min(decision.batch, waiting) / profile.latency_ms(decision.subnet, decision.batch)


class Always:
    """A policy that makes the same decision each time, and records what it was asked."""

    def __init__(self, rank, batch, *, defer_ms=-math.inf):
        self.rank, self.batch, self.defer_ms = rank, batch, defer_ms
        self.profiles, self.states = [], []

    def __call__(self, profile, state):
        self.profiles.append(profile)
        self.states.append(state)
        return Decision(profile.rows[self.rank].subnet, self.batch, self.defer_ms)


def simulate(profile, policy, arrivals_ms, slo_ms=50.0, floors=0.0, lengths=0, seed=0, workers=1, stall_s=5.0, **cluster):
    """Simulates queries that arrive at these times, by default on one worker."""
    trace = Trace(np.array(arrivals_ms) / 1e3, slo_ms, floors, lengths=np.array(lengths))
    return simulator.simulate(profile, policy, trace, cluster=Cluster(workers, **cluster), seed=seed, stall_s=stall_s)


def ms(seconds):
    return (1e3 * seconds).round(6).tolist()
