"""Damaged exports: every single-bit flip, files cut to every length, and something else in place of a file.

Each is refused, or is harmless: it loads with equal content.
"""

import functools
import itertools
import os
import pathlib
import random
import shutil

import bad
import numpy as np
import pytest
from small_exports import IMAGES, payload_of, write
from tiny import random_images

from superserve_jax import errors, exports
from superserve_jax.manifest import MANIFEST_NAME, check_file, read_manifest
from superserve_jax.profile import Profile

pytestmark = pytest.mark.usefixtures("no_test_hangs")


def damaged(file):
    """Flips each bit of a file in turn, then lets it grow, and cuts it to every length. In the end it is as before."""
    content = file.read_bytes()
    with file.open("r+b", buffering=0) as f:
        for place, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(f.fileno(), bytes([byte ^ 1 << bit]), place)
                yield f"bit {bit} of byte {place} is flipped"
            os.pwrite(f.fileno(), bytes([byte]), place)
        os.pwrite(f.fileno(), b"0", len(content))
        for length in (len(content) + 1, *reversed(range(len(content)))):
            os.truncate(f.fileno(), length)
            yield f"the length is {length}"
        os.pwrite(f.fileno(), content, 0)


# The exports are as small as possible, 16 and 13 KB, so that there is time for every bit.
def test_a_file_with_any_bit_flipped_or_of_any_length_is_refused_or_reads_the_same(exported):
    payload, contents = payload_of(exported)
    assert {"statistics.npz", "weights/_METADATA"} <= set(contents)
    profile = exports.profile_path(exported, "cpu")
    # Each file's reader, and the share of damages that it may accept: 1e-5 equals 1E-5, and a profile needs no digest.
    readers = {payload / name: (functools.partial(check_file, payload / name, e), 0.0) for name, e in contents.items()}
    readers[exported / MANIFEST_NAME] = functools.partial(read_manifest, exported), 0.01
    readers[profile] = functools.partial(Profile.load, profile), 0.1
    for file, (read, share) in readers.items():
        whole, accepted = read(), 0
        for damage in damaged(file):
            found = bad.attempt(read, errors.ExportError, errors.ProfileError)
            if not isinstance(found, errors.SuperServeError):
                assert share, f"{file}: {damage}, but nobody noticed"
                assert found == whole, damage
                accepted += 1
        assert accepted <= share * 8 * file.stat().st_size
    exports.load(exported)


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
                assert "\n" not in str(loaded)
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


STAND_INS = [missing, folder, pipe, link_outside, link_to_itself]
PLACES = itertools.product(["statistics.npz", "weights", "weights/_METADATA", "weights/d", ""], STAND_INS)
MANIFEST = ((f"../{MANIFEST_NAME}", stand_in) for stand_in in STAND_INS if stand_in != link_outside)


@pytest.mark.parametrize(("place", "stand_in"), [*PLACES, *MANIFEST])
def test_something_else_in_place_of_a_file_or_folder_is_refused_by_its_name(export, place, stand_in):
    file = (payload_of(export)[0] / place).resolve()
    kept = pathlib.Path(f"{file}.kept")
    shutil.move(file, kept)
    stand_in(file)
    if kept.exists():
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    with pytest.raises(errors.ExportError) as caught:
        exports.load(export)
    assert str(export) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(export):
    for file in (payload_of(export)[0] / "statistics.npz", export / MANIFEST_NAME):
        mode = file.stat().st_mode
        file.chmod(0)
        with pytest.raises(errors.ExportError, match="cannot be read"):
            exports.load(export)
        file.chmod(mode)
