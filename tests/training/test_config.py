import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from superserve_jax import errors
from superserve_jax.training.config import OptimConfig, config_from_json, config_to_json, load_config

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_survives_json(path):
    config = load_config(path)
    assert config.name == path.stem
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
    "name": ("", "a/b"),
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
