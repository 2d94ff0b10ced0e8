"""Places: processes that hold an engine, die, hang and come back (see `serving.makers.Place`)."""

import threading
import time

import fakes

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice


class Place:
    """A process that can be killed. It comes back when `is_back` is set."""

    def __init__(self, name, on_run=None):
        self.name, self.on_run = name, on_run
        self.is_back = threading.Event()
        self.made = 0
        self.engine = None

    def is_up(self, timeout_s):
        return self.is_back.wait(timeout_s)

    def make_engine(self, source):
        self.made += 1
        self.engine = RemoteDevice(self)
        return self.engine, fakes.PROFILE


KILLER = 99.0


class RemoteDevice(FakeDevice):
    """A device in another process."""

    lead_s = 0.0

    def __init__(self, place):
        super().__init__(fakes.PROFILE, name=place.name, speed=float("inf"), on_run=place.on_run)
        self.place = place
        self.dead, self.answers = threading.Event(), threading.Event()
        self.answers.set()
        self.device_s, self.call_s = None, 0.0

    def launch(self, *batch):
        if self.dead.is_set():
            raise errors.EngineLostError("the process is gone")
        launched = super().launch(*batch)
        if KILLER in [float(one) for one in batch[2]]:
            self.dead.set()

        def in_time():
            return self.answers.wait(0.0)

        def wait():
            while not self.answers.wait(1e-3):
                if self.dead.is_set():
                    raise errors.EngineLostError("the process is gone")
            if self.dead.is_set():
                raise errors.EngineLostError("the process is gone")
            time.sleep(self.call_s)
            launched.wait()

        return launched._replace(wait=wait, in_time=in_time, device_s=self.device_s and (lambda: self.device_s))


def places(count, **options):
    return [Place(f"far:{i}", **options) for i in range(count)]


def serve(some, **options):
    return fakes.serve(*(place.make_engine(None)[0] for place in some), **options)


def return_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("superserve-return")]


def states(s):
    return {w["name"]: w["state"] for w in s.health()["per_worker"]}
