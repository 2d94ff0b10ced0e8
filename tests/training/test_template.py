"""A model whose class count, image size and the like come from the data."""

import dataclasses
import logging

import numpy as np
import pytest
from mlp_family import MLPConfig
from noise import CONFIG
from tiny import TINY

from superserve_jax import errors
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets import supernet
from superserve_jax.training import data, loop
from superserve_jax.training.config import TrainConfig
from superserve_jax.training.data import fit
from superserve_jax.training.template import from_data
from superserve_jax.vocabulary import Vocabulary

PIXELS = ("num_classes", "image_size", "channels", "mean", "std")


def dataset(classes=4, channels=3, size=12):
    rng = np.random.default_rng(0)
    x = np.zeros((40, size, size, channels), np.uint8)
    x[..., 0] = 51
    x[:, :, ::2, 0] = 153
    x[..., 1:] = rng.integers(0, 256, x[..., 1:].shape)
    return data.from_arrays(train=(x, np.arange(40) % classes), test=(x, np.arange(40) % classes), validation=8)


def test_missing_values_come_from_the_data():
    model, names = fit.complete(from_data(TINY, *PIXELS), dataset())
    assert (model.num_classes, model.image_size, model.channels) == (4, 12, 3)
    assert (model.mean[0], model.std[0]) == (0.4, 0.2)
    assert sorted(names) == sorted(PIXELS)
    assert model.depths == TINY.depths
    fit.check(dataset(), model)


def test_the_mean_and_deviation_are_those_of_numpy():
    found = fit.pixel_statistics(dataset())
    values = dataset().arrays("train")[0].reshape(-1, 3) / 255
    assert found["mean"] == pytest.approx(values.mean(0), abs=1e-4)
    assert found["std"] == pytest.approx(values.std(0), abs=1e-4)


def test_images_of_one_colour_have_a_deviation_above_0():
    x = np.full((9, 8, 8, 1), 7, np.uint8)
    same = data.from_arrays(train=(x, np.arange(9) % 3), test=(x, np.arange(9) % 3), validation=0)
    assert fit.pixel_statistics(same)["std"] == (0.001,)


def test_a_given_value_stays():
    template = dataclasses.replace(from_data(TINY, *PIXELS), mean=(0.5, 0.5, 0.5), num_classes=4)
    model, names = fit.complete(template, dataset())
    assert model.mean == (0.5, 0.5, 0.5)
    assert sorted(names) == ["channels", "image_size", "std"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_given_mean_may_be_of_any_number_of_channels(channels):
    model = dataclasses.replace(from_data(OFAResNetConfig(), *PIXELS), mean=(0.5,) * channels)
    assert TrainConfig("x", model).model is model
    assert fit.complete(model, dataset(channels=channels, size=32))[0].channels == channels


def test_a_given_value_that_does_not_fit_is_refused():
    model, _ = fit.complete(dataclasses.replace(from_data(TINY, *PIXELS), num_classes=7, image_size=9), dataset())
    with pytest.raises(errors.ConfigError) as e:
        fit.check(dataset(), model)
    assert "model.num_classes is 7, but arrays has 4 classes" in str(e.value)
    assert "model.image_size is 9, but the inputs of arrays need 12" in str(e.value)


def test_texts_tell_the_size_of_the_vocabulary_and_of_the_inputs():
    example = DynaBERTConfig(vocab_size=9, max_length=4, hidden_size=8, depths=(1,), heads=(1, 2), ffn=(4, 8))
    template = from_data(example, "num_classes", "vocab_size", "pad_id", "max_length", "token_types")
    ids = np.ones((12, 6), np.int32)
    texts = data.from_arrays(train=(ids, np.arange(12) % 2), test=(ids, np.arange(12) % 2), validation=2)
    texts.vocabulary = Vocabulary(("[CLS]", "x", "[PAD]"), scheme="words")
    model, _ = fit.complete(template, texts)
    assert (model.num_classes, model.vocab_size, model.pad_id, model.max_length, model.token_types) == (2, 3, 2, 6, 1)
    fit.check(texts, model)


@pytest.mark.parametrize("name", ["widths", "nun_classes", "vocab_size"])
def test_only_values_that_data_can_tell_may_be_left_out(name):
    with pytest.raises(errors.UnknownNameError, match="unknown field of MLPConfig that data can tell"):
        from_data(MLPConfig(), name)


def test_a_program_that_needs_the_whole_model_says_what_is_missing():
    template = from_data(TINY, "mean", "std")
    with pytest.raises(errors.ConfigError, match=r"has no mean, std, .* from the data; give values here, .*--model\.mean"):
        supernet.SuperNet.create(template, seed=0)
    assert not hasattr(template, "nothing")


@pytest.mark.slow
def test_training_reports_what_it_derived_and_a_resumed_run_takes_it_from_its_config(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "superserve_jax")
    small = MLPConfig(num_classes=9, image_size=8, depths=(0, 1), widths=(2, 4))
    model = from_data(small, "num_classes")
    config = dataclasses.replace(CONFIG, epochs=0.5, batch_size=8, buckets=1, random_subnets=0, eval_every=0, model=model)
    run = loop.train(config, tmp_path / "run", dataset=dataset(channels=1, size=8))
    assert run.config.model == dataclasses.replace(small, num_classes=4)
    line = "data: arrays: 4 classes; 32 examples for training, 8 for validation, 40 for testing; num_classes 4"
    assert [r.message for r in caplog.records].count(line) == 1
    monkeypatch.setattr(fit, "facts_of", lambda dataset: {})
    assert loop.train(config, tmp_path / "run", dataset=dataset(channels=1, size=8)).config == run.config
