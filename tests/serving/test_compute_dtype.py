"""Servers that compute in bfloat16: accuracies, profile, reply, swaps, and exports without accuracies in it."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from fakes import LONG_MS, WAIT_S
from tiny import TINY, assert_close, random_images, random_params, random_statistics

import superserve_jax as ss
from superserve_jax import errors, exports, machine
from superserve_jax.engines import profiling
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.exports import Served
from superserve_jax.supernets.supernet import SuperNet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
IMAGES = random_images(TINY, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three exports of one subnet: two with accuracies in bfloat16, and the second of them without these."""
    folder, subnet = tmp_path_factory.mktemp("exports"), TINY.space().smallest()
    model = SuperNet(TINY, random_params(TINY), {subnet: random_statistics(TINY, subnet)})
    served = Served(subnet, 0.5, None, 1, 1, accuracy_bfloat16=0.4)
    accuracies = {"old": (0.5, 0.4), "new": (0.7, 0.6), "none": (0.7, None)}
    for name, (accuracy, other) in accuracies.items():
        row = dataclasses.replace(served, accuracy=accuracy, accuracy_bfloat16=other)
        exports.export(folder / name, model, [row], measured="made up")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERSERVE_CACHE", str(folder / "cache"))  # so that only the first server compiles
        yield folder


def opened(path, **options):
    return ss.Server(path, batch_sizes=(1,), slo_ms=LONG_MS, **options)


def replies(server):
    return [f.result(WAIT_S) for f in server.submit_many(IMAGES)]


def test_a_reply_has_the_dtype_and_its_accuracy_also_after_a_swap(folders):
    expected = ss.load(folders / "old")(IMAGES)
    with opened(folders / "old", compute_dtype="bfloat16") as server:
        assert server.profile.compute_dtype == "bfloat16"
        answers = replies(server)
        assert {(r.compute_dtype, r.accuracy, r.output.dtype.name) for r in answers} == {("bfloat16", 0.4, "float32")}
        assert_close([r.output for r in answers], expected, 2e-2)
        assert np.abs(np.array([r.output for r in answers]) - expected).max() > 0
        server.add_worker(jax.devices()[0])
        with pytest.raises(errors.ConfigError, match="batch sizes, lengths and dtype"):
            server.add_worker(jax.devices()[0], profile=dataclasses.replace(server.profile, compute_dtype="float32"))
        with pytest.raises(errors.ConfigError, match="no accuracies in bfloat16 for 1 of 1 subnets"):
            server.swap(folders / "none")
        assert {r.accuracy for r in replies(server)} == {0.4}
        server.swap(folders / "new")
        assert {(r.compute_dtype, r.accuracy) for r in replies(server)} == {("bfloat16", 0.6)}
    with opened(folders / "old") as server:
        assert {(r.compute_dtype, r.accuracy) for r in replies(server)} == {("float32", 0.5)}


def test_each_dtype_has_a_profile_of_its_own(folders, run_program, caplog):
    measure = ("serve/measure.py", folders / "new", "--batch-sizes", 1, "--slicing", "kept", "--repeats", 1)
    paths = [exports.profile_path(folders / "new", machine.device_kind(jax.devices()[0]), d) for d in ("float32", "bfloat16")]
    run_program(*measure)
    whole = paths[0].read_bytes()
    assert str(paths[1]) in run_program(*measure, "--compute-dtype", "bfloat16").stdout
    assert paths[0].read_bytes() == whole
    found = [ss.Profile.load(path) for path in paths]
    assert [(p.compute_dtype, p.rows[0].accuracy) for p in found] == [("float32", 0.7), ("bfloat16", 0.6)]
    caplog.set_level(logging.WARNING)
    with opened(folders / "new", compute_dtype="bfloat16") as server:
        assert server.profile == found[1]
    assert not caplog.records
    paths[1].write_bytes(whole)
    with opened(folders / "new", compute_dtype="bfloat16") as server:
        assert server.profile.compute_dtype == "bfloat16"
    assert "in float32, not on" in caplog.text


def test_an_engine_and_its_profile_have_one_dtype(folders):
    with opened(folders / "old", compute_dtype="bfloat16") as server:
        profile = server.profile
    engine = FakeEngine(profile)
    engine.compute_dtype = "float32"
    with pytest.raises(errors.ConfigError, match="computes in float32, but its profile has accuracies in bfloat16"):
        ss.Server.from_engines([engine], profile)
    measured = profiling.measure(engine, {profile.rows[0].subnet: 0.4}, (1,), device="fake", repeats=1)
    assert measured.compute_dtype == "float32"


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("none", "bfloat16", r"run `superserve evaluate RUN --bfloat16` and `superserve export RUN`, or serve in float32"),
        ("old", "float16", "unknown compute_dtype 'float16'"),
    ],
)
def test_a_dtype_that_cannot_be_served_is_refused_before_anything_is_compiled(folders, compilations, name, dtype, message):
    model = ss.load(folders / name)
    before = len(compilations())
    with pytest.raises((errors.ConfigError, errors.UnknownNameError), match=message):
        ss.Server(model, compute_dtype=dtype)
    assert len(compilations()) == before


def test_an_export_of_unknown_accuracies_can_be_served_in_bfloat16(folders, tmp_path):
    model = ss.load(folders / "old")
    unknown = [dataclasses.replace(s, accuracy=None, accuracy_bfloat16=None) for s in model.served]
    exports.export(tmp_path / "unknown", model, unknown, measured="not at all")
    with opened(tmp_path / "unknown", compute_dtype="bfloat16") as server:
        assert {(r.compute_dtype, r.accuracy) for r in replies(server)} == {("bfloat16", 0.0)}
