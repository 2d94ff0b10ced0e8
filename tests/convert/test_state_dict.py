"""State dicts are read from files and wrappers. Everything else is refused."""

import sys
import types

import numpy as np
import published
import pytest
from published import assert_same_model, bert_state

from superserve_jax import convert, errors


@pytest.fixture(scope="module")
def bert_model():
    return published.bert_model()


def test_an_npz_file_can_be_read(bert_model, tmp_path):
    np.savez(tmp_path / "bert.npz", **bert_state(bert_model))
    assert_same_model(convert.bert(tmp_path / "bert.npz", num_heads=3), bert_model)


def test_a_safetensors_file_can_be_read(bert_model, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    state = {k: np.ascontiguousarray(v) for k, v in bert_state(bert_model).items()}
    library.save_file(state, tmp_path / "bert.safetensors")
    assert_same_model(convert.bert(str(tmp_path / "bert.safetensors"), num_heads=3), bert_model)


class FakeTensor:
    """The methods of a torch tensor that `convert` calls."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    cpu = float = detach

    def numpy(self):
        return self.array


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_torch_file_is_read_with_weights_only(bert_model, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"bert{suffix}"
    path.touch()
    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        return {"state_dict": {k: FakeTensor(v) for k, v in bert_state(bert_model).items()}}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, __version__="2.6.0+cpu"))
    assert_same_model(convert.bert(path, num_heads=3), bert_model)
    assert calls == [((path,), {"map_location": "cpu", "weights_only": True})]


@pytest.mark.parametrize(("suffix", "module"), [(".pth", "torch"), (".safetensors", "safetensors.numpy")])
def test_a_library_that_is_missing_is_named_with_the_remedy(tmp_path, monkeypatch, suffix, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / f"weights{suffix}").touch()
    with pytest.raises(errors.ConversionError, match=rf"needs the library {module.split('.')[0]}.*superserve-jax\[convert\]"):
        convert.bert(tmp_path / f"weights{suffix}", num_heads=1)


def test_a_file_that_is_missing_damaged_or_of_another_kind_is_refused(bert_model, tmp_path):
    with pytest.raises(errors.ConversionError, match=r"no weight file .*absent\.npz"):
        convert.bert(tmp_path / "absent.npz", num_heads=1)
    with pytest.raises(errors.ConversionError, match=r"the formats are \.npz, \.safetensors, \.pth"):
        convert.bert(tmp_path / "weights.h5", num_heads=1)
    np.savez(tmp_path / "bert.npz", **bert_state(bert_model))
    content = (tmp_path / "bert.npz").read_bytes()
    for damaged in (b"", b"not a zip", content[: len(content) // 2], content[:300] + b"\0\0\0\0" + content[304:]):
        (tmp_path / "bert.npz").write_bytes(damaged)
        with pytest.raises(errors.ConversionError, match=r"bert\.npz"):
            convert.bert(tmp_path / "bert.npz", num_heads=3)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(errors.ConversionError, match=r"array\.npz"):
        convert.bert(tmp_path / "array.npz", num_heads=1)


def test_wrappers_and_other_dtypes_are_tolerated(bert_model):
    state = {f"module.{k}": v.astype(np.float64) for k, v in bert_state(bert_model).items()}
    assert_same_model(convert.bert({"epoch": 3, "state_dict": state}, num_heads=3), bert_model)


def test_a_mapping_that_is_no_state_dict_is_refused(tmp_path):
    with pytest.raises(errors.ConversionError, match="the state dict holds no weights"):
        convert.bert({}, num_heads=1)
    with pytest.raises(errors.ConversionError, match="'epoch' must be a dense array of real numbers, got str"):
        convert.bert({"epoch": "three"}, num_heads=1)
