"""Damaged exports: every single-bit flip, files cut to every length, and something else in place of a file.

Each is refused, or is harmless: it loads with equal content.
"""

import functools
import json
import os
import pathlib
import random
import shutil

import bad
import numpy as np
import pytest
from small_exports import IMAGES, TEXTS, WORDS, payload_of, write
from tiny import random_images

from superserve_jax import errors, exports
from superserve_jax.manifest import MANIFEST_NAME, check_file, read_manifest
from superserve_jax.profile import Profile


# These exports are as small as possible, 16 and 13 KB, so that there is time for every bit.
@pytest.fixture(scope="module", params=["images", pytest.param("texts", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    config, words = {"images": (IMAGES, None), "texts": (TEXTS, WORDS)}[request.param]
    return write(tmp_path_factory.mktemp("exports") / request.param, config, words)


@pytest.fixture(autouse=True)
def no_test_hangs():
    with bad.within(120):
        yield


def flips(file):
    """Flips each bit of a file in turn. Each flip is undone before the next."""
    content = file.read_bytes()
    handle = os.open(file, os.O_WRONLY)
    try:
        for place, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(handle, bytes([byte ^ 1 << bit]), place)
                yield place, bit
            os.pwrite(handle, bytes([byte]), place)
    finally:
        os.close(handle)


def test_every_flipped_bit_of_a_manifest_is_refused_or_reads_the_same(exported):
    whole = json.dumps(read_manifest(exported), sort_keys=True)
    refused = 0
    for where in flips(exported / MANIFEST_NAME):
        read = bad.attempt(lambda: read_manifest(exported), errors.ExportError)
        if isinstance(read, errors.ExportError):
            refused += 1
        else:
            assert json.dumps(read, sort_keys=True) == whole, where
    size = 8 * (exported / MANIFEST_NAME).stat().st_size
    assert 0.99 * size < refused <= size


def test_every_flipped_bit_of_a_payload_file_is_refused(exported):
    payload, contents = payload_of(exported)
    assert {"statistics.npz", "weights/_METADATA"} <= set(contents)
    for name, expected in contents.items():
        for where in flips(payload / name):
            try:
                check_file(payload / name, expected)
            except errors.ExportError:
                continue
            raise AssertionError(f"{name}: the flip of (byte, bit) {where} was not noticed")
        check_file(payload / name, expected)


def test_every_flipped_bit_of_a_profile_is_refused_or_reads_the_same(exported):
    file = exports.profile_path(exported, "cpu")
    whole = Profile.load(file)
    refused = 0
    for where in flips(file):
        read = bad.attempt(lambda: Profile.load(file), errors.ProfileError)
        refused += isinstance(read, errors.ProfileError)
        assert isinstance(read, errors.ProfileError) or read == whole, where
    assert refused > 0.9 * 8 * file.stat().st_size


def test_loading_refuses_flips_of_any_file(exported):
    """A random sample of the flips above, through `exports.load` as users call it. Every run draws another sample."""
    payload, contents = payload_of(exported)
    model = exports.load(exported)
    inputs = random_images(IMAGES, 1) if model.config == IMAGES else model.encode(["a b"])
    logits = np.asarray(model(inputs, model.subnets[-1]))
    for file in [exported / MANIFEST_NAME, *(payload / name for name in contents)]:
        content = file.read_bytes()
        for _ in range(20):
            place, bit = random.randrange(len(content)), random.randrange(8)
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            loaded = bad.attempt(lambda: exports.load(exported), errors.ExportError)
            if not isinstance(loaded, errors.ExportError):
                assert file.name == MANIFEST_NAME, (file, place, bit)
                assert loaded.served == model.served
                np.testing.assert_array_equal(loaded(inputs, model.subnets[-1]), logits)
            else:
                assert str(exported) in str(loaded)
        file.write_bytes(content)
    exports.load(exported)


def test_a_file_cut_to_any_length_or_grown_is_refused(exported):
    payload, contents = payload_of(exported)
    readers = {payload / name: functools.partial(check_file, expected=e) for name, e in contents.items()}
    for file, read in {**readers, exported / MANIFEST_NAME: lambda file: read_manifest(file.parent)}.items():
        content = file.read_bytes()
        file.write_bytes(content + b"0")
        for length in (len(content) + 1, *reversed(range(len(content)))):
            os.truncate(file, length)
            with pytest.raises(errors.ExportError, match=r"manifest\.json|bytes instead of"):
                read(file)
        file.write_bytes(content)
    exports.load(exported)


# -- something else in place of a file ----------------------------------------------------------------------------------------


@pytest.fixture
def export(tmp_path):
    return write(tmp_path / "export", IMAGES)


def missing(file):
    pass


def folder(file):
    file.mkdir()


def pipe(file):
    os.mkfifo(file)


def link_outside(file):
    outside = file.parents[len(file.parts) - 1 - file.parts.index("export")] / f"outside-{file.name}"
    shutil.move(f"{file}.kept", outside)
    file.symlink_to(outside)


def link_to_itself(file):
    file.symlink_to(file)


@pytest.mark.parametrize("stand_in", [missing, folder, pipe, link_outside, link_to_itself], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["statistics.npz", "weights", "weights/_METADATA", "weights/d", ""])
def test_something_else_in_place_of_a_file_or_folder_is_refused_by_its_name(export, stand_in, name):
    file = payload_of(export)[0] / name
    kept = pathlib.Path(f"{file}.kept")
    shutil.move(file, kept)
    stand_in(file)
    if kept.exists():
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    with pytest.raises(errors.ExportError) as caught:
        exports.load(export)
    assert str(export) in str(caught.value)


@pytest.mark.parametrize("stand_in", [missing, folder, pipe, link_to_itself], ids=lambda f: f.__name__)
def test_something_else_in_place_of_the_manifest_is_refused(export, stand_in):
    (export / MANIFEST_NAME).unlink()
    stand_in(export / MANIFEST_NAME)
    with pytest.raises(errors.ExportError, match=r"manifest\.json"):
        exports.load(export)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(export):
    for file in (payload_of(export)[0] / "statistics.npz", export / MANIFEST_NAME):
        mode = file.stat().st_mode
        file.chmod(0)
        with pytest.raises(errors.ExportError, match="cannot be read"):
            exports.load(export)
        file.chmod(mode)
