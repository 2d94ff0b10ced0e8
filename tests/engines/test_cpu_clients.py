"""CPU devices with a chosen number of threads: how cores are divided, and how their executables are cached."""

import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jaxlib import xla_client
from tiny import TINY, assert_close, random_images, random_params, random_statistics

from superserve_jax import errors, machine
from superserve_jax.engines import cache, cpu_clients, keys
from superserve_jax.engines.cpu_clients import Share
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.supernets.supernet import SuperNet

UNUSED = 900  # an index that no engine uses
SUBNETS = [TINY.space().smallest(), TINY.space().largest()]
IMAGES = list(random_images(TINY, 4))


@pytest.fixture(scope="module")
def model():
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in SUBNETS})


def engine_in_parts(model, lanes=2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cores", lambda: lanes)
        return DeviceEngine(model, Share(), subnet_list=SUBNETS, batch_sizes=(1, 4), parts={4: 2})


def check(model, engine):
    for subnet in SUBNETS:
        for size in (1, 4):
            assert_close(engine.run(subnet, size, IMAGES[:size]), model(np.stack(IMAGES[:size]), subnet))


# -- devices ------------------------------------------------------------------------------------------------------------------


def test_a_device_has_its_number_of_threads_and_is_made_once():
    three, lane = cpu_clients.create(3, UNUSED), cpu_clients.create(1, UNUSED, inline=True)
    assert [cpu_clients.threads_of(d) for d in (three, lane)] == [3, 1]
    assert cpu_clients.create(3, UNUSED) is three
    assert lane not in (cpu_clients.create(1, UNUSED), cpu_clients.create(1, UNUSED + 1, inline=True))


def test_jaxs_own_device_keeps_its_number_of_threads(monkeypatch):
    own = jax.devices("cpu")[0]
    before = cpu_clients.threads_of(own)
    monkeypatch.setenv("NPROC", "5")
    assert cpu_clients.threads_of(own) == before


@pytest.mark.parametrize("before", [None, "7"])
def test_the_environment_is_as_before_after_a_device_is_made_and_after_an_error(monkeypatch, before):
    monkeypatch.delenv("NPROC", raising=False)
    if before is not None:
        monkeypatch.setenv("NPROC", before)
    index, make, seen = UNUSED + (10 if before else 11), xla_client.make_cpu_client, []

    def fail(**_):
        seen.append(os.environ["NPROC"])
        raise RuntimeError("no threads")

    monkeypatch.setattr(xla_client, "make_cpu_client", fail)
    with pytest.raises(RuntimeError, match="no threads"):
        cpu_clients.create(2, index)
    assert os.environ.get("NPROC") == before
    monkeypatch.setattr(xla_client, "make_cpu_client", make)
    made = cpu_clients.create(2, index)  # nothing of the failure is kept
    assert (seen, os.environ.get("NPROC"), cpu_clients.threads_of(made)) == (["2"], before, 2)


def test_workers_that_are_no_number_of_cores_are_refused(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    for workers in (None, 1, 2, 3, 4):
        cpu_clients.check_workers(workers)
    for workers in (0, -1, 5, True, 2.0, "2", [2]):
        with pytest.raises(errors.ConfigError, match=r"cpu_workers must be from 1 to 4, the number of cores, got "):
            cpu_clients.check_workers(workers)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7, 16, 64])
