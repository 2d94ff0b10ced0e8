"""StableHLO files give our logits in a process that has jax, but not this package."""

import json
import os
import re
import subprocess
import sys

import jax.export
import numpy as np
import pytest
from three_subnets import KINDS, cases, expected
from tiny import assert_close, random_params, random_statistics

from superserve_jax import errors, exports, extract, files, foreign
from superserve_jax.exports import Served
from superserve_jax.supernets.supernet import SuperNet

pytest.importorskip("flatbuffers", reason="needs the extra extract")

# Runs every file on the inputs of its .npz, and writes the logits.
PROGRAM = """
import pathlib, sys
sys.modules.update(dict.fromkeys(("superserve_jax", "flax")))  # importing one of them fails
import jax, jax.export, numpy as np
for path in pathlib.Path(sys.argv[1]).glob("*.stablehlo"):
    run = jax.jit(jax.export.deserialize(path.read_bytes()).call)
    with np.load(path.with_suffix(".npz")) as inputs:
        np.savez(path.with_suffix(".logits.npz"), **{name: run(inputs[name]) for name in inputs})
"""


def batches_of(kind):
    """A batch of one input, and one of several. Of texts, the second has fewer tokens."""
    single, several, *shorter = cases(KINDS[kind])
    return [single, shorter[-1] if shorter else several]


CASES = {(kind, index): batches_of(kind) for kind in ("bottleneck", "bert") for index in range(3)}
CASES |= {(kind, 1): batches_of(kind)[1:] for kind in ("basic", "float32", "one_type")}


@pytest.mark.slow
def test_every_file_gives_the_logits_of_a_plain_network_without_this_package(models, take, tmp_path):
    for (kind, index), batches in CASES.items():
        (tmp_path / f"{kind}-{index}.stablehlo").write_bytes(extract.content(take(kind, index), "stablehlo"))
        np.savez(tmp_path / f"{kind}-{index}.npz", *batches)
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}  # to compile
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], check=True, env={**os.environ, **fast})
    for (kind, index), batches in CASES.items():
        logits = np.load(tmp_path / f"{kind}-{index}.logits.npz")
        for i, inputs in enumerate(batches):
            assert_close(logits[f"arr_{i}"], expected(models[kind], index, inputs), 1e-4)


@pytest.mark.parametrize("kind", ["basic", "one_type"])
def test_no_device_rounds_the_factors_of_products(take, kind):
    module = jax.export.deserialize(bytearray(extract.content(take(kind, 0), "stablehlo"))).mlir_module()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", module)
    assert products
    assert [line for line in products if not re.search(r"HIGHEST.*HIGHEST", line)] == []


def test_the_contract_is_beside_the_file_with_its_digest(models, tmp_path):
    written = extract.write(tmp_path / "a.stablehlo", models["basic"], 0)
    assert written.paths == (tmp_path / "a.stablehlo", tmp_path / "a.stablehlo.json")
    found = json.loads(written.paths[1].read_text())
    assert found.pop("sha256") == files.sha256(written.paths[0])
    assert found == written.contract == written.subnet.contract


def own_family(monkeypatch, path, name):
    """A SuperNet of a family in a user's file, and its served subnet."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = getattr(foreign.import_module(str(path)), name)()
    subnet = config.space().smallest()
    model = SuperNet(config, random_params(config), {subnet: random_statistics(config, subnet)})
    return model, [Served(subnet, None, None, config.flops(subnet), config.num_params(subnet))]


def test_a_family_of_a_user_works_and_is_refused_for_onnx_by_its_name(monkeypatch, tmp_path, request):
    """Its norms follow matrix products, so their statistics cannot be folded."""
    example = request.config.rootpath / "docs" / "examples" / "my_family.py"
    model, served = own_family(monkeypatch, example, "MyConfig")
    model = exports.load(exports.export(tmp_path / "export", model, served, measured="never"))
    written = extract.write(tmp_path / "a.stablehlo", model)
    assert written.check.difference < 1e-5
    weights = written.subnet.weights
    statistics = model.statistics_of(served[0].subnet)
    np.testing.assert_array_equal(weights["first.mean"], statistics[0, : len(weights["first.mean"])])
    assert {"first.variance", "first.norm.scale", "first.norm.bias", "first.linear.kernel"} <= set(weights)
    with pytest.raises(errors.ExportError, match=r"ofa_resnet and dynabert, not 'my_mlp'; give the format stablehlo to run"):
        extract.write(tmp_path / "a.onnx", model)


def test_a_network_that_needs_a_batch_size_is_refused(monkeypatch, tmp_path, request):
    model, served = own_family(monkeypatch, request.config.rootpath / "tests/helpers/mlp_family.py", "MLPConfig")
    model = exports.load(exports.export(tmp_path / "export", model, served, measured="never"))
    with pytest.raises(errors.ExportError, match=r"family 'mlp' cannot be traced for batches .* write x.shape\[0\] in place"):
        extract.write(tmp_path / "a.stablehlo", model)
    assert not list(tmp_path.glob("a.*"))
    assert extract.write(tmp_path / "a.safetensors", model).check == extract.Check(not_checked="the file has only weights")
