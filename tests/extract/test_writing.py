"""`extract.write` and the command `extract`: what they refuse, what they replace, and what they print."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from superserve_jax import errors, extract, shipped
from superserve_jax.commands.extract import main
from superserve_jax.extract import checking

PROGRAM = "serve/extract.py"
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(('superserve_jax', 'flax')))\n"  # importing one of them fails


@pytest.mark.parametrize("index", [1.0, "1", None])
def test_an_index_that_is_not_an_integer_is_refused(models, index):
    with pytest.raises(errors.SubnetError, match=rf"must be an integer from 0 to 2, got {index!r}"):
        extract.take(models["basic"], index)


@pytest.mark.parametrize("index", [3, -4, 100])
def test_an_index_outside_of_the_list_is_refused_with_its_range(models, index):
    with pytest.raises(
        errors.SubnetError, match=rf"subnet {index} is not one of the 3 served subnets .* from 0 .* to 2, or -1"
    ):
        extract.take(models["basic"], index)


@pytest.mark.parametrize(
    ("name", "format", "error", "message"),
    [
        (
            "a.bin",
            None,
            errors.ConfigError,
            r"the name .*a.bin does not say .*; give a format: onnx, stablehlo or safetensors",
        ),
        ("a", None, errors.ConfigError, "does not say which format to write"),
        ("a.onnx", "onx", errors.UnknownNameError, "did you mean 'onnx'"),
    ],
)
def test_an_unknown_format_is_refused(models, tmp_path, name, format, error, message):
    with pytest.raises(error, match=message):
        extract.write(tmp_path / name, models["basic"], format=format)


@pytest.mark.parametrize(
    ("format", "package"), [("onnx", "onnx"), ("stablehlo", "flatbuffers"), ("safetensors", "safetensors")]
)
def test_a_missing_package_is_named(models, tmp_path, monkeypatch, format, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(errors.ExportError, match=rf"needs the package '{package}': pip install 'superserve-jax\[extract\]'"):
        extract.write(tmp_path / "a", models["basic"], format=format)
    assert not list(tmp_path.iterdir())


def test_a_family_without_a_graph_is_refused_before_the_package_is_needed(take, monkeypatch):
    monkeypatch.setattr(extract.formats, "_BUILDERS", {})
    with pytest.raises(errors.ExportError, match=r"not 'ofa_resnet'; give the format stablehlo to run .* or safetensors"):
        extract.content(take("basic", 2), "onnx")


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_a_file_with_other_logits_is_not_written(models, tmp_path, monkeypatch, difference):
    (tmp_path / "a.safetensors").write_text("old")
    monkeypatch.setattr(checking, "check", lambda *_: extract.Check("jax 1", difference))
    with pytest.raises(errors.ExportError, match=r"with jax 1, differ from the server's by .*0.0001 .* Nothing was written"):
        extract.write(tmp_path / "a.safetensors", models["basic"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "old"


@pytest.mark.parametrize(("format", "packages"), [("stablehlo", ["flatbuffers"]), ("onnx", ["onnx", "onnxruntime"])])
def test_the_check_finds_other_weights(models, take, format, packages):
    """The file of another subnet has the same inputs."""
    for package in packages:
        pytest.importorskip(package)
    content = extract.content(take("basic", 1), format)
    assert checking.check(models["basic"], take("basic", 2), format, content).is_wrong


def test_without_onnxruntime_a_graph_is_written_unchecked(models, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    written = extract.write(tmp_path / "a.onnx", models["basic"], 2)
    assert written.check == extract.Check(not_checked="the package onnxruntime is missing: pip install onnxruntime")
    assert (tmp_path / "a.onnx").stat().st_size == written.size


def test_logits_of_zero_prove_nothing(take, models):
    model = copy.copy(models["basic"])
    model.params = {name: np.zeros_like(value) for name, value in model.params.items()}
    check = checking.check(model, take("basic", 0), "stablehlo", b"any file")
    assert check == extract.Check(not_checked="all logits are zero")


def test_an_older_file_is_replaced_and_a_folder_is_made(models, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    small, large = (extract.write(path, models["basic"], i).size for i in (np.int64(0), 2))
    assert path.stat().st_size == large > small
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_path_that_cannot_be_written_is_refused(models, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(errors.WriteError, match=r"a.safetensors cannot be written"):
        extract.write(tmp_path / "a.safetensors", models["basic"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_weights_that_are_too_large_for_a_format_are_refused(take, monkeypatch):
    monkeypatch.setattr(extract.formats, "_MOST_BYTES", {"onnx": 1000})
    monkeypatch.setattr(extract.formats, "_PACKAGES", {"onnx": "json"})
    with pytest.raises(errors.ExportError, match=r"have [\d,]+ bytes, .* onnx holds less than 2 GiB; give the format safe"):
        extract.content(take("basic", 2), "onnx")


def test_the_home_folder_is_found(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert extract.write("~/a.safetensors", models["basic"]).paths == (tmp_path / "a.safetensors",)


@pytest.mark.parametrize("format", extract.FORMATS)
def test_the_command_prints_a_program_that_runs_without_this_package(run_program, tmp_path, format):
    for package in {"onnx": ("onnx", "onnxruntime"), "stablehlo": ("flatbuffers",), "safetensors": ()}[format]:
        pytest.importorskip(package)
    path = tmp_path / f"it's.{format}"
    done = run_program(PROGRAM, "digits", "--subnet", "1", "--out", path, json_file=True)
    contract = done.json["contract"]
    served = json.loads((shipped.exports()["digits"] / "manifest.json").read_text())["served"]
    assert (contract["index"], contract["accuracy"]) == (1, served[1]["accuracy"])
    assert f"{100 * served[1]['accuracy']:.2f} %" in done.stdout
    assert f"{path}: " in done.stdout
    assert done.json["bytes"] == path.stat().st_size
    assert done.json["format"] == format
    if format == "safetensors":
        assert done.json["check"] == {"ran_with": None, "difference": None, "not_checked": "the file has only weights"}
        assert "\nnot checked: the file has only weights\n" in done.stdout
    else:
        assert done.json["check"]["difference"] < 1e-5
        assert f"\nchecked with {done.json['check']['ran_with']}: logits differ" in done.stdout
    [snippet] = re.findall(r"without superserve-jax:\n\n(.*?)\n\n", done.stdout, re.DOTALL)
    assert snippet.count("\n") == 4
    printed = subprocess.run([sys.executable, "-c", WITHOUT + snippet], check=True, capture_output=True, text=True).stdout
    assert "classifier.kernel" in printed if format == "safetensors" else re.fullmatch(r"\[\d\]\n", printed)


def test_the_default_name_has_the_index_and_the_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["extract", "digits", "--subnet", "1", "--format", "safetensors"])
    main()
    assert [p.name for p in tmp_path.iterdir()] == ["subnet1.safetensors"]


def test_without_a_file_the_command_lists_the_subnets(run_program):
    lines = run_program(PROGRAM, "digits").stdout.splitlines()
    served = json.loads((shipped.exports()["digits"] / "manifest.json").read_text())["served"]
    assert [line.split()[0] for line in lines[2 : 2 + len(served)]] == [str(i) for i in range(len(served))]
    assert lines[-1].startswith("choose one: superserve extract digits --subnet INDEX --out FILE.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("digits --subnet 6 --out a.onnx", "subnet 6 is not one of the 6 served subnets"),
        ("digits --subnet 2", "--subnet 2 has no effect without --out"),
        ("nowhere --out a.gguf", "the name a.gguf does not say which format to write"),
        ("nowhere --out a.onnx --json ./a.onnx", "--json a.onnx would replace the extracted file; give another name"),
        ("nowhere --out a.stablehlo --json a.stablehlo.json", "--json a.stablehlo.json would replace the extracted file"),
        ("nowhere --format safetensors --json subnet-1.safetensors", "would replace the extracted file"),
        ("nowhere --out a.onnx", "is not an export"),
    ],
)
def test_bad_options_end_the_command_with_one_line(run_program, options, message):
    error = run_program(PROGRAM, *options.split(), status=2).stderr
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_library_does_not_import_this_package():
    """tests/test_layering.py checks the same for every module."""
    modules = "{'superserve_jax.extract', 'onnx', 'onnxruntime', 'safetensors'}"
    code = f"import sys, superserve_jax as ss; ss.Server, ss.Profile; assert not {modules} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
