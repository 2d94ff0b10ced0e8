"""Servers whose engines know one subnet, with batch sizes up to 16: for tests of workers and of their failures."""

import math

from fakes import LONG_MS, WAIT_S

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

SIZES = (1, 2, 4, 8, 16)
ROW = Row(Subnet((0,)), 0.7, tuple(float(b) for b in SIZES))
PROFILE = Profile(SIZES, (ROW,))
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1048576 bytes."


def largest(profile, state):
    return Decision(profile.rows[0].subnet, profile.max_batch)


def fake(on_run=None, *, name="fake:0", make=FakeEngine):
    return make(PROFILE, speed=math.inf, on_run=on_run, name=name)


def serve(*engines, **options):
    options = {"policy": largest, "slo_ms": LONG_MS, "tune_runtime": False, **options}
    return Server.from_engines(engines or [fake()], PROFILE, **options)


def outcomes(queries):
    """The result of each query: its output's value, or the error."""
    return [f.result(WAIT_S).output[0] if f.exception(WAIT_S) is None else f.exception() for f in queries]


def state(s, name="fake:0"):
    return next(w for w in s.health()["per_worker"] if w["name"] == name)
