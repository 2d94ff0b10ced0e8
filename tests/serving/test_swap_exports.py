"""Swaps of real exports while serving: the answers, the memory, and the exports that are refused."""

import dataclasses
import gc
import shutil
import threading
import types
import weakref
from typing import Any

import jax
import numpy as np
import pytest
from bad import no_new_threads
from fakes import LONG_MS, WAIT_S, threads, traffic, wait_until
from tiny import TINY, live_bytes, random_images, random_params, random_statistics

import superserve_jax as ss
from superserve_jax import errors, machine
from superserve_jax.engines import executables, keys, prepare
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.exports import Served, export, profile_path
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.server import Server
from superserve_jax.supernets.supernet import SuperNet


def write(folder, seed, *, accuracy, config=TINY, which="smallest"):
    """Writes an export of random weights with one subnet and a latency profile."""
    subnet = getattr(config.space(), which)()
    model = SuperNet(config, random_params(config, seed), {subnet: random_statistics(config, subnet, seed)})
    export(folder, model, [Served(subnet, accuracy, None, 1, 1)], measured="random weights")
    kind = machine.device_kind(jax.devices()[0])
    Profile((1,), (Row(subnet, accuracy, (1.0,)),), kind).save(profile_path(folder, kind))
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERSERVE_CACHE", str(folder / "cache"))  # so that only the first test compiles
        yield write(folder / "old", 1, accuracy=0.5), write(folder / "new", 2, accuracy=0.6, which="largest")


def opened(path):
    return Server(path, batch_sizes=(1,), slo_ms=LONG_MS)


IMAGES = random_images(TINY, 6)


def answers(s):
    replies = [f.result(WAIT_S) for f in s.submit_many(IMAGES)]
    return np.stack([r.output for r in replies]), {r.accuracy for r in replies}


def expected(path):
    model = ss.load(path)
    return np.asarray(model(IMAGES, model.subnets[0]))


def test_after_a_swap_answers_are_the_new_models_and_nothing_of_the_old_one_is_left(exports):
    compiled_in = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled_in.append(threading.current_thread().name) if "compile" in name else None
    )
    futures = []
    old, new = map(expected, exports)
    assert np.abs(old - new).max() > 0.1
    gc.collect()
    with opened(exports[0]) as s:
        np.testing.assert_allclose(answers(s)[0], old, atol=1e-4)
        taken, gone = live_bytes(), [weakref.ref(s.model), weakref.ref(s.pool.members.workers[0].engine)]
        gone += [weakref.ref(e) for e in gone[1]().executables]
        with traffic(lambda: futures.extend(s.submit_many(IMAGES))):
            compiled_in.clear()
            s.swap(exports[1])
            after = len(futures)
        for future in futures:
            future.result(WAIT_S)
        # Without a collection, since those skip what the open server has frozen. The worker drops its engine a moment later.
        wait_until(lambda: [ref() for ref in gone] == [None] * len(gone))
        wait_until(lambda: live_bytes() <= taken)
        got, accuracies = answers(s)
        np.testing.assert_allclose(got, new, atol=1e-4)
        assert (accuracies, s.profile.rows[0].accuracy, s.model.path) == ({0.6}, 0.6, exports[1])
        for i, reply in enumerate(f.result(WAIT_S) for f in futures):
            assert reply.accuracy in ((0.5, 0.6) if i < after else (0.6,))
            np.testing.assert_allclose(reply.output, (old if reply.accuracy == 0.5 else new)[i % len(IMAGES)], atol=1e-4)
    assert compiled_in
    assert not [name for name in compiled_in if name.startswith("superserve")]


def test_a_swap_and_a_new_worker_keep_the_precision_of_the_server(exports, monkeypatch):
    """They may run in another thread, whose settings of jax differ from those of the thread that opened the server."""
    precisions, build = [], executables.build

    def record(*args, **options):
        precisions.append(keys.settings()["jax_default_matmul_precision"])
        return build(*args, **options)

    monkeypatch.setattr(executables, "build", record)
    with jax.default_matmul_precision("highest"):
        server = opened(exports[0])
    with server:
        server.swap(exports[1])
        server.add_worker(jax.devices()[0])
    assert precisions == ["highest"] * 3


def test_an_export_that_cannot_be_served_leaves_the_old_one_serving(exports, tmp_path):
    larger = write(tmp_path / "larger", 3, accuracy=0.9, config=dataclasses.replace(TINY, image_size=11))
    damaged = shutil.copytree(exports[1], tmp_path / "damaged")
    [statistics] = damaged.glob("payload-*/statistics.npz")
    statistics.write_bytes(statistics.read_bytes()[:-1] + b"x")
    bare = SuperNet(TINY, random_params(TINY))
    with opened(exports[0]) as s:
        before, _ = answers(s)
        for path, kind, message in (
            (tmp_path / "nowhere", errors.ExportError, "is not an export"),
            (damaged, errors.ExportError, "statistics.npz"),
            (larger, errors.ConfigError, r"\(11, 11, 1\).*\(9, 9, 1\)"),
            (bare, errors.ConfigError, "export the SuperNet first"),
        ):
            with pytest.raises(kind, match=message):
                s.swap(path)
            after, accuracies = answers(s)
            np.testing.assert_array_equal(after, before)
            assert accuracies == {0.5}
        assert s.model.path == exports[0]


