"""serve/bench/soak.py on fake engines: what it judges, and that a broken guarantee ends it with status 1."""

import gc
import mmap
import pathlib
import runpy
import types

import numpy as np
import pytest
from fakes import PROFILE

import superserve_jax as ss
from superserve_jax.engines import prepare
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import endurance
from superserve_jax.loadtest.endurance import Second

BENCH = pathlib.Path(__file__).parents[2] / "serve" / "bench"


@pytest.fixture(scope="module")
def soak():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        return runpy.run_path(str(BENCH / "soak.py"))


@pytest.fixture
def program(run_program):
    """Runs the program with options. Returns what it wrote and what it printed."""

    def run(*options, status=0, **patches):
        done = run_program("serve/bench/soak.py", *options, json_file=True, status=status, patches=patches)
        return done.json, done.stdout + done.stderr

    return run


def holds(soak, warm_up_s=60, **change):
    """Which guarantees hold in five minutes of a noisy server. `change` maps fields to functions of the second's number."""
    rng = np.random.default_rng(0)
    usual = {"memory_mb": lambda i: 500.0, "p50_ms": lambda i: 10.0, "p99_ms": lambda i: 30.0}
    counts = dict.fromkeys(("answers", "met", "batches", "changes", "lag_ms"), 1)

    def noisy(name, value):
        return value * (1 + (0.002 if name == "memory_mb" else 0.2) * rng.random())

    seconds = [
        Second(time_s=i + 1.0, **counts, **{name: noisy(name, at(i)) for name, at in {**usual, **change}.items()})
        for i in range(300)
    ]
    return [guarantee.holds for guarantee in soak["steadiness"](seconds, warm_up_s)]


def test_all_guarantees_hold_for_a_steady_server_after_its_warm_up(soak):
    warming = {"memory_mb": lambda i: 500 + 100 * min(i / 60, 1), "p99_ms": lambda i: 900 if i < 50 else 30}
    assert holds(soak, **warming) == [True] * 3
    assert holds(soak, warm_up_s=0, **warming)[0] is False


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"memory_mb": lambda i: 500 + 0.06 * i}, 0),
        ({"memory_mb": lambda i: 500 + 20 * (i == 200)}, 0),
        ({"p50_ms": lambda i: 10 * 1.001**i}, 1),
        ({"p99_ms": lambda i: 30 * 1.001**i}, 2),
    ],
)
def test_growth_breaks_its_guarantee(soak, change, broken):
    assert holds(soak, **change) == [i != broken for i in range(3)]


def test_growth_is_relative_and_a_trend_without_noise_is_certain():
    assert endurance.growth([100.0] * 30)[0] == 0.0
    growth, chance = endurance.growth([100.0 + i for i in range(31)])
    assert growth == pytest.approx(30 / 115)
    assert chance < 1e-9
    assert endurance.growth(list(range(131, 100, -1)))[1] == pytest.approx(1.0)


def test_resident_memory_sees_an_allocation():
    gc.collect()
    before_mb = endurance.resident_mb()
    with mmap.mmap(-1, 200_000_000) as block:  # fresh pages; an array may get pages that the process already had
        for place in range(0, len(block), 4096):
            block[place] = 1
        # The rest of the process takes and frees memory, too.
        assert 150 < endurance.resident_mb() - before_mb < 250


@pytest.mark.parametrize("lengths", [(), (4, 8)])
def test_random_inputs_fit_the_engine(lengths):
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


@pytest.mark.slow
def test_heavy_traffic_on_an_export_is_answered_by_all_subnets(program, monkeypatch, tmp_path):
    model = types.SimpleNamespace(path=tmp_path)
    served = model, [FakeEngine(PROFILE, input_shape=(2,))], [PROFILE]
    monkeypatch.setattr(ss, "load", lambda path: model)
    monkeypatch.setattr(prepare, "prepare", lambda *args, **options: served)
    monkeypatch.setattr(endurance, "PERIOD_S", 1)
    plot = tmp_path / "plots" / "soak.png"
    gc.collect()  # else executables of other tests may go meanwhile
    options = ("--minutes", 0.1, "--warm-up-s", 1, "--load", 1.5, "--plot", plot)
    written, printed = program(tmp_path, *options, MEMORY=1.0, GROWTH=1e9)  # six seconds say nothing about growth
    assert written["submitted"] == written["resolved"] > 500
    assert written["subnets"] == 3
    assert len(written["seconds"]) == 6
    held = {guarantee["what"]: guarantee["holds"] for guarantee in written["guarantees"]}
    assert held["every future resolves"]
    assert held["nothing is compiled after the start"]
    assert plot.stat().st_size > 0
    assert all(what in printed for what in held)
