"""Servers with several workers that divide the cores of a CPU: their number, their answers, and changes while serving."""

import functools
import gc
import threading
import weakref

import jax
import numpy as np
import pytest
from fakes import LONG_MS, WAIT_S, traffic, wait_until
from tiny import TINY, assert_close, live_bytes, random_images
from two_workers import SIZES, store, write

import superserve_jax as ss
from superserve_jax import errors, machine
from superserve_jax.engines import measuring, prepare
from superserve_jax.engines.cpu_clients import Share
from superserve_jax.exports import profile_path
from superserve_jax.serving.server import Server

IMAGES = random_images(TINY, 12)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERSERVE_CACHE", str(folder / "cache"))  # so that only the first servers compile
        yield folder


@pytest.fixture(scope="module")
def folders(cached):
    """Two exports, and one that was profiled with one worker."""
    return [write(cached / "old", 1), write(cached / "new", 2), write(cached / "alone", 3, parts={}, cpu_workers=1)]


def opened(path, **options):
    return Server(path, **{"batch_sizes": SIZES, "slo_ms": LONG_MS, **options})


def engines_of(server):
    return [w.engine for w in server.pool.members.workers if hasattr(w, "engine")]  # a worker that has left drops it


def names(server):
    return [w["name"] for w in server.health()["per_worker"] if w["state"] not in ("left", "removed", "abandoned")]


@functools.cache
def expected_of(path):
    """The model of an export, and its outputs for `IMAGES` by subnet."""
    model = ss.load(path)
    return model, {s: np.asarray(model(IMAGES, s)) for s in model.subnets}


def check(server, path):
    """All answers are those of an export's model."""
    model, expected = expected_of(path)
    replies = [f.result(WAIT_S) for f in server.submit_many(IMAGES)]
    for i, reply in enumerate(replies):
        assert reply.accuracy == model.accuracies("float32")[reply.subnet]
        assert_close(reply.output, expected[reply.subnet][i], 1e-4)


def check_every_worker(server, path):
    """Each worker gives the model's outputs for every subnet and batch size. No queries may be waiting."""
    _, expected = expected_of(path)
    for engine in engines_of(server):
        for subnet, outputs in expected.items():
            for size in SIZES:
                assert_close(engine.run(subnet, size, list(IMAGES[:size])), outputs[:size])


def share(engines):
    return all(e.slices is engines[0].slices and e.buckets is engines[0].buckets for e in engines)


# -- the number of workers ----------------------------------------------------------------------------------------------------


def test_a_server_has_as_many_workers_as_its_profile_and_all_of_them_answer(folders, monkeypatch, caplog):
    with opened(folders[0]) as s:
        assert names(s) == ["cpu:0", "cpu:1"]
        engines = engines_of(s)
        assert share(engines)
        assert all(e.parts == {2: 1} and e.lanes == Share(i, 2).lanes for i, e in enumerate(engines))
        assert [p.cpu_workers for p in s.profiles] == [2, 2]
        check_every_worker(s, folders[0])
        check(s, folders[0])
        together = threading.Barrier(2)

        def run_together(*batch, run):
            together.wait(WAIT_S)
            return run(*batch)

        for engine in engines:
            monkeypatch.setattr(engine, "run", lambda *batch, run=engine.run: run_together(*batch, run=run))
        for future in s.submit_many(IMAGES[:4]):
            future.result(WAIT_S)
        assert all(w["batches"] for w in s.health()["per_worker"])
    assert "no latency profile" not in caplog.text


@pytest.mark.parametrize(("which", "workers"), [(0, 1), (2, 2)])
def test_another_number_of_workers_is_measured_again_with_a_warning(folders, which, workers, caplog):
    with opened(folders[which], cpu_workers=workers) as s:
        assert len(names(s)) == len(set(names(s))) == workers
        assert s.profile.cpu_workers == workers
        assert share(engines_of(s))
        check_every_worker(s, folders[which])
    assert "measuring again" in caplog.text
    caplog.clear()
    with opened(folders[which], cpu_workers=3 - workers) as s:  # that of the profile
        assert len(names(s)) == 3 - workers
    assert "measuring" not in caplog.text


def test_without_a_profile_there_is_one_worker(folders, cached, caplog):
    path = write(cached / "unmeasured", 4)
    profile_path(path, machine.device_kind(jax.devices()[0])).unlink()
    with opened(path) as s:
        assert (names(s), s.profile.parts, s.profile.cpu_workers) == (["cpu:0"], {}, 1)
        check(s, path)
    assert "has no latency profile" in caplog.text


def test_workers_of_one_thread_need_no_parts(cached):
    path = write(cached / "whole", 5, parts={})
    with opened(path) as s:
        assert [e.device for e in engines_of(s)] == [lane for i in range(2) for lane in Share(i, 2).lanes]
        check_every_worker(s, path)


