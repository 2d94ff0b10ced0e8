import dataclasses
import json
import math
import pathlib
import pickle
import sys
import typing

import jax
import jax.numpy as jnp
import pytest
import tyro

from superserve_jax import errors
from superserve_jax.training.config import OptimConfig, TrainConfig, config_from_json, config_to_json, load_config
from superserve_jax.training.data import DataConfig
from superserve_jax.training.data.text import TextConfig
from superserve_jax.training.template import ModelTemplate

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_survives_json(path):
    config = load_config(path)
    assert config.name == path.stem
    if isinstance(config.model, ModelTemplate):
        config = dataclasses.replace(config, model=config.model.fill({}))
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def debug():
    return load_config(CONFIGS[0].parent / "debug.py")


IMPOSSIBLE = {
    "epochs": (math.nan, 0, -1),
    "batch_size": (0, 1.5),
    "buckets": (0,),
    "random_subnets": (-1,),
    "label_smoothing": (1.0,),
    "ema": (1.0,),
    "seed": (-1, True),
    "name": ("", "a/b", "..", ".", "/etc", "../x", "con\0", "a\nb", "\ud800", "x" * 300),
    "model": (None,),
    "checkpoint_every": (0,),
    "eval_every": (-1,),
    "optim.lr": (math.nan, 0.0, -1.0, math.inf),
    "optim.warmup": (1.0,),
    "optim.momentum": ("x",),
    "optim.clip_norm": (-1.0,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_a_value_that_cannot_work_is_refused_by_name(name, value):
    part, field = (OptimConfig(), name.removeprefix("optim.")) if name.startswith("optim.") else (debug(), name)
    with pytest.raises(errors.ConfigError, match=name):
        dataclasses.replace(part, **{field: value})


@pytest.mark.parametrize(
    ("part", "field", "value", "nearest"),
    [
        (OptimConfig(), "name", "adam", "adamw"),
        (OptimConfig(), "schedule", "cosin", "cosine"),
        (debug(), "compute_dtype", "float16", "bfloat16"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_suggested(part, field, value, nearest):
    with pytest.raises(errors.UnknownNameError, match=f"did you mean '{nearest}'"):
        dataclasses.replace(part, **{field: value})


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_spares_norms_and_biases(name):
    optimiser = OptimConfig(name=name, weight_decay=0.5, schedule="constant", warmup=0.0).create(10)
    params = {"a.kernel": jnp.ones((2, 2)), "a.bias": jnp.ones(2)}
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    assert (updates["a.kernel"] < 0).all()
    assert (updates["a.bias"] == 0).all()


def test_the_learning_rate_warms_up_and_falls_to_zero():
    def step_size(step, **settings):
        optimiser = OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, momentum=0.0, **settings).create(100)
        params = {"w.kernel": jnp.zeros((1, 1))}
        state = optimiser.init(params)
        for _ in range(step + 1):
            updates, state = optimiser.update({"w.kernel": jnp.ones((1, 1))}, state, params)
        return -float(updates["w.kernel"][0, 0])

    rates = [step_size(k, warmup=0.1) for k in (0, 5, 10, 50, 99)]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(1.0)
    assert rates[2] > rates[3] > rates[4] == pytest.approx(0.0, abs=1e-3)
    assert step_size(99, schedule="constant", warmup=0.0) == pytest.approx(1.0)


def test_a_config_of_an_older_version_is_read_with_defaults_and_one_of_a_newer_refused():
    values = config_to_json(debug())
    old = {k: v for k, v in values.items() if k not in ("phases", "distill", "ema")}
    assert config_from_json(old) == debug()
    with pytest.raises(errors.UnknownNameError, match="field of OptimConfig 'lrr': did you mean 'lr'"):
        config_from_json({**values, "optim": {**values["optim"], "lrr": 1}})
    with pytest.raises(errors.ConfigError, match="the config does not fit"):
        config_from_json({k: v for k, v in values.items() if k != "model"})


@pytest.mark.parametrize("name", ["", "..", ".", "../x", "/etc", "a/../b", "glue/..", "a/b/c", "con\0", "a\nb", "ns:a", "a b"])
def test_a_dataset_whose_name_could_be_another_folder_is_refused(name):
    for config in (DataConfig, TextConfig):
        with pytest.raises(errors.ConfigError, match="name must be a TFDS dataset such as 'cifar10'"):
            config(name=name)


# -- config files -------------------------------------------------------------------------------------------------------------

OWN_DATACLASSES = """
from __future__ import annotations

import dataclasses
from typing import ClassVar

from mlp_family import MLPConfig
from superserve_jax import families
from superserve_jax.training.config import TrainConfig


@dataclasses.dataclass
class Sizes:
    widths: tuple[int, ...] = (8, 24)
    parent: Sizes | None = None
    known: ClassVar[list[Sizes]] = []


@families.register
@dataclasses.dataclass(frozen=True)
class WiderConfig(MLPConfig):
    family: ClassVar[str] = "wider_mlp"
    widths: tuple[int, ...] = Sizes(parent=Sizes()).parent.widths


def get_config() -> TrainConfig:
    return TrainConfig(name="wider", model=WiderConfig(), epochs=WIDTH)


WIDTH = len([*dataclasses.fields(Sizes)])
"""


def test_a_config_file_with_postponed_annotations_and_its_own_dataclasses_is_read(tmp_path):
    (tmp_path / "wider.py").write_text(OWN_DATACLASSES)
    config = load_config(tmp_path / "wider.py")
    assert (config.model.widths, config.epochs) == ((8, 24), 2)
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    assert typing.get_type_hints(type(config.model))["widths"] == tuple[int, ...]
    assert pickle.loads(pickle.dumps(config)) == config
    assert [*tmp_path.iterdir()] == [tmp_path / "wider.py"]  # no bytecode, which could be stale after an edit


def test_the_fields_of_a_config_file_s_own_family_are_options_of_the_command_line(tmp_path):
    (tmp_path / "wider.py").write_text(OWN_DATACLASSES)
    default = load_config(tmp_path / "wider.py")
    config = tyro.cli(TrainConfig, default=default, args=["--model.widths", "4", "8", "--epochs", "3"])
    assert (config.model.widths, config.epochs, type(config.model)) == ((4, 8), 3, type(default.model))


def test_an_edited_config_file_is_read_anew_and_two_of_one_name_are_apart(tmp_path):
    text = (CONFIGS[0].parent / "debug.py").read_text()
    for folder, name in (("a", "one"), ("b", "two"), ("a", "six")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "same.py").write_text(text.replace('name="debug"', f'name="{name}"'))
        assert load_config(tmp_path / folder / "same.py").name == name


def test_a_config_file_that_fails_leaves_the_module_of_the_last_one_that_did_not(tmp_path):
    path, before = tmp_path / "wider.py", set(sys.modules)
    path.write_text("1 / 0")
    with pytest.raises(errors.ConfigError):
        load_config(path)
    assert not any("wider" in name for name in set(sys.modules) - before)
    path.write_text(OWN_DATACLASSES)
    config = load_config(path)
    path.write_text("1 / 0")
    with pytest.raises(errors.ConfigError):
        load_config(path)
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x = 1\ndef get_config(:\n    pass",
            r"bad\.py fails, see .*bad\.py:2, `def get_config\(:`: SyntaxError: invalid syntax$",
        ),
        ("def get_config():\nreturn 1", r"bad\.py:2, `return 1`: IndentationError: expected an indented block"),
        ("x = '''", r"bad\.py:1, .*: SyntaxError: unterminated triple-quoted string literal"),
        ("import beside\n", r"bad\.py fails, see .*beside\.py:3, `y = \)`: SyntaxError: unmatched '\)'$"),
        (
            "def get_config():\n    return 1 / 0",
            r"bad\.py fails, see .*bad\.py:2, `return 1 / 0`: ZeroDivisionError: division by",
        ),
        ("import sys\nsys.exit(0)", r"bad\.py fails, see .*bad\.py:2, `sys\.exit\(0\)`: SystemExit: 0$"),
        ("x = 1\n\0", r"bad\.py fails: .*null bytes"),
        ("# -*- coding: nonsense -*-", r"bad\.py fails.*: SyntaxError: .*nonsense"),
    ],
)
def test_a_config_file_that_fails_is_refused_by_file_line_and_text(tmp_path, monkeypatch, text, message):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside.py").write_text("\nx = 1\ny = )\n")
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(errors.ConfigError, match=message):
        load_config(tmp_path / "bad.py")
