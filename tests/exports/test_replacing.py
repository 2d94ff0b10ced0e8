"""An export that replaces another one: what it may delete, who else may write or read, and what must not be exported."""

import json
import os
import resource
import threading

import numpy as np
import pytest
from lock_holder import locked_elsewhere
from tiny import TINY, write_export

from superserve_jax import errors, exports, files
from superserve_jax.exports import directory
from superserve_jax.profile import Profile
from superserve_jax.supernets.supernet import SuperNet


def names(path):
    return {f.name for f in path.iterdir()}


@pytest.mark.parametrize("content", ['{"name": "my extension", "version": 3}', "not json", "[]"])
def test_a_manifest_of_another_program_is_not_replaced(tiny, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "payload-data").mkdir()
    with pytest.raises(errors.ExportError, match="belongs to another program; remove it, or choose another directory"):
        write_export(tmp_path, tiny)
    assert (tmp_path / "manifest.json").read_text() == content
    assert names(tmp_path) == {"manifest.json", "payload-data"}


def test_only_payloads_of_exports_are_deleted(tiny, tmp_path):
    others = {"payload-data", "payload-0123456789abcdef", "profiles", "notes"}
    write_export(tmp_path, tiny)
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    changed = SuperNet(TINY, {**tiny.params, "classifier.bias": tiny.params["classifier.bias"] + 1}, tiny.statistics)
    write_export(tmp_path, changed)
    payload = exports.load(tmp_path).manifest["payload"]
    assert names(tmp_path) == {*others, "manifest.json", payload}
    assert all((tmp_path / name / "precious.txt").exists() for name in others)


def test_of_two_exports_to_one_path_the_second_gets_an_error(tiny, tmp_path):
    write_export(tmp_path, tiny, measured="first")
    with locked_elsewhere(tmp_path):
        with pytest.raises(errors.ExportError, match="another process exports to"):
            write_export(tmp_path, tiny, measured="second")
        assert exports.load(tmp_path).manifest["measured"] == "first"
    write_export(tmp_path, tiny, measured="third")  # the system has released the lock
    with files.locked(tmp_path), pytest.raises(errors.ExportError, match="another process exports"):
        write_export(tmp_path, tiny)


def test_loading_succeeds_while_the_export_is_replaced(tiny, tmp_path):
    versions = [SuperNet(TINY, {**tiny.params, "classifier.bias": np.full(3, i, np.float32)}, tiny.statistics) for i in (0, 1)]
    write_export(tmp_path, versions[0], measured="0")
    done = threading.Event()

    def replace():
        for i in range(1, 30):
            write_export(tmp_path, versions[i % 2], measured=str(i % 2))
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    loads = 0
    try:
        while not done.is_set():
            model = exports.load(tmp_path)
            assert np.all(np.asarray(model.params["classifier.bias"]) == int(model.manifest["measured"]))
            loads += 1
    finally:
        thread.join()
    assert loads > 3


def test_a_reader_that_meets_a_deleted_payload_takes_the_new_one(tiny, tmp_path, monkeypatch):
    write_export(tmp_path, tiny, measured="old")
    changed = SuperNet(TINY, {**tiny.params, "classifier.bias": tiny.params["classifier.bias"] + 1}, tiny.statistics)
    read = directory.read_manifest

    def read_then_replace(path):
        found = read(path)
        monkeypatch.setattr(directory, "read_manifest", read)
        write_export(tmp_path, changed, measured="new")
        return found

    monkeypatch.setattr(directory, "read_manifest", read_then_replace)
    assert exports.load(tmp_path).manifest["measured"] == "new"


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", BAD)
def test_weights_that_are_not_finite_are_refused(tiny, tmp_path, monkeypatch, value):
    bias = tiny.params["classifier.bias"].copy()
    bias[1] = value
    bad = SuperNet(TINY, {**tiny.params, "classifier.bias": bias}, tiny.statistics)
    with pytest.raises(errors.ExportError, match=r"weights 'classifier.bias' of the model are NaN or infinite"):
        write_export(tmp_path / "e", bad)
    assert not (tmp_path / "e").exists()
    with monkeypatch.context() as patch:
        patch.setattr(directory, "_check_finite", lambda *_: None)
        write_export(tmp_path / "e", bad)
    with pytest.raises(errors.ExportError, match=r"weights 'classifier.bias' of \S+e are NaN or infinite"):
        exports.load(tmp_path / "e")


@pytest.mark.parametrize(("row", "value"), [*((0, v) for v in BAD), *((1, v) for v in BAD), (1, -1e-3)])
def test_statistics_that_are_not_finite_or_negative_variances_are_refused(tiny, tmp_path, monkeypatch, row, value):
    subnet = tiny.calibrated[1]
    statistics = {s: v.copy() for s, v in tiny.statistics.items()}
    statistics[subnet][row, 0] = value
    bad = SuperNet(TINY, tiny.params, statistics)
    with pytest.raises(errors.ExportError, match=r"the statistics of the model for .* calibrate again"):
        write_export(tmp_path / "e", bad)
    with monkeypatch.context() as patch:
        patch.setattr(directory, "_check_finite", lambda *_: None)
        write_export(tmp_path / "e", bad)
    with pytest.raises(errors.ExportError, match=r"the statistics of \S+e for"):
        exports.load(tmp_path / "e")


# The largest array of `tiny` has 9,216 bytes. Orbax may spread the arrays over several files.
@pytest.mark.parametrize("limit", [0, 100, 7_000])
def test_a_full_disk_leaves_the_old_export_and_no_partial_files(tiny, tmp_path, limit):
    write_export(tmp_path, tiny, measured="old")
    changed = SuperNet(TINY, {**tiny.params, "classifier.bias": tiny.params["classifier.bias"] + 1}, tiny.statistics)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(errors.ExportError, match=r"make room on the disk|still intact"):
            write_export(tmp_path, changed, measured="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert exports.load(tmp_path).manifest["measured"] == "old"
    assert names(tmp_path) == {"manifest.json", exports.load(tmp_path).manifest["payload"]}


def test_a_manifest_that_cannot_be_written_leaves_the_old_export(tiny, tmp_path, monkeypatch):
    write_export(tmp_path, tiny, measured="old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        with pytest.raises(
            errors.ExportError, match=r"No space left on device\. An export that was there before is still intact"
        ):
            write_export(tmp_path, tiny, measured="new")
    assert exports.load(tmp_path).manifest["measured"] == "old"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("no_test_hangs")
def test_a_pipe_in_place_of_a_profile_is_refused(export):
    path = exports.profile_path(export.path, "cpu")
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.raises(errors.ProfileError, match="is not a regular file"):
        Profile.load(path)
