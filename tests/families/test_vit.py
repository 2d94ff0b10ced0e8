"""ViT's variants and its config. `supernets/test_programs.py` compares the subnets of one config with plain networks."""

import dataclasses

import jax
import numpy as np
import plain
import pytest
from tiny import TINY_VIT, assert_close, random_images, random_params

import superserve_jax as ss
from superserve_jax import errors
from superserve_jax.extract import extraction
from superserve_jax.families.vit import ViTConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import data, stages
from superserve_jax.training.config import DistillConfig, Phase, SearchConfig, TrainConfig
from superserve_jax.training.template import from_data

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = {
    "DeiT": {"tokens": 2, "pool": "token"},
    "distilled DeiT": {"tokens": 2, "pool": "tokens"},
    "DINOv2 with registers": {"tokens": 5, "pool": "token_mean", "layer_scale": 1.0},
    "timm's mean": {"tokens": 1, "pool": "mean_norm"},
    "no tokens": {"tokens": 0, "pool": "mean"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_subnets_of_each_variant_agree_with_the_plain_network(variant):
    config = dataclasses.replace(TINY_VIT, layer_scale=0.0, **{"mean": (0.1, 0.2), "std": (0.3, 0.4), "channels": 2})
    config = dataclasses.replace(config, **VARIANTS[variant])
    params, images, space = random_params(config), random_images(config, 2), config.space()
    model, rows = SuperNet(config, params), np.zeros((2, 0), np.float32)
    for subnet in (space.smallest(), space.largest(), space.sample(0, 0)):
        expected, sliced = plain.network(config, params, subnet, images, None), programs.sliced(config, subnet)
        assert_close(model(images, subnet), expected)
        assert_close(sliced.infer(params, images, rows, sliced.active(subnet)), expected)


def test_the_default_config_is_vit_b_16():
    config = ViTConfig()
    largest, smallest = config.space().largest(), config.space().smallest()
    position = 768  # of the class token, which is a part of the token here
    assert config.num_params(largest) == 86_567_656 - position
    patches, block = 196 * 768 * 768, 197 * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * 197 * 197 * 768
    assert config.flops(largest) == patches + 12 * block + 768 * 1000
    assert config.num_params(smallest) == 12_164_968
    assert [axis.name for axis in config.space().axes] == ["heads", "expand"]


def test_the_first_channels_of_the_first_positions_tell_the_patches_apart():
    config = dataclasses.replace(TINY_VIT, image_size=8 * TINY_VIT.patch, widths=(16,))
    positions = programs.initial_params(config, 0)["positions"][0]
    assert positions.shape == (64, 16)
    some = np.asarray(positions)[:, :8]
    assert np.linalg.norm(some[:, None] - some, axis=-1)[~np.eye(64, dtype=bool)].min() > 0.05


def test_a_field_makes_the_width_elastic():
    wide = dataclasses.replace(TINY_VIT, widths=(8,))
    assert [axis.name for axis in wide.space().axes] == ["heads", "expand"]
    assert TINY_VIT.space().axes[-1].choices == ((0.5, 1.0),)
    assert dataclasses.replace(wide, depths=(2,)).space().depths == ()
    assert dataclasses.replace(wide, depths=(1,)).space().depths == ()


def test_hidden_states_are_recorded_unless_the_width_is_elastic():
    for widths, count in (((8,), 2), ((4, 8), 0)):
        config = dataclasses.replace(TINY_VIT, widths=widths)
        program, smallest = programs.masked(config), config.space().smallest()
        _, hidden = program.train_hidden(random_params(config), random_images(config, 2), program.active(smallest))
        assert len(hidden) == count


def test_an_extracted_subnet_says_how_its_inputs_are_made():
    about = extraction.input_contract(TINY_VIT, has_network=False)["about"]
    assert about.startswith("Raw pixels from 0 to 255, channels last. Compute (x / 255 - mean) / std first")


def test_training_takes_values_of_the_model_from_the_data():
    model = from_data(TINY_VIT, "num_classes", "image_size", "channels", "mean", "std")
    found = model.fill({"num_classes": 5, "image_size": 8, "channels": 3, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)})
    assert (found.num_classes, found.image_size, found.channels, found.mean) == (5, 8, 3, (0.1, 0.2, 0.3))


def patterns(count, seed):
    """Noisy images of 8x8 pixels, each with one of four patterns in all its patches, and the number of the pattern."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, count)
    pattern = np.random.default_rng(9).integers(0, 2, (4, 4, 4, 1))
    return (rng.integers(0, 100, (count, 8, 8, 1)) + 100 * np.tile(pattern, (1, 2, 2, 1))[label]).astype(np.uint8), label


@pytest.mark.slow
def test_it_is_trained_searched_exported_and_served(tmp_path):
    sizes = {"widths": (16,), "depths": (1, 2), "heads": (1, 2), "mlp": (16, 32)}
    config = TrainConfig(
        name="vit",
        model=ViTConfig(num_classes=4, image_size=8, channels=1, patch=4, mean=(0.3,), std=(0.3,), **sizes),
        phases=(Phase(rewire=True),),
        distill=DistillConfig(hidden=0.1),
        epochs=10,
        batch_size=40,
        buckets=1,
        eval_every=0,
        search=SearchConfig(candidates=4, examples=80, served=2),
    )
    dataset = data.from_arrays(train=patterns(320, 0), test=patterns(80, 1), validation=80)
    run = ss.train(config, tmp_path / "vit", dataset=dataset)
    assert run.metrics()[-1]["accuracy"] > 0.8  # guessing gives 0.25
    for stage in (stages.search, stages.calibrate, stages.evaluate):
        stage(run)
    path = stages.export(run)
    model, images = ss.load(path), random_images(config.model, 8)
    assert model.config == config.model
    with ss.Server(path, slo_ms=10_000, batch_sizes=(4,), devices=jax.devices()[:1]) as server:
        for image, future in zip(images, server.submit_many(list(images)), strict=True):
            reply = future.result(timeout=60)
            assert_close(reply.output, model(image[None], reply.subnet)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number from 1 up"),
        ({"channels": True}, "channels must be a whole number from 1 up, got True"),
        ({"tokens": -1}, "tokens must be a whole number from 0 up"),
        ({"image_size": 7}, "image_size must be a multiple of the patch of 2 pixels, got 7"),
        ({"heads": (1, 3)}, "the largest width must be a multiple of the 3 heads, got 8"),
        ({"widths": (8, 4)}, "widths must be ascending"),
        ({"depths": ()}, "depths must be ascending"),
        ({"mlp": (0.5, 1.0)}, "mlp must be ascending whole numbers"),
        ({"pool": "tokens"}, "pool 'tokens' needs at least 2 tokens, got tokens=1"),
        ({"tokens": 0}, "pool 'token' needs at least 1 tokens"),
        ({"pool": "toke"}, "did you mean 'token'"),
        ({"layer_scale": -0.1}, "layer_scale must be 0 or positive"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"mean": (0.1, 0.2)}, "mean needs 1 values, one per channel"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"std": ("a",)}, "every field must have the type of its default"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError), match=message):
        dataclasses.replace(TINY_VIT, **changes)
