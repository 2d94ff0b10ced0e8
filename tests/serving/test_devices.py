"""One server, several devices: workers with profiles of their own, and real executables on eight virtual devices."""

import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import jax
import numpy as np
import pytest
from fakes import BUCKETED, PROFILE, SUBNETS, WAIT_S, fake, outcomes, serve, several, worker, x
from small_exports import IMAGES, write
from tiny import TINY, live_bytes, random_images, random_statistics

from superserve_jax import errors, exports, machine
from superserve_jax.engines import prepare
from superserve_jax.engines.base import Wrapper
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server

SLOW = PROFILE.scaled(3.0)


def engines_of(profiles, on_run=None):
    return [fake(on_run, name=f"fake:{i}", profile=profile) for i, profile in enumerate(profiles)]


def test_the_policy_is_asked_with_the_profile_of_the_worker_that_is_free():
    asked, together = set(), threading.Barrier(3)

    def policy(profile, state):
        asked.add((state.worker, profile.latency_ms(SUBNETS[0], 1), state.workers))
        return Decision(SUBNETS[0], 1)

    profiles = (PROFILE, SLOW, PROFILE)
    with serve(*engines_of(profiles, lambda *_: together.wait(WAIT_S)), profile=profiles, policy=policy) as s:
        outcomes(s.submit_many(x(range(3))))
        assert s.profiles == profiles
    assert {(worker, ms, round(workers, 6)) for worker, ms, workers in asked} == {
        (0, 1.0, round(7 / 3, 6)),
        (1, 3.0, 7.0),
        (2, 1.0, round(7 / 3, 6)),
    }


@pytest.mark.parametrize(("follow_drift", "slowdown"), [(True, 2.0), (False, 1.0)])
def test_health_says_how_many_times_slower_than_its_profile_a_worker_is(follow_drift, slowdown):
    now_s = [100.0]

    def takes_twice_as_long(*_):
        now_s[0] += 2e-3

    with serve(fake(takes_twice_as_long), clock=lambda: now_s[0], follow_drift=follow_drift) as s:
        assert worker(s)["slowdown"] == 1.0
        for i in range(600):
            s.submit(x(i)).result(WAIT_S)
        assert worker(s)["slowdown"] == pytest.approx(slowdown, rel=0.01)


def test_a_floor_must_be_met_by_every_worker():
    profiles = PROFILE, PROFILE.only(SUBNETS[:1])
    with serve(*engines_of(profiles), profile=profiles) as s, pytest.raises(errors.AccuracyFloorError, match=r"has 0\.7"):
        s.submit(x(1), min_accuracy=0.8)


@pytest.mark.parametrize(
    ("engines", "profiles", "message"),
    [
        (several(2), [PROFILE] * 3, "3 profiles for 2 workers"),
        (several(2), [PROFILE, PROFILE.at((1,))], "same batch sizes"),
        ([fake(), fake(input_shape=(3,))], PROFILE, "for the same inputs; got 2 engines"),
    ],
)
def test_engines_and_profiles_that_do_not_fit_together_are_refused(engines, profiles, message):
    with pytest.raises(errors.ConfigError, match=message):
        Server.from_engines(engines, profiles)


# -- two batches under way ----------------------------------------------------------------------------------------------------


def test_a_device_that_sleeps_takes_inputs_of_any_length():
    sleeping = fake(profile=BUCKETED, make=FakeDevice)
    for _ in range(3):
        assert sleeping.run(SUBNETS[0], 4, [np.full(3, 7, np.int32), np.full(64, 9, np.int32)]) == [(7, 0), (9, 0)]


def test_real_executables_give_the_same_answers_with_two_batches_under_way(tiny):
    served = [tiny.space.smallest(), tiny.space.largest()]
    real = DeviceEngine(tiny, jax.devices()[0], subnet_list=served, batch_sizes=(1, 2, 4))
    turns = itertools.cycle(served)
    table = Profile((1, 2, 4), tuple(Row(subnet, 0.7, (0.1, 0.2, 0.3)) for subnet in served))
    images = random_images(TINY, 120)
    with serve(real, profile=table, policy=lambda profile, state: Decision(next(turns), 4), overlap=True) as s:
        replies = [future.result(WAIT_S) for future in s.submit_many(images)]
    for subnet in served:
        mine = [i for i, reply in enumerate(replies) if reply.subnet == subnet]
        assert len(mine) > 20
        np.testing.assert_allclose([replies[i].output for i in mine], np.asarray(tiny(images[mine], subnet)), atol=1e-4)


