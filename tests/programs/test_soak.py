"""serve/bench/soak.py on fake engines: what it judges, and that a broken promise ends it with status 1."""

import gc
import json
import logging
import math
import mmap
import pathlib
import runpy
import sys
import types

import numpy as np
import pytest
from fakes import PROFILE

import superserve_jax as ss
from superserve_jax import errors
from superserve_jax.engines import prepare
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import endurance, storm
from superserve_jax.loadtest.endurance import Second
from superserve_jax.serving.futures import Future

PROGRAM = str(pathlib.Path(__file__).parents[2] / "serve" / "bench" / "soak.py")


@pytest.fixture(scope="module")
def soak():
    return runpy.run_path(PROGRAM)


@pytest.fixture
def program(soak, monkeypatch, tmp_path, caplog):
    """Runs the program with options; returns its exit status and what it wrote."""
    caplog.set_level(logging.CRITICAL, logger="superserve_jax.serving")  # as the program does; this puts it back

    def run(*options):
        path = tmp_path / "soak.json"
        monkeypatch.setattr(sys, "argv", ["soak.py", "--json", str(path), *map(str, options)])
        with pytest.raises(SystemExit) as caught:
            soak["main"]()
        return caught.value.code, json.loads(path.read_text())

    return run


def seconds(count=300, **change):
    """So many seconds of a noisy server, with figures by the second's number."""
    rng = np.random.default_rng(0)
    steady = {"memory_mb": lambda i: 500.0, "p50_ms": lambda i: 10.0, "p99_ms": lambda i: 30.0}
    figures = {**dict.fromkeys(("answers", "failed", "batches", "changes"), 1), "attainment": 1.0, "lag_ms": 0.0}
    return [
        Second(
            time_s=i + 1.0,
            **figures,
            **{
                name: f(i) * (1 + (0.2 if name != "memory_mb" else 0.002) * rng.random())
                for name, f in {**steady, **change}.items()
            },
        )
        for i in range(count)
    ]


def kept(promises):
    return [promise.kept for promise in promises]


def test_a_steady_server_keeps_its_promises_though_it_warms_up(soak):
    warming = seconds(memory_mb=lambda i: 500 + 100 * min(i / 60, 1), p99_ms=lambda i: 900 if i < 50 else 30)
    assert kept(soak["judge"](warming, 60)) == [True] * 3
    assert kept(soak["judge"](warming, 0))[0] is False


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"memory_mb": lambda i: 500 + 0.06 * i}, 0),
        ({"memory_mb": lambda i: 500 + 20 * (i == 200)}, 0),
        ({"p50_ms": lambda i: 10 * 1.001**i}, 1),
        ({"p99_ms": lambda i: 30 * 1.001**i}, 2),
    ],
)
def test_what_grows_is_named(soak, change, broken):
    assert kept(soak["judge"](seconds(**change), 60)) == [i != broken for i in range(3)]


def test_where_the_system_does_not_tell_the_memory_it_is_not_judged(soak):
    assert kept(soak["judge"](seconds(memory_mb=lambda i: math.nan), 60))[0] is None


def test_a_growth_is_relative_and_a_trend_without_noise_is_certain():
    assert endurance.growth([100.0] * 30) == (0.0, 0.0)
    growth, z = endurance.growth([100.0 + i for i in range(31)])
    assert growth == pytest.approx(30 / 115)
    assert z > 7
    assert endurance.growth(list(range(131, 100, -1)))[1] < -7


def test_resident_memory_sees_an_allocation():
    before_mb = endurance.resident_mb()
    if math.isnan(before_mb):
        pytest.skip("no /proc")
    with mmap.mmap(-1, 25_000_000) as block:  # fresh pages, where an array may get some that lay idle
        block.write(bytes(len(block)))
        assert 20 < endurance.resident_mb() - before_mb < 60


@pytest.mark.parametrize("lengths", [(), (4, 8)])
def test_made_up_inputs_are_what_an_engine_takes(lengths):
    target = types.SimpleNamespace(input_shape=(8,), input_dtype=np.dtype(np.uint8), lengths=lengths, pad_id=0)
    inputs = endurance.make_inputs(target, np.random.default_rng(0))
    assert {x.dtype for x in inputs} == {np.dtype(np.uint8)}
    if lengths:
        assert {len(x) for x in inputs} == set(range(1, 9))
        assert all(x.all() for x in inputs)
    else:
        assert {x.shape for x in inputs} == {(8,)}
        assert len({x.tobytes() for x in inputs}) == len(inputs)


# -- the whole program --------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(monkeypatch, tmp_path):
    """An export that is served by a fake engine; in windows of a second."""
    fake = FakeEngine(PROFILE, input_shape=(2,))
    model = types.SimpleNamespace(path=tmp_path)
    monkeypatch.setattr(ss, "load", lambda path: model)
    monkeypatch.setattr(prepare, "prepare", lambda *args, **options: (model, [fake], [PROFILE]))
    monkeypatch.setattr(endurance, "PERIOD_S", 1)
    return tmp_path


@pytest.mark.slow
def test_heavy_traffic_on_an_export_is_answered_by_all_subnets(program, export, tmp_path, capsys):
    plot = tmp_path / "plots" / "soak.png"
    gc.collect()  # else executables of other tests may go meanwhile
    _, written = program(export, "--minutes", 0.1, "--warm-up-s", 1, "--load", 1.5, "--plot", plot)
    assert written["submitted"] == written["resolved"] > 500
    assert written["subnets"] == 3
    assert len(written["seconds"]) == 6
    judged = {promise["what"]: promise["kept"] for promise in written["promises"]}
    assert judged["every future resolves"]
    assert judged["exactly the executables of the start"]
    assert plot.stat().st_size > 0
    printed = capsys.readouterr().out
    assert all(promise in printed for promise in judged)


def test_a_run_too_short_to_judge_is_refused(soak, export, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["soak.py", str(export), "--minutes", "1"])
    with pytest.raises(errors.ConfigError, match=r"--minutes 1 leave less than 3 s after the 60 s of --warm-up-s"):
        soak["main"]()


@pytest.mark.parametrize("options", [[], ["runs/export", "--faults"]])
def test_it_takes_either_an_export_or_faults(soak, monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["soak.py", *options])
    with pytest.raises(errors.ConfigError, match="give either an export's directory, or --faults"):
        soak["main"]()


def test_a_storm_ends_with_status_0_and_its_figures(program):
    status, written = program("--faults", "--queries", 3_000)
    assert status == 0
    assert written["findings"]["offered"] == sum(written["findings"]["outcomes"].values()) == 3_000
    assert all(promise["kept"] for promise in written["promises"])


def test_a_storm_with_a_query_lost_ends_with_status_1(program, monkeypatch):
    monkeypatch.setattr(storm, "_PATIENCE_S", 0.2)
    set_result = Future.set_result

    def forget(self, value):
        return self.inputs != 7 and set_result(self, value)

    monkeypatch.setattr(Future, "set_result", forget)
    status, written = program("--faults", "--queries", 100)
    assert status == 1
    assert written["findings"]["lost"] == 1
    assert written["findings"]["examples"] == ["query 7 was lost: it never resolved"]
