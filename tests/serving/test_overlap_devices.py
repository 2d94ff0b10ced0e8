"""Devices that compute while the host prepares the next batch."""

import itertools

import jax
import numpy as np
from fakes import BUCKETED, SUBNETS, WAIT_S, fake, serve
from tiny import TINY, random_images

from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision


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
