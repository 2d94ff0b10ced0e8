"""A subnet as a standalone network: it computes the same as inside the SuperNet, and shares no weights."""

import copy
import dataclasses
import functools
import json
import pickle

import jax
import numpy as np
import optax
import pytest
from mlp_family import MLPConfig
from tiny import CONFIGS, TINY, random_images, random_params

import superserve_jax as ss
from superserve_jax import errors, families
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.training import data, loop, losses, stages
from superserve_jax.training.config import OptimConfig, TrainConfig
from superserve_jax.training.data import DataConfig
from superserve_jax.training.runs import Run

UNEVEN = TINY.space().subnet(depth=(1, 0, 2), expand=(0.5, 0.5, 1.0), width=(0.5, 1.0, 0.5))
NONE = np.zeros(0, np.int32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_dir):
    """An untrained run of an MLP on a small cluttered_digits. Standalone subnets do not need a trained run."""
    digits = DataConfig(data_dir=digits_dir, image_size=8, validation=20)
    config = TrainConfig("mlp", MLPConfig(), digits, epochs=3, batch_size=28, calibration_examples=64, log_every=10)
    return Run.create(config, tmp_path_factory.mktemp("runs") / "mlp")


@functools.partial(jax.jit, static_argnums=0)
def train_program(program, params, images):
    return program.train(params, images, NONE)


@pytest.mark.parametrize("subnet", [TINY.space().smallest(), UNEVEN, TINY.space().largest()], ids=["small", "uneven", "large"])
def test_a_standalone_subnet_computes_what_the_subnet_computes_and_costs_as_much(subnet):
    config, params = SingleSubnetConfig(TINY, subnet), random_params(TINY)
    only, images = config.space().largest(), random_images(TINY, 5)
    assert config.space().smallest() == only
    assert (config.flops(only), config.num_params(only)) == (TINY.flops(subnet), TINY.num_params(subnet))
    for program in (programs.masked(config), programs.sliced(config, only)):
        assert program.traced == ()
        logits, row = train_program(program, params, images)
        expected, expected_row = train_program(programs.sliced(TINY, subnet), params, images)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(row, expected_row, rtol=1e-5, atol=1e-5)


def test_a_standalone_subnet_begins_with_the_supernet_s_weights():
    config = SingleSubnetConfig(MLPConfig(), MLPConfig().space().smallest())
    standalone_params, shared = programs.initial_params(config, 3), programs.initial_params(MLPConfig(), 3)
    assert standalone_params.keys() == shared.keys()
    assert all((standalone_params[name] == shared[name]).all() for name in shared)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_config_of_a_standalone_subnet_survives_json_copying_and_pickling(kind):
    config = SingleSubnetConfig(CONFIGS[kind], CONFIGS[kind].space().sample(0, 7))
    assert families.config_from_json(json.loads(json.dumps(families.config_to_json(config)))) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_subnet_of_another_space_is_refused():
    with pytest.raises(errors.SubnetError, match="gates must be"):
        SingleSubnetConfig(TINY, Subnet((1,)))


def test_standalone_training_changes_only_the_weights_of_the_subnet_and_is_not_repeated(run, monkeypatch):
    config = run.config.model
    smallest = config.space().smallest()
    measured = stages.standalone(run, smallest, "smallest")
    assert (measured.flops, measured.params) == (config.flops(smallest), config.num_params(smallest))
    own = Run.open(run.workdir / "alone" / "smallest")
    assert own.read("evaluation.json", made_by="")[0]["accuracy"] == measured.accuracy
    assert own.metrics()[-1]["step"] == 30  # 3 epochs of 280 images in batches of 28
    exported = ss.load(stages.export(own))
    assert [s.subnet for s in exported.served] == [Subnet(())]
    assert exported(random_images(config, 2), exported.subnets[0]).shape == (2, 10)
    params, fresh = own.model().params, programs.initial_params(config, run.config.seed)
    changed = np.asarray(params["first.linear.kernel"] != fresh["first.linear.kernel"])
    width = config.widths[0]
    assert changed[:, :width].any()
    assert (np.asarray(params["first.linear.bias"] != fresh["first.linear.bias"]) == (np.arange(16) < width)).all()
    assert (params["blocks.0.linear.bias"] == fresh["blocks.0.linear.bias"]).all()
    monkeypatch.setattr(stages, "calibrate", lambda *_: pytest.fail("calibrated again"))
    assert stages.standalone(run, smallest, "smallest") == measured
    with pytest.raises(errors.ConfigError, match="another config"):
        stages.standalone(run, config.space().largest(), "smallest")


def test_a_standalone_subnet_learns_from_labels_only(run, tmp_path):
    """One step equals a gradient step of the labels' loss, here without momentum or decay."""
    sgd = OptimConfig(name="sgd", lr=0.5, schedule="constant", warmup=0, weight_decay=0, momentum=0)
    config = stages.standalone_config(run.config, MLPConfig().space().subnet(depth=1, width=8))
    config = dataclasses.replace(config, optim=sgd, epochs=1e-6, label_smoothing=0.1)
    after = loop.train(config, tmp_path / "run").model().params
    batch = next(data.open(config.data).train(config.batch_size, seed=config.seed))

    def loss(params):
        logits, _ = programs.masked(config.model).train(params, batch["inputs"], NONE)
        return losses.cross_entropy(logits, batch["label"], smoothing=0.1)

    params = programs.initial_params(config.model, config.seed)
    expected = optax.apply_updates(params, jax.tree.map(lambda g: -0.5 * g, jax.jit(jax.grad(loss))(params)))
    for name, value in expected.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
