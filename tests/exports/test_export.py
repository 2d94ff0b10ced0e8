"""Tests of writing and loading an export. One file because all of them damage or replace the same small export."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from tiny import TINY, random_images, random_params

from superserve_jax import errors, exports, files
from superserve_jax.exports import Served, directory
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary


def served_of(model):
    return [Served(s, 0.5 + 0.1 * i, None, TINY.flops(s), TINY.num_params(s)) for i, s in enumerate(model.calibrated)]


def write(path, model, **changes):
    arguments = {"measured": "made up", "class_names": ("a", "b", "c"), "training": {"lr": 0.1}, **changes}
    return exports.export(path, model, served_of(model), **arguments)


@pytest.fixture
def exported(tiny, tmp_path):
    return write(tmp_path / "export", tiny)


def files_of(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def reseal(path, change):
    """Edits the manifest and makes its digest fit again, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = files.digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_loaded_export_gives_the_same_logits_and_lists_its_served_subnets(tiny, exported):
    model = exports.load(exported)
    images = random_images(TINY, 3)
    for subnet in tiny.calibrated:
        np.testing.assert_array_equal(model(images, subnet), tiny(images, subnet))
    assert model.config == TINY
    assert model.served == tuple(sorted(served_of(tiny), key=lambda s: s.flops))
    assert model.class_names == ("a", "b", "c")
    assert model.manifest["training"] == {"lr": 0.1}


def test_an_export_keeps_the_statistics_of_the_largest_subnet_even_if_it_is_not_served(tiny, tmp_path):
    smallest, inputs = TINY.space().smallest(), random_images(TINY, 2)
    loaded = exports.load(exports.export(tmp_path / "export", tiny, served_of(tiny)[:1], measured="made up"))
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
    write(exported, tiny, measured="second")
    assert exports.load(exported).manifest["measured"] == "second"
    assert len(list(exported.glob("payload-*"))) == 1


@pytest.mark.parametrize(
    "name", ["manifest.json", "payload-*/statistics.npz", "payload-*/weights/_METADATA", "payload-*/weights/d/*"]
)
def test_a_flipped_bit_a_cut_and_a_missing_file_are_each_refused_in_one_line(exported, name):
    file = next(iter(exported.glob(name)))
    content = file.read_bytes()
    damages = [content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :] for i in range(0, len(content), 997)]
    for damaged in [*damages, content[: len(content) // 2], None]:
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(errors.ExportError) as caught:
            exports.load(exported)
        assert str(exported) in str(caught.value)
        assert "\n" not in str(caught.value)
        file.write_bytes(content)
    exports.load(exported)


def test_a_surplus_file_in_the_payload_is_refused(exported):
    (next(exported.glob("payload-*")) / "extra.bin").write_bytes(b"x")
    with pytest.raises(errors.ExportError, match=r"extra\.bin is not in the manifest"):
        exports.load(exported)


def test_an_export_from_a_newer_version_is_refused_with_the_remedy(exported):
    reseal(exported, lambda m: m.update(schema=99))
    with pytest.raises(errors.ExportError, match="upgrade superserve-jax"):
        exports.load(exported)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(payload="../../etc"),
        lambda m: m.update(payload=7),
        lambda m: m.pop("files"),
        lambda m: m.update(config={"family": "nonsense"}),
        lambda m: m["config"].update(num_classes=5),
        lambda m: m["config"].update(image_size="x"),
        lambda m: m["served"][0].update(subnet={"gates": [1]}),
        lambda m: m["served"].append(3),
        lambda m: m["files"].update(a={"bytes": 1 << 60, "sha256": ""}),
        lambda m: m.update(files={k: None for k in m["files"]}),
        lambda m: m.update(class_names=None),
    ],
)
def test_a_manifest_that_lies_is_refused_even_with_a_fitting_digest(exported, change):
    reseal(exported, change)
    with pytest.raises(errors.ExportError):
        exports.load(exported)


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_files_too_small_or_too_large_for_the_config_are_refused_unread(exported, size):
    reseal(exported, lambda manifest: [file.update(bytes=size) for file in manifest["files"].values()])
    with pytest.raises(errors.ExportError, match="but its files have"):
        exports.load(exported)


def test_a_manifest_that_serves_a_subnet_twice_in_two_forms_is_refused(exported):
    def serve_again(manifest):
        smallest = manifest["served"][0]
        choices = smallest["subnet"]["expand"]
        again = [1.0, *choices[1:]]  # the first block is dropped, so its choice does not matter
        assert choices != again
        manifest["served"].append({**smallest, "subnet": {**smallest["subnet"], "expand": again}})

    reseal(exported, serve_again)
    with pytest.raises(errors.ExportError, match="none of them twice"):
        exports.load(exported)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "not json", "[" * 100_000])
