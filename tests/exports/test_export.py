"""Tests of writing and loading an export. One file because all of them damage or replace the same small export."""

import contextlib
import dataclasses
import functools
import itertools
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from tiny import TINY, TINY_BERT, random_images, random_params, write_export

from superserve_jax import errors, exports
from superserve_jax.exports import Served, directory
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary


@pytest.fixture
def exported(tiny, tmp_path):
    descending = tiny.calibrated[::-1]
    return write_export(tmp_path / "export", tiny, descending, class_names=("a", "b", "c"), training={"lr": 0.1})


def test_a_loaded_export_gives_the_same_logits_and_lists_its_served_subnets(tiny, exported):
    model = exports.load(exported)
    images = random_images(TINY, 3)
    for subnet in tiny.calibrated:
        np.testing.assert_array_equal(model(images, subnet), tiny(images, subnet))
    assert model.config == TINY
    assert model.served == tuple(
        Served(s, 0.5 + 0.1 * (2 - i), None, TINY.flops(s), TINY.num_params(s)) for i, s in enumerate(tiny.calibrated)
    )
    assert model.class_names == ("a", "b", "c")
    assert model.manifest["training"] == {"lr": 0.1}


def test_an_export_keeps_the_statistics_of_the_largest_subnet_even_if_it_is_not_served(tiny, tmp_path):
    smallest, inputs = TINY.space().smallest(), random_images(TINY, 2)
    loaded = exports.load(write_export(tmp_path / "export", tiny, [smallest]))
    assert loaded.subnets == (smallest,)
    np.testing.assert_array_equal(loaded(inputs, smallest, norm="shared"), tiny(inputs, smallest, norm="shared"))


def test_an_export_opens_in_a_process_that_has_only_its_directory(exported, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(exported, elsewhere)
    code = (
        "import sys, numpy as np, superserve_jax as ss\n"
        f"model = ss.load({str(elsewhere)!r})\n"
        "print(model(np.zeros((2, 9, 9, 1), np.uint8), model.subnets[0]).shape)\n"
        "assert not any(name.startswith('superserve_jax.training') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 3)"


def test_exporting_again_replaces_the_old_one_and_leaves_nothing_behind(tiny, exported):
    tiny.params = {k: v + 1 for k, v in tiny.params.items()}
    write_export(exported, tiny, measured="second")
    assert exports.load(exported).manifest["measured"] == "second"
    assert len(list(exported.glob("payload-*"))) == 1


def test_a_surplus_file_in_the_payload_is_refused(exported):
    (next(exported.glob("payload-*")) / "extra.bin").write_bytes(b"x")
    with pytest.raises(errors.ExportError, match=r"extra\.bin is not in the manifest"):
        exports.load(exported)


def test_a_path_that_is_no_export_is_refused_with_the_reason(tmp_path):
    with pytest.raises(errors.ExportError, match=r"^\S+ is not an export: it does not exist"):
        exports.load(tmp_path / "absent")
    with pytest.raises(errors.ExportError, match=r"has no manifest\.json"):
        exports.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ExportError, match="not a directory"):
        exports.load(tmp_path / "file")


def test_a_folder_with_other_things_in_it_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(errors.ExportError, match="not empty"):
        write_export(tmp_path, tiny)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("thesis.tex", "precious")]


def test_an_uncalibrated_subnet_or_none_at_all_cannot_be_exported(tiny, tmp_path):
    with pytest.raises(errors.ConfigError, match="at least one"):
        write_export(tmp_path / "e", tiny, [])
    odd = TINY.space().subnet(depth=(0, 0, 1), expand=1.0, width=0.5)
    with pytest.raises(errors.NotCalibratedError):
        write_export(tmp_path / "e", tiny, [odd])
    assert not (tmp_path / "e").exists()


class Killed(BaseException):
    """Simulates SIGKILL: nothing catches it, and nothing is cleaned up."""


