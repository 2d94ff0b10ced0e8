"""What only a GPU can show: command buffers, precision, tuning, and prepared slices from the cache.

test_device.py and test_prepared.py have more tests that run on a GPU if there is one.
"""

import dataclasses

import gpu_compile
import jax
import numpy as np
import pytest
from tiny import TINY, TINY_BERT, assert_close, random_images, random_params, random_statistics, random_tokens

from superserve_jax.engines import executables
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.executables import Form
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

pytestmark = pytest.mark.gpu

SPACE = TINY.space()
SUBNETS = [SPACE.smallest(), SPACE.largest()]
IMAGES = random_images(TINY, 2)
BUCKET = programs.bucketed(TINY, SUBNETS)


@pytest.fixture
def model():
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in SUBNETS})


@pytest.fixture
def exact():
    """Multiplies in float32. By default, a GPU multiplies float32 in fewer bits."""
    with jax.default_matmul_precision("highest"):
        yield


def engine_of(model, subnet_list=SUBNETS, *, batch_sizes=(1, 2), **options):
    return DeviceEngine(model, jax.devices()[0], subnet_list=subnet_list, batch_sizes=batch_sizes, **options)


def check_engine(engine, model, tolerance=1e-4):
    for _ in range(2):
        for subnet in engine.subnets:
            for batch in engine.batch_sizes:
                assert_close(engine.run(subnet, batch, list(IMAGES[:batch])), model(IMAGES[:batch], subnet), tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("program", [programs.sliced(TINY, SUBNETS[1]), BUCKET], ids=["alone", "bucket"])
def test_a_call_is_one_command_buffer_after_tuning(program, dtype):
    form = Form(kept=True, laid_out=True, folded=not program.traced, dtype=dtype)
    counts, _ = gpu_compile.count(executables.trace_program(program, 2, jax.devices()[0], form=form), ())
    assert (counts["buffers"], counts["separate_launches"]) == (1, 0)
    assert (counts["conditionals"] > 0) == bool(program.traced)


def test_a_call_with_traced_gates_does_not_wait_for_the_device():
    """If a call waited at a gate, the call before it would be ready when it returns."""
    config, device = dataclasses.replace(TINY, image_size=225), jax.devices()[0]
    program = programs.bucketed(config, [config.space().smallest(), config.space().largest()])
    executable = executables.trace_program(program, 128, device, form=Form(kept=True, laid_out=True)).compile()
    values = tuple(np.full(shape, 0.01, np.float32) for _, shape in executable.leaves)
    statistics = np.ones((2, program.statistics_size), np.float32)
    rest = random_images(config, 128), statistics, program.active(program.envelope)
    arguments = jax.device_put((values, *rest), executable.call.input_formats[0])
    executable.call(*arguments).block_until_ready()
    calls = [executable.call(*arguments) for _ in range(8)]
    assert not calls[-2].is_ready()
    assert all(np.isfinite(call).all() for call in calls)


@pytest.mark.usefixtures("exact")
def test_a_bucket_and_subnets_alone_give_the_outputs_of_the_masked_program(model):
    check_engine(engine_of(model), model)
    check_engine(engine_of(model, envelopes=dict.fromkeys(SUBNETS, SUBNETS[1])), model)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("slicing", ["kept", "in_call"])
def test_a_transformer_gives_the_outputs_of_the_masked_program(slicing):
    model, tokens, space = SuperNet.create(TINY_BERT, seed=0), random_tokens(TINY_BERT, 2), TINY_BERT.space()
    engine = engine_of(model, [space.smallest(), space.largest()], lengths=(3, 6), slicing=slicing)
    for subnet in engine.subnets:
        assert_close(engine.run(subnet, 2, list(tokens)), model(tokens, subnet), 1e-4)


def test_the_default_precision_and_bfloat16_differ_little_from_float32(model):
    tokens = random_tokens(TINY_BERT, 2)
    transformer, largest = SuperNet.create(TINY_BERT, seed=0), TINY_BERT.space().largest()
    with jax.default_matmul_precision("highest"):
        images_expected, tokens_expected = {s: model(IMAGES, s) for s in SUBNETS}, transformer(tokens)
    for dtype in ("float32", "bfloat16"):
        engine = engine_of(model, compute_dtype=dtype)
        for subnet in SUBNETS:
            assert_close(engine.run(subnet, 2, list(IMAGES)), images_expected[subnet], 2e-2)
        engine = engine_of(transformer, [largest], lengths=(6,), compute_dtype=dtype)
        assert_close(engine.run(largest, 2, list(tokens)), tokens_expected, 2e-2)


def test_threads_that_compile_keep_the_precision_of_the_caller():
    def text(precision):
        with jax.default_matmul_precision(precision):
            made = executables.build([BUCKET, programs.sliced(TINY, SUBNETS[1])], (1, 2), jax.devices()[0])
        return [executable.call.as_text() for executable in made.values()]

    for exact, fast in zip(text("highest"), text("default"), strict=True):
        assert "operand_precision={highest,highest}" in exact
        assert "operand_precision={highest,highest}" not in fast


@pytest.mark.usefixtures("exact")
def test_prepared_slices_come_from_the_cache_with_their_layouts(model, root, caplog):
    check_engine(engine_of(model), model)
    entries = {path: path.read_bytes() for path in root.glob("*.bin")}
    again = engine_of(model)
    check_engine(again, model)
    assert {path: path.read_bytes() for path in root.glob("*.bin")} == entries
    assert "compiling again" not in caplog.text
    layouts = [f.layout.major_to_minor for _, bucket in again.calls.values() for f in bucket.slicer.call.output_formats]
    assert any(layout != tuple(range(len(layout))) for layout in layouts)


def test_two_engines_share_the_results_of_tuning(root):
    def tuned():
        return {path: path.read_bytes() for path in root.glob("tuning-*/*")}

    config = dataclasses.replace(TINY, image_size=11)  # XLA remembers in this process how it tuned the sizes of other tests
    subnet = config.space().largest()
    model = SuperNet(config, random_params(config), {subnet: random_statistics(config, subnet)})
    engine_of(model, [subnet], batch_sizes=(3,))
    first = tuned()
    assert first
    for path in root.glob("*.bin"):
        path.unlink()
    engine_of(model, [subnet], batch_sizes=(3,))
    assert tuned() == first
    assert list(root.glob("*.bin"))
