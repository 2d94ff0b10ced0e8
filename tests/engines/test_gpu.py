"""What only a GPU can show; without one these are deselected (`tiny.py`), and tests of the same name run on the CPU."""

import itertools

import jax
import numpy as np
import pytest
from tiny import TINY, random_images, random_params, random_statistics

from superserve_jax.engines import executables, subnet_buckets
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device():
    return jax.devices("gpu")[0]


@pytest.fixture(scope="module")
def model():
    chosen = list(TINY.space().enumerate())[::20]
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in chosen})


@pytest.fixture(autouse=True)
def whole_float32():
    """By default a GPU multiplies float32 in fewer bits."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
@pytest.mark.parametrize("buckets", [3, 100])
def test_sliced_bucketed_and_masked_agree_on_the_device(model, device, slicing, buckets):
    envelopes = subnet_buckets.choose(model.calibrated, TINY.flops, buckets)
    engine = DeviceEngine(
        *(model, device), subnet_list=model.calibrated, batch_sizes=(2,), envelopes=envelopes, slicing=slicing
    )
    images = random_images(TINY, 2)
    for subnet in model.calibrated:
        expected = np.asarray(model(images, subnet))
        np.testing.assert_allclose(engine.run(subnet, 2, list(images)), expected, atol=1e-4 * np.abs(expected).max())


def test_executables_run_on_the_device_and_weights_lie_there_once(model, device):
    program = programs.sliced(TINY, model.space.largest())
    executable = executables.compile_program(program, 2, device)
    weights = sum(v.nbytes for v in model.params.values())
    assert executable.call.memory_analysis().argument_size_in_bytes >= weights
    before = device.memory_stats()["bytes_in_use"]
    engine = DeviceEngine(*(model, device), subnet_list=model.calibrated, batch_sizes=(1, 2), slicing="in_call")
    engine.run(model.calibrated[0], 1, list(random_images(TINY, 1)))
    used = device.memory_stats()["bytes_in_use"] - before
    assert used < 2 * weights + (1 << 20)


def test_a_buffer_that_is_written_to_after_a_batch_changes_no_answer(model, device):
    engine = DeviceEngine(model, device, subnet_list=model.calibrated, batch_sizes=(2,))
    subnet = model.calibrated[0]
    for seed in range(20):
        images = random_images(TINY, 2, seed=seed)
        outputs = engine.run(subnet, 2, list(images))
        for staged in itertools.chain(*engine._staging.values()):
            staged[:] = 255
        expected = np.asarray(model(images, subnet))
        np.testing.assert_allclose(outputs, expected, atol=1e-4 * np.abs(expected).max())


def test_two_batches_that_are_under_way_at_once_do_not_mix(model, device):
    engine = DeviceEngine(model, device, subnet_list=model.calibrated, batch_sizes=(2,))
    assert engine.overlap
    small, large = model.calibrated[0], model.calibrated[-1]
    for seed in range(20):
        images = random_images(TINY, 4, seed=seed)
        first, then = engine.launch(large, 2, list(images[:2])), engine.launch(small, 2, list(images[2:]))
        first.wait()
        outputs = first.outputs()
        for staged in itertools.chain(*engine._staging.values()):  # those that belong to no batch any more
            staged[:] = 255
        for subnet, found, of in (large, outputs, images[:2]), (small, then.outputs(), images[2:]):
            expected = np.asarray(model(of, subnet))
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_slices_that_went_give_their_memory_back(model, device):
    subnet, other = model.calibrated[1:3]
    engine = DeviceEngine(
        *(model, device), subnet_list=[subnet, other], batch_sizes=(2,),
        slice_bytes=4 * max(map(TINY.num_params, (subnet, other))),
    )  # fmt: skip
    images = list(random_images(TINY, 2))
    engine.run(subnet, 2, images)
    before = device.memory_stats()["bytes_in_use"]
    for _ in range(10):
        engine.run(other, 2, images)
        engine.run(subnet, 2, images)
    assert device.memory_stats()["bytes_in_use"] <= before + (1 << 20)
