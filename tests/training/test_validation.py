"""Validation curves and Weights & Biases: when a run validates, and that a resumed run repeats no point."""

import dataclasses
import sys
import types

import numpy as np
import pytest
from noise import Noise, assert_same_state
from tiny import random_params

from superserve_jax import errors
from superserve_jax.training import loop, metrics_log, validation
from superserve_jax.training.config import Phase
from superserve_jax.training.runs import Run
from superserve_jax.training.step import SandwichStep, TrainState
from superserve_jax.training.validation import Validation

pytestmark = pytest.mark.usefixtures("on_noise")


@pytest.fixture
def by_default(config):
    """The config of the short run, 12 steps, which validates as often as by default."""
    return dataclasses.replace(config, eval_every=None)


def validated(run):
    return [line["step"] for line in run.metrics("validation")]


@pytest.mark.parametrize(
    ("eval_every", "log_every", "num_steps", "expected"),
    [(None, 50, 2671, 268), (None, 50, 100, 50), (None, 1, 7, 1), (0, 50, 2671, 0), (30, 50, 2671, 30)],
)
def test_a_run_validates_about_ten_times_unless_the_config_says_how_often(config, eval_every, log_every, num_steps, expected):
    changed = dataclasses.replace(config, eval_every=eval_every, log_every=log_every)
    assert validation.interval(changed, num_steps) == expected


def test_validation_is_on_by_default_changes_no_bit_and_a_resumed_run_repeats_no_point(
    by_default, finished, tmp_path, count_calls
):
    count_calls(SandwichStep, "__call__", interrupt_at=7)
    with pytest.raises(KeyboardInterrupt):
        loop.train(by_default, tmp_path / "run")
    run = loop.train(by_default, tmp_path / "run")
    assert validated(run) == [2, 4, 6, 8, 10, 12]
    assert_same_state(run, finished)


def test_a_run_may_be_resumed_with_another_interval_but_not_with_another_optimiser(by_default, run):
    loop.train(by_default, run.workdir)
    assert Run.open(run.workdir).config.eval_every is None
    with pytest.raises(errors.ConfigError, match=r"optim\.lr"):
        loop.train(dataclasses.replace(by_default, optim=dataclasses.replace(by_default.optim, lr=1.0)), run.workdir)


def test_without_validation_examples_a_run_has_no_curve_and_says_so(by_default, tmp_path, caplog):
    class Without(Noise):
        def num_examples(self, split):
            if split == "validation":
                raise errors.DataError("no validation split; set validation above 0")
            return super().num_examples(split)

    run = loop.train(dataclasses.replace(by_default, epochs=0.2), tmp_path / "run", dataset=Without())
    assert validated(run) == []
    assert "no validation curves: no validation split; set validation above 0" in caplog.text


def test_no_subnet_is_validated_twice(config):
    state = TrainState(random_params(config.model), None, {})
    fixed = dataclasses.replace(config, phases=(Phase(elastic=()),))
    assert list(Validation(fixed, Noise())(state)) == ["largest"]
    assert list(Validation(config, Noise())(state)) == ["smallest", "middle", "largest"]


# -- Weights & Biases ------------------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.points, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, *, step):
        self.points.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    return fake


def test_wandb_gets_all_metrics_and_a_resumed_training_continues_its_run(by_default, finished, tmp_path, wandb, count_calls):
    config = dataclasses.replace(by_default, wandb="digits")
    count_calls(SandwichStep, "__call__", interrupt_at=8)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    run = loop.train(config, tmp_path / "run")
    assert_same_state(run, finished)
    first, second = wandb.started
    assert first == second
    assert (first["project"], first["name"], first["resume"], wandb.finished) == ("digits", config.name, "allow", 2)
    assert first["config"]["optim"]["lr"] == config.optim.lr
    sent = [(step, name, value) for step, values in wandb.points for name, value in values.items()]
    files = [
        (line["step"], f"{kind}/{name}", value)
        for kind in ("train", "validation")
        for line in metrics_log.read(run.workdir, kind)
        for name, value in line.items()
        if name != "step"
    ]
    assert sorted(sent) == sorted(files)
    loop.train(config, run.workdir)  # a finished training starts no W&B run
    assert len(wandb.started) == 2


def test_no_project_needs_no_wandb_and_a_project_names_what_to_install(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(errors.ConfigError, match=r"wandb='digits'.*pip install 'superserve-jax\[wandb\]'"):
        loop.train(dataclasses.replace(config, wandb="digits"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    loop.train(dataclasses.replace(config, epochs=0.1), tmp_path / "run")


def test_wandb_that_cannot_start_is_an_error_and_one_that_fails_later_is_a_warning(config, tmp_path, wandb, caplog):
    def fail(*_, **__):
        raise RuntimeError("no network")

    short = dataclasses.replace(config, epochs=0.4, wandb="digits")
    wandb.log = wandb.finish = fail
    run = loop.train(short, tmp_path / "run")
    assert caplog.text.count("did not take the metrics") == 1
    assert "could not finish the run: RuntimeError: no network" in caplog.text
    assert np.isfinite(run.metrics()[-1]["loss"])
    wandb.init = fail
    with pytest.raises(
        errors.ConfigError, match=r"project 'digits': RuntimeError: no network.*wandb login.*WANDB_MODE=offline"
    ):
        loop.train(short, tmp_path / "other")
