"""The loop and the stages after it, on a small MLP and noise: exact resumption, Ctrl-C, the files in the folder.

One file because its tests share one small run, which is trained once.
"""

import dataclasses
import json
import math
import os
import signal

import jax
import numpy as np
import pytest
from noise import MODEL, Noise, assert_same_state, metrics_of

import superserve_jax as ss
from superserve_jax import errors, machine
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Program
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import evaluation, latency, loop, stages
from superserve_jax.training.config import Phase, config_from_json
from superserve_jax.training.data import halves
from superserve_jax.training.runs import Run
from superserve_jax.training.sampling import Sampler
from superserve_jax.training.step import SandwichStep

pytestmark = pytest.mark.usefixtures("on_noise")


def test_a_run_changes_every_parameter_and_leaves_its_config_metrics_plot_and_checkpoints(config, finished):
    lines = finished.metrics()
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert config_from_json(json.loads((finished.workdir / "config.json").read_text())) == config
    assert (finished.workdir / "metrics.png").stat().st_size > 1000
    assert sorted(os.listdir(finished.workdir / "checkpoints")) == ["12", "8"]
    trained, fresh = finished.model().params, programs.initial_params(config.model, config.seed)
    assert all((np.asarray(trained[name]) != np.asarray(fresh[name])).any() for name in fresh)


def test_a_run_stopped_by_ctrl_c_goes_on_to_bit_equal_state(config, finished, tmp_path, count_calls):
    before = signal.getsignal(signal.SIGINT)
    calls = count_calls(SandwichStep, "__call__", interrupt_at=7)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 7 of 12; run the same command to go on"):
        loop.train(config, tmp_path / "b")
    assert signal.getsignal(signal.SIGINT) is before
    resumed = loop.train(config, tmp_path / "b")
    assert signal.getsignal(signal.SIGINT) is before
    assert len(calls) == 12
    assert_same_state(resumed, finished)
    assert metrics_of(resumed)[-2:] == metrics_of(finished)[-2:]  # after the checkpoint of step 7, a line averages fewer steps


def test_a_finished_run_is_not_trained_again(config, run, monkeypatch):
    monkeypatch.setattr(SandwichStep, "__call__", lambda *_, **__: pytest.fail("trained again"))
    loop.train(config, run.workdir)


def test_a_folder_of_another_config_is_refused_with_the_difference(config, finished):
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    with pytest.raises(errors.ConfigError, match=r"optim\.lr: 0\.004 -> 0\.5"):
        loop.train(changed, finished.workdir)


def with_search(run, **changes):
    return dataclasses.replace(
        run, config=dataclasses.replace(run.config, search=dataclasses.replace(run.config.search, **changes))
    )


