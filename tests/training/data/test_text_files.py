"""Texts in the user's own files: CSV, TSV, JSON; columns, labels, damaged lines, vocabularies, and changed files.

One file because all tests read variants of the same few texts.
"""

import csv
import json
import pathlib
import tracemalloc

import numpy as np
import pytest
from small_datasets import assert_resumes, sizes

from superserve_jax import errors
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training import data
from superserve_jax.training.config import load_config
from superserve_jax.training.data import TextFileConfig, fingerprints, fit
from superserve_jax.vocabulary import Vocabulary

ROWS = [("good film, really", "good"), ("bad film", "bad")] * 10
CONFIGS = pathlib.Path(__file__).parents[3] / "configs"


def csv_text(rows=ROWS, header="text,label", sep=","):
    return "\n".join([header.replace(",", sep), *(f'"{text}"{sep}{label}' for text, label in rows)]) + "\n"


def opened(path, content=None, *, model=None, **changes):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.open(TextFileConfig(str(path), **{"max_length": 8, **changes}), model)


def problem(path, content=None, **changes):
    with pytest.raises(errors.DataError) as e:
        opened(path, content, **changes)
    return str(e.value)


def tokens(dataset, split="train"):
    names = dataset.vocabulary.tokens
    inputs, labels = dataset.arrays(split)
    texts = [" ".join(names[i] for i in ids if names[i] not in ("[PAD]", "[CLS]", "[SEP]")) for ids in inputs]
    return {(text, dataset.class_names[label]) for text, label in zip(texts, labels, strict=True)}


EXPECTED = {("good film , really", "good"), ("bad film", "bad")}


# -- formats ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", csv_text()),
        ("a.CSV", csv_text().replace("\n", "\r\n")),
        ("a.csv", b"\xef\xbb\xbf" + csv_text().encode()),  # as Excel writes it
        ("a.csv", csv_text(sep=";")),
        ("a.csv", csv_text(sep="\t")),
        ("a.csv", "label,text,id\n" + "".join(f'{label},"{text}",7\n' for text, label in ROWS)),
        ("a.tsv", csv_text(sep="\t").replace('"', "")),
        ("a.jsonl", "\n".join(json.dumps({"text": t, "label": c, "id": 1}) for t, c in ROWS)),
        ("a.json", "\n\n".join(json.dumps({"text": t, "label": c}) for t, c in ROWS) + "\n"),
        ("a.json", json.dumps([{"text": t, "label": c} for t, c in ROWS], indent=1)),
    ],
)
def test_every_format_gives_the_same_texts_and_labels(tmp_path, name, content):
    dataset = opened(tmp_path / name, content)
    assert dataset.class_names == ("bad", "good")
    assert tokens(dataset) == EXPECTED
    assert sizes(dataset) == [16, 2, 2]
    assert "16 examples for training, 2 held out for validation, 2 held out for testing" in data.describe(dataset)


def test_quotes_in_a_tsv_file_have_no_meaning(tmp_path):
    rows = ['"unbalanced film\tgood', "film film\tbad"] * 10
    assert opened(tmp_path / "a.tsv", "text\tlabel\n" + "\n".join(rows)).num_examples("train") == 16


def test_a_text_in_quotes_may_have_several_lines(tmp_path):
    assert ("bad film", "bad") in tokens(opened(tmp_path / "a.csv", csv_text().replace("bad film", "bad\nfilm")))


def test_columns_are_chosen_by_name_and_pairs_have_two(tmp_path):
    rows = "\n".join(f"a{i % 2} film,film a{i % 2},x,{i % 2}" for i in range(20))
    changes = {"text": "s1", "second": "s2", "label": "same", "token_types": 2}
    dataset = opened(tmp_path / "a.csv", f"s1,s2,no,same\n{rows}\n", **changes)
    inputs, _ = dataset.arrays("train", limit=1)
    assert inputs.shape == (1, 8, 2)
    assert inputs[0, :, 1].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_labels_that_are_numbers_are_in_their_order(tmp_path):
    lines = [json.dumps({"text": "a film", "label": label}) for label in (10, 9, 2.0, "1")] * 5
    assert opened(tmp_path / "a.jsonl", "\n".join(lines)).class_names == ("1", "2", "9", "10")