def test_workers_with_several_cores_each_answer_as_the_model_does(folders, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 5)
    store(folders[0], parts={2: 1}, cpu_workers=2)  # the number of cores is part of the profile's name
    with opened(folders[0]) as s:
        assert [len(e.lanes) for e in engines_of(s)] == [2, 2]
        check_every_worker(s, folders[0])
        check(s, folders[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_workers": 0}, r"cpu_workers must be from 1 to 2, the number of cores, got 0"),
        ({"cpu_workers": 3}, r"cpu_workers must be from 1 to 2, the number of cores, got 3"),
        ({"cpu_workers": "2"}, r"cpu_workers must be from 1 to 2, the number of cores, got '2'"),
        ({"cpu_workers": 1, "devices": True}, r"cpu_workers divides the cores of a single CPU device, got .*leave it out"),
        ({"cpu_workers": 2, "devices": True}, r"cpu_workers divides the cores of a single CPU device, got .*leave it out"),
    ],
)
def test_workers_that_cannot_be_are_refused_before_anything_is_compiled(folders, options, message, compilations):
    if "devices" in options:
        options = {**options, "devices": jax.devices()}
    before = len(compilations())
    with pytest.raises(errors.ConfigError, match=message):
        opened(folders[0], **options)
    assert len(compilations()) == before


def test_engines_of_a_server_have_no_workers_of_a_cpu(folders):
    with opened(folders[2]) as s, pytest.raises(errors.UnknownNameError, match="cpu_workers"):
        Server.from_engines(engines_of(s), s.profile, cpu_workers=2)


def test_a_profile_knows_the_parts_of_its_engine_and_the_number_of_workers(folders):
    model = ss.load(folders[0])
    _, engines, _ = prepare.prepare(model, batch_sizes=SIZES)
    first, *others = engines
    for beside in (others, []):
        measured = measuring.measure(model, first, repeats=1, beside=beside)
        assert (measured.parts, measured.cpu_workers) == ({2: 1}, 1 + len(beside))


# -- changes while serving ----------------------------------------------------------------------------------------------------


def test_a_swap_keeps_both_workers_and_the_new_ones_share_their_weights(folders, caplog):
    futures = []
    with opened(folders[0]) as s:
        old = [weakref.ref(e) for e in engines_of(s)]
        with traffic(lambda: futures.extend(s.submit_many(IMAGES))):
            s.swap(folders[1])
        for future in futures:
            future.result(WAIT_S)
        assert names(s) == ["cpu:0", "cpu:1"]
        engines = engines_of(s)
        assert share(engines)
        assert [e.lanes for e in engines] == [Share(i, 2).lanes for i in range(2)]
        assert (s.profile.parts, s.profile.cpu_workers) == ({2: 1}, 2)
        check_every_worker(s, folders[1])
        check(s, folders[1])
        wait_until(lambda: [ref() for ref in old] == [None, None])
        assert s.health()["failures"] == 0
    assert "no latency profile" not in caplog.text


def test_a_swap_to_an_export_of_one_worker_keeps_both_and_measures_it_again(folders, caplog):
    with opened(folders[0]) as s:
        s.swap(folders[2])
        assert names(s) == ["cpu:0", "cpu:1"]
        assert share(engines_of(s))
        assert s.profile.cpu_workers == 2
        check(s, folders[2])
    assert "measuring again" in caplog.text


def test_a_server_of_one_worker_keeps_one_after_a_swap(folders):
    with opened(folders[2]) as s:
        s.swap(folders[1])
        assert names(s) == ["cpu:0"]
        check(s, folders[1])


@pytest.mark.parametrize("removed", [0, 1])
def test_a_worker_goes_on_without_the_other_also_after_a_swap(folders, removed):
    with opened(folders[0]) as s:
        s.remove_worker(f"cpu:{removed}")
        assert names(s) == [f"cpu:{1 - removed}"]
        check_every_worker(s, folders[0])
        check(s, folders[0])
        s.swap(folders[1])
        assert len(names(s)) == 1
        check(s, folders[1])


def test_a_device_can_be_added_only_if_one_worker_has_all_cores(folders):
    with opened(folders[0]) as s:
        with pytest.raises(errors.ConfigError, match="its workers divide the cores"):
            s.add_worker(jax.devices()[0])
        assert names(s) == ["cpu:0", "cpu:1"]
        check(s, folders[0])
    with opened(folders[2]) as s:
        added = s.add_worker(jax.devices()[0])
        assert names(s) == ["cpu:0", added] != ["cpu:0", "cpu:0"]
        check_every_worker(s, folders[2])
        s.swap(folders[2])
        assert len(set(names(s))) == 2
        check_every_worker(s, folders[2])
        check(s, folders[2])


def test_a_closed_server_frees_the_weights_of_all_workers(folders):
    expected_of(folders[0])  # its model stays
    before = live_bytes()
    with opened(folders[0]) as s:
        check(s, folders[0])
        engines = engines_of(s)
        gone = [weakref.ref(s.model), *map(weakref.ref, engines), *(weakref.ref(e) for e in engines[0].executables)]
        arrays = sum(a.nbytes for a in s.model.params.values())
        assert before + arrays <= live_bytes() <= before + 3 * arrays  # the model, the weights, and slices
    del s, engines
    wait_until(lambda: gc.collect() >= 0 and [ref() for ref in gone] == [None] * len(gone))
    assert live_bytes() <= before
