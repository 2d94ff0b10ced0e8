"""What a replay makes of its results: disturbed policies, the rows of its verdict, and the table of several runs."""

import dataclasses
import json
import pathlib
import re
import runpy
import types

import demo_runs
import numpy as np
import pytest

from superserve_jax import errors
from superserve_jax.commands import replay, replay_setup
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.exports import Served
from superserve_jax.profile import Profile, Row
from superserve_jax.simulation import traces
from superserve_jax.subnet import Subnet
from superserve_jax.training import data
from superserve_jax.training.data import halves

PROFILE = Profile((1,), (Row(Subnet((1,)), 0.5, (1.0,)),))


@pytest.mark.parametrize(
    ("slower", "stall_ms", "said"),
    [
        (1.0, 0.0, ""),
        (1.09, 17.0, ""),
        (1.11, 0.0, "latencies are now 1.11 times those before the first policy"),
        (0.9, 0.0, "latencies are now 0.90 times"),
        (1.0, 19.0, "the process stood still for 19 ms"),
    ],
)
def test_a_policy_is_disturbed_if_latencies_move_by_ten_percent_or_the_process_stands_still(slower, stall_ms, said):
    found = replay.disturbance({"slower": slower, "longest_stall_ms": stall_ms}, 36.0)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_replay_sends_the_half_that_was_not_profiled(monkeypatch):
    inputs, labels = np.arange(40, dtype=np.uint8).reshape(40, 1), np.arange(40) % 4
    dataset = data.from_arrays(train=(inputs, labels), test=(inputs, labels), validation=4)
    config = types.SimpleNamespace(data="a dataset")
    monkeypatch.setattr(replay_setup, "config_from_json", lambda _: config)
    monkeypatch.setattr(replay_setup.data, "open", lambda *_, **__: dataset)

    def sent(half):
        served = Served(Subnet((1,)), 0.5, None, 1, 1, profiled_half=half)
        found, _ = replay_setup.test_examples(types.SimpleNamespace(served=(served,), manifest={"training": {}}))
        return set(found.ravel().tolist())

    assert sent(half=True) == set(inputs[~halves.profiling_half(labels)].ravel().tolist())
    assert sent(half=False) == set(range(40))  # an export of an older version, profiled on the whole split


def test_the_table_of_several_runs_has_a_cell_for_every_column():
    best = {"name": "fixed:3", "measured": 90.0}
    run = {"attainment": 0.9999, "accuracy": 92.5, "best": best, "failing": {"attainment": 0.6}, "gain": 2.5}
    run |= {"repeats": 1, "disturbed": [], "minutes": 2.25}
    assert demo_runs.cells(run) == ("99.99 %", "92.50 %", "fixed:3", "90.00 %", "+2.50", "40.0 %", "1", "-", "2.2")
    none = {**run, "best": None, "failing": None, "gain": None}
    assert demo_runs.cells(none)[2:6] == ("none", "-", "-", "-")


def test_a_run_with_a_disturbed_row_does_not_hold():
    run, options = {"attainment": 1.0, "gain": 2.0, "disturbed": []}, demo_runs.Options(pathlib.Path())
    assert demo_runs.holds(run, options)
    assert not demo_runs.holds({**run, "disturbed": ["fixed:3"]}, options)
    assert not demo_runs.holds({**run, "gain": None}, options)
    busy = demo_runs.Options(pathlib.Path(), busy=1)
    assert demo_runs.holds({"attainment": 0.9, "gain": 0.1, "disturbed": ["fixed:3"]}, busy)
    assert not demo_runs.holds({**run, "gain": -0.1}, busy)


def row(name, attainment, accuracy, disturbance=""):
    result = {"name": name, "label": name, "attainment": attainment, "disturbance": disturbance, "tries": 1}
    result |= {"slower": 1.2 if disturbance else 1.0, "longest_stall_ms": 0.0}
    return result | {"accuracy_profiled": accuracy, "accuracy_measured": accuracy}


def test_only_disturbed_rows_that_decide_the_verdict_are_repeated():
    options = replay_setup.Options(pathlib.Path())
    stall = "the process stood still for 40 ms"
    results = [row("slackfit", 1.0, 93.0), row("fixed:0", 1.0, 90.0, stall), row("fixed:1", 1.0, 91.0)]
    results += [row("fixed:2", 0.98, 92.0), row("fixed:3", 0.5, 94.0, stall)]
    assert replay.to_repeat(results, replay.make_verdict(options, results)) is None
    results[3] = row("fixed:2", 0.98, 92.0, stall)
    assert replay.to_repeat(results, replay.make_verdict(options, results)) == 3
    assert replay.to_repeat(results[:1] + results[4:], None) == 1  # without a verdict, any disturbed row
    results[0] = row("slackfit", 1.0, 93.0, stall)
    assert replay.to_repeat(results, replay.make_verdict(options, results)) == 0
    results[0]["tries"] = 2
    assert replay.to_repeat(results, replay.make_verdict(options, results)) == 3  # each gets its share of the repeats


