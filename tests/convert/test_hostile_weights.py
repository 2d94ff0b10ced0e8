"""Weight files of strangers: nothing in them runs, and no small file exhausts the memory. Odd tensors are refused by name."""

import io
import json
import pickle
import re
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
from bad import Trap

from superserve_jax import convert, errors
from superserve_jax.convert import state_dict

NOT_READ = "holds Python objects.*They could run code, so they are not read; have the weights saved alone"


@pytest.fixture
def ran(tmp_path):
    """The path that appears if the code in a file has run."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


# -- code ---------------------------------------------------------------------------------------------------------------------


def test_a_pickle_runs_and_the_fixture_sees_it(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_objects_in_an_npz_are_not_unpickled(ran, tmp_path):
    np.savez(tmp_path / "evil.npz", weight=np.array([Trap(ran)], dtype=object))
    with pytest.raises(errors.ConversionError, match=rf"evil\.npz.*{NOT_READ}"):
        convert.bert(tmp_path / "evil.npz", num_heads=1)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_pickle_or_an_npy_of_objects_by_another_name_is_not_unpickled(ran, tmp_path, suffix):
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps({"weight": Trap(ran)}))
    with pytest.raises(errors.ConversionError, match=rf"evil\{suffix} is damaged, or is not a"):
        convert.bert(path, num_heads=1)
    with path.open("wb") as file:
        np.save(file, np.array([Trap(ran)], dtype=object))
    with pytest.raises(errors.ConversionError, match=rf"evil\{suffix} is damaged, or is not a"):
        convert.bert(path, num_heads=1)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_objects_in_a_torch_file_are_not_unpickled(ran, tmp_path, torch, suffix, form):
    path, state = tmp_path / f"evil{suffix}", {"weight": Trap(ran)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(errors.ConversionError, match=rf"evil\{suffix}.*{NOT_READ}") as caught:
        convert.bert(path, num_heads=1)
    assert "False" not in str(caught.value)  # torch's own message says how to run the code
    assert re.search(r"\(\w+\.mkdir\)", str(caught.value))


def test_a_whole_model_in_a_torch_file_is_refused_with_the_remedy(tmp_path, torch):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(errors.ConversionError, match=r"model\.pth.*Linear.*torch\.save\(model\.state_dict\(\), path\)"):
        convert.bert(tmp_path / "model.pth", num_heads=1)


def test_a_torch_whose_weights_only_can_be_tricked_is_refused(tmp_path, monkeypatch):
    old = types.SimpleNamespace(load=lambda *a, **k: pytest.fail("called"), __version__="2.5.1+cu121")
    monkeypatch.setitem(sys.modules, "torch", old)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(errors.ConversionError, match=r"torch 2\.5\.1.* too old.*pip install 'superserve-jax\[convert\]'"):
        convert.bert(tmp_path / "weights.pth", num_heads=1)


# -- lies about sizes ---------------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "header_bytes"),
    [
        (ENTRY, 2**64 - 1),
        (ENTRY, 2**63),
        (ENTRY, 90_000_000),
        ({**ENTRY, "shape": [2**40], "data_offsets": [0, 2**42]}, None),
        ({**ENTRY, "shape": [2**62, 4, 2]}, None),
        ({**ENTRY, "shape": [-2]}, None),
        ({**ENTRY, "data_offsets": [8, 0]}, None),
        ({**ENTRY, "data_offsets": [-8, 0]}, None),
        ({**ENTRY, "shape": [3]}, None),
        ({**ENTRY, "dtype": "PY"}, None),
    ],
)
def test_a_safetensors_file_whose_header_lies_is_refused(tmp_path, entry, header_bytes):
    pytest.importorskip("safetensors.numpy")
    header = json.dumps({"weight": entry}).encode()
    length = struct.pack("<Q", header_bytes or len(header))
    (tmp_path / "lies.safetensors").write_bytes(length + header + bytes(8))
    with pytest.raises(errors.ConversionError, match=r"lies\.safetensors is damaged, or is not a \.safetensors file"):
        convert.bert(tmp_path / "lies.safetensors", num_heads=1)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,)}",  # items of no bytes need no file
        "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,)}",
        "__import__('os').abort()",
    ],
)
def test_an_npz_whose_header_lies_is_refused(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "lies.npz", "w") as archive:
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n"
        archive.writestr("weight.npy", content)
    with pytest.raises(errors.ConversionError, match=r"lies\.npz is damaged|'weight' claims to hold 4,000,000,000,000 bytes"):
        convert.bert(tmp_path / "lies.npz", num_heads=1)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.6.0"))
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("unpacked"))
    with zipfile.ZipFile(tmp_path / f"bomb{suffix}", "w") as archive:
        archive.writestr("weight.npy", bytes(100))
        archive.infolist()[0].file_size = 2 << 30  # as a real bomb says, which would take seconds to make
    with pytest.raises(errors.ConversionError, match=r"bomb.* claims to hold 2,147,483,648 bytes, far more than"):
        convert.bert(tmp_path / f"bomb{suffix}", num_heads=1)


def test_a_torch_tensor_that_repeats_one_number_without_end_is_refused(tmp_path, torch):
    torch.save({"weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pth")
    with pytest.raises(errors.ConversionError, match="'weight' claims to hold 4,000,000,000,000 bytes"):
        convert.bert(tmp_path / "wide.pth", num_heads=1)


# -- odd arrays ---------------------------------------------------------------------------------------------------------------


class Raises:
    def __init__(self, error):
        self.error = error

    def __array__(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    "value",
    [
        [[1.0, 2.0], [3.0]],
        np.eye(2) + 1j,
        np.ma.masked_array([1.0, 2.0], [False, True]),
        np.array(["1", "2"]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.array([1, None], object),
        Raises(RuntimeError("no")),
        Raises(MemoryError()),
        None,
    ],
    ids=["ragged", "complex", "masked", "text", "date", "objects", "raises", "no memory", "none"],
)
def test_a_weight_that_is_no_dense_array_of_real_numbers_is_refused_by_name(value):
    with pytest.raises(errors.ConversionError, match=r"'weight' must be a dense array of real numbers, got .*; convert it"):
        state_dict.read({"weight": value})


@pytest.mark.parametrize("kind", ["sparse", "csr", "meta", "quantised", "complex", "nested", "jagged"])
@pytest.mark.filterwarnings("ignore")
def test_a_torch_tensor_without_dense_real_numbers_is_refused_by_name(torch, tmp_path, kind):
    eye = torch.eye(3)
    value = {
        "sparse": eye.to_sparse,
        "csr": eye.to_sparse_csr,
        "meta": lambda: eye.to("meta"),
        "quantised": lambda: torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8),
        "complex": lambda: eye.to(torch.complex64),
        "nested": lambda: torch.nested.nested_tensor([eye, torch.eye(2)]),
        "jagged": lambda: torch.nested.nested_tensor([eye, torch.ones(2, 3)], layout=torch.jagged),
    }[kind]()
    with pytest.raises(errors.ConversionError, match=r"'weight' must be a dense array of real numbers, got \w*Tensor"):
        state_dict.read({"weight": value})
    if kind in ("sparse", "meta", "quantised", "complex"):
        torch.save({"weight": value}, tmp_path / "odd.pth")
        with pytest.raises(errors.ConversionError, match="'weight' must be a dense array of real numbers"):
            state_dict.read(tmp_path / "odd.pth")


def test_torch_tensors_of_other_dtypes_are_read(torch):
    eye = torch.eye(3)
    for value in (eye.bfloat16(), eye.half(), eye.double(), eye.int(), torch.nn.Parameter(eye)):
        found = state_dict.read({"weight": value})["weight"]
        assert (found.dtype, found.tolist()) == (np.float32, np.eye(3).tolist())


def test_a_weight_too_large_for_float32_is_infinite_without_a_warning():
    assert np.isinf(state_dict.read({"weight": np.array([1e300])})["weight"]).all()


@pytest.mark.parametrize("value", [None, 5, io.BytesIO(b"x"), ["weights.npz"]])
def test_what_is_neither_a_mapping_nor_a_path_is_refused(value):
    with pytest.raises(errors.ConversionError, match="expected a mapping of arrays or the path of a file, got"):
        state_dict.read(value)
