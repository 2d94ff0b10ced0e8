"""`superserve prepare`: MNIST and Fashion-MNIST from idx files, without TensorFlow. Small files stand for the real ones."""

import gzip
import hashlib
import pathlib
import signal
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds

from superserve_jax import errors, progress
from superserve_jax.training import data
from superserve_jax.training.data import DataConfig
from superserve_jax.training.datasets import making, mnist, prepared

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"
COUNTS = {"train": 40, "test": 12}


def idx(values, kind=8):
    """An idx file with these bytes as its values."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape) + values.tobytes()


def made_up(counts=COUNTS):
    """{file: its content}. Image i of a split is white in pixel i, and has the label i % 10."""
    contents = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = np.zeros((counts[split], 784), np.uint8)
        images[np.arange(counts[split]), np.arange(counts[split])] = 255
        contents[f"{prefix}-images-idx3-ubyte"] = idx(images.reshape(-1, 28, 28))
        contents[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(counts[split], dtype=np.uint8) % 10)
    return contents


def write(folder, contents):
    """Writes files, packed with gzip, and returns the folder."""
    folder.mkdir()
    for name, content in contents.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    return folder


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "files", made_up())


@pytest.mark.parametrize(("name", "classes"), [("mnist", ("0", "9")), ("fashion_mnist", ("T-shirt/top", "Ankle boot"))])
def test_the_command_prepares_a_dataset_that_training_and_tfds_find(run_program, files, tmp_path, name, classes):
    printed = run_program("train/prepare.py", name, "--files", files, "--data-dir", tmp_path / "tfds")
    assert f"{name} is prepared: 40 in train, 12 in test; {tmp_path}/tfds/{name}/3.0.1\n" == printed.stdout
    dataset = data.open(DataConfig(name, str(tmp_path / "tfds"), image_size=28, validation=8))
    assert (dataset.class_names[0], dataset.class_names[-1]) == classes
    seen = {}
    for split in ("train", "validation", "test"):
        images, labels = dataset.arrays(split)
        white = images.reshape(len(images), -1).argmax(1)
        assert (images.sum((1, 2, 3)) == 255).all()
        assert np.array_equal(white % 10, labels)
        seen[split] = white.tolist()
    assert sorted(seen["train"] + seen["validation"]) == list(range(40))
    assert (len(seen["validation"]), sorted(seen["test"])) == (8, list(range(12)))
    source = tfds.data_source(name, split="test", data_dir=str(tmp_path / "tfds"))
    assert [int(example["image"].argmax()) for example in source] == seen["test"]
    assert tfds.builder(name, data_dir=str(tmp_path / "tfds")).info.module_name == tfds.builder_cls(name).__module__


def test_examples_have_the_order_of_the_official_builder(files, tmp_path, monkeypatch):
    """The official one is given files that are encoded already. Otherwise it would need TensorFlow."""
    from_files, _ = prepared.prepare("mnist", str(files), str(tmp_path / "a"))
    examples = mnist.read_folder("mnist", str(files))

    def png(images):
        folder = tmp_path / "png"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            mnist.PIL.Image.fromarray(image).save(folder / f"{len(images)}-{i}.png")
            yield folder / f"{len(images)}-{i}.png"

    official = tfds.builder_cls("mnist")
    counts = {60_000: "train", 10_000: "test"}
    module = f"{official.__module__}"
    monkeypatch.setattr(f"{module}._extract_mnist_images", lambda _, count: list(png(examples[counts[count]].images)))
    monkeypatch.setattr(f"{module}._extract_mnist_labels", lambda _, count: examples[counts[count]].labels)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, urls: urls)
    builder = official(data_dir=str(tmp_path / "b"))
    making.make(builder)
    for split in COUNTS:
        ours, theirs = from_files.as_data_source(split), builder.as_data_source(split)
        assert [int(e["image"].argmax()) for e in ours] == [int(e["image"].argmax()) for e in theirs]


def test_files_may_be_unpacked(files, tmp_path):
    for path in files.iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert {split: len(e.labels) for split, e in mnist.read_folder("mnist", str(files)).items()} == COUNTS


def test_a_prepared_dataset_is_left_as_it_is(run_program, files, tmp_path):
    arguments = ("train/prepare.py", "mnist", "--files", files, "--data-dir", tmp_path / "tfds")
    run_program(*arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "tfds").rglob("*") if path.is_file()}
    (files / "train-images-idx3-ubyte.gz").unlink()
    printed = run_program(*arguments).stdout
    assert "mnist was prepared before: 40 in train, 12 in test" in printed
    assert "nothing was changed" in printed
    assert {path: path.read_bytes() for path in (tmp_path / "tfds").rglob("*") if path.is_file()} == before


TRAIN, LABELS, TEST = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
GOOD = made_up()
SPOILED = {
    f"has no {TRAIN}.gz; it has t10k-images": {TRAIN: None},
    f"{TRAIN}.gz is neither an idx file nor one packed with gzip: it begins with b'<htm'": {TRAIN: b"<html>not found"},
    f"{TRAIN}.gz is damaged: Compressed file ended before": {TRAIN: gzip.compress(GOOD[TRAIN])[:-9]},
    f"{TRAIN}.gz is damaged: CRC check failed": {TRAIN: gzip.compress(GOOD[TRAIN])[:-8] + bytes(8)},
    f"{TRAIN}.gz is damaged: it has 31,359 instead of the 31,360 bytes of its 40 items": {TRAIN: GOOD[TRAIN][:-1]},
    f"{TRAIN}.gz is damaged: it has more than the 31,360 bytes": {TRAIN: GOOD[TRAIN] + b"\0"},
    f"{TRAIN}.gz is damaged: unpack requires a buffer of 12 bytes": {TRAIN: GOOD[TRAIN][:15]},
    f"{TRAIN}.gz is neither": {TRAIN: b""},
    f"{TRAIN}.gz holds labels. Expected an idx file of images of 28x28": {TRAIN: GOOD[LABELS]},
    f"{LABELS}.gz holds images of 28x28. Expected an idx file of labels": {LABELS: GOOD[TRAIN]},
    f"{TRAIN}.gz holds images of 32x32": {TRAIN: idx(np.zeros((40, 32, 32), np.uint8))},
    "of type 0x0d instead of 0x08": {TRAIN: idx(np.zeros((40, 28, 28), np.uint8), kind=13)},
    f"{TEST}.gz claims to hold 0 items": {TEST: idx(np.zeros((0, 28, 28), np.uint8))},
    f"{TEST}.gz claims to hold 4,294,967,295 items": {TEST: struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 28, 28)},
    f"has 12 images, but {{folder}}/{LABELS}.gz has 40 labels": {TRAIN: GOOD[TEST]},
    f"{LABELS}.gz has the label 10 at position 3. Expected 0 to 9": {LABELS: idx(np.array([1, 2, 3, 10] * 10, np.uint8))},
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_bad_file_is_refused_and_nothing_is_written(run_program, files, tmp_path, message):
    [(name, content)] = SPOILED[message].items()
    (files / f"{name}.gz").unlink()
    if content is not None:
        (files / f"{name}.gz").write_bytes(content)
    error = run_program("train/prepare.py", "mnist", "--files", files, "--data-dir", tmp_path / "tfds", status=2).stderr
    assert message.format(folder=files) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "tfds").exists()


def test_a_folder_that_is_missing_or_of_another_dataset_is_refused(files, tmp_path):
    with pytest.raises(errors.DataError, match=r"nowhere is no folder; give the folder that holds train-images"):
        prepared.prepare("mnist", str(tmp_path / "nowhere"), str(tmp_path))
    with pytest.raises(errors.ConfigError, match="files can be given for mnist and fashion_mnist, got 'cifar10'"):
        prepared.prepare("cifar10", str(files), str(tmp_path))
    with pytest.raises(errors.UnknownNameError, match="did you mean 'fashion_mnist'"):
        prepared.prepare("fashion_mnits", None, str(tmp_path))


def test_files_with_other_counts_or_bytes_than_the_official_ones_give_a_warning(files, caplog):
    mnist.read_folder("mnist", str(files))
    assert "has 40 examples in its split train; the official dataset has 60000" in caplog.text
    assert f"{TEST}, t10k-labels-idx1-ubyte, {TRAIN}, {LABELS} in {files}: not the official files of mnist" in caplog.text


def test_files_of_mnist_are_not_prepared_as_fashion_mnist(files, monkeypatch):
    monkeypatch.setitem(mnist.MNIST_MD5, TEST, hashlib.md5(GOOD[TEST]).hexdigest())
    with pytest.raises(errors.DataError, match=r"has files of mnist, by their MD5\. Expected those of fashion_mnist"):
        mnist.read_folder("fashion_mnist", str(files))


def test_an_interrupted_preparation_leaves_nothing_and_can_be_repeated(run_program, files, tmp_path, monkeypatch):
    def interrupted(items, description, **_):
        for i, item in enumerate(items):
            if i == 7 and "test" in description:
                signal.raise_signal(signal.SIGINT)
            yield item

    arguments = ("train/prepare.py", "mnist", "--files", files, "--data-dir", tmp_path / "tfds")
    with monkeypatch.context() as patch:
        patch.setattr(progress, "track", interrupted)
        assert run_program(*arguments, status=130).stderr.endswith("\ninterrupted\n")
    assert not [path for path in (tmp_path / "tfds").rglob("*") if path.is_file()]
    assert "mnist is prepared" in run_program(*arguments).stdout


@pytest.fixture
def addresses(files, monkeypatch):
    """What TFDS knows about the downloads of mnist: addresses, sizes and checksums. Here they are files."""
    infos = {}
    for path in files.iterdir():
        content = path.read_bytes()
        infos[path.as_uri()] = tfds.download.checksums.UrlInfo(
            tfds.core.units.Size(len(content)), hashlib.sha256(content).hexdigest(), path.name
        )
    monkeypatch.setattr(tfds.builder_cls("mnist"), "url_infos", infos)
    return files


def test_without_files_the_dataset_is_downloaded(run_program, addresses, tmp_path):
    printed = run_program("train/prepare.py", "mnist", "--data-dir", tmp_path / "tfds")
    assert "mnist is prepared: 40 in train, 12 in test" in printed.stdout


@pytest.mark.parametrize("fault", ["missing", "changed", "longer"])
def test_a_download_that_fails_says_what_to_do(run_program, addresses, tmp_path, fault):
    path = addresses / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes(content[:-1] + b"?" if fault == "changed" else content + bytes(100))
    error = run_program("train/prepare.py", "mnist", "--data-dir", tmp_path / "tfds", status=2).stderr
    assert ("cannot be downloaded: " if fault == "missing" else "is another file today: SHA-256 ") in error
    assert "give their folder: superserve prepare mnist --files FOLDER" in error
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("name", mnist.NAMES)
def test_training_on_a_dataset_that_is_not_prepared_names_the_command(tmp_path, name):
    with pytest.raises(errors.DataError, match=rf"superserve prepare {name} --data-dir {tmp_path}\n"):
        data.open(DataConfig(name, str(tmp_path)))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"there are no real files in {REAL}")
@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashion_mnist", 0.2861)])
def test_the_real_files_are_taken_without_a_warning(caplog, name, mean):
    splits = mnist.read_folder(name, str(REAL / name))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert splits["train"].images.mean() / 255 == pytest.approx(mean, abs=1e-4)
    assert np.bincount(splits["test"].labels).sum() == 10_000