@pytest.mark.parametrize("tolerance", [None, 0.99])
def test_the_stages_lead_from_a_run_to_an_export_that_answers(config, run, tolerance):
    run = with_search(run, candidates=12, served=12, tolerance=tolerance)
    chosen = stages.search(run)
    space = config.model.space()
    assert {space.smallest(), space.largest()} <= {c.subnet for c in chosen}
    stages.calibrate(run)
    served = stages.evaluate(run)
    assert [s.subnet for s in served] == run.served()
    assert served[-1].accuracy == served[-1].accuracy_shared
    model = ss.load(stages.export(run))
    assert model.class_names == run.dataset().class_names
    images, labels = Noise(config.data).arrays("test")
    profiled = halves.profiling_half(labels)
    for s in model.served:
        hits = np.argmax(np.asarray(model(images, s.subnet)), -1) == labels
        assert hits[profiled].mean() == pytest.approx(s.accuracy)
        assert s.profiled_half
    assert f"profiling half of the {len(labels)} test examples" in model.manifest["measured"]
    assert [s.accuracy_bfloat16 for s in model.served] == [None] * len(served)
    both = stages.evaluate(run, bfloat16=True)
    assert [dataclasses.replace(s, accuracy_bfloat16=None) for s in both] == served
    assert [s.accuracy_bfloat16 for s in both] == pytest.approx([s.accuracy for s in both], abs=0.02)
    assert stages.table(both)[0][-1] == "in bfloat16"
    assert ss.load(stages.export(run)).accuracies("bfloat16") == {s.subnet: s.accuracy_bfloat16 for s in both}
    middle = np.median([s.accuracy for s in served])
    error = f"standard error of an accuracy: {100 * math.sqrt(middle * (1 - middle) / 150):.1f} points"
    assert (
        stages.precision(run, served) == f"test accuracies are those on about 150 test examples, one half of the 300; {error}"
    )
    assert set(model.statistics) == set(model.subnets)
    assert config_from_json(model.manifest["training"]) == run.config
    assert {"search.png", "search.json", "statistics.npz", "evaluation.json"} <= set(os.listdir(run.workdir))
    tried = [Subnet.from_json(c["subnet"]) for c in json.loads((run.workdir / "search.json").read_text())["candidates"]]
    assert len(tried) == 12
    assert list(model.subnets) == run.served()
    if tolerance:  # one of each network
        assert len(model.subnets) == len({tuple(config.model.sizes(s).values()) for s in tried})
    # Validation data decides which subnets are exported. Test accuracies do not, and those of an older run are marked.
    falling = [dataclasses.replace(s, accuracy=0.9 - 0.01 * i, profiled_half=False) for i, s in enumerate(served)]
    run.write("evaluation.json", [s.to_json() for s in falling])
    older = ss.load(stages.export(run))
    assert list(older.subnets) == run.served()
    assert "profiling half" not in older.manifest["measured"]
    assert "those on all 300 test examples; " in stages.precision(run, older.served)
    assert not any(s.profiled_half for s in older.served)


def test_a_search_stopped_by_ctrl_c_goes_on_to_the_same_result(run, count_calls, caplog):
    run = with_search(run, candidates=10, served=6)
    undisturbed = stages.search(run)
    before = (run.workdir / "search.json").read_bytes()
    (run.workdir / "search.jsonl").unlink()
    calls = count_calls(evaluation, "accuracy", interrupt_at=5)
    with pytest.raises(KeyboardInterrupt):
        stages.search(run)
    with caplog.at_level("INFO"):
        assert stages.search(run) == undisturbed
    assert "has 4 candidates already" in caplog.text
    assert len(calls) == 5 + 6
    assert (run.workdir / "search.json").read_bytes() == before
    stages.search(with_search(run, candidates=10, served=3, tolerance=0.5))  # what is made of the candidates may change
    assert len(calls) == 5 + 6
    with caplog.at_level("INFO"):
        stages.search(with_search(run, calibration_examples=100))
    assert "was written with other data; searching anew" in caplog.text


def test_a_search_over_latency_times_subnets_once_and_says_how_far_off_it_is(config, run, monkeypatch):
    run = with_search(run, candidates=12, cost="latency", latency_batch=2)
    monkeypatch.setattr(stages, "_TIMED", 6)
    chosen = stages.search(run)
    found = json.loads((run.workdir / "search.json").read_text())
    assert found["cost"] == "latency"
    assert 0 < found["latency_error"] < 10
    best = max(c["accuracy"] for c in found["candidates"])
    assert found["standard_error"] == pytest.approx((best * (1 - best) / run.config.search.examples) ** 0.5)
    assert 0 < chosen[0].cost <= chosen[-1].cost
    first = json.loads((run.workdir / "search.jsonl").read_text().splitlines()[0])
    assert first["settings"]["device"] == machine.device_kind(jax.devices()[0])  # jax calls every CPU "cpu"
    monkeypatch.setattr(latency, "measure", lambda *_, **__: pytest.fail("timed again"))
    assert stages.search(run) == chosen
    costs = [config.model.flops(s) for s in run.served()]
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("stage", "made_by"),
    [(stages.calibrate, "superserve search"), (stages.evaluate, "superserve search"), (stages.export, "superserve evaluate")],
)
def test_a_stage_without_the_one_before_says_which_program_to_run(finished, stage, made_by):
    with pytest.raises(errors.ConfigError, match=made_by):
        stage(finished)


