"""One server, several devices: workers with profiles of their own, and real executables on eight virtual devices."""

import contextlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

WAIT_S = 10.0
SUBNETS = (Subnet((0,)), Subnet((1,)))
FAST = Profile((1, 4), tuple(Row(s, a, ms) for s, a, ms in zip(SUBNETS, (0.7, 0.8), ((1.0, 2.0), (3.0, 6.0)), strict=True)))
SLOW = FAST.scaled(3.0)


def x(value):
    return np.float32(value)


def always(profile, state):
    return Decision(SUBNETS[0], 1)


@contextlib.contextmanager
def serve(*profiles, on_run=None, **options):
    engines = [FakeEngine(p, name=f"fake:{i}", speed=float("inf"), on_run=on_run) for i, p in enumerate(profiles)]
    options = {"slo_ms": 60_000.0, "tune_runtime": False, "policy": always, **options}
    with Server.from_engines(engines, profiles, **options) as s:
        yield s


def test_the_policy_is_asked_with_the_profile_of_the_worker_that_is_free():
    asked, together = set(), threading.Barrier(3)

    def policy(profile, state):
        asked.add((state.worker, profile.latency_ms(SUBNETS[0], 1), state.workers))
        return Decision(SUBNETS[0], 1)

    with serve(FAST, SLOW, FAST, policy=policy, on_run=lambda *_: together.wait(WAIT_S)) as s:
        for future in s.submit_many([x(i) for i in range(3)]):
            future.result(WAIT_S)
        assert s.profiles == (FAST, SLOW, FAST)
    assert {(worker, ms) for worker, ms, _ in asked} == {(0, 1.0), (1, 3.0), (2, 1.0)}
    assert {(worker, round(workers, 6)) for worker, _, workers in asked} == {
        (0, round(7 / 3, 6)),
        (1, 7.0),
        (2, round(7 / 3, 6)),
    }


@pytest.mark.parametrize(("follow_drift", "slowdown"), [(True, 2.0), (False, 1.0)])
def test_health_says_how_many_times_slower_than_its_profile_a_worker_is(follow_drift, slowdown):
    now_s, slow_ms = [100.0], {SUBNETS[0]: 2.0, SUBNETS[1]: 6.0}

    def takes_twice_as_long(subnet, batch_size, inputs):
        now_s[0] += 1e-3 * slow_ms[subnet]

    with serve(FAST, on_run=takes_twice_as_long, clock=lambda: now_s[0], follow_drift=follow_drift) as s:
        assert [w["slowdown"] for w in s.health()["per_worker"]] == [1.0]
        for i in range(600):
            s.submit(x(i)).result(WAIT_S)
        assert [w["slowdown"] for w in s.health()["per_worker"]] == [pytest.approx(slowdown, rel=0.01)]


def test_a_floor_must_be_met_by_every_worker():
    with serve(FAST, FAST.only(SUBNETS[:1])) as s, pytest.raises(errors.AccuracyFloorError, match=r"has 0\.7"):
        s.submit(x(1), min_accuracy=0.8)


def test_profiles_must_be_as_many_as_engines_and_of_the_same_batch_sizes():
    fakes = [FakeEngine(FAST), FakeEngine(FAST)]
    with pytest.raises(errors.ConfigError, match="3 profiles for 2 workers"):
        Server.from_engines(fakes, [FAST] * 3)
    with pytest.raises(errors.ConfigError, match="same batch sizes"):
        Server.from_engines(fakes, [FAST, FAST.at((1,))])


def test_eight_devices_with_executables_of_their_own_answer_as_the_model_does():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "SUPERSERVE_CACHE": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # tests import each other's helpers
    done = subprocess.run([sys.executable, __file__], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"cpu:{i}" for i in range(8)]


def main():
    """The program of the last test, for a process with eight devices. Prints the names of the devices that answered."""
    import pathlib
    import tempfile

    import jax
    from tiny import TINY, live_bytes, random_images, random_params, random_statistics

    from superserve_jax import exports
    from superserve_jax.engines import prepare
    from superserve_jax.exports import Served
    from superserve_jax.supernets.supernet import SuperNet

    devices, batch, kinds = jax.devices(), 4, ("left", "right")
    kind_of = {device: kinds[device.id % 2] for device in devices}
    prepare.device_kind = kind_of.__getitem__  # two kinds of devices, profiled apart
    chosen = [TINY.space().smallest(), TINY.space().largest()]
    with tempfile.TemporaryDirectory() as folder:
        tiny = SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in chosen})
        served = [Served(s, a, None, TINY.flops(s), TINY.num_params(s)) for s, a in zip(chosen, (0.5, 0.9), strict=True)]
        exports.export(pathlib.Path(folder) / "export", tiny, served, measured="random weights")
        model = exports.load(pathlib.Path(folder) / "export")
    # One kind has a profile with one subnet, the other with another: each holds only the executables that it needs.
    for kind, subnet in zip(kinds, chosen, strict=True):
        accuracy = next(s.accuracy for s in model.served if s.subnet == subnet)
        stored[kind] = Profile((batch,), (Row(subnet, accuracy, (1.0,)),), kind)
    prepare.stored_profile = lambda model, kind, batch_sizes, lengths: stored[kind]
    _, engines, profiles = prepare.prepare(model, batch_sizes=(batch,), devices=devices, slicing="in_call")
    assert [p.device for p in profiles] == [kind_of[d] for d in devices]

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
        assert live_bytes(device) == sum(a.nbytes for a in weights.values()) + random_statistics(TINY, subnet).nbytes

    together, answered = threading.Barrier(len(devices)), set()

    class Together:
        """An engine that waits in its first batch until every device has one."""

        def __init__(self, held):
            self.__dict__.update(vars(held))
            self._held = held

        def run(self, subnet, batch_size, inputs):
            if self.name not in answered:
                answered.add(self.name)
                together.wait(WAIT_S)
            return self._held.run(subnet, batch_size, inputs)

    images = random_images(TINY, 100)
    with Server.from_engines([Together(e) for e in engines], profiles, slo_ms=60_000.0) as s:
        replies = [future.result(WAIT_S) for future in s.submit_many(images)]
    for subnet in chosen:
        places = [i for i, reply in enumerate(replies) if reply.subnet == subnet]
        assert places
        expected = np.asarray(model(images[places], subnet))
        np.testing.assert_allclose([replies[i].output for i in places], expected, atol=1e-5 * np.abs(expected).max())
    print(*sorted(answered))


stored = {}

if __name__ == "__main__":
    main()
