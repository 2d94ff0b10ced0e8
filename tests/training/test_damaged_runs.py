"""Damaged files in a run's folder, and checkpoints of another network: an error that names the file and what to do."""

import dataclasses
import json
import logging
import os
import shutil

import bad
import numpy as np
import pytest
from noise import CONFIG, Noise
from tiny import random_statistics

from superserve_jax import errors
from superserve_jax.exports import Served
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import loop, metrics_log
from superserve_jax.training.config import OptimConfig
from superserve_jax.training.metrics_log import MetricsLog
from superserve_jax.training.runs import Run
from superserve_jax.training.search import Candidate, SearchLog

pytestmark = pytest.mark.usefixtures("no_test_hangs")

PLAIN = dataclasses.replace(CONFIG, data=None)
LARGEST = PLAIN.model.space().largest()
SETTINGS = {"model": "m"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run's folder in which every stage has left its file."""
    run = Run.convert(PLAIN, tmp_path_factory.mktemp("whole") / "run", SuperNet.create(PLAIN.model, seed=0))
    run.save_statistics({LARGEST: random_statistics(PLAIN.model, LARGEST)})
    run.write("search.json", {"served": [LARGEST.to_json()], "tolerance": None})
    run.write("evaluation.json", [Served(LARGEST, 0.5, None, 10, 20).to_json()])
    SearchLog(run.workdir / "search.jsonl", SETTINGS).add(Candidate(LARGEST, 10, 0.5))
    lines = "".join(json.dumps({"step": step, "loss": 1.5, "accuracy": float("nan")}) + "\n" for step in (2, 4))
    for name in ("metrics.jsonl", "validation.jsonl"):
        (run.workdir / name).write_text(lines)
    (run.workdir / "training.lock").write_text("process 1 on host")
    return run.workdir


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


CONTENTS = {
    **{"empty": b"", "text": b"hello\n", "bytes": bytes(range(128, 256)), "list": b"[]\n", "object": b"{}\n"},
    **{"number": b"5\n", "null": b"null\n", "deep": b"[" * 100_000 + b"\n", "surrogate": b'"\\ud800"\n', "long": b"9" * 5000},
    **{"half": None, "pipe": None, "folder": None},
}


UNFINISHED = ("empty", "bytes", "long", "half")  # without the end of a line, as after a kill


def spoil(path, kind):
    good = path.read_bytes()
    path.unlink()
    if kind in ("pipe", "folder"):
        {"pipe": os.mkfifo, "folder": os.mkdir}[kind](path)
    else:
        path.write_bytes(good[: len(good) // 2] if kind == "half" else CONTENTS[kind])


READERS = {
    "config.json": (Run.open, r"config\.json is damaged .*; restore it, or train in another folder"),
    "search.json": (
        lambda f: Run.open(f).served(),
        r"search\.json is damaged .*; make it again with `superserve search",
    ),
    "evaluation.json": (
        lambda f: Run.open(f).evaluated(),
        r"evaluation\.json is damaged .*make it again with `superserve eval",
    ),
    "search.jsonl": (
        lambda f: SearchLog(f / "search.jsonl", SETTINGS),
        r"search\.jsonl is damaged .*remove it to search anew",
    ),
    "statistics.npz": (lambda f: Run.open(f).model(), r"statistics\.npz .* calibrate"),
    "training.lock": (
        lambda f: Run.open(f).training_lock().__enter__(),
        r"training\.lock cannot be written: .* not a regular",
    ),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_name_with_a_remedy(folder, name, kind):
    spoil(folder / name, kind)
    read, message = READERS[name]
    found = bad.attempt(lambda: read(folder), errors.SuperServeError)
    if not isinstance(found, errors.SuperServeError):
        valid = {"evaluation.json": ("list", "object"), "search.jsonl": UNFINISHED, "training.lock": set(CONTENTS) - {"pipe"}}
        assert kind in valid.get(name, ())
    else:
        with pytest.raises(type(found), match=message):
            read(folder)


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "validation.jsonl"])
def test_training_goes_on_with_damaged_metrics_and_sets_them_aside(folder, caplog, name, kind):
    spoil(folder / name, kind)
    what = {"metrics.jsonl": "train", "validation.jsonl": "validation"}[name]
    with caplog.at_level(logging.WARNING):
        before = metrics_log.read(folder, what)
        record = MetricsLog(folder, 2)
        record.add({"loss": 1.0, "accuracy": 0.5})
        record.flush(3, examples=1)
        record.validation(3, {"largest": 0.5})
    assert [line["step"] for line in metrics_log.read(folder, what)] == [*(line["step"] for line in before), 3]
    if kind in UNFINISHED:
        assert not [r for r in caplog.records if r.name.startswith("superserve_jax")]
        assert not (folder / "set_aside").exists()
    else:
        assert f"{folder / name} is damaged (" in caplog.text
        assert len(list((folder / "set_aside").glob(f"{name}.*"))) == 1


def test_the_good_lines_of_damaged_metrics_are_kept(folder, caplog):
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": "x"}\n\xff\n{"loss": 1}\n{"step": 6, "loss": 2}\n')
    MetricsLog(folder, 6)
    assert [line["step"] for line in metrics_log.read(folder)] == [2, 4, 6]
    assert "metrics.jsonl is damaged (line 3: ValidationError: Expected `float`, got `str`" in caplog.text


@pytest.mark.parametrize("kind", CONTENTS)
def test_damaged_checksums_make_the_checkpoint_not_count(folder, caplog, kind):
    spoil(folder / "checksums" / "0.json", kind)
    with pytest.raises(errors.ConfigError, match="has no checkpoint yet"):
        Run.open(folder).model()
    assert "the checkpoint of step 0" in caplog.text


@pytest.mark.parametrize("name", ["checkpoints", "checksums"])
@pytest.mark.parametrize("kind", ["text", "pipe"])
def test_a_file_in_place_of_the_folder_of_checkpoints_is_refused_before_training(folder, name, kind):
    shutil.rmtree(folder / name)
    (folder / name).write_text("")
    spoil(folder / name, kind)
    for read in (lambda: Run.open(folder).model(), lambda: loop.train(PLAIN, folder, dataset=Noise())):
        with pytest.raises(errors.DataError, match=f"{name} is not a folder, so it cannot hold checkpoints; remove it"):
            read()


# -- checkpoints of another network -------------------------------------------------------------------------------------------

OTHERS = {
    "width": (
        {"model": dataclasses.replace(PLAIN.model, widths=(4, 8, 12))},
        r"(params|ema)/blocks\.0\.linear\.bias has shape \(12,\) instead of \(16,\); .*; \d+ more",
    ),
    "depth": (
        {"model": dataclasses.replace(PLAIN.model, depths=(0, 1, 2))},
        r"(params|ema)/blocks\.2\.linear\.bias of shape \(16,\) is missing; ",
    ),
    "more depth": (
        {"model": dataclasses.replace(PLAIN.model, depths=(0, 1, 2, 3, 4))},
        r"(params|ema)/blocks\.3\.linear\.bias of shape \(16,\) is not expected; ",
    ),
    "optimiser": ({"optim": OptimConfig(name="sgd", lr=0.1)}, r"opt_state/\S+ of shape \(.*\) is not expected"),
    "average": ({"ema": 0.0}, r"ema/blocks\.0\.linear\.bias of shape \(16,\) is missing; "),
}


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoints_of_another_run_are_refused_with_the_difference(folder, tmp_path, other):
    changes, message = OTHERS[other]
    config = dataclasses.replace(PLAIN, **changes)
    theirs = Run.convert(config, tmp_path / "other", SuperNet.create(config.model, seed=0))
    for name in ("checkpoints", "checksums"):
        shutil.rmtree(folder / name)
        shutil.copytree(theirs.workdir / name, folder / name)
    remedy = r"\. Restore the run's own folders checkpoints and checksums, or remove both to train anew"
    message = rf"the checkpoint of step 0 in \S+ is of another network or optimiser: {message}.*{remedy}"
    with pytest.raises(errors.DataError, match=message):
        loop.train(PLAIN, folder, dataset=Noise())
    if other != "optimiser":
        with pytest.raises(errors.DataError, match=message):
            Run.open(folder).model()
    assert (folder / "checkpoints" / "0").is_dir()  # nothing was removed
    assert np.isfinite(Run.open(theirs.workdir).model().params["classifier.bias"]).all()
