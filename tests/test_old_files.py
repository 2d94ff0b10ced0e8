"""Files that commit aac2b73 wrote still load with equal bits, and a training run that it began can be resumed.

tests/data/README.md tells how the files were made, and describes the contents of expected.npz.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from noise import state_of
from tiny import assert_same_arrays

from superserve_jax import exports
from superserve_jax.profile import Profile
from superserve_jax.training import data, loop
from superserve_jax.training.runs import Run

OLD = pathlib.Path(__file__).parent / "data" / "aac2b73"
MIDDLE, STEPS = 7, 12  # the run was stopped after step 7 of 12


def expected(prefix):
    """The arrays of expected.npz whose names begin with `prefix/`, by the rest of their names, in the order of the file."""
    with np.load(OLD / "expected.npz") as arrays:
        return {name.removeprefix(f"{prefix}/"): arrays[name] for name in arrays.files if name.startswith(f"{prefix}/")}


@pytest.fixture
def dataset():
    arrays = expected("data")
    train, test = ((arrays[f"{split}_inputs"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    return data.from_arrays(train=train, test=test, validation=16)


@pytest.fixture
def run(tmp_path, dataset):
    """A copy of the run, which training may change."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    return Run.open(tmp_path / "run", dataset=dataset)


def state_at(run, step):
    """Leaves of the training state in a checkpoint, by their number."""
    return {f"{i:03}": leaf for i, leaf in enumerate(state_of(run, step).values())}


@pytest.mark.parametrize("name", ["images", "texts"])
def test_an_export_loads_with_equal_weights_and_statistics_and_computes_the_same_logits(name):
    model = exports.load(OLD / name)
    assert_same_arrays(model.params, expected(f"{name}/weights"))
    assert_same_arrays({str(i): model.statistics_of(s) for i, s in enumerate(model.subnets)}, expected(f"{name}/statistics"))
    inputs = expected(name)["inputs"]
    for subnet, logits in zip(model.subnets, expected(f"{name}/logits").values(), strict=True):
        np.testing.assert_allclose(model(inputs, subnet), logits, rtol=1e-5, atol=1e-6)  # XLA differs between CPUs
    if name == "texts":
        np.testing.assert_array_equal(model.encode(["a b", "é", "b b a"]), inputs)


@pytest.mark.parametrize("name", ["images", "texts"])
def test_a_profile_has_equal_values_and_is_written_byte_for_byte_as_before(name, tmp_path):
    profile, values = Profile.load(OLD / f"{name}.json"), json.loads((OLD / f"{name}.json").read_text())
    assert (profile.device, profile.slicing, list(profile.batch_sizes)) == ("cpu", "in_call", values["batch_sizes"])
    assert list(profile.lengths) == values.get("lengths", [])
    for length, rows in zip(profile.lengths or (0,), [*values.get("shorter", []), values["rows"]], strict=True):
        for row, value in zip(profile.at_length(length).rows, rows, strict=True):
            assert (row.subnet.to_json(), row.accuracy) == (value["subnet"], value["accuracy"])
            assert (list(row.latency_ms), list(row.p99_ms)) == (value["latency_ms"], value["p99_ms"])
    profile.save(tmp_path / "profile.json")
    assert (tmp_path / "profile.json").read_bytes() == (OLD / f"{name}.json").read_bytes()


def test_a_half_trained_run_has_the_recorded_state_statistics_and_results(run):
    with run.checkpoints() as saved:
        assert saved.latest(clean=True) == MIDDLE
    assert_same_arrays(state_at(run, MIDDLE), expected("middle"))
    statistics = run.statistics()
    assert_same_arrays({str(i): statistics[s] for i, s in enumerate(run.served())}, expected("run"))
    assert [line["step"] for line in run.metrics()] == [4]
    served = exports.load(OLD / "images").served
    recorded = json.loads((OLD / "run" / "evaluation.json").read_text())
    assert [s.to_json() for s in served] == [{**values, "profiled_half": False} for values in recorded]


@pytest.mark.slow
def test_a_half_trained_run_resumes_to_the_recorded_end(run, dataset, tmp_path):
    """The end must be bit-equal only if this machine also computes the first half with equal bits.

    XLA's code for another CPU may round differently. Five steps at a learning rate of 4e-3 keep such a difference small.
    """
    assert loop.train(run.config, run.workdir, dataset=dataset).workdir == run.workdir
    end = run.model().params
    whole = loop.train(dataclasses.replace(run.config, checkpoint_every=MIDDLE), tmp_path / "whole", dataset=dataset)
    if all(np.array_equal(leaf, state_at(whole, MIDDLE)[name]) for name, leaf in expected("middle").items()):
        assert_same_arrays(end, expected("end"))
        assert_same_arrays(whole.model().params, expected("end"))
    for params in (end, whole.model().params):
        for name, value in expected("end").items():
            np.testing.assert_allclose(params[name], value, rtol=0, atol=1e-3, err_msg=name)