def test_a_folder_without_a_run_or_without_a_checkpoint_is_refused(config, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"not the folder of a run.*superserve train"):
        Run.open(tmp_path)
    with pytest.raises(errors.ConfigError, match="no checkpoint yet"):
        Run.create(config, tmp_path / "run").model()


def test_training_traces_one_program_per_subnet_bucket_however_many_steps(config, tmp_path, count_calls, monkeypatch):
    monkeypatch.setattr(loop.supernets, "check", lambda *_, **__: None)  # it traces programs, too
    traced = count_calls(Program, "train")
    model = dataclasses.replace(MODEL, widths=(5, 10, 15))
    fresh = dataclasses.replace(config, model=model, random_subnets=2, eval_every=0)
    loop.train(fresh, tmp_path / "run")
    used = {c.program for k in range(12) for c in Sampler(fresh.model, buckets=2, random_subnets=2, seed=0).step(k)}
    assert len(used) == 2 + 2
    assert len(traced) == len({program for program, *_ in traced}) == len(used)


def test_a_run_on_a_given_dataset_takes_no_other_in_later_stages(config, tmp_path):
    run = loop.train(dataclasses.replace(config, epochs=0.1), tmp_path / "run", dataset=Noise())
    stages.search(run)
    again = Run.open(tmp_path / "run")
    with pytest.raises(errors.ConfigError, match=r"Run\.open\(.*dataset=\.\.\.\)"):
        stages.calibrate(again)
    stages.calibrate(Run.open(tmp_path / "run", dataset=Noise()))
    with pytest.raises(errors.ConfigError, match="the config names no dataset"):
        loop.train(dataclasses.replace(config, data=None), tmp_path / "other")


def test_further_training_removes_the_results_of_the_stages_for_the_old_weights(config, tmp_path):
    run = Run.convert(config, tmp_path / "run", SuperNet.create(config.model, seed=3))
    stages.calibrate(run, [config.model.space().largest()])
    for name in ("search.json", "evaluation.json"):
        run.write(name, {})
    found = [run.workdir / name for name in ("search.json", "statistics.npz", "evaluation.json")]
    assert all(file.exists() for file in found)
    loop.train(config, tmp_path / "run")
    assert not any(file.exists() for file in found)


def test_validation_without_validation_examples_is_refused_before_the_first_step(config, tmp_path):
    class Without(Noise):
        def num_examples(self, split):
            if split == "validation":
                raise errors.DataError("no validation split; set validation above 0")
            return super().num_examples(split)

    with pytest.raises(errors.DataError, match="set validation above 0"):
        loop.train(dataclasses.replace(config, eval_every=2), tmp_path / "run", dataset=Without())
    assert not (tmp_path / "run").exists()


def test_a_search_tries_only_what_the_last_phase_trained(config, tmp_path):
    depth_only = dataclasses.replace(config, epochs=0.2, phases=(Phase(elastic=("depth",)),))
    run = loop.train(depth_only, tmp_path / "run")
    space = config.model.space()
    assert {c.subnet for c in stages.search(run)} <= {space.subnet(depth=d) for d in MODEL.depths}


def test_phases_within_one_line_of_metrics_are_averaged_over_their_own_steps(config, tmp_path):
    frozen = Phase(elastic=())
    run = loop.train(dataclasses.replace(config, epochs=0.6, log_every=6, phases=(Phase(), frozen, Phase())), tmp_path)
    assert np.isfinite(run.metrics()[0]["loss_smallest"])
