"""Devices that compute while the host prepares the next batch."""

import math

import fakes
import jax
import numpy as np
from fakes import SUBNETS, WAIT_S
from tiny import TINY, random_images, random_params, random_statistics

from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server
from superserve_jax.supernets.supernet import SuperNet


def test_a_device_that_sleeps_takes_inputs_of_any_length():
    table = fakes.Profile((1, 2), rows_at=dict.fromkeys((4, 8), (fakes.Row(SUBNETS[0], 0.7, (1.0, 2.0)),)))
    sleeping = FakeDevice(table, input_shape=(8,), input_dtype=np.int32, speed=math.inf)
    for _ in range(3):
        assert sleeping.run(SUBNETS[0], 2, [np.full(3, 7, np.int32), np.full(8, 9, np.int32)]) == [(7, 0), (9, 0)]


def test_real_executables_give_the_same_answers_with_two_batches_under_way():
    space = TINY.space()
    served = [space.smallest(), space.largest()]
    model = SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in served})
    real = DeviceEngine(model, jax.devices()[0], subnet_list=served, batch_sizes=(1, 2, 4))
    turns = iter(range(10**6))

    def in_turn(profile, state):
        return Decision(served[next(turns) % 2], 4)

    table = fakes.Profile((1, 2, 4), tuple(fakes.Row(s, a, (0.1, 0.2, 0.3)) for s, a in zip(served, (0.7, 0.8), strict=True)))
    images = random_images(TINY, 120)
    with Server.from_engines([real], table, policy=in_turn, slo_ms=60_000, overlap=True, tune_runtime=False) as s:
        replies = [future.result(timeout=WAIT_S) for future in s.submit_many(list(images))]
    for subnet in served:
        mine = [i for i, reply in enumerate(replies) if reply.subnet == subnet]
        assert len(mine) > 20
        expected = np.asarray(model(images[mine], subnet))
        np.testing.assert_allclose(np.stack([replies[i].output for i in mine]), expected, atol=1e-4)


def test_a_staging_buffer_belongs_to_its_batch_until_the_output_is_ready():
    space = TINY.space()
    model = SuperNet(TINY, random_params(TINY), {space.largest(): random_statistics(TINY, space.largest())})
    real = DeviceEngine(model, jax.devices()[0], subnet_list=[space.largest()], batch_sizes=(4,))
    images = random_images(TINY, 12)
    expected = np.asarray(model(images, space.largest()))
    first = real.launch(space.largest(), 4, list(images[:4]))
    then = real.launch(space.largest(), 4, list(images[4:8]))
    for launched, i in (then, 4), (first, 0):  # in any order, since a batch that failed may be run in between
        for free in real.staging[4, 0]:
            free[:] = 255
        launched.wait()
        np.testing.assert_allclose(launched.outputs(), expected[i : i + 4], atol=1e-4)
    np.testing.assert_allclose(real.run(space.largest(), 4, list(images[8:])), expected[8:], atol=1e-4)
    for _ in range(3):
        real.launch(space.largest(), 4, list(images[:4]))  # given up, as by a worker that leaves
    np.testing.assert_allclose(real.run(space.largest(), 4, list(images[8:])), expected[8:], atol=1e-4)
