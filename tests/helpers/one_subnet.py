"""Servers whose engines know one subnet, with batch sizes up to 16: for tests of workers and of their failures."""

import functools

import fakes

from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.subnet import Subnet

SIZES = (1, 2, 4, 8, 16)
ROW = Row(Subnet((0,)), 0.7, tuple(float(b) for b in SIZES))
PROFILE = Profile(SIZES, (ROW,))
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1048576 bytes."


def largest(profile, state):
    return Decision(profile.rows[0].subnet, profile.max_batch)


fake = functools.partial(fakes.fake, profile=PROFILE)
several = functools.partial(fakes.several, profile=PROFILE)
serve = functools.partial(fakes.serve, profile=PROFILE, policy=largest)