def test_a_staging_buffer_belongs_to_its_batch_until_the_output_is_ready(tiny):
    largest = tiny.space.largest()
    real = DeviceEngine(tiny, jax.devices()[0], subnet_list=[largest], batch_sizes=(4,))
    images = random_images(TINY, 12)
    expected = np.asarray(tiny(images, largest))
    first, then = (real.launch(largest, 4, list(images[i : i + 4])) for i in (0, 4))
    for launched, i in (then, 4), (first, 0):  # in any order, since a batch that failed may be run in between
        for free in real.staging[4, 0]:
            free[:] = 255
        launched.wait()
        np.testing.assert_allclose(launched.outputs(), expected[i : i + 4], atol=1e-4)
    np.testing.assert_allclose(real.run(largest, 4, list(images[8:])), expected[8:], atol=1e-4)
    for _ in range(3):
        real.launch(largest, 4, list(images[:4]))  # given up, as by a worker that leaves
    np.testing.assert_allclose(real.run(largest, 4, list(images[8:])), expected[8:], atol=1e-4)


# -- eight devices ------------------------------------------------------------------------------------------------------------


def test_eight_devices_with_executables_of_their_own_answer_as_the_model_does():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "SUPERSERVE_CACHE": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # tests import each other's helpers
    done = subprocess.run([sys.executable, __file__], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"cpu:{i}" for i in range(8)]


def main():
    """The program of the last test, for a process with eight devices. Prints the names of the devices that answered."""
    devices, batch, kinds = jax.devices(), 4, ("left", "right")
    kind_of = {device: kinds[device.id % 2] for device in devices}
    machine.device_kind = kind_of.__getitem__  # two kinds of devices, profiled apart
    with tempfile.TemporaryDirectory() as folder:
        model = exports.load(write(pathlib.Path(folder) / "export", IMAGES))
    # One kind has a profile with one subnet, the other with another: each holds only the executables that it needs.
    stored = {
        kind: Profile((batch,), (Row(served.subnet, served.accuracy, (1.0,)),), kind)
        for kind, served in zip(kinds, model.served, strict=True)
    }
    prepare.stored_profile = lambda model, kind, *_: stored[kind]
    # The first engine of each kind is made alone. The others find the results of its tuning, and are made at once.
    make_engine, others, made = prepare.make_engine, threading.Barrier(len(devices) - len(kinds)), []

    def make(model, device, profile, **options):
        made.append(device.id)
        if device.id >= len(kinds):
            others.wait(WAIT_S)
        return make_engine(model, device, profile, **options)

    prepare.make_engine = make
    _, engines, profiles = prepare.prepare(model, batch_sizes=(batch,), devices=devices, slicing="in_call")
    assert [p.device for p in profiles] == [kind_of[d] for d in devices]
    assert made[:2] == [0, 1]
    assert sorted(made) == list(range(len(devices)))

    for device, held, profile in zip(devices, engines, profiles, strict=True):
        zeros, subnet = np.zeros((batch, *held.input_shape), held.input_dtype), profile.rows[0].subnet
        assert held.subnets == (subnet,)
        held.run(subnet, batch, list(zeros))
        [call] = held.executables
        shardings = jax.tree.leaves((call.input_shardings, call.output_shardings))
        assert {d for sharding in shardings for d in sharding.device_set} == {device}
        # Each device holds the weights that its subnet reads, once. The model itself is on the first device.
        [(_, bucket)] = held.calls.values()
        weights = model.params if device == devices[0] else bucket.weights
        assert live_bytes(device) == sum(a.nbytes for a in weights.values()) + random_statistics(IMAGES, subnet).nbytes

    together, answered = threading.Barrier(len(devices)), set()

    class Together(Wrapper):
        """An engine that waits in its first batch until every device has one."""

        def run(self, *batch):
            if self.name not in answered:
                answered.add(self.name)
                together.wait(WAIT_S)
            return super().run(*batch)

    images = random_images(IMAGES, 100)
    with Server.from_engines([Together(e) for e in engines], profiles, slo_ms=60_000.0) as s:
        replies = [future.result(WAIT_S) for future in s.submit_many(images)]
    for subnet in model.subnets:
        places = [i for i, reply in enumerate(replies) if reply.subnet == subnet]
        assert places
        expected = np.asarray(model(images[places], subnet))
        np.testing.assert_allclose([replies[i].output for i in places], expected, atol=1e-5 * np.abs(expected).max())
    print(*sorted(answered))


if __name__ == "__main__":
    main()
