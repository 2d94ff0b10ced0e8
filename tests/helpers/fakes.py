"""Servers with fake engines, for tests. The answer to input x is (x, rank of the subnet)."""

import contextlib
import math
import threading

import numpy as np

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

SUBNETS = [Subnet((i,)) for i in range(3)]
PROFILE = Profile(
    (1, 2, 4),
    tuple(
        Row(s, a, tuple(ms * (i + 1) for ms in (1.0, 2.0, 4.0)))
        for i, (s, a) in enumerate(zip(SUBNETS, (0.7, 0.75, 0.8), strict=True))
    ),
)
BUCKETED, FASTER = (
    Profile((1, 4), rows_at={n: (Row(Subnet((0,)), 0.7, (ms, 2 * ms)),) for n, ms in zip((16, 64), each, strict=True)})
    for each in ((1.0, 4.0), (0.5, 3.0))
)
"""Two profiles with the length buckets 16 and 64."""
WAIT_S = 10.0
LONG_MS = 60_000.0


def always(rank, batch=4):
    return lambda profile, state: Decision(SUBNETS[rank], batch)


def by_slack(profile, state):
    """A policy: with more slack, a larger subnet and a smaller batch."""
    rank = sum(state.slack_ms > ms for ms in (5, 50))
    return Decision(SUBNETS[rank], 4 >> rank)


def fake(on_run=None, *, name="fake:0"):
    return FakeEngine(PROFILE, speed=math.inf, on_run=on_run, name=name)


def serve(*engines, policy=None, slo_ms=LONG_MS, **options):
    options = {"tune_runtime": False, **options}
    return Server.from_engines(engines or [fake()], PROFILE, policy=policy or always(0), slo_ms=slo_ms, **options)


def x(value) -> np.ndarray:
    return np.array(value, np.float32)


def tokens(length) -> np.ndarray:
    return np.full(length, length, np.int32)


def fail(*_):
    raise RuntimeError("the device burns")


class Gate:
    """An `on_run` hook that blocks the first batch until the test sets `opened`."""

    def __init__(self):
        self.entered, self.opened, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, subnet, batch_size, inputs):
        self.batches.append([float(i) for i in inputs])
        if not self.entered.is_set():
            self.entered.set()
            assert self.opened.wait(WAIT_S)


@contextlib.contextmanager
def held(count=1, **options):
    """A server with one busy worker. Yields the server, the gate that blocks the worker, and the future of its query 0."""
    gate = Gate()
    with serve(*(fake(gate, name=f"fake:{i}") for i in range(count)), **options) as s:
        first = s.submit(x(0))
        assert gate.entered.wait(WAIT_S)
        try:
            yield s, gate, first
        finally:
            gate.opened.set()