def test_the_table_marks_disturbed_rows_only_if_there_are_any(capsys):
    options, numbers = replay_setup.Options(pathlib.Path()), {"p50_ms": 1.0, "p99_ms": 2.0}
    numbers |= {"lateness_p50_ms": 0.0, "lateness_p99_ms": 0.0}
    quiet = row("slackfit", 1.0, 93.0) | numbers
    replay.print_tables(options, [quiet], None)
    assert "tries" not in capsys.readouterr().out
    replay.print_tables(
        options,
        [quiet, {**row("fixed:1", 0.9, 95.0, "the process stood still for 40 ms"), **numbers, "tries": 4}],
        None,
    )
    printed = capsys.readouterr().out
    assert "Run the replay when the machine is quiet" in printed
    header, _, first, second = printed.strip().splitlines()[:4]
    assert header.rstrip().endswith("tries   disturbed")
    assert first.split()[-1] == "1"
    assert second.split()[-2:] == ["4", "yes"]
    stalled = row("fixed:0", 1.0, 80.0, "the process stood still for 40 ms") | numbers
    results = [quiet, stalled, row("fixed:1", 1.0, 90.0) | numbers]
    replay.print_tables(options, results, replay.make_verdict(options, results))
    assert "The last line does not depend on these rows." in capsys.readouterr().out


def test_disturbed_rows_are_repeated_after_the_last_policy_until_the_repeats_are_used_up(monkeypatch):
    calls = []

    def replay_policy(options, work, name, short, *, corrected):
        calls.append(name)
        disturbed = name == "fixed:1" and calls.count(name) < 3
        attainment, accuracy = {"slackfit": (1.0, 92.0), "fixed:0": (1.0, 90.0), "fixed:1": (0.9, 91.0)}[name]
        return object(), row(short, attainment, accuracy, "stalled" if disturbed else "")

    monkeypatch.setattr(replay, "replay_policy", replay_policy)
    work = types.SimpleNamespace(engines=(), profiles=(), slo_ms=36.0, trace=types.SimpleNamespace(deadlines_s=np.ones(1)))
    names = ["slackfit", "fixed:1", "fixed:0"]
    for allowed, needed, left in (5, 2, ""), (1, 1, "stalled"):
        calls.clear()
        options = replay_setup.Options(pathlib.Path(), repeats=allowed)
        _, results, repeats, _ = replay.replay_all(options, work, names)
        assert (calls, repeats) == ([*names, *["fixed:1"] * needed], needed)
        assert [r["disturbance"] for r in results] == ["", left, ""]


def test_the_least_disturbed_try_counts(monkeypatch):
    slower = iter([1.3, 1.2, 1.4])

    def replay_policy(options, work, name, short, *, corrected):
        factor = next(slower)
        return factor, row(short, 0.9, 90.0, "slower") | {"slower": factor}

    monkeypatch.setattr(replay, "replay_policy", replay_policy)
    work = types.SimpleNamespace(engines=(), profiles=(), slo_ms=36.0, trace=types.SimpleNamespace(deadlines_s=np.ones(1)))
    replays, results, repeats, _ = replay.replay_all(replay_setup.Options(pathlib.Path(), repeats=2), work, ["slackfit"])
    assert (replays, repeats, results[0]["tries"], results[0]["slower"]) == ([1.2], 2, 3, 1.2)


def test_a_policy_that_fails_ends_the_replay_after_the_table_and_results_of_those_before_it(monkeypatch, capsys, tmp_path):
    def replay_policy(options, work, name, short, *, corrected):
        if name == "mine.py:mine":
            raise errors.PolicyError("the policy 'mine' failed: IndexError()")
        late = {"p50_ms": 1.0, "p99_ms": 2.0, "lateness_p50_ms": 0.0, "lateness_p99_ms": 0.0}
        return object(), row(short, 1.0, 90.0) | late

    profile = Profile((1,), (Row(Subnet((1,)), 0.9, (1.0,)),))
    trace = traces.gamma(rate_qps=100.0, duration_s=0.1)
    work = replay_setup.Work([FakeEngine(profile)], [profile], trace, [], np.zeros(0), 36.0)
    options = replay_setup.Options(tmp_path, policies=("fixed:all", "mine.py:mine", "slackfit"), json=tmp_path / "r.json")
    monkeypatch.setattr(replay, "replay_policy", replay_policy)
    monkeypatch.setattr(replay, "make_policy", lambda *_: None)
    monkeypatch.setattr(replay.loadgen, "rehearse", lambda *_: None)
    monkeypatch.setattr(replay_setup, "prepare_work", lambda _: work)
    monkeypatch.setattr(replay.cli, "parse", lambda *_: options)
    with pytest.raises(errors.PolicyError, match="'mine'"):
        replay.main()
    written = json.loads(options.json.read_text())
    assert [r["name"] for r in written["policies"]] == ["fixed:0"]
    assert (written["error"], written["verdict"]) == ("the policy 'mine' failed: IndexError()", None)
    assert re.search(r"^fixed:0 .*100\.00 %", capsys.readouterr().out, re.MULTILINE)

    nothing = dataclasses.replace(options, policies=("mine.py:mine", "slackfit"), json=tmp_path / "none.json")
    monkeypatch.setattr(replay.cli, "parse", lambda *_: nothing)
    with pytest.raises(errors.PolicyError, match="'mine'"):
        replay.main()
    assert not nothing.json.exists()