def test_workers_divide_the_cores_and_never_share_one(monkeypatch, cores):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(cpu_clients, "create", lambda threads, index, *, inline=False: (threads, index, inline))
    for workers in range(1, cores + 1):
        each = [Share(i, workers).lanes for i in range(workers)]
        devices = [Share(i, workers).device for i in range(workers)]
        assert len(every := [lane for lanes in each for lane in lanes]) <= max(8, workers)
        assert len(set(every)) == len(every)
        assert sum(threads for threads, _, _ in every) <= cores
        assert len({len(lanes) for lanes in each}) == 1
        assert all([inline for _, _, inline in lanes] == [True] + [False] * (len(lanes) - 1) for lanes in each)
        if workers > 1:
            assert [(threads, inline) for threads, _, inline in devices] == [(cores // workers, True)] * workers
            assert len(set(devices)) == workers
            if cores // workers == 1:  # then one device computes both whole batches and parts
                assert devices == every
    assert Share().device == jax.devices("cpu")[0]
    if cores <= 8:
        assert {threads for threads, _, _ in Share().lanes} == {1}
        assert len(Share().lanes) == cores


def test_arrays_of_any_size_and_dtype_are_on_another_device_without_a_copy():
    lane = cpu_clients.create(1, UNUSED, inline=True)
    arrays = [jax.device_put(np.ones(n, dtype), lane) for n in (1, 3, 64, 100_000) for dtype in ("float32", "bfloat16")]
    for device in (jax.devices("cpu")[0], cpu_clients.create(1, UNUSED)):
        found = cpu_clients.on_device(arrays, device)
        assert [a.unsafe_buffer_pointer() for a in found] == [a.unsafe_buffer_pointer() for a in arrays]
        assert all(a.device == device and a.dtype == b.dtype for a, b in zip(found, arrays, strict=True))


# -- the cache ----------------------------------------------------------------------------------------------------------------


def test_the_key_of_the_cache_contains_the_number_of_threads():
    devices = [cpu_clients.create(1, 0, inline=True), cpu_clients.create(1, UNUSED), cpu_clients.create(2, UNUSED)]
    one, other, two = (keys.common_key(TINY, device) for device in devices)
    assert one == other  # all lanes share their entries
    assert (one["threads"], two) == (1, {**one, "threads": 2})


@pytest.fixture
def counted(monkeypatch):
    """Counts compilations, and refuses to serialise an executable that was loaded."""
    compiled, loaded, compile_ = [], [], cache.Traced.compile
    serialize, load = serialize_executable.serialize, serialize_executable.deserialize_and_load

    def loading(*args, **options):
        loaded.append(load(*args, **options))
        return loaded[-1]

    def serialising(call, *args, **options):
        assert not any(call is other for other in loaded)
        return serialize(call, *args, **options)

    monkeypatch.setattr(serialize_executable, "deserialize_and_load", loading)
    monkeypatch.setattr(serialize_executable, "serialize", serialising)
    monkeypatch.setattr(cache.Traced, "compile", lambda self, *args: compiled.append(self) or compile_(self, *args))
    return compiled


def test_a_second_engine_loads_the_executables_of_all_lanes(model, root, counted):
    check(model, engine_in_parts(model))
    entries = len(list(root.glob("*.bin")))
    assert entries == len(counted) == 2 * 2 + 1  # of each subnet: whole batches and parts. Of the smaller one: the slicer.
    for lanes in (2, 3, 1):
        counted.clear()
        again = engine_in_parts(model, lanes)
        assert len(again.executables) == len(SUBNETS) * (1 + lanes)
        check(model, again)
        assert (counted, len(list(root.glob("*.bin")))) == ([], entries)


def test_without_a_cache_a_program_is_compiled_once_for_all_lanes(model, monkeypatch, counted):
    monkeypatch.setenv("SUPERSERVE_CACHE", "")
    for lanes in (3, 1):
        counted.clear()
        check(model, engine_in_parts(model, lanes))
        assert len(counted) == 2 * 2 + 1


def test_a_damaged_entry_of_lanes_is_compiled_again(model, root, counted, caplog):
    engine_in_parts(model)
    for path in root.glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-1])
    counted.clear()
    check(model, engine_in_parts(model))
    assert len(counted) == 5
    assert "is damaged" in caplog.text


def test_lanes_work_beside_jaxs_own_compilation_cache(model, monkeypatch, tmp_path):
    """An executable that jax has loaded from its own cache is serialised for the lanes."""
    monkeypatch.setenv("SUPERSERVE_CACHE", "")
    names = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in names}
    try:
        for name, value in names.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for _ in range(2):
            check(model, engine_in_parts(model))
            jax.clear_caches()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# -- the allocator ------------------------------------------------------------------------------------------------------------

FAULTS = """
import resource
from superserve_jax.engines import cpu_clients
changed = cpu_clients.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * (40 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(changed), faults())
"""


@pytest.mark.parametrize(
    ("environment", "changed"),
    [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000"}, False)],
)
def test_freed_memory_is_kept_unless_the_user_has_set_the_allocator(environment, changed):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("these are settings of glibc")
    code = [sys.executable, "-c", FAULTS]
    done = subprocess.run(code, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    found, faults = map(int, done.stdout.split())
    assert found == changed
    assert (faults < 1000) == changed  # ten blocks of 40 MiB have 100,000 pages
