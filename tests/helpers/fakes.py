"""Servers with fake engines, for tests. The answer to input x is (x, rank of the subnet)."""

import contextlib
import math
import threading
import time

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
WAIT_S = 30.0
LONG_MS = 60_000.0
ZERO = np.array(0, np.float32)


def always(rank, batch=4):
    return lambda profile, state: Decision(SUBNETS[rank], batch)


def by_slack(profile, state):
    """A policy: with more slack, a larger subnet and a smaller batch."""
    rank = sum(state.slack_ms > ms for ms in (5, 50))
    return Decision(SUBNETS[rank], 4 >> rank)


def fake(on_run=None, *, name="fake:0", profile=PROFILE, make=FakeEngine, **options):
    """An engine that does not sleep. With length buckets, its inputs are texts."""
    inputs = {"input_shape": profile.lengths[-1:], "input_dtype": np.int32} if profile.lengths else {}
    return make(profile, on_run=on_run, name=name, **{"speed": math.inf, **inputs, **options})


def several(count, on_run=None, **options):
    return [fake(on_run, name=f"fake:{i}", **options) for i in range(count)]


def serve(*engines, profile=PROFILE, **options):
    options = {"policy": always(0), "slo_ms": LONG_MS, "tune_runtime": False, **options}
    return Server.from_engines(engines or [fake(profile=profile)], profile, **options)


def x(value) -> np.ndarray:
    """One input, or a stack of inputs."""
    return np.array(value, np.float32)


def tokens(length) -> np.ndarray:
    return np.full(length, length, np.int32)


def outcomes(futures):
    """The outcome of each query: the value of its output, or its error."""
    return [f.result(WAIT_S).output[0] if f.exception(WAIT_S) is None else f.exception() for f in futures]


def worker(s, name="fake:0"):
    """What a server says about the health of one worker."""
    return next(w for w in s.health()["per_worker"] if w["name"] == name)


def idle_worker(s, name="fake:0"):
    """Like `worker`, once the worker is idle: it is so only a moment after it has given its last answer."""
    wait_until(lambda: worker(s, name)["state"] == "idle")
    return worker(s, name)


def fail(*_):
    raise RuntimeError("the device burns")


class Faulty:
    """An `on_run` hook that raises if the batch has one of some inputs. It remembers the batches."""

    def __init__(self, *poison):
        self.poison, self.batches = set(poison), []

    def __call__(self, subnet, batch_size, inputs):
        self.batches.append([float(i) for i in inputs])
        if self.poison & set(self.batches[-1]):
            raise RuntimeError("bad luck")


class Cramped:
    """An `on_run` hook of a device whose memory suffices for `most` inputs. It remembers the batch sizes."""

    def __init__(self, most, error=MemoryError):
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, subnet, batch_size, inputs):
        self.sizes.append(batch_size)
        if batch_size > self.most:
            raise self.error


class Gate:
    """An `on_run` hook that blocks the first batch until the test sets `opened`, and calls `then` with every batch."""

    def __init__(self, then=lambda *_: None):
        self.entered, self.opened, self.batches, self.then = threading.Event(), threading.Event(), [], then

    def __call__(self, subnet, batch_size, inputs):
        self.batches.append([i.item(0) for i in inputs])
        if not self.entered.is_set():
            self.entered.set()
            assert self.opened.wait(WAIT_S)
        self.then(subnet, batch_size, inputs)

    @contextlib.contextmanager
    def holding(self):
        """Waits until a batch is blocked. The end of the block lets it go on."""
        assert self.entered.wait(WAIT_S)
        try:
            yield
        finally:
            self.opened.set()


@contextlib.contextmanager
def held(count=1, *, query=ZERO, profile=PROFILE, then=lambda *_: None, **options):
    """A server with one busy worker. Yields the server, the gate that blocks the worker, and the future of its query 0."""
    gate = Gate(then)
    with serve(*several(count, gate, profile=profile), profile=profile, **options) as s:
        first = s.submit(query)
        with gate.holding():
            yield s, gate, first


def wait_until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(1e-3)


@contextlib.contextmanager
def threads(*targets):
    """Calls each target in a thread of its own. Yields the threads. They must end soon after the block."""
    started = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in started:
        thread.start()
    yield started
    for thread in started:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@contextlib.contextmanager
def traffic(submit, clients=1):
    """Calls `submit` again and again, in as many threads as there are clients, until the end of the block."""

    def repeat():
        while not stop.wait(3e-4):
            submit()

    stop = threading.Event()
    with threads(*[repeat] * clients):
        try:
            yield
        finally:
            stop.set()