def test_a_folder_has_a_file_for_each_split(tmp_path):
    for name, count in (("train.csv", 20), ("dev.csv", 6), ("Test.csv", 4)):
        (tmp_path / name).write_text(csv_text(ROWS[:count]))
    (tmp_path / ".hidden.csv").write_text("")
    assert sizes(opened(tmp_path)) == [20, 6, 4]
    assert "6 from dev.csv for validation, 4 from Test.csv for testing" in data.describe(opened(tmp_path))
    assert sizes(opened(tmp_path, validation=3)) == [17, 3, 4]
    assert_resumes(opened(tmp_path), 7, 5)


# -- problems -----------------------------------------------------------------------------------------------------------------


def test_all_lines_without_text_or_label_are_in_one_message_or_left_out(tmp_path, caplog):
    content = csv_text() + ",good\nbad film,\n,\na,bad,c\n"
    message = problem(tmp_path / "a.csv", content)
    for expected in (
        "has 4 problems",
        "line 22 of a.csv has no text",
        "line 23 of a.csv has no label",
        "line 24 of a.csv has no text and no label",
        "line 25 of a.csv has more values than the first line has names",
        "--data.skip-bad (skip_bad=True) leaves out lines that cannot be used; here it is 4",
    ):
        assert expected in message
    assert sum(sizes(opened(tmp_path / "a.csv", skip_bad=True))) == 20
    opened(tmp_path / "a.csv", skip_bad=True)
    assert caplog.text.count("4 lines cannot be used and are left out:\n  - line 22 of a.csv has no text\n") == 1
    assert "  - line 25 of a.csv has more values" in caplog.text


def test_everything_that_does_not_fit_is_in_one_message(tmp_path):
    (tmp_path / "train.csv").write_text(csv_text() + "film,\n")
    (tmp_path / "test.csv").write_text(csv_text([*ROWS, ("a", "zebra"), ("b", "zebra")]))
    model = DynaBERTConfig(num_classes=5, vocab_size=6, max_length=9, token_types=2)
    message = problem(tmp_path, model=model)
    for expected in (
        "test.csv has the label 'zebra' (2x), which train.csv does not have",
        "line 22 of train.csv has no label",
        f"model.num_classes is 5, but {tmp_path} has 2 classes",
        f"model.max_length is 9, but the inputs of {tmp_path} need 8",
        f"model.token_types is 2, but the inputs of {tmp_path} need 1",
        f"model.vocab_size is 6, but the inputs of {tmp_path} need 9",
    ):
        assert expected in message


