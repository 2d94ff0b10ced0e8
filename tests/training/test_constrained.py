"""Search under constraints: limits, the accuracy predictor, evolution, latency tables, and the whole search on a short run.

One file because its parts share a network with a made-up accuracy.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
from tiny import TINY

from superserve_jax import errors
from superserve_jax.training import (
    calibration,
    constrained,
    evaluation,
    evolution,
    latency,
    latency_table,
    stages,
    validation,
)
from superserve_jax.training.constrained import Settings, search_under
from superserve_jax.training.constraints import Constraints, Costs, size_bytes
from superserve_jax.training.latency_table import LatencyTable
from superserve_jax.training.predictor import AccuracyPredictor

WIDE = dataclasses.replace(
    TINY, stage_widths=(16, 32), depths=((1, 2, 3), (1, 2, 3)), width_mults=(0.25, 0.5, 0.75, 1.0), image_size=16
)
SPACE = WIDE.space()


def made_up(subnet):
    """An accuracy that rises with depth and width, but not with FLOPs: widths that do not double are bad."""
    sizes = WIDE.sizes(subnet)
    narrow = 0.4 / sizes["stage0.out"] + 0.8 / sizes["stage1.out"]
    uneven = 0.1 * abs(np.log(sizes["stage1.out"] / sizes["stage0.out"] / 2))
    return float(0.95 - 0.3 / sum(subnet.gates) - narrow - uneven)


# -- constraints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["latency=5ms"], Constraints(latency_ms=5.0)),
        (["latency=250us", "size=20MB", "flops=1G"], Constraints(0.25, 20e6, 1e9)),
        (["latency=.5S"], Constraints(latency_ms=500.0)),
        (["size=1.5MiB"], Constraints(size_bytes=1.5 * 2**20)),
        (["size=900kb", "flops=2e6"], Constraints(size_bytes=9e5, flops=2e6)),
        (["flops=3 MFLOPs"], Constraints(flops=3e6)),
    ],
)
def test_constraints_are_read_from_texts_with_units(texts, expected):
    assert Constraints.parse(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["latency=5"], "latency must be a number above 0, with its unit, such as latency=5ms; got '5'"),
        (["size=20"], "with its unit, such as size=20MB; got '20'"),
        (["flops=fast"], "flops must be a number above 0, such as flops=1G; got 'fast'"),
        (["latency=-5ms"], "got '-5ms'"),
        (["latency=5MB"], "got '5MB'"),
        (["size"], "got ''"),
        (["flops=0"], "flops must be above 0 and finite, got 0"),
        (["flops=1e400"], "flops must be above 0 and finite, got inf"),
        (["latancy=5ms"], "unknown constraint 'latancy': did you mean 'latency'"),
        (["flops=1G", "flops=2G"], "'flops' is given twice"),
        ([], "at least one limit"),
    ],
)
def test_a_wrong_constraint_is_refused_with_an_example(texts, message):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError)) as caught:
        Constraints.parse(texts)
    assert message in str(caught.value)


def test_several_constraints_hold_together():
    under = Constraints(latency_ms=5.0, size_bytes=100.0, flops=10.0)
    assert under.hold_for(Costs(10, 100, 5.0))
    assert not any(under.hold_for(costs) for costs in (Costs(11, 100, 5.0), Costs(10, 101, 5.0), Costs(10, 100, 5.1)))


def test_the_size_is_that_of_the_weights_and_statistics_of_the_subnet_alone():
    for subnet in (SPACE.smallest(), SPACE.largest()):
        channels = sum(WIDE.norm_sizes(WIDE.sizes(subnet)).values())
        assert size_bytes(WIDE, subnet) == 4 * WIDE.num_params(subnet) + 2 * 4 * channels
        assert size_bytes(WIDE, subnet, "bfloat16") == 2 * WIDE.num_params(subnet) + 2 * 4 * channels


# -- predictor and evolution --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor():
    """A predictor that has seen 60 subnets, whose accuracies have some noise."""
    rng = np.random.default_rng(0)
    return AccuracyPredictor(WIDE, {s: made_up(s) + rng.normal(0, 0.003) for s in evolution.spread(WIDE, 60, seed=1)})


def test_the_predictor_ranks_subnets_that_it_has_not_seen(predictor):
    unseen = [SPACE.sample(77, k) for k in range(100)]
    expected, found = np.array([made_up(s) for s in unseen]), np.array(predictor(unseen))
    assert np.corrcoef(expected, found)[0, 1] > 0.9
    assert np.sqrt(np.mean((found - expected) ** 2)) < 2 * predictor.rmse + 0.01
    assert predictor.kendall_tau > 0.6
    assert predictor([]) == []


def test_the_error_comes_from_subnets_that_were_held_out():
    rng = np.random.default_rng(0)
    noise = {s: float(rng.uniform(0.1, 0.9)) for s in evolution.spread(WIDE, 60, seed=1)}
    found = AccuracyPredictor(WIDE, noise)
    assert abs(found.kendall_tau) < 0.4  # an error on the same subnets would hide that there is nothing to learn
    assert found.rmse > 0.15
    assert AccuracyPredictor(WIDE, dict.fromkeys(noise, 0.5)).kendall_tau == 0.0


def test_too_few_subnets_for_a_predictor_are_refused():
    with pytest.raises(errors.ConfigError, match="needs 10 or more evaluated networks, got 3"):
        AccuracyPredictor(WIDE, {s: 0.5 for s in evolution.spread(WIDE, 3, seed=1)})


def test_samples_are_spread_over_the_flops_and_more_samples_only_add_some():
    few, many = (evolution.spread(WIDE, count, seed=2) for count in (20, 60))
    assert many[:20] == few
    assert len(set(many)) == 60
    assert {SPACE.smallest(), SPACE.largest()} <= set(few)
    logs = np.sort(np.log([WIDE.flops(s) for s in many]))
    assert np.diff(logs).max() < 0.2 * (logs[-1] - logs[0])
    small = evolution.spread(TINY, 10**6, seed=2)
    assert len(set(small)) == len(small) <= TINY.space().size


LIMIT = 0.3 * WIDE.flops(SPACE.largest())


def predict(subnets):
    return [made_up(s) for s in subnets]


def meets(subnet):
    return WIDE.flops(subnet) <= LIMIT


def test_evolution_meets_the_constraints_and_is_better_than_random_search():
    found = evolution.evolve(SPACE, meets, predict, count=600, seed=3)
    control = evolution.random_search(SPACE, meets, predict, count=600, seed=3)
    assert len(found) == len(control) == 600
    assert all(meets(s) for s in (*found, *control))
    assert max(found.values()) > max(control.values())
    assert found == evolution.evolve(SPACE, meets, predict, count=600, seed=3)
    assert all(value == made_up(s) for s, value in found.items())


def test_evolution_begins_with_the_given_subnets_and_leaves_out_those_that_do_not_meet_the_constraints():
    best = max((s for s in (SPACE.sample(9, k) for k in range(300)) if meets(s)), key=made_up)
    found = evolution.evolve(SPACE, meets, predict, count=50, seed=3, start=[SPACE.largest(), best])
    assert best in found
    assert SPACE.largest() not in found


def test_a_space_with_few_subnets_under_the_constraint_gives_nearly_all_of_them(monkeypatch):
    monkeypatch.setattr(evolution, "_MISSES", 500)
    space = TINY.space()
    under = {s for s in space.enumerate() if TINY.flops(s) <= 0.3 * TINY.flops(space.largest())}

    def values(subnets):
        return [float(TINY.flops(s)) for s in subnets]

    assert 5 < len(under) < 500
    for find in (evolution.evolve, evolution.random_search):
        found = set(find(space, lambda s: s in under, values, count=10_000, seed=0))
        assert found <= under
        assert len(found) > 0.9 * len(under)


# -- latency tables -----------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    """A table in which each million multiply-adds takes a millisecond."""
    latencies = {s: 1.0 + WIDE.flops(s) / 1e6 for s in latency.spread(WIDE, 20, seed=0)}
    return LatencyTable("card", 1, latency_table._plain(WIDE), latencies)  # noqa: SLF001


def test_a_latency_table_is_the_same_after_writing_and_reading(table, tmp_path):
    table.write(tmp_path / "table.json")
    read = LatencyTable.read(tmp_path / "table.json")
    assert read == table
    assert json.loads((tmp_path / "table.json").read_text())["device"] == "card"
    unseen = SPACE.sample(5, 5)
    assert read.predictor(WIDE)(unseen) == pytest.approx(1.0 + WIDE.flops(unseen) / 1e6, rel=0.05)


def test_a_table_of_another_network_is_refused(table):
    with pytest.raises(errors.ConfigError, match="the latency table of 'card' is of another network than the run"):
        table.predictor(TINY)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x"}', None])
def test_a_file_that_is_no_latency_table_is_refused(text, table, tmp_path):
    path = tmp_path / "table.json"
    table.write(path)
    if text is None:
        text = path.read_text().replace('"ms": ', '"ms": -')
    path.write_text(text)
    with pytest.raises(errors.ConfigError, match=r"table\.json"):
        LatencyTable.read(path)
    with pytest.raises(errors.ConfigError, match="no latency table"):
        LatencyTable.read(tmp_path / "missing.json")


# -- the whole search on a short run --------------------------------------------------------------------------------------


FEW = Settings(samples=14, predictions=60, winners=3)


@pytest.fixture
def half(config):
    """The constraint of half the FLOPs of the largest subnet."""
    return Constraints(flops=0.5 * config.model.flops(config.model.space().largest()))


def test_the_winners_are_evaluated_and_meet_the_constraints(config, run, half, count_calls):
    stages.search(run)
    calls = count_calls(evaluation, "accuracy")
    report = search_under(run, half, FEW)
    assert report.samples >= 10
    assert len(calls) <= report.samples + len(report.rows) - run.config.search.candidates  # those are not evaluated again
    assert 0 < len(report.winners) <= 3 >= len(report.control) > 0
    assert all(half.hold_for(w.costs) and w.costs.latency_ms is None and w.measured_ms is None for w in report.rows)
    assert report.best.accuracy == max(w.accuracy for w in report.rows)
    model, dataset = run.model(), run.dataset()
    images, _ = dataset.arrays("train", limit=config.search.calibration_examples)
    model.statistics = calibration.calibrate(model, [report.best.subnet], images)
    (again,) = evaluation.accuracy(model, [report.best.subnet], lambda: validation.batches(dataset, config.search))
    assert report.best.accuracy == again
    assert json.loads((run.workdir / "constrained.json").read_text()) == json.loads(json.dumps(report.to_json()))
    assert report.to_json()["subnet"] == report.best.subnet.to_json()


def test_a_constrained_search_stopped_by_ctrl_c_goes_on_to_the_same_result(run, half, count_calls):
    undisturbed = search_under(run, half, FEW)
    (run.workdir / "constrained.jsonl").unlink()
    calls = count_calls(evaluation, "accuracy", interrupt_at=6)
    with pytest.raises(KeyboardInterrupt):
        search_under(run, half, FEW)
    assert search_under(run, half, FEW) == undisturbed
    total = len(calls)
    assert search_under(run, half, FEW) == undisturbed
    assert len(calls) == total  # nothing is evaluated a second time
    tighter = Constraints(flops=0.8 * half.flops)
    assert search_under(run, tighter, FEW).samples == undisturbed.samples
    assert len(calls) - total <= 2 * FEW.winners + 1  # only winners are new


def test_the_winner_is_served_and_the_stages_go_on_with_it(run, half):
    report = search_under(run, half, FEW)
    constrained.serve(run, report.best.subnet)
    assert run.served() == [report.best.subnet]  # there was no other search
    largest = run.config.model.space().largest()
    constrained.serve(run, largest)
    constrained.serve(run, report.best.subnet)
    assert run.served() == [report.best.subnet, largest]
    stages.calibrate(run)
    assert [s.subnet for s in stages.evaluate(run)] == [report.best.subnet, largest]


def test_a_latency_is_measured_once_and_its_table_names_the_device(run, monkeypatch):
    times = {"calls": 0}

    def measure(model, subnets, *, batch):
        times["calls"] += 1
        return {s: 1.0 + 3.0 * batch * model.config.flops(s) / model.config.flops(model.space.largest()) for s in subnets}

    monkeypatch.setattr(latency, "measure", measure)
    report = search_under(run, Constraints(latency_ms=3.0), FEW, device="My Card")
    assert all(w.measured_ms <= 3.0 * 1.02 for w in report.rows)
    assert report.best.measured_ms <= 3.0
    assert report.latency["device"] == "My Card"
    assert report.latency["error"] < 0.1
    path = run.workdir / "latency_tables" / "my-card-batch1.json"
    assert LatencyTable.read(path).device == "My Card"
    assert times["calls"] == 2  # the table, and the winners
    search_under(run, Constraints(latency_ms=2.5), FEW, device="My Card")
    assert times["calls"] == 3
    other = search_under(run, Constraints(latency_ms=3.0), FEW, table=LatencyTable.read(path), device="this machine")
    assert times["calls"] == 3
    assert all(w.measured_ms is None and w.costs.latency_ms <= 3.0 for w in other.rows)


def test_if_all_winners_measure_above_the_limit_the_fastest_is_the_best_and_none_is_served(run, monkeypatch, run_program):
    """The table says that subnets are fast, but they are slow when they are timed alone."""
    times = {"calls": 0}

    def measure(model, subnets, *, batch):
        times["calls"] += 1
        slow = 100.0 if times["calls"] > 1 else 1.0
        return {s: slow * (1.0 + model.config.flops(s) / model.config.flops(model.space.largest())) for s in subnets}

    monkeypatch.setattr(latency, "measure", measure)
    report = search_under(run, Constraints(latency_ms=1.9), FEW, device="My Card")
    assert report.best.measured_ms == min(w.measured_ms for w in report.rows)
    assert not report.is_within(report.best)
    times["calls"] = 0
    few = ("--samples", 14, "--predictions", 60, "--winners", 2, "--serve")
    done = run_program("train/search.py", run.workdir, "--under", "latency=1.9ms", *few, status=2)
    assert "--serve: all subnets that were timed are above the limit of 1.9 ms; the fastest one takes" in done.stderr


def test_a_constraint_that_no_subnet_meets_is_refused_before_any_evaluation(run, count_calls):
    calls = count_calls(evaluation, "accuracy")
    with pytest.raises(errors.ConfigError, match=r"no subnet has size <= 1e-06 MB: the smallest one has .* MB; allow more"):
        search_under(run, Constraints(size_bytes=1.0), FEW)
    assert not calls


def test_the_command_prints_the_errors_of_the_predictions_and_serves_the_winner(run, half, run_program):
    few = ("--samples", 14, "--predictions", 60, "--winners", 2, "--serve")
    under = ("--under", f"flops={half.flops:.0f}", "size=1MB")
    printed, _, found = run_program("train/search.py", run.workdir, *under, *few, json_file=True)
    assert re.search(r"^under size <= 1 MB, FLOPs <= \S+ M: \d+ subnets by evolution and \d+ random ones", printed)
    assert re.search(r"RMSE \d+\.\d\d points, Kendall tau -?\d\.\d{3}", printed)
    assert re.search(r"^evolution +Subnet\(.*\d\d? %", printed, re.MULTILINE)
    assert re.search(r"best of evolution, \d+\.\d\d points (above|below) the best of the random search", printed)
    assert [s.to_json() for s in run.served()] == [found["subnet"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--under", "latency=5"), "latency must be a number above 0, with its unit, such as latency=5ms; got '5'"),
        (("--under", "flops=1G", "--candidates", "7"), "--candidates 7 has no effect with --under; leave out one of them"),
        (("--samples", "7"), "--samples 7 has no effect without --under; give both or neither"),
        (("--under", "flops=1G", "--samples", "1"), "samples must be int >= 10, got 1"),
        (("--under", "flops=1G", "--latency-table", "x.json"), "--latency-table has no effect without a limit"),
    ],
)
def test_the_command_refuses_options_in_one_line(options, message, run, run_program):
    assert f"error: {message}" in run_program("train/search.py", run.workdir, *options, status=2).stderr
