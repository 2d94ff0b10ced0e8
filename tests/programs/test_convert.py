"""train/convert.py as a user runs it."""

import dataclasses
import json
import shutil

import bert_directory
import jax
import numpy as np
import pytest
import vit_directory
from PIL import Image
from published import assert_same_model, ofa_state
from tiny import assert_close, assert_same_arrays, random_images, random_params, random_statistics

import superserve_jax as ss
from superserve_jax import errors
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import loop
from superserve_jax.training.config import load_config
from superserve_jax.training.runs import Run
from superserve_jax.training.step import SandwichStep

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

CONFIG = """
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.training.config import TrainConfig
from superserve_jax.training.data import DataConfig


def get_config():
    return TrainConfig(
        name="converted",
        model=OFAResNetConfig(
            num_classes=10,
            image_size=32,
            stem_depths=(1,),
            depths=((2,), (2,), (4,), (2,)),
            expand_ratios=(0.25,),
            width_mults=(0.06, 0.1),
        ),
        data=DataConfig(name="cluttered_digits", channels=3, data_dir={data_dir!r}, validation=20),
    )
"""


def test_the_program_makes_a_run_that_training_goes_on_from(run_program, digits_dir, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.replace("{data_dir!r}", repr(digits_dir)))
    config = load_config(tmp_path / "config.py").model
    largest = config.space().largest()
    model = SuperNet(config, random_params(config), {largest: random_statistics(config, largest)})
    np.savez(tmp_path / "weights.npz", **ofa_state(model, wrapped=False))
    run = tmp_path / "run"
    command = ["train/convert.py", tmp_path / "config.py", tmp_path / "weights.npz", "--workdir", run]
    done = run_program(*command, json_file=True, fresh=True)
    assert "go on with" in done.stdout
    assert done.json["params"] == config.num_params(largest)
    assert_same_model(Run.open(run).model(), model)
    assert "already has a checkpoint" in run_program(*command, status=2).stderr
    run = Run.open(run)
    sandwich = SandwichStep(run.config.optim.create(10))
    fresh = jax.eval_shape(sandwich.init, model.params)
    with run.checkpoints() as saved:  # where the training loop begins
        assert saved.latest() == 0
        state = fresh._replace(**saved.restore(0, **fresh._asdict()))
    assert_same_arrays(state.params, model.params)
    shutil.rmtree(run.workdir / "checkpoints")
    with pytest.raises(errors.DataError, match="convert them again"):
        loop.train(run.config, run.workdir)


