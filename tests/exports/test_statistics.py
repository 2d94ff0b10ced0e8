import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from bad import Trap
from small_exports import IMAGES, payload_of, write
from tiny import TINY, assert_same_arrays, random_statistics

from superserve_jax import errors, exports
from superserve_jax.exports import statistics

SUBNETS = [TINY.space().sample(0, step) for step in range(5)]
CALIBRATED = {s: random_statistics(TINY, s) for s in SUBNETS}


def assert_equal(read):
    assert list(read) == list(CALIBRATED)
    assert {values.dtype for values in read.values()} == {np.dtype(np.float32)}
    assert_same_arrays(read, CALIBRATED)


def test_statistics_are_read_as_they_were_written(tmp_path):
    statistics.write(tmp_path / "statistics.npz", CALIBRATED)
    assert_equal(statistics.read(tmp_path / "statistics.npz", TINY))
    statistics.write(tmp_path / "statistics.npz", {})
    assert statistics.read(tmp_path / "statistics.npz", TINY) == {}


def test_the_older_format_of_runs_is_read(tmp_path):
    """It has one array for each subnet."""
    names = np.array(json.dumps([s.to_json() for s in SUBNETS]))
    arrays = {f"row{i}": values for i, values in enumerate(CALIBRATED.values())}
    np.savez(tmp_path / "statistics.npz", subnets=names, **arrays)
    assert_equal(statistics.read(tmp_path / "statistics.npz", TINY))
    arrays["row1"] = arrays["row1"][:, 1:]
    np.savez(tmp_path / "statistics.npz", subnets=names, **arrays)
    with pytest.raises(errors.ExportError, match="do not fit its 5 subnets"):
        statistics.read(tmp_path / "statistics.npz", TINY)


# -- files that are damaged, or that an attacker made -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exports.load(write(tmp_path_factory.mktemp("images") / "export", IMAGES))


def npz(packed=zipfile.ZIP_STORED, **entries):
    """A zip archive with the given bytes as entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(array, **header):
    """A NumPy file. With `header`, only that header and no values."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    if header:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1,), **header})
    return buffer.getvalue()


def test_statistics_that_do_not_fit_are_refused_and_nothing_is_unpickled(tmp_path, model):
    good = (payload_of(model.path)[0] / "statistics.npz").read_bytes()
    file, trap = tmp_path / "statistics.npz", tmp_path / "trap"
    file.write_bytes(good)
    assert statistics.read(file, IMAGES).keys() == model.statistics.keys()
    listed = np.array(json.dumps([s.to_json() for s in model.statistics]))
    widths = np.array([values.shape[1] for values in model.statistics.values()])
    whole = np.concatenate(list(model.statistics.values()), axis=1)
    fitting = {"subnets": npy(listed), "widths": npy(widths), "rows": npy(whole)}
    file.write_bytes(npz(**fitting))
    assert statistics.read(file, IMAGES).keys() == model.statistics.keys()
    pickled = npy(np.array([Trap(trap)], object))
    for content in (
        *(b"", b"PK", b"\x80\x04.", good[:-30], npz(), npz(**{**fitting, "rows": b""}), pickled),
        *(npz(**{**fitting, name: pickled}) for name in fitting),
        *(npz(**{**fitting, "rows": npy(None, shape=shape)}) for shape in ((2, 10**12), (1 << 62, 1 << 62), (2, 0), (-1, 4))),
        npz(**{**fitting, "rows": npy(whole.astype(np.float64))}),
        npz(**{**fitting, "rows": npy(whole[:, 1:])}),
        npz(**{**fitting, "widths": npy(widths[::-1] * -1)}),
        npz(**{**fitting, "widths": npy(widths.astype(float) + 0.5)}),
        npz(**{**fitting, "subnets": npy(np.array("[" * 100_000))}),
        npz(**{**fitting, "subnets": npy(np.array('[{"gates": [1, 1, 1, 1]}]'))}),
    ):
        file.write_bytes(content)
        with pytest.raises(errors.ExportError, match=r"statistics\.npz"):
            statistics.read(file, IMAGES)
    assert not trap.exists()


ZEROS = npy(np.zeros((2, 10**6), np.float32))
EMPTY = {"subnets": npy(np.array("[]")), "rows": npy(np.zeros((2, 0), np.float32))}
PACKED = [npz(packed, subnets=ZEROS) for packed in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)]
CLAIMS = {
    "packed zeros": PACKED,
    "packed zeros of a small claim": [p.replace(struct.pack("<I", len(ZEROS)), struct.pack("<I", 200)) for p in PACKED],
    "a shape of terabytes": [npz(subnets=npy(None, shape=shape)) for shape in ((2, 10**12), (-(10**6), -(10**6)))],
    "items of zero bytes": [npz(**EMPTY, widths=npy(None, descr=kind, shape=(10**9,))) for kind in ("<U0", "|S0", "|V0")],
    "an array before the archive": [npy(None, shape=(10**9,)) + npz(subnets=b"")],
}


@pytest.mark.parametrize("contents", CLAIMS.values(), ids=CLAIMS)
def test_statistics_that_claim_more_than_their_file_holds_are_refused_before_memory_is_taken(tmp_path, contents):
    file = tmp_path / "statistics.npz"
    for content in contents:
        file.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(errors.ExportError, match=r"statistics\.npz"):
            statistics.read(file, IMAGES)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000


@pytest.mark.parametrize("content", [b"\x93NUMPY\1\0\6\0{'a': ", b"\x93NUMPY\1\0\2\0{(", b"\x93NUMPY\2\0\2\0\0\0{}"])
def test_statistics_whose_header_is_no_python_are_refused(tmp_path, content):
    (tmp_path / "statistics.npz").write_bytes(npz(subnets=content))
    with pytest.raises(errors.ExportError, match=r"statistics\.npz"):
        statistics.read(tmp_path / "statistics.npz", IMAGES)
