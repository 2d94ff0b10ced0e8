"""A family that is defined in a single file works from training to serving. `test_checking.py` runs `check` on this family."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from mlp_family import MLPConfig
from tiny import random_images

import superserve_jax as ss
from superserve_jax.training import data, stages
from superserve_jax.training.config import SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_dir):
    """A trained, searched, calibrated and evaluated run."""
    config = TrainConfig(
        name="mlp",
        model=MLPConfig(),
        data=DataConfig(data_dir=digits_dir, image_size=8, validation=60),
        epochs=20,
        batch_size=60,
        buckets=2,
        calibration_examples=240,
        search=SearchConfig(candidates=6, calibration_examples=240, examples=60, served=3),
    )
    run = ss.train(config, tmp_path_factory.mktemp("runs") / "mlp")
    stages.search(run)
    stages.calibrate(run)
    stages.evaluate(run)
    return run


@pytest.fixture(scope="module")
def path(run):
    return stages.export(run)


def test_it_trains_and_is_searched(run):
    assert run.metrics()[-1]["accuracy"] > 0.3  # guessing gives 0.1
    space = run.config.model.space()
    assert {space.smallest(), space.largest()} <= set(run.served())
    assert ss.load(stages.export(run)).config == run.config.model


def test_its_export_has_the_accuracies_that_evaluation_measured(run, path):
    model = ss.load(path)
    images, labels = data.open(run.config.data).arrays("test")
    for served in model.served:
        hits = np.argmax(np.asarray(model(images, served.subnet)), -1) == labels
        assert hits.mean() == pytest.approx(served.accuracy)


def test_a_server_answers_with_its_subnets(path):
    model = ss.load(path)
    images = random_images(MLPConfig(), 8)
    with ss.Server(path, slo_ms=10_000, batch_sizes=(1, 4), devices=jax.devices()[:1]) as server:
        for image, future in zip(images, server.submit_many(list(images)), strict=True):
            reply = future.result(timeout=60)
            expected = np.asarray(model(image[None], reply.subnet))[0]
            np.testing.assert_allclose(reply.output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
            assert reply.accuracy in [row.accuracy for row in server.profile.rows if row.subnet == reply.subnet]


def test_a_family_s_file_in_the_families_folder_is_registered_automatically(tmp_path):
    """Runs in a new process, in which the `families` folder seems to hold one more file."""
    (tmp_path / "toy.py").write_text(
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass ToyConfig:\n    family = 'toy'\n    width: int = 1\n"
    )
    code = (
        "import pkgutil\n"
        "real = pkgutil.iter_modules\n"
        f"pkgutil.iter_modules = lambda path: (path.append({str(tmp_path)!r}), real(path))[1]\n"
        "from superserve_jax import families\n"
        "assert families.config_from_json({'family': 'toy', 'width': 2}).width == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
