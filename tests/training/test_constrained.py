"""Search under constraints: the accuracy predictor, evolution, and the whole search on a short run.

One file because its parts share a network with a made-up accuracy.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
from noise import Noise
from tiny import TINY, WIDE

from superserve_jax import errors, families, machine
from superserve_jax.training import (
    calibration,
    constrained,
    evaluation,
    evolution,
    latency,
    stages,
    validation,
)
from superserve_jax.training.config import Phase
from superserve_jax.training.constrained import Settings, search_under
from superserve_jax.training.constraints import Constraints
from superserve_jax.training.latency_table import LatencyTable
from superserve_jax.training.predictor import AccuracyPredictor

SPACE = WIDE.space()


def made_up(subnet):
    """An accuracy that rises with depth and width, but not with FLOPs: widths that do not double are bad."""
    sizes = WIDE.sizes(subnet)
    narrow = 0.4 / sizes["stage0.out"] + 0.8 / sizes["stage1.out"]
    uneven = 0.1 * abs(np.log(sizes["stage1.out"] / sizes["stage0.out"] / 2))
    return float(0.95 - 0.3 / sum(subnet.gates) - narrow - uneven)


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


def test_the_prediction_of_a_network_that_was_learned_from_is_one_of_a_regression_without_it():
    rng = np.random.default_rng(0)
    coarse = dataclasses.replace(WIDE, divisor=8)  # several subnets are one network
    learned, spare = (spread := evolution.spread(coarse, 60, seed=1))[:50], spread[50:]
    found = AccuracyPredictor(coarse, {s: float(rng.uniform(0.1, 0.9)) for s in learned})
    assert found.unseen(spare) == found(spare)
    assert np.abs(np.subtract(found.unseen(learned), found(learned))).min() > 0
    networks = {evolution.network(coarse, s): s for s in learned}
    drawn = (SPACE.sample(3, k) for k in range(2_000))
    twin = next(s for s in drawn if s not in learned and evolution.network(coarse, s) in networks)
    assert found.unseen([twin]) == found.unseen([networks[evolution.network(coarse, twin)]]) != found([twin])


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


@pytest.mark.parametrize(
    ("limits", "told"), [({"size_bytes": 1.0}, "size <= 1e-06 MB"), ({"flops": 10.0}, "FLOPs <= 1e-05 M")]
)
def test_a_constraint_that_no_subnet_meets_is_refused_before_anything_is_timed_or_evaluated(run, limits, told, count_calls):
    calls = count_calls(evaluation, "accuracy"), count_calls(latency, "measure")
    with pytest.raises(errors.ConfigError, match=rf"no subnet has latency <= 5 ms, {told}: the smallest one has .* MB; allow"):
        search_under(run, Constraints(latency_ms=5.0, **limits), FEW)
    assert calls == ([], [])


def test_a_latency_that_only_the_margin_makes_unreachable_is_refused_with_the_margin(run, monkeypatch, count_calls):
    """The predicted latency of the smallest subnet is within the limit, and with the margin it is not."""
    noise = np.random.default_rng(0)
    monkeypatch.setattr(latency, "measure", lambda model, subnets, *, batch: {s: noise.uniform(1, 9) for s in subnets})
    with pytest.raises(errors.ConfigError) as caught:
        search_under(run, Constraints(latency_ms=0.01), FEW, device="My Card")
    low, high = map(float, re.findall(r"([\d.]+) ms by prediction, and ([\d.]+) ms with the margin", str(caught.value))[0])
    calls = count_calls(evaluation, "accuracy")
    assert high > 1.2 * low
    limit = (low + high) / 2
    with pytest.raises(errors.ConfigError, match=rf"no subnet has latency <= {limit:g} ms: .* and {high:.3g} ms with the"):
        search_under(run, Constraints(latency_ms=limit), FEW, device="My Card")
    assert not calls


def test_the_latency_table_of_this_machine_has_the_name_that_its_profiles_have(run, monkeypatch):
    monkeypatch.setattr(machine, "device_kind", lambda device: f"a name for {device.platform}")
    monkeypatch.setattr(latency, "measure", lambda model, subnets, *, batch: {s: 1.0 + s["width"][0] for s in subnets})
    report = search_under(run, Constraints(latency_ms=50.0), FEW)
    assert report.latency["device"] == "a name for cpu"
    assert (run.workdir / "latency_tables" / "a-name-for-cpu-batch1.json").is_file()
    assert all(w.measured_ms is not None for w in report.rows)


def test_a_latency_table_of_other_batches_or_without_a_limit_of_the_latency_is_refused(run):
    config = run.config.model
    model = json.loads(json.dumps(families.config_to_json(config)))
    table = LatencyTable("card", 16, model, {s: 1.0 + s["width"][0] for s in latency.spread(config, 20, seed=0)})
    with pytest.raises(errors.ConfigError, match=r"is of batches of 16, and the limit is .* of 1; give --latency-batch 16"):
        search_under(run, Constraints(latency_ms=50.0), FEW, table=table)
    with pytest.raises(errors.ConfigError, match="a latency table has no effect without a limit of the latency"):
        search_under(run, Constraints(flops=1e9), FEW, table=table)


def test_all_networks_of_a_small_space_are_evaluated_and_nothing_is_predicted(run, half):
    phase = Phase(elastic=("width",))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, phases=(phase,)))
    four = [run.config.model.space().validate(s) for s in phase.space(run.config.model).enumerate()]
    for _ in range(2):  # the second time, all of them are known
        report = search_under(run, half, dataclasses.replace(FEW, samples=10))
        assert report.samples == len(four) == 4
        assert (report.rmse, report.kendall_tau, report.predictions) == (None, None, (0, 0))
        assert {w.subnet for w in report.rows} == {s for s in four if run.config.model.flops(s) <= half.flops}
        assert all(w.found_by == "evaluated" and w.predicted is None for w in report.rows)
        assert report.best.accuracy == max(w.accuracy for w in report.rows)
        assert json.loads((run.workdir / "constrained.json").read_text()) == json.loads(json.dumps(report.to_json()))


def test_the_test_split_is_not_read(run, half, monkeypatch):
    for name in ("arrays", "eval"):
        real = getattr(Noise, name)

        def read(self, split, *arguments, real=real, **options):
            assert split != "test"
            return real(self, split, *arguments, **options)

        monkeypatch.setattr(Noise, name, read)
    (run.workdir / "inputs.json").unlink(missing_ok=True)  # the fingerprints of all splits, with which every stage begins
    assert search_under(run, half, FEW).rows


def test_the_command_prints_the_errors_of_the_predictions_and_serves_the_winner(run, half, run_program):
    few = ("--samples", 14, "--predictions", 60, "--winners", 2, "--serve")
    under = ("--under", f"flops={half.flops:.0f}", "size=1MB")
    printed, _, found = run_program("train/search.py", run.workdir, *under, *few, json_file=True)
    assert re.search(r"^under size <= 1 MB, FLOPs <= \S+ M: \d+ subnets by evolution and \d+ random ones", printed)
    assert re.search(r"RMSE \d+\.\d\d points, Kendall tau -?\d\.\d{3}", printed)
    assert re.search(r"^evolution +Subnet\(.*\d\d? %", printed, re.MULTILINE)
    assert re.search(r"best of evolution, \d+\.\d\d points (above|below) the best of the random search", printed)
    assert [s.to_json() for s in run.served()] == [found["subnet"]]


def test_the_command_says_that_a_small_space_was_evaluated_whole(run, run_program):
    config = json.loads((run.workdir / "config.json").read_text())
    config["phases"] = [dataclasses.asdict(Phase(elastic=("width",)))]
    (run.workdir / "config.json").write_text(json.dumps(config))
    done = run_program("train/search.py", run.workdir, "--under", "flops=1G")
    assert "under FLOPs <= 1000 M: all networks of the search space, 4 subnets, in " in done.stdout
    assert len(re.findall(r"^evaluated +Subnet\(", done.stdout, re.MULTILINE)) == 4
    assert "predict" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--under", "latency=5"), "latency must be a number above 0, with its unit, such as latency=5ms; got '5'"),
        (("--under", "flops=1G", "--candidates", "7"), "--candidates 7 has no effect with --under; leave out one of them"),
        (("--samples", "7"), "--samples 7 has no effect without --under; give both or neither"),
        (("--under", "flops=1G", "--samples", "1"), "samples must be int >= 10, got 1"),
        (("--under", "flops=1G", "--latency-table", "x.json"), "--latency-table x.json has no effect without a limit"),
        (("--under", "size=1MB", "--latency-batch", "16"), "--latency-batch 16 has no effect without a limit of the latency"),
        (("--latency-batch", "16"), "--latency-batch 16 has no effect without --cost latency; give both or neither"),
    ],
)
def test_the_command_refuses_options_in_one_line(options, message, run, run_program):
    assert f"error: {message}" in run_program("train/search.py", run.workdir, *options, status=2).stderr
