"""A storm: clients, and processes that are killed, stopped, or crash, checked from what clients saw (see loadtest.checker)."""

import collections
import os
import random
import signal
import threading
import time

import actors
import numpy as np
import pytest

import superserve_jax as ss
from superserve_jax import errors, remote
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.loadtest.checker import Checker
from superserve_jax.loadtest.recorder import ANSWERED, Recorder
from superserve_jax.scheduling.policies import ByProfile, SlackFit
from superserve_jax.serving import makers
from superserve_jax.simulation.paper_profile import paper_profile

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

SECONDS, ACTORS, CLIENTS = 15.0, 3, 3


class Recorded:
    """A place whose engines are recorded, also those that come back."""

    def __init__(self, device, recorder):
        self._device, self._recorder = device, recorder
        self.engine = None

    def make_engine(self, source):
        self.engine, profile = self._device.make_engine(source)
        recorded = self._recorder.engine(self.engine)
        recorded.lead_s, recorded.place = self.engine.lead_s, self
        return recorded, profile

    def is_up(self, timeout_s):
        return self._device.is_up(timeout_s)


def client(server, recorder, number, end_s):
    rng = random.Random(f"client {number}")
    waiting = collections.deque()
    while time.monotonic() < end_s:
        slo_ms = rng.choice([20.0, 100.0, 30_000.0])
        waiting += recorder.submit(server, rng.randint(1, 32), slo_ms=slo_ms, min_accuracy=rng.choice([0.0, 0.0, 0.78]))
        if rng.random() < 0.1:
            recorder.cancel(*rng.choice(waiting))
        time.sleep(rng.expovariate(1 / 0.03))
        while len(waiting) > 100:
            recorder.read(*waiting.popleft(), 60.0)
    for query in waiting:
        recorder.read(*query, 60.0)


def add(server, place):
    """Adds a worker. Its process may be starting again."""
    end_s = time.monotonic() + 60.0
    while True:
        try:
            return server.add_worker(place)
        except errors.EngineLostError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)


def harm(server, places, end_s):
    """Kills and stops processes, and replaces workers. Returns what it did."""
    rng, done = random.Random(0), collections.Counter()
    while time.monotonic() < end_s:
        place, kind = rng.choice(places), rng.choice(["kill", "stop", "segfault", "replace"])
        pid = place.engine.pid
        try:
            if kind == "replace":
                server.remove_worker(place.engine.name)
                add(server, place)
            elif kind == "stop":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(rng.uniform(0.05, 0.5))
                os.kill(pid, signal.SIGCONT)
            else:
                os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSEGV)
        except (ProcessLookupError, errors.UnknownNameError, errors.ConfigError):
            continue  # it is gone already, or the last one
        done[kind] += 1
        time.sleep(rng.uniform(0.2, 1.0))
    return done


def test_no_query_is_lost_or_answered_twice_in_a_storm():
    profile = paper_profile()
    recorder, checker = Recorder(), Checker(profile, strict_order=False, abandons=True)
    places = [Recorded(device, recorder) for device in remote.ray_devices(ACTORS, num_cpus=0)]
    engines, profiles = makers.make_all(places, actors.Fake(kind=FakeDevice, shape=(), dtype=np.int64))
    policy = recorder.policy(ByProfile(SlackFit, profile))
    with ss.Server.from_engines(engines, profiles, policy=policy, slo_ms=36.0, max_queue=2_000) as server:
        end_s = time.monotonic() + SECONDS
        clients = [threading.Thread(target=client, args=(server, recorder, i, end_s)) for i in range(CLIENTS)]
        for thread in clients:
            thread.start()
        done = harm(server, places, end_s)
        for thread in clients:
            thread.join()
        checker.read(recorder.notes)
        end_s = time.monotonic() + 30
        while server.health()["alive"] < ACTORS and time.monotonic() < end_s:
            time.sleep(0.1)
        assert server.health()["alive"] == ACTORS
    checker.read(recorder.notes)
    found = checker.finish()
    assert not found.examples
    assert (found.lost, found.twice, found.violations) == (0, 0, 0)
    assert set(found.outcomes) <= {ANSWERED, "cancelled"}, found.outcomes
    assert found.outcomes[ANSWERED] > 1_000
    assert set(done) == {"kill", "stop", "segfault", "replace"}