NO_COLUMN = "a.csv has no column 'text'; its first line names 'review', 'label'; choose with --data.text, --data.second and"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", csv_text(header="review,label"), NO_COLUMN),
        ("a.csv", "", "a.csv has no column 'text' and no column 'label'; its first line names nothing"),
        ("a.csv", "text,label\n", "a.csv has no line with 'text' and 'label'"),
        ("a.csv", csv_text().encode("utf-16"), "a.csv is not UTF-8 (byte 0); convert it"),
        ("a.csv", csv_text([("a", "x")] * 20), "'x' is the only label in a.csv, and at least 2 are needed"),
        (
            "a.csv",
            csv_text([("a", f"x{i}") for i in range(60)]),
            "column 'label' has 60 different labels in 60 lines; is it",
        ),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": ', "a.jsonl is damaged after 1 lines: "),
        ("a.jsonl", '{"txt": "a", "label": "b"}', "has no line with 'text' and 'label'; its first line names 'txt', 'label'"),
        ("a.jsonl", "[" * 100_000, "a.jsonl is damaged after 0 lines"),
        ("a.jsonl", "[1, null]", "a.jsonl has no line with 'text' and 'label'"),
        ("a.jsonl", '{"text": "\\ud800", "label": "b"}', "a.jsonl has no line with"),
        ("a.txt", "", "has an unknown suffix, expected one of .csv, .tsv, .jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name, content, message):
    assert message in problem(tmp_path / name, content)


def test_a_path_without_training_texts_says_what_is_there(tmp_path):
    assert "has no files with a suffix of .csv" in problem(tmp_path)
    (tmp_path / "reviews.csv").write_text(csv_text())
    assert "has reviews.csv, but no train.csv (or .tsv, .jsonl); rename a file, or give its path" in problem(tmp_path)
    assert "does not exist" in problem(tmp_path / "absent")
    with pytest.raises(errors.ConfigError, match=r"data\.path is not given"):
        data.open(TextFileConfig())


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.csv", "val.csv", "dev.csv"):
        (tmp_path / name).write_text(csv_text())
    assert "dev.csv and val.csv both stand for the validation split; remove one of them" in problem(tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).write_text(csv_text())
    assert "train.csv and train.jsonl both stand for the train split; remove one of them" in problem(tmp_path)


def test_a_long_text_is_read_and_the_limit_of_others_stays(tmp_path):
    before = csv.field_size_limit()
    assert sum(sizes(opened(tmp_path / "a.csv", csv_text([("film " * 40_000, "good"), ("bad film", "bad")] * 5)))) == 10
    assert "a.csv is damaged after 20 lines: field larger than" in problem(
        tmp_path / "a.csv", csv_text() + '"film,good\n' + "bad film,bad\n" * 1_400_000
    )
    assert csv.field_size_limit() == before


def test_reading_a_large_file_takes_little_memory(tmp_path):
    content = csv_text([("film" * 30_000, "good"), ("bad film", "bad")] * 50)
    (tmp_path / "a.csv").write_text(content)
    tracemalloc.start()
    try:
        opened(tmp_path / "a.csv")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_every_system_have_their_numbers(tmp_path, end):
    content = end.join(["text,label", *["a film,good", '"b",bad'] * 10, ",good", "a film,good", "bad,"])
    message = problem(tmp_path / "a.csv", content)
    assert "line 22 of a.csv has no text" in message
    assert "line 24 of a.csv has no label" in message


def test_of_very_many_bad_lines_the_log_lists_a_hundred(tmp_path, caplog):
    message = problem(tmp_path / "a.csv", csv_text() + ",good\n" * 1_500)
    assert "has 1,500 problems" in message
    assert "1,490 more, of which the first 100 are listed above" in message
    assert len([r for r in caplog.records if r.name.startswith("superserve_jax")]) == 100


# -- vocabulary ---------------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_most_frequent_words_of_the_training_texts_or_a_file(tmp_path):
    dataset = opened(tmp_path / "a.csv", csv_text([*ROWS, ("rare", "good")]))
    assert dataset.vocabulary.tokens == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", ",", "bad", "good", "really")
    assert len(opened(tmp_path / "a.csv", vocabulary_size=6).vocabulary.tokens) == 6
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nfilm\n##s\n")
    assert len(opened(tmp_path / "a.csv", vocabulary=str(tmp_path / "vocab.txt")).vocabulary.tokens) == 6


def test_a_word_with_capitals_and_accents_is_one_word_in_lower_case():
    texts = ["Café, café.", "CAFE"]
    assert "cafe" in Vocabulary.build(texts).tokens
    assert Vocabulary.build(texts, lowercase=False).tokens == ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def test_the_template_takes_the_models_sizes_from_the_texts(tmp_path):
    dataset = opened(tmp_path / "a.csv", csv_text())
    model, names = fit.complete(load_config(CONFIGS / "text_file.py").model, dataset)
    assert (model.num_classes, model.vocab_size, model.pad_id, model.max_length, model.token_types) == (2, 9, 0, 8, 1)
    assert "vocab_size" in names
    fit.check(dataset, model)


# -- changed files, and configs -----------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    first = data.fingerprint(opened(tmp_path / "a.csv", csv_text()))
    assert data.fingerprint(opened(tmp_path / "b.csv", csv_text())) == first
    second = data.fingerprint(opened(tmp_path / "a.csv", csv_text().replace("really", "cheaply")))
    assert [change.split(" ")[0] for change in fingerprints.differences(first, second)] == ["vocabulary", "train:"]


def test_the_config_survives_json_and_refuses_bad_values():
    config = TextFileConfig("a.csv", text="review", skip_bad=True)
    assert data.data_from_json(json.loads(json.dumps(data.data_to_json(config)))) == config
    for changes in ({"max_length": 2}, {"token_types": 3}, {"validation": -1}, {"vocabulary_size": 4}, {"text": 3}):
        with pytest.raises(errors.ConfigError, match=next(iter(changes))):
            TextFileConfig("a.csv", **changes)


# -- arrays -------------------------------------------------------------------------------------------------------------------

WORDS = Vocabulary(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film"))
LABELS = np.array([0, 1] * 6)


def from_texts(texts, **changes):
    pair = texts, LABELS
    return data.from_arrays(**{"train": pair, "test": pair, "validation": 2, "vocabulary": WORDS, "max_length": 5, **changes})


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda t: np.array(t, object)])
def test_texts_become_token_ids(kind):
    dataset = from_texts(kind(["good film", "bad"] * 6))
    assert dataset.vocabulary is WORDS
    inputs, labels = dataset.arrays("test", limit=2)
    assert inputs.tolist() == [[2, 4, 6, 3, 0], [2, 5, 3, 0, 0]]
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [list, np.array])
def test_pairs_of_texts_become_token_ids_with_types(kind):
    dataset = from_texts(kind([("good", "bad"), ("film", "film")] * 6), token_types=2)
    assert dataset.arrays("test", limit=1)[0].tolist() == [[[2, 0], [4, 0], [3, 0], [5, 1], [3, 1]]]


