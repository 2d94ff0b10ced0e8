"""Executables and their cache, and servers of an export that use them."""

import dataclasses
import time

import jax
import numpy as np
import pytest
from tiny import TINY, live_bytes, random_images, write_export

import superserve_jax as ss
from superserve_jax import errors, exports
from superserve_jax.engines import executables, subnet_buckets
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

BATCHES = (1, 4)


@pytest.fixture
def model(tiny, tmp_path):
    return exports.load(write_export(tmp_path / "export", tiny))


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
            assert all(f.result(timeout=10).output.shape == (3,) for f in futures)
        for row in profile.rows:
            reply = server.submit(random_images(TINY, 1)[0], min_accuracy=row.accuracy).result(timeout=10)
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


class TestCache:
    @pytest.fixture(autouse=True)
    def private(self, monkeypatch, tmp_path):
        self.root = tmp_path / "cache"
        monkeypatch.setenv("SUPERSERVE_CACHE", str(self.root))

    def answer(self, model):
        made, _ = executables.build([programs.sliced(TINY, model.space.smallest())], (1,), jax.devices()[0])
        [executable] = made.values()
        leaves = tuple(model.params[name] for name, _ in executable.leaves)
        statistics, active = model.statistics[model.space.smallest()], np.zeros(0, np.int32)
        return np.asarray(executable.call(leaves, random_images(TINY, 1), statistics, active))

    def test_a_second_start_loads_what_the_first_compiled_without_compiling(self, model, compilations):
        first = self.answer(model)
        [entry] = self.root.glob("*.bin")
        assert self.root.stat().st_mode & 0o077 == 0
        programs.used_leaves.cache_clear()
        before = [e for e in compilations() if "backend_compile" in e or "trace" in e]
        np.testing.assert_array_equal(self.answer(model), first)
        assert [e for e in compilations() if "backend_compile" in e or "trace" in e] == before
        assert list(self.root.glob("*")) == [entry]

    @pytest.mark.parametrize("damage", [lambda c: c[:100], lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: b""])
    def test_a_damaged_entry_is_compiled_again(self, model, damage, caplog):
        first = self.answer(model)
        [entry] = self.root.glob("*.bin")
        content = entry.read_bytes()
        entry.write_bytes(damage(content))
        np.testing.assert_array_equal(self.answer(model), first)
        assert "is damaged" in caplog.text
        caplog.clear()
        self.answer(model)
        assert "is damaged" not in caplog.text

    def test_a_directory_that_others_may_write_to_is_not_trusted(self, model, caplog):
        self.root.mkdir(mode=0o777)
        self.root.chmod(0o777)
        self.answer(model)
        assert "chmod 700" in caplog.text
        assert not list(self.root.glob("*"))

    def test_another_config_or_batch_has_an_entry_of_its_own(self):
        for entries, (num_classes, batch) in enumerate([(3, 1), (3, 2), (7, 1)], 1):
            config = dataclasses.replace(TINY, num_classes=num_classes)
            executables.build([programs.sliced(config, config.space().smallest())], (batch,), jax.devices()[0])
            assert len(list(self.root.glob("*.bin"))) == entries

    def test_a_family_whose_source_cannot_be_read_is_compiled_without_a_cache(self, caplog):
        notebook = type("Notebook", (type(TINY),), {"__module__": "builtins"})  # which has no source in Python
        config = notebook(**dataclasses.asdict(TINY))
        made, _ = executables.build([programs.sliced(config, config.space().smallest())], (1,), jax.devices()[0])
        assert len(made) == 1
        assert "no cache of executables for Notebook" in caplog.text
        assert not self.root.exists()


def test_a_failed_compilation_cancels_the_others(model, monkeypatch):
    begun = []

    def compile_program(program, batch, device, **_):
        begun.append(batch)
        time.sleep(0.01)
        raise RuntimeError("cannot be compiled")

    monkeypatch.setattr(executables, "compile_program", compile_program)
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        executables.build([programs.sliced(TINY, model.space.smallest())], range(1, 500), jax.devices()[0])
    assert len(begun) < 499
