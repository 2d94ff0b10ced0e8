"""Executables and their cache, and servers of an export that use them."""

import time

import jax
import numpy as np
import pytest
from tiny import TINY, live_bytes, random_images, write_export

import superserve_jax as ss
from superserve_jax import errors, exports
from superserve_jax.engines import executables, subnet_buckets
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.supernets import compiler, programs
from superserve_jax.supernets.supernet import SuperNet

BATCHES = (1, 4)


@pytest.fixture
def model(tiny, tmp_path):
    return exports.load(write_export(tmp_path / "export", tiny))


def test_options_of_the_compiler_that_the_user_has_set_are_left_out(monkeypatch):
    name = "xla_gpu_enable_command_buffer"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert "CONVOLUTION" in compiler.options("gpu")[name]
    assert compiler.options("gpu", command_buffers=False) == {name: ""}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{name}=")
    assert name not in compiler.options("gpu")
    assert compiler.options("cpu")
    assert compiler.options("tpu") == {}


@pytest.mark.parametrize("slicing", ["kept", "in_call"])
def test_weights_exist_once_however_many_executables_share_them(model, slicing):
    device, envelopes = jax.devices()[0], subnet_buckets.choose(model.subnets, TINY.flops, 2)
    program_list = set(executables.bucket_programs(TINY, model.subnets, envelopes).values())
    read = sum(
        4 * int(np.prod(shape)) if slicing == "kept" else model.params[name].nbytes
        for program in program_list
        for name, shape in programs.used_leaves(program).items()
    )
    grown = []
    for batch_sizes in ((1,), BATCHES):
        before = live_bytes()
        engine = DeviceEngine(
            *(model, device), subnet_list=model.subnets, batch_sizes=batch_sizes, envelopes=envelopes, slicing=slicing
        )
        grown.append(live_bytes() - before)
        assert len(engine.executables) == len(program_list) * len(batch_sizes)
        # Weights that an executable holds as constants are in no live buffer. So all of them must be arguments.
        arguments = sum(call.memory_analysis().argument_size_in_bytes for call in engine.executables)
        assert arguments >= len(batch_sizes) * read
        assert grown[-1] <= engine.statistics.nbytes + engine.slices.nbytes + 128  # the traced sizes
        assert (engine.slices.nbytes > 0) == (slicing == "kept")
        del engine
    assert grown[0] == grown[1]


def test_serving_traces_and_compiles_nothing_after_the_start(model, compilations):
    with ss.Server(model, slo_ms=1000, batch_sizes=BATCHES) as server:
        profile = server.profile
        before = len(compilations())
        assert before > 0  # so the counter can count
        for i in range(20):
            futures = server.submit_many(list(random_images(TINY, 1 + i % 7, seed=i)))
            assert all(f.result(timeout=60).output.shape == (3,) for f in futures)
        for row in profile.rows:
            reply = server.submit(random_images(TINY, 1)[0], min_accuracy=row.accuracy).result(timeout=60)
            assert reply.accuracy >= row.accuracy
        assert len(compilations()) == before


def test_a_server_needs_an_export_batch_sizes_and_devices(model):
    with pytest.raises(errors.ConfigError, match="export"):
        ss.Server(SuperNet(TINY, model.params, model.statistics))
    with pytest.raises(errors.ConfigError, match="batch_sizes must be ascending"):
        ss.Server(model, batch_sizes=())
    with pytest.raises(errors.ConfigError, match="devices must be a list of at least one"):
        ss.Server(model, devices=[])
    with pytest.raises(errors.UnknownNameError, match="did you mean 'slackfit'"):
        ss.Server(model, policy="slakfit", batch_sizes=(1,))


def test_a_failed_compilation_cancels_the_others(model, monkeypatch):
    begun = []

    def trace_program(program, batch, device, **_):
        begun.append(batch)
        time.sleep(0.01)
        raise RuntimeError("cannot be compiled")

    monkeypatch.setattr(executables, "trace_program", trace_program)
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        executables.build([programs.sliced(TINY, model.space.smallest())], range(1, 500), jax.devices()[0])
    assert len(begun) < 499
