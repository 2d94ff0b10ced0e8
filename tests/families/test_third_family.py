"""A family that is defined in a single file works from training to serving. `test_checking.py` runs `check` on this family."""

import subprocess
import sys

import jax
import pytest
from mlp_family import MLPConfig
from tiny import assert_close, random_images

import superserve_jax as ss
from superserve_jax.training import stages
from superserve_jax.training.config import SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


@pytest.mark.usefixtures("quick_compilation")
def test_it_is_trained_searched_exported_and_served(tmp_path, digits_dir):
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
    run = ss.train(config, tmp_path / "mlp")
    assert run.metrics()[-1]["accuracy"] > 0.3  # guessing gives 0.1
    for stage in (stages.search, stages.calibrate, stages.evaluate):
        stage(run)
    path = stages.export(run)
    model, images = ss.load(path), random_images(config.model, 8)
    assert model.config == config.model
    assert {model.space.smallest(), model.space.largest()} <= set(run.served())
    with ss.Server(path, slo_ms=10_000, batch_sizes=(1, 4), devices=jax.devices()[:1]) as server:
        for image, future in zip(images, server.submit_many(list(images)), strict=True):
            reply = future.result(timeout=60)
            assert_close(reply.output, model(image[None], reply.subnet)[0])
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