@pytest.mark.parametrize("first", [True, False], ids=["nothing before", "an old export before"])
def test_a_process_killed_while_writing_leaves_the_old_export_or_the_new_one(tiny, tmp_path, monkeypatch, first):
    path = tmp_path / "export"
    outcomes = []
    for deadly in range(1, 40):
        shutil.rmtree(path, ignore_errors=True)
        if not first:
            write_export(path, tiny, measured="old")
        count = 0

        def step(name, *arguments, deadly=deadly, **options):
            nonlocal count
            count += 1
            if count == deadly:
                raise Killed
            return getattr(os, name)(*arguments, **options)

        killed = True
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            doubles = {name: functools.partial(step, name) for name in ("fsync", "rename", "replace")}
            patch.setattr(directory, "os", types.SimpleNamespace(**{**vars(os), **doubles}))
            write_export(path, tiny, measured="new")
            killed = False
        try:
            outcomes.append(exports.load(path).manifest["measured"])
        except errors.ExportError:
            outcomes.append("nothing")  # allowed only if there was nothing before, as asserted below
        write_export(path, tiny, measured="after")  # the leftovers do no harm
        assert exports.load(path).manifest["measured"] == "after"
        assert not list(path.glob("payload-part*"))
        if not killed:
            break
    assert not killed
    assert outcomes[-1] == "new"
    assert set(outcomes) == {"nothing" if first else "old", "new"}


def test_every_file_is_on_disk_before_the_manifest_is_replaced(tiny, tmp_path, monkeypatch):
    on_disk, unsafe = set(), []

    def fsync(handle):
        os.fsync(handle)
        on_disk.add(os.fstat(handle).st_ino)

    def replace(new, old):
        assert not old.exists()  # it appears only when it is complete
        unsafe.append([f for f in (tmp_path / "export").rglob("*") if f.is_file() and f.stat().st_ino not in on_disk])
        os.replace(new, old)

    doubles = {"fsync": fsync, "replace": replace}
    monkeypatch.setattr(directory, "os", types.SimpleNamespace(**{**vars(os), **doubles}))
    write_export(tmp_path / "export", tiny)
    assert unsafe == [[]]


# -- a vocabulary in the export -----------------------------------------------------------------------------------------

NAMED = TINY_BERT.space().subnet(gates=(0, 1, 1), heads=(1, 2, 1), ffn=(3, 3, 5))
PIECES = Vocabulary(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat"))


@pytest.fixture
def text_model():
    """A DynaBERT. It needs no statistics."""
    return SuperNet(TINY_BERT, random_params(TINY_BERT))


def write_text_model(path, model, **changes):
    return write_export(path, model, [model.space.smallest(), NAMED], **{"vocabulary": PIECES, **changes})


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_export_of_a_text_model_encodes_as_its_vocabulary_did(text_model, tmp_path, lowercase):
    words = dataclasses.replace(PIECES, lowercase=lowercase)
    model = exports.load(write_text_model(tmp_path / "e", text_model, vocabulary=words))
    assert model.vocabulary == PIECES.tokens
    one, batch = model.encode("The cats"), model.encode(["The cats", "sat"])
    assert (one.shape, batch.shape) == ((6, 2), (2, 6, 2))
    assert np.array_equal(batch, words.encode(["The cats", "sat"], length=6, token_types=2))
    assert np.array_equal(one, batch[0])
    assert one[1, 0] == (4 if lowercase else 1)
    assert (model.config, model.subnets) == (TINY_BERT, (TINY_BERT.space().smallest(), NAMED))
    for subnet, norm in itertools.product(model.subnets, ("own", "shared")):
        np.testing.assert_array_equal(model(batch, subnet, norm=norm), text_model(batch, subnet))
    assert model.manifest["files"]["vocabulary.txt"]["sha256"]


def test_pairs_are_encoded_one_by_one_or_many_at_once(text_model, tmp_path):
    model = exports.load(write_text_model(tmp_path / "e", text_model))
    one, batch = model.encode("the", "cat"), model.encode(["the"], ["cat"], length=5)
    assert (one.shape, batch.shape) == ((6, 2), (1, 5, 2))
    assert np.array_equal(one[:5], batch[0])
    with pytest.raises(errors.InputError, match="each be one text, or each be a list"):
        model.encode("the", ["cat"])


def test_a_model_without_vocabulary_has_no_tokens_and_encodes_nothing(exported):
    model = exports.load(exported)
    assert model.vocabulary == ()
    with pytest.raises(errors.InputError, match="has no vocabulary"):
        model.encode("the cat")


def test_a_vocabulary_that_does_not_fit_the_model_cannot_be_exported(text_model, tiny, tmp_path):
    more = Vocabulary((*PIECES.tokens, *"abcd"))
    for path, call, message in (
        (tmp_path / "a", lambda path: write_text_model(path, text_model, vocabulary=more), "make them agree"),
        (tmp_path / "b", lambda path: write_export(path, tiny, vocabulary=PIECES), "reads token ids, got OFAResNetConfig"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            call(path)
        assert not path.exists()
