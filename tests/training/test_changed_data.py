"""A run whose data has changed between two starts is refused, and says what has changed. Data may be moved and copied.

One file because every kind of data goes through the same check.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time

import jax.numpy as jnp
import noise
import numpy as np
import PIL.Image
import pytest
from noise import CONFIG
from tiny import TINY, random_statistics

from superserve_jax import errors
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import data, loop, stages
from superserve_jax.training.config import DistillConfig
from superserve_jax.training.data import DataConfig, FolderConfig, fingerprints
from superserve_jax.training.datasets import prepared
from superserve_jax.training.datasets.cluttered_digits import render
from superserve_jax.training.runs import Run
from superserve_jax.training.template import from_data

REMEDY = r"Restore them, or choose another --workdir\. If you know that they are the same, remove \S+inputs\.json"
SHORT = dataclasses.replace(CONFIG, epochs=0.6)  # of 128 images: one step


def images(count=128, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 1), dtype=np.uint8), np.arange(count) % 10


def arrays(**changes):
    return data.from_arrays(**{"train": images(), "test": images(30, 1), "validation": 20, **changes})


def changed(place):
    """The training arrays, with one byte of the images or one label changed."""
    x, y = images()
    if place == "inputs":
        x[100, 3, 4, 0] ^= 1
    else:
        y[100] = 7
    return x, y


def start(run, found):
    """What training does with the fingerprint of a dataset when it starts."""
    inputs = {"data": data.fingerprint(found), "teacher": None}
    run.check_inputs(inputs)
    run.write_inputs(inputs, 0)


@pytest.fixture
def run(tmp_path):
    return Run.create(dataclasses.replace(CONFIG, data=None), tmp_path / "run")


# -- arrays -------------------------------------------------------------------------------------------------------------------

X, Y = images()
ARRAYS = [
    ({"train": changed("inputs")}, r"data: train: inputs: sha256\)"),
    ({"train": changed("labels")}, r"data: train: labels: sha256\)"),
    (
        {"train": images(129)},
        r"data: training examples 108 -> 109; data: train: inputs: sha256, shape \[128, 32",
    ),
    ({"train": (X, Y.astype(np.uint8))}, "labels: dtype int64 -> uint8, sha256"),
    ({"train": (X.reshape(128, 16, 64, 1), Y), "test": (images(30, 1)[0].reshape(30, 16, 64, 1), Y[:30])}, "inputs: shape"),
    ({"train": (X[::-1], Y[::-1])}, "inputs: sha256"),
    ({"test": images(30, 2)}, r"data: test: inputs: sha256\)"),
    ({"validation": 21}, "data: held out 20 -> 21, training examples 108 -> 107"),
    ({"validation": images(20, 1)}, "data: .*validation is new"),
    ({"shift": 1}, "data: shift 0 -> 1"),
    ({"flip": True}, "data: flip False -> True"),
]


@pytest.mark.parametrize(("changes", "message"), ARRAYS)
def test_changed_arrays_are_refused_with_the_difference(run, changes, message):
    start(run, arrays())
    start(run, arrays())
    with pytest.raises(errors.DataError, match=rf"have changed since its training began \(.*{message}.*{REMEDY}"):
        start(run, arrays(**changes))


def test_a_fingerprint_is_of_the_values_and_not_of_the_memory():
    padded = np.zeros((128, 32, 40, 1), np.uint8)
    padded[:, :, :32] = X
    for other in (padded[:, :, :32], np.asfortranarray(X), X[::-1].copy()[::-1]):
        assert data.fingerprint(arrays(train=(other, Y))) == data.fingerprint(arrays())
    repeated = np.broadcast_to(X[:1], X.shape)
    assert fingerprints.of_array(repeated) == fingerprints.of_array(repeated.copy())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, ">i4", bool])
def test_a_fingerprint_is_of_the_bytes_of_any_dtype(dtype):
    values = np.arange(24).reshape(4, 3, 2).astype(dtype)
    for array in (values, values[:, ::-1], values[:0], values[0, 0, 0]):
        assert fingerprints.sha256([array]) == hashlib.sha256(array.tobytes()).hexdigest()


def test_a_fingerprint_copies_no_array_and_is_quick():
    """Measured: 28 ms for both splits of MNIST."""
    large = np.zeros((60_000, 28, 28, 1), np.uint8)
    before_s = time.process_time()
    fingerprints.of_array(large)
    fingerprints.of_array(large[:, ::-1])
    assert time.process_time() - before_s < 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return loop.train(SHORT, tmp_path_factory.mktemp("trained") / "run", dataset=arrays()).workdir


def test_training_that_goes_on_with_other_data_is_refused_and_with_the_same_data_goes_on(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    loop.train(SHORT, tmp_path / "run", dataset=arrays())
    for place in ("inputs", "labels"):
        with pytest.raises(errors.DataError, match=REMEDY):
            loop.train(SHORT, tmp_path / "run", dataset=arrays(train=changed(place)))
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)  # now the run is not finished


@pytest.mark.parametrize(
    "stage",
    [
        stages.search,
        lambda run: stages.calibrate(run, []),
        stages.evaluate,
        stages.export,
        lambda run: stages.standalone(run, run.config.model.space().largest(), "x"),
    ],
)
def test_later_stages_refuse_changed_data(trained, tmp_path, stage):
    shutil.copytree(trained, tmp_path / "run")
    run = Run.open(tmp_path / "run", dataset=arrays(train=changed("inputs")))
    run.write("search.json", {"served": []})
    run.write("evaluation.json", [])
    with pytest.raises(errors.DataError, match=REMEDY):
        stage(run)
    assert not (tmp_path / "run" / "alone").exists()


def test_a_run_of_an_older_version_goes_on_with_a_warning_and_is_protected_from_then_on(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "inputs.json").unlink()
    with caplog.at_level(logging.WARNING):
        loop.train(SHORT, tmp_path / "run", dataset=arrays(train=changed("inputs")))
    assert "has no inputs.json, as after an older version" in caplog.text
    caplog.clear()
    loop.train(SHORT, tmp_path / "run", dataset=arrays(train=changed("inputs")))
    assert not [r for r in caplog.records if r.name.startswith("superserve_jax")]
    with pytest.raises(errors.DataError, match=REMEDY):
        loop.train(SHORT, tmp_path / "run", dataset=arrays())


def test_the_remedy_of_a_damaged_or_unwanted_record_works(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    record = tmp_path / "run" / "inputs.json"
    for content in (b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000):
        record.write_bytes(content)
        with pytest.raises(errors.ConfigError, match=r"inputs\.json is damaged or cannot be read: .*; remove it to go on"):
            loop.train(SHORT, tmp_path / "run", dataset=arrays())
    record.unlink()
    loop.train(SHORT, tmp_path / "run", dataset=arrays())


def test_a_dataset_of_the_users_own_class_is_told_apart_as_far_as_it_can_be(run):
    class Own(noise.Noise):
        content = "a"

        def fingerprint(self):
            return {"content": self.content, "shape": (1, 2)}  # JSON makes a list of the tuple

    class Bad(noise.Noise):
        def fingerprint(self):
            return {"content": object()}

    start(run, Own())
    start(run, Own())
    for found in (noise.Noise(), type("Other", (Own,), {"content": "b"})()):
        with pytest.raises(errors.DataError, match="data: content"):
            start(run, found)
    with pytest.raises(errors.ConfigError, match=r"fingerprint\(\) of noise must return a JSON object"):
        start(run, Bad())


# -- a folder -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path):
    for split, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                PIL.Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.bmp")
                os.utime(folder / f"{i}.bmp", ns=(10**18, 10**18 + i))
    return tmp_path / "pets"


def open_folder(path):
    return data.open(FolderConfig(path=str(path), image_size=8, validation=2))


FILES = {
    "an image is added": (
        lambda p: shutil.copy2(p / "3.bmp", p / "5.bmp"),
        r"train/cat: .*files 5 -> 6, names, sizes",
    ),
    "an image is removed": (lambda p: (p / "3.bmp").unlink(), r"train/cat: bytes 5710 -> 4568, files 5 -> 4"),
    "an image is renamed": (lambda p: (p / "3.bmp").rename(p / "31.bmp"), r"\(data: train/cat: names\)"),
    "an image grows": (
        lambda p: (p / "3.bmp").write_bytes((p / "3.bmp").read_bytes() + b"\0"),
        r"train/cat: bytes 5710 -> 5711, sizes",
    ),
    "an image is moved": (
        lambda p: (p / "3.bmp").rename(p.parent / "dog" / "7.bmp"),
        r"train/dog: .*files 5 -> 6",
    ),
    "a class is renamed": (lambda p: p.rename(p.parent / "bat"), r"train/bat is new, train/cat is gone"),
    "an image of the same size is written": (
        lambda p: (p / "3.bmp").write_bytes((p / "4.bmp").read_bytes()),
        r"\(data: train/cat: times\)\. Only times of files differ; copy the files together with their times\. ",
    ),
}


@pytest.mark.parametrize("change", FILES)
def test_a_changed_folder_is_refused_with_the_class(run, pets, change):
    start(run, open_folder(pets))
    FILES[change][0](pets / "train" / "cat")
    if change == "a class is renamed":
        (pets / "test" / "cat").rename(pets / "test" / "bat")
    with pytest.raises(errors.DataError, match=FILES[change][1] + ".*" + REMEDY):
        start(run, open_folder(pets))


def test_a_folder_may_be_moved_or_copied_with_its_times(run, pets):
    start(run, open_folder(pets))
    shutil.copytree(pets, pets.with_name("copied"))  # like cp -a
    start(run, open_folder(pets.with_name("copied")))
    start(run, open_folder(pets.rename(pets.with_name("moved"))))
    (pets.with_name("moved") / "train" / "cat" / "notes.txt").write_text("not an image")
    start(run, open_folder(pets.with_name("moved")))


def test_a_run_goes_on_after_its_folder_was_moved_and_remembers_the_new_place(tmp_path, pets, monkeypatch):
    config = dataclasses.replace(CONFIG, data=FolderConfig(path=str(pets), image_size=8, validation=2))
    before = Run.create(config, tmp_path / "run")
    with pytest.raises(errors.ConfigError, match=r"data\.path: "):  # no record yet
        Run.create(moved(config, tmp_path), tmp_path / "run")
    start(before, before.dataset())
    pets.rename(tmp_path / "moved")
    after = Run.create(moved(config, tmp_path), tmp_path / "run")
    start(after, after.dataset())
    assert Run.open(tmp_path / "run").dataset().name == str(tmp_path / "moved")
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=3))
    with pytest.raises(errors.ConfigError, match=r"data\.validation: 2 -> 3"):
        Run.create(other, tmp_path / "run")


def test_values_that_one_dataset_gave_are_not_taken_for_another(tmp_path, pets, monkeypatch):
    config = dataclasses.replace(CONFIG, data=FolderConfig(path=str(pets), image_size=8, validation=2))
    before = Run.create(dataclasses.replace(config, model=dataclasses.replace(TINY, num_classes=2)), tmp_path / "run")
    start(before, before.dataset())
    shutil.copytree(pets, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved/train/cat", tmp_path / "moved/train/emu")
    other = dataclasses.replace(moved(config, tmp_path), model=from_data(TINY, "num_classes", "image_size"))
    with pytest.raises(errors.DataError, match=rf"data: train/emu is new.*{REMEDY}"):
        loop.train(other, tmp_path / "run")
    monkeypatch.setattr(data, "open", lambda *_: pytest.fail("opened"))
    other = dataclasses.replace(other, data=dataclasses.replace(other.data, validation=3))
    with pytest.raises(errors.ConfigError, match=r"run holds a run of another config \(data\.validation: 2 -> 3\)"):
        loop.train(other, tmp_path / "run")


def test_settings_of_the_search_may_change_and_the_run_remembers_them(tmp_path):
    searched = dataclasses.replace(CONFIG, search=dataclasses.replace(CONFIG.search, candidates=7))
    Run.create(CONFIG, tmp_path / "run")
    run = Run.create(searched, tmp_path / "run")
    assert run.config.search.candidates == 7
    start(run, arrays())
    assert Run.open(tmp_path / "run").config == searched


def moved(config, folder):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder / "moved")))


# -- TFDS ---------------------------------------------------------------------------------------------------------------------


def digits(folder):
    return data.open(DataConfig(data_dir=str(folder), validation=20))


def test_the_fingerprint_of_a_tfds_dataset_has_name_version_checksums_and_a_sample(digits_dir, tmp_path):
    found = data.fingerprint(digits(digits_dir))
    assert (found["name"], found["checksums"]) == ("cluttered_digits/1.0.0", "none")
    assert {name: found[name]["examples"] for name in ("train", "validation", "test")} == {
        "train": 280,
        "validation": 20,
        "test": 90,
    }
    shutil.copytree(f"{digits_dir}/cluttered_digits", tmp_path / "cluttered_digits", copy_function=shutil.copyfile)
    assert data.fingerprint(digits(tmp_path)) == found


def test_another_tfds_dataset_of_the_same_name_is_refused(run, digits_dir, tmp_path, monkeypatch):
    start(run, digits(digits_dir))
    load_scans = render.load_scans
    monkeypatch.setattr(render, "NUM_IMAGES", {"train": 300, "test": 90})
    monkeypatch.setattr(render, "load_scans", lambda split: [part[::-1] for part in load_scans(split)])
    prepared.load("cluttered_digits", str(tmp_path))
    with pytest.raises(errors.DataError, match=r"data: test: sample; data: train: sample; data: validation: sample\)"):
        start(run, digits(tmp_path))


@pytest.mark.parametrize("name", ["version", "checksums"])
def test_another_version_or_other_downloads_are_refused(run, digits_dir, monkeypatch, name):
    found = digits(digits_dir)
    start(run, found)
    recorded = json.loads((run.workdir / "inputs.json").read_text())
    assert recorded["data"]["name"] == "cluttered_digits/1.0.0"
    recorded["data"] |= {"name": "cluttered_digits/0.9.0"} if name == "version" else {"checksums": "0" * 64}
    run.write("inputs.json", recorded)
    with pytest.raises(errors.DataError, match=rf"data: {'name .*0.9.0 -> .*1.0.0' if name == 'version' else 'checksums'}"):
        start(run, found)


# -- the other inputs ---------------------------------------------------------------------------------------------------------


def test_another_teacher_is_refused_and_a_moved_one_is_not(tmp_path):
    def teacher(name, seed):
        config = dataclasses.replace(CONFIG, name=name, data=None)
        run = Run.convert(config, tmp_path / name, SuperNet.create(CONFIG.model, seed=seed))
        largest = CONFIG.model.space().largest()
        run.save_statistics({largest: random_statistics(CONFIG.model, largest)})
        return DistillConfig(teacher=str(tmp_path / name))

    def train(distill):
        loop.train(dataclasses.replace(SHORT, distill=distill), tmp_path / "run", dataset=arrays())

    first = teacher("first", 0)
    train(first)
    with pytest.raises(errors.DataError, match=r"\(teacher\).*" + REMEDY):
        train(teacher("second", 1))
    with pytest.raises(errors.DataError, match=r"\(teacher is gone\).*" + REMEDY):
        train(dataclasses.replace(first, teacher=None))
    pathlib.Path(first.teacher).rename(tmp_path / "moved")
    train(dataclasses.replace(first, teacher=str(tmp_path / "moved")))