def test_a_fixed_subnet_that_is_not_worth_serving_is_refused_with_the_reason():
    profile = Profile((1,), tuple(Row(Subnet((i,)), 0.5 + i / 10, (1.0 + i,)) for i in range(3)))
    asked = replay_setup.Options(pathlib.Path(), policies=("fixed:2", "fixed:all", "fixed:largest"))
    assert replay_setup.policy_names(asked, profile) == ("fixed:2", "fixed:0", "fixed:1", "fixed:2", "fixed:largest")
    with pytest.raises(errors.ConfigError, match=r"'fixed:3': only the subnets 0 to 2 are served.*not worth serving"):
        replay_setup.policy_names(dataclasses.replace(asked, policies=("fixed:3",)), profile)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": pathlib.Path("a.csv"), "cv2": 1.0}, "--cv2 1.0 has no effect with --trace"),
        ({"trace": pathlib.Path("a.csv"), "seconds": 3.0}, "--seconds 3.0 has no effect with --trace"),
        ({"speed": 10.0}, "--speed 10.0 has no effect without --trace"),
        ({"slow_after": 0.3}, "--slow-after 0.3 has no effect without --slow-factor"),
        ({"seconds": 3.0}, "the first burst ends after 4 s, got 3.0"),
        ({"seconds": float("inf")}, "seconds must be a number from 4 up"),
        ({"slo_ms": -1.0}, "slo_ms must be above 0, got -1.0"),
        ({"repeats": -1}, "--repeats must be 0 or more, got -1"),
        ({"cv2": float("nan")}, "--cv2 must be 0 or more, got nan"),
    ],
)
def test_wrong_options_are_refused_before_the_export_is_read(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        replay_setup.check_options(replay_setup.Options(pathlib.Path("nowhere"), **options))


def test_traffic_that_ends_with_the_first_burst_and_recorded_traffic_pass():
    replay_setup.check_options(replay_setup.Options(pathlib.Path("nowhere"), seconds=4.0))
    replay_setup.check_options(replay_setup.Options(pathlib.Path("nowhere"), trace=pathlib.Path("a.csv"), speed=2.0))


def test_the_subnets_of_the_seeds_table_are_spread_from_the_smallest_to_the_largest():
    spaced = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "train" / "bench" / "seeds.py"))["spaced"]
    assert spaced(list(range(24)), 8) == [0, 3, 7, 10, 13, 16, 20, 23]
    assert spaced([1, 2], 8) == [1, 2]


def test_a_spread_needs_two_runs_and_either_a_config_or_runs(run_program):
    assert "at least two runs, got 1" in run_program("train/bench/seeds.py", "configs/debug.py", "--seeds", 1, status=2).stderr
    assert "either a config to train or --runs" in run_program("train/bench/seeds.py", status=2).stderr


def test_the_plot_shows_the_policies_of_the_verdict_and_your_own(monkeypatch):
    drawn = {}
    monkeypatch.setattr(replay.plots, "replay", lambda lines, path, **_: drawn.update(lines))
    monkeypatch.setattr(replay.loadgen, "series", lambda done, **_: done)
    names = ("slackfit", "slackfit-paper", "a.py:mine", "fixed:0")
    rows = [row(name, 1.0, 90.0) for name in ("slackfit", "slackfit-paper", "mine", "fixed:0")]
    rows = [{**r, "label": replay.label(r["name"], PROFILE)} for r in rows]
    options = replay_setup.Options(pathlib.Path(), policies=names)
    work = types.SimpleNamespace(trace=types.SimpleNamespace(name="t"), profiles=[PROFILE], engines=[None], slo_ms=36.0)
    replay.plot(pathlib.Path("unused.png"), options, work, names, rows, replay.make_verdict(options, rows))
    assert drawn == {"slackfit (default)": "slackfit", "mine": "a.py:mine", "fixed:0, 50.00 %": "fixed:0"}


def test_every_label_begins_with_the_name_that_the_option_policies_takes():
    for name in ("slackfit", "slackfit-paper", "slackfit-paper:16", "max-batch", "fixed:0", "mine"):
        assert re.split(r"[ ,]", replay.label(name, PROFILE))[0] == name