def test_token_ids_keep_the_vocabulary_for_the_export_and_the_fingerprint():
    ids = np.ones((12, 5), np.int32)
    dataset = from_texts(ids)
    assert (dataset.vocabulary, dataset.arrays("test")[0].dtype) == (WORDS, np.int32)
    other = from_texts(ids, vocabulary=Vocabulary(WORDS.tokens[:5]))
    assert data.fingerprint(dataset)["vocabulary"] != data.fingerprint(other)["vocabulary"]
    assert "vocabulary" not in data.fingerprint(from_texts(ids, vocabulary=None))


def test_texts_that_cannot_be_used_are_refused():
    with pytest.raises(errors.DataError, match=r"got <U4 of shape .*; for texts, give a vocabulary"):
        from_texts(["film"] * 12, vocabulary=None)
    with pytest.raises(errors.DataError, match="inputs of train must be texts, or pairs of texts"):
        from_texts([("a", "b"), ("a",)] * 6)
    for texts in (["film"] * 11 + [3], [("a", 3)] * 12):
        with pytest.raises(errors.SuperServeError, match="a text must be a str"):
            from_texts(texts)
    with pytest.raises(errors.ConfigError, match="max_length must be int >= 3"):
        from_texts(["film"] * 12, max_length=2)


# -- Parquet, and classes in a given order ------------------------------------------------------------------------------------


def test_a_parquet_file_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"text": t, "label": c} for t, c in ROWS]), tmp_path / "a.parquet")
    assert tokens(opened(tmp_path / "a.parquet")) == EXPECTED
    assert "a.parquet is damaged" in problem(tmp_path / "a.parquet", b"PAR1 no")


def test_given_class_names_decide_the_order_and_a_label_is_a_name_or_its_number(tmp_path):
    rows = [("good film", "good"), ("bad film", "1")] * 10
    found = opened(tmp_path / "a.csv", csv_text(rows), class_names=("good", "bad"))
    assert found.class_names == ("good", "bad")
    assert tokens(found) == {("good film", "good"), ("bad film", "bad")}
    message = problem(tmp_path / "a.csv", csv_text(rows), class_names=("yes", "no"))
    assert "a.csv has the label 'good' (10x), not one of yes, no" in message