def test_other_vocabularies_and_lengths_are_refused():
    sizes = {"num_classes": 3, "vocab_size": 11, "hidden_size": 8, "depths": (1,), "heads": (1,), "ffn": (3,)}

    def text(vocabulary, **changes) -> Any:
        config = DynaBERTConfig(**sizes, **{"max_length": 64, "pad_id": 0, **changes})
        return types.SimpleNamespace(path="here", config=config, vocabulary=vocabulary)

    prepare.check_same_inputs(text(("a",)), text(("a",), max_length=32), (16, 32))
    for other_model, message in (
        (text(("b",)), "another vocabulary"),
        (text(("a",), max_length=16), "exceeds the model's max_length=16"),
        (text(("a",), pad_id=1), "padded with 1, but this server .*padded with 0"),
        (types.SimpleNamespace(path="there", config=TINY, vocabulary=()), r"there takes inputs of shape \(9, 9, 1\)"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            prepare.check_same_inputs(text(("a",)), other_model, (16, 32))


def test_a_swap_returns_when_the_running_batches_have_been_answered(exports, monkeypatch):
    with opened(exports[0]) as s:
        old, entered, go_on = s.pool.members.workers[0].engine, threading.Event(), threading.Event()

        def run_slowly(*args, run=old.run):
            entered.set()
            assert go_on.wait(WAIT_S)
            return run(*args)

        monkeypatch.setattr(old, "run", run_slowly)
        running = s.submit(IMAGES[0])
        assert entered.wait(WAIT_S)
        with threads(lambda: s.swap(exports[1])) as [swapping]:
            wait_until(lambda: s.model.path == exports[1])
            swapping.join(0.01)
            assert swapping.is_alive()
            go_on.set()
        assert running.result(0).accuracy == 0.5


def test_swaps_and_a_worker_that_joins_come_one_after_the_other(exports, monkeypatch):
    def load_slowly(path, load=prepare.load):
        loading.set()
        assert go_on.wait(WAIT_S)
        return load(path)

    loading, go_on = threading.Event(), threading.Event()
    with opened(exports[0]) as s:
        device = s.pool.members.workers[0].engine.device
        monkeypatch.setattr(prepare, "load", load_slowly)
        with threads(lambda: s.swap(exports[1])) as changes:
            assert loading.wait(WAIT_S)
            with threads(lambda: s.swap(exports[0]), lambda: s.swap(exports[1]), lambda: s.add_worker(device)) as others:
                assert answers(s)[1] == {0.5}
                others[-1].join(0.2)
                assert all(t.is_alive() for t in (*changes, *others))
                assert s.health()["alive"] == 1
                go_on.set()
        health = s.health()
        assert (health["alive"], health["failures"]) == (2, 0)
        assert {w.engine.model for w in s.pool.members.workers} == {s.model}
        assert answers(s)[1] == {s.profile.rows[0].accuracy}


def test_a_swap_refuses_a_worker_that_was_added_as_an_engine(exports):
    with opened(exports[0]) as s:
        given = FakeEngine(s.profile, name="mine", input_shape=(9, 9, 1), input_dtype=np.uint8)
        s.add_worker(given)
        with pytest.raises(errors.ConfigError, match="worker mine was added as an engine; remove it first"):
            s.swap(exports[1])
        s.remove_worker("mine")
        s.swap(exports[1])
        assert answers(s)[1] == {0.6}


def test_a_swap_or_a_new_worker_without_a_thread_to_compile_in_changes_nothing(exports):
    with opened(exports[0]) as s:
        before, old = s.health(), answers(s)
        for change in (lambda: s.swap(exports[1]), lambda: s.add_worker(jax.devices()[0])):
            with no_new_threads(), pytest.raises(errors.ThreadStartError):
                change()
        after = s.health()
        assert (after["workers"], after["alive"], after["failures"]) == (1, 1, 0)
        answered = {"batches": 0, "slowdown": 1.0}  # what the answers above may change
        assert {**before["per_worker"][0], **answered} == {**after["per_worker"][0], **answered}
        np.testing.assert_array_equal(answers(s)[0], old[0])
        s.swap(exports[1])
        assert answers(s)[1] == {0.6}
    with no_new_threads(), pytest.raises(errors.ThreadStartError):
        opened(exports[0])
