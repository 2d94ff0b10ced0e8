"""A pipe, socket, device, link or folder anywhere in an export is refused, and nothing waits for it."""

import os
import pathlib
import shutil

import odd_files
import pytest
from small_exports import TEXTS, WORDS, write
from tiny import write_export

from superserve_jax import errors, exports
from superserve_jax.manifest import verify_files

pytestmark = pytest.mark.usefixtures("no_test_hangs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("exports") / "whole", TEXTS, WORDS)


@pytest.fixture
def copy(whole, tmp_path, monkeypatch):
    """A copy of an export of a text model, by a short relative path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "e")
    return pathlib.Path("e")


def every_file(path):
    return [f for f in sorted(path.rglob("*")) if f.is_file() and f.parent.name != "profiles"]


@pytest.mark.parametrize("kind", odd_files.ODD)
def test_it_is_refused_in_place_of_any_file(copy, kind):
    """`load` checks all files before it reads one, so most cases call only that check."""
    contents = exports.load(copy).manifest["files"]
    [payload] = copy.glob("payload-*")
    found = every_file(copy)
    assert {f.name for f in found} > {"manifest.json", "statistics.npz", "vocabulary.txt", "_METADATA"}
    for i, file in enumerate(found):
        kept = file.rename("kept")
        odd_files.put(kind, file)
        with pytest.raises(errors.ExportError, match=rf"{file.name}|is not an export"):
            exports.load(copy) if i % 4 == 0 or file.parent != payload / "weights" else verify_files(payload, contents)
        (os.rmdir if kind == "folder" else os.unlink)(file)
        kept.rename(file)
    exports.load(copy)


@pytest.mark.parametrize("kind", [kind for kind in odd_files.ODD if kind != "folder"])
@pytest.mark.parametrize("place", ["payload", "payload/weights", "payload/weights/d", "payload/new"])
def test_it_is_refused_beside_the_files_and_in_place_of_a_folder(copy, kind, place):
    [payload] = copy.glob("payload-*")
    path = pathlib.Path(place.replace("payload", str(payload)))
    if path.is_dir():
        shutil.rmtree(path)
    odd_files.put(kind, path)
    with pytest.raises(errors.ExportError, match="copy or export it again"):
        exports.load(copy)


@pytest.mark.parametrize("kind", odd_files.ODD)
def test_an_export_does_not_replace_it_in_place_of_the_manifest_and_replaces_it_elsewhere(tiny, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = write_export(pathlib.Path("e"), tiny)
    [payload] = path.glob("payload-*")
    odd_files.put(kind, payload / "statistics.npz")
    assert exports.load(write_export(path, tiny)).served
    odd_files.put(kind, path / "manifest.json")
    with pytest.raises(errors.ExportError, match=r"manifest\.json is damaged or belongs to another|holds no export"):
        write_export(path, tiny)
