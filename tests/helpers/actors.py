"""Engines for actors. Ray pickles this module by value, because actors cannot import it."""

import os
import sys
import time

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.serving.server import Server
from superserve_jax.simulation.paper_profile import paper_profile

SHAPE = (1024,)


class Odd(FakeDevice):
    """A device that does something odd for some inputs: the first number of an input says what."""

    POISON, SEGFAULT, NONSENSE, MEMORY, NAN = 200, 201, 202, 203, 204

    def launch(self, subnet, batch_size, inputs):
        first = {x.item(0) for x in inputs}
        if self.POISON in first:
            raise ValueError("poison")
        if self.SEGFAULT in first:
            os.kill(os.getpid(), 11)
        if self.MEMORY in first and batch_size > 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if self.NAN in first:
            raise errors.NotFiniteError("outputs [0] of 1 are NaN")
        launched = super().launch(subnet, batch_size, inputs)
        if self.NONSENSE in first:
            return launched._replace(outputs=lambda: [launched.outputs()])
        return launched


def make(kind=Odd, speed=1.0, clock_off_s=0.0, open_s=0.0, shape=SHAPE, dtype=np.uint8):
    """An engine that sleeps as long as the paper's profile says, and the profile."""
    if clock_off_s:
        monotonic = time.monotonic
        time.monotonic = lambda: monotonic() + clock_off_s
    time.sleep(open_s)
    profile = paper_profile()
    return kind(profile, input_shape=shape, input_dtype=dtype, speed=speed), profile


class Sent:
    """Options that are sent to an actor, with this module."""

    def __init__(self, **options):
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._options = options


class Fake(Sent):
    """What an actor makes such an engine from, see `serving.makers.Source`."""

    def __repr__(self):
        return f"Fake({self._options})"

    def at(self, profile):
        return self

    def fits(self, made, profile):
        return repr(self) == repr(made)

    def open(self):
        return make(**self._options)


class FakeServer(Sent):
    """What a router makes a server with such an engine from, see `remote.router.Router`."""

    def __call__(self):
        if error := self._options.get("error"):
            raise error
        engine, profile = make(**self._options)
        return Server.from_engines([engine], profile, slo_ms=60_000.0)


def x(value):
    return np.full(SHAPE, value, np.uint8)
