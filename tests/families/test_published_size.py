"""The published OFA-ResNet50 (48 M parameters, 224x224) is built with fresh weights, exported, loaded and run."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_images, write_export

import superserve_jax as ss
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training.config import load_config

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "ofa_resnet50.py"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_published_network_is_built_exported_loaded_and_run(tmp_path):
    config = load_config(CONFIG).model
    space = config.space()
    assert config.num_params(space.largest()) == pytest.approx(48e6, rel=0.01)
    chosen = [space.smallest(), space.subnet(depth=(0, 2, 3, 4, 3), expand=0.25, width=0.8), space.largest()]
    model, image, logits = SuperNet.create(config, seed=0), random_images(config, 1), {}
    # The stored statistics are computed from the same image. So inference must give the same logits as training.
    for subnet in chosen:
        program = programs.sliced(config, subnet)
        train = jax.jit(lambda params, x, program=program: program.train(params, x, jnp.zeros((0,), jnp.int32)))
        logits[subnet], statistics = map(np.asarray, train(model.params, image))
        model.statistics[subnet] = statistics
    write_export(tmp_path / "export", model)
    del model

    loaded = ss.load(tmp_path / "export")
    assert list(loaded.subnets) == chosen
    weights = sum(p.nbytes for p in loaded.params.values())
    assert weights == pytest.approx(4 * 48e6, rel=0.01)
    for subnet in chosen:
        assert weights > 500 * loaded.statistics[subnet].nbytes
        found = np.asarray(loaded(image, subnet))
        assert found.shape == (1, 1000)
        assert np.std(found) > 1e-3
        np.testing.assert_allclose(found, logits[subnet], rtol=1e-2, atol=1e-2 * np.std(found))