def test_unfit_weights_leave_no_run_behind(run_program, tmp_path):
    np.savez(tmp_path / "weights.npz", weight=np.zeros(3))
    command = ["train/convert.py", "configs/debug.py", tmp_path / "weights.npz", "--workdir", tmp_path / "run"]
    done = run_program(*command, status=2)
    assert "once-for-all's OFA-ResNet has stem_stride=2, got 4" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_directory_of_hugging_face_becomes_a_run_and_a_server_without_a_config(run_program, tmp_path):
    path, model = bert_directory.write(tmp_path / "reviews")
    done = run_program("train/convert.py", path, "--workdir", tmp_path / "run", "--max-length", 8, json_file=True)
    assert "classes: negative, positive" in done.stdout
    assert "Its accuracy is unknown" in done.stdout
    assert done.json["params"] == dataclasses.replace(model.config, max_length=8).num_params(model.space.largest())
    found = ss.load(tmp_path / "run" / "export")
    assert [s.accuracy for s in found.served] == [None]
    fast = ("--no-load", "--repeats", 2, "--lengths", 8, "--batch-sizes", 1, "--slicing", "kept")
    assert "unknown" in run_program("serve/measure.py", found.path, *fast).stdout
    with ss.Server(found.path, slo_ms=1000, lengths=(8,), batch_sizes=(1,)) as server:
        reply = server.submit(found.encode("The film was good.")).result(timeout=60)
    padded = np.pad(found.encode(["The film was good."]), ((0, 0), (0, 8), (0, 0)))
    np.testing.assert_allclose(reply.output, model(padded, model.space.largest())[0], rtol=1e-4, atol=1e-5)
    assert reply.accuracy == 0
    assert "does not name" in run_program("serve/replay.py", found.path, status=2).stderr
    done = run_program("train/search.py", tmp_path / "run", status=2)
    assert "was converted without texts; convert into another folder with --texts FILE" in done.stderr
    done = run_program("train/convert.py", path, "--label", "sentiment", "--workdir", tmp_path / "other", status=2)
    assert "--label sentiment has no effect without --texts; give both or neither" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_directory_of_a_vit_becomes_a_run_and_a_server_and_with_images_smaller_subnets_are_served(run_program, tmp_path):
    path, network = vit_directory.write("hf_vit", tmp_path / "vit"), vit_directory.converted("hf_vit")
    done = run_program("train/convert.py", path, "--workdir", tmp_path / "run", json_file=True)
    assert "classes: cat, dog, fish, horse, owl\ninputs: raw images of 24x24 pixels, 3 channels, uint8" in done.stdout
    assert "without labelled images (--images FOLDER)" in done.stdout
    assert done.json["params"] == network.config.num_params(network.space.largest())
    images = random_images(network.config, 2)
    assert_close(ss.load(tmp_path / "run" / "export")(images), network(images))

    rng = np.random.default_rng(0)
    for name in reversed(vit_directory.META["class_names"]):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(tmp_path / "pets" / name / f"{i}.png")
    command = ("train/convert.py", path, "--workdir", tmp_path / "subnets", "--candidates", 4)
    done = run_program(*command, "--images", tmp_path / "pets")
    assert "sorting heads and neurons by importance" in done.stdout
    assert all(s.accuracy is not None for s in ss.load(tmp_path / "subnets" / "export").served)
    assert_close(Run.open(tmp_path / "subnets").model()(images), network(images), 1e-4)

    texts = bert_directory.write_texts(tmp_path / "texts.csv")
    done = run_program(*command[:3], tmp_path / "other", "--texts", texts, status=2)
    assert "--texts does not fit: this network classifies images; give --images" in done.stderr
    (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "cats")
    done = run_program(*command[:3], tmp_path / "other", "--images", tmp_path / "pets", status=2)
    assert "Missing in the data: cat; unknown to the classifier: cats" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_path_that_is_neither_a_directory_nor_a_config_is_named(run_program, tmp_path):
    done = run_program("train/convert.py", tmp_path / "absent", status=2)
    assert "there is no directory" in done.stderr


def test_with_texts_smaller_subnets_are_served_with_measured_accuracies(run_program, tmp_path):
    path, model = bert_directory.write(tmp_path / "reviews")
    texts = bert_directory.write_texts(tmp_path / "texts.csv")
    command = ("train/convert.py", path, "--texts", texts, "--candidates", 6, "--workdir", tmp_path / "run")
    done = run_program(*command)
    assert "sorting heads and neurons by importance" in done.stdout
    found = ss.load(tmp_path / "run" / "export")
    assert all(s.accuracy is not None for s in found.served)
    assert found.class_names == bert_directory.LABELS
    run = Run.open(tmp_path / "run")
    assert run.dataset().class_names == bert_directory.LABELS
    inputs = found.encode(["the film was good"])
    largest = model.space.largest()
    np.testing.assert_allclose(run.model()(inputs, largest), model(inputs, largest), rtol=1e-4, atol=1e-5)

    vocabulary = (run.workdir / "vocabulary.txt").read_bytes()
    other, _ = bert_directory.write(tmp_path / "others", tokens=(*bert_directory.TOKENS[:-1], "e"))
    done = run_program("train/convert.py", other, *command[2:], status=2)
    assert "holds a run of another config (name: reviews -> others)" in done.stderr
    assert not done.stdout  # refused before texts are read and units are sorted
    done = run_program(*command, status=2)
    assert "already has a checkpoint, of step 0; choose another --workdir" in done.stderr
    assert not done.stdout
    assert (run.workdir / "vocabulary.txt").read_bytes() == vocabulary

    moved = shutil.move(run.workdir, tmp_path / "moved")
    assert "test accuracy" in run_program("train/evaluate.py", moved).stdout
    done = run_program("train/supernet.py", moved, "--epochs", 7, status=2)
    assert "holds a run of another config" in done.stderr
    done = run_program("train/supernet.py", moved)  # trains the converted weights further
    assert f"export: {moved / 'export'}" in done.stdout
    manifest = json.loads((moved / "export" / "manifest.json").read_text())
    assert manifest["training"]["data"]["vocabulary"] == str(moved / "vocabulary.txt")

    texts.write_text("text,label\ngood,excellent\n")
    stderr = run_program(*command[:-1], tmp_path / "other", status=2).stderr
    assert "has the label 'excellent' (1x), not one of negative, positive" in stderr
    assert not (tmp_path / "other").exists()