def test_a_foreign_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(errors.ExportError):
        exports.load(tmp_path)


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
        write(tmp_path, tiny)
    assert files_of(tmp_path) == {"thesis.tex": b"precious"}


def test_an_uncalibrated_subnet_or_none_at_all_cannot_be_exported(tiny, tmp_path):
    with pytest.raises(errors.ConfigError, match="at least one"):
        exports.export(tmp_path / "e", tiny, [], measured="")
    odd = TINY.space().subnet(depth=(0, 0, 1), expand=1.0, width=0.5)
    with pytest.raises(errors.NotCalibratedError):
        exports.export(tmp_path / "e", tiny, [Served(odd, 0.5, None, 1, 1)], measured="")
    assert not (tmp_path / "e").exists()


class Killed(BaseException):
    """Simulates SIGKILL: nothing catches it, and nothing is cleaned up."""


@pytest.mark.parametrize("first", [True, False], ids=["nothing before", "an old export before"])
def test_a_process_killed_while_writing_leaves_the_old_export_or_the_new_one(tiny, tmp_path, monkeypatch, first):
    path = tmp_path / "export"
    calls = ["fsync", "rename", "replace"]
    outcomes = []
    for deadly in range(1, 40):
        shutil.rmtree(path, ignore_errors=True)
        if not first:
            write(path, tiny, measured="old")
        count = 0

        def step(name, *arguments, deadly=deadly, **options):
            nonlocal count
            count += 1
            if count == deadly:
                raise Killed
            return getattr(os, name)(*arguments, **options)

        with monkeypatch.context() as patch:
            doubles = {name: functools.partial(step, name) for name in calls}
            patch.setattr(directory, "os", types.SimpleNamespace(**{**vars(os), **doubles}))
            try:
                write(path, tiny, measured="new")
                killed = False
            except Killed:
                killed = True
        try:
            outcomes.append(exports.load(path).manifest["measured"])
        except errors.ExportError:
            outcomes.append("nothing")  # allowed only if there was nothing before, as asserted below
        write(path, tiny, measured="after")  # the leftovers do no harm
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
    write(tmp_path / "export", tiny)
    assert unsafe == [[]]


def test_paths_of_profiles_are_made_from_the_device_kind():
    assert exports.profile_path("e", "cpu AMD EPYC 2 cores") == pathlib.Path("e/profiles/cpu-amd-epyc-2-cores.json")


# -- a vocabulary in the export -----------------------------------------------------------------------------------------

BERT = DynaBERTConfig(
    num_classes=3, vocab_size=9, max_length=6, hidden_size=8, depths=(1, 2), heads=(1, 2), ffn=(4, 8), token_types=2
)
PIECES = Vocabulary(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat"))


@pytest.fixture
def text_model():
    """A DynaBERT. It needs no statistics."""
    return SuperNet(BERT, random_params(BERT))


def write_text_model(path, model, **changes):
    served = [Served(s, 0.5, None, BERT.flops(s), BERT.num_params(s)) for s in (model.space.smallest(), model.space.largest())]
    return exports.export(path, model, served, measured="", **{"vocabulary": PIECES, **changes})


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
    assert model(batch, model.subnets[0]).shape == (2, 3)
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


def test_an_older_export_without_a_vocabulary_still_loads(exported):
    reseal(exported, lambda m: m.pop("vocabulary"))
    assert exports.load(exported).vocabulary == ()


def test_a_vocabulary_that_does_not_fit_the_model_cannot_be_exported(text_model, tiny, tmp_path):
    more = Vocabulary((*PIECES.tokens, "a", "b"))
    for path, call, message in (
        (tmp_path / "a", lambda path: write_text_model(path, text_model, vocabulary=more), "make them agree"),
        (tmp_path / "b", lambda path: write(path, tiny, vocabulary=PIECES), "reads token ids, got OFAResNetConfig"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            call(path)
        assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(vocabulary={"scheme": "nonsense", "lowercase": True}),
        lambda m: m.update(vocabulary={"scheme": ["wordpiece"], "lowercase": True}),
        lambda m: m.update(vocabulary={"scheme": "wordpiece", "lowercase": 7}),
        lambda m: m.update(vocabulary={"surplus": 1}),
        lambda m: m.update(vocabulary=[1]),
        lambda m: m["config"].update(pad_id=2),
    ],
)
def test_a_manifest_that_lies_about_the_vocabulary_is_refused(text_model, tmp_path, change):
    path = write_text_model(tmp_path / "e", text_model)
    reseal(path, change)
    with pytest.raises(errors.ExportError, match="vocabulary"):
        exports.load(path)


def test_a_damaged_vocabulary_is_refused(text_model, tmp_path):
    path = write_text_model(tmp_path / "e", text_model)
    file = next(path.glob("payload-*/vocabulary.txt"))
    file.write_text(file.read_text().replace("cat", "cow"))
    with pytest.raises(errors.ExportError, match="SHA-256 does not match"):
        exports.load(path)
