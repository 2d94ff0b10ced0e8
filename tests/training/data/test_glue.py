"""GLUE's tasks from local files: Parquet of the Hub, TSV of gluebenchmark.com, JSON lines."""

import json
import shutil

import bert_directory
import pytest

from superserve_jax import errors
from superserve_jax.training import data
from superserve_jax.vocabulary import Vocabulary

SENTENCES = [("the film is good", 1), ("a bad film", 0), ('"not" good', 0), ("very good .", 1), ("the film was bad", 0)]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(Vocabulary(bert_directory.TOKENS).to_text())
    return str(path)


def write(path, rows, *, header=True):
    """Writes rows, which are dicts, in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [list(rows[0])] if header else []
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in [*lines, *(row.values() for row in rows)]))
    return path


def open_task(name, folder, words, **options):
    options = {"validation": 2, "max_length": 12, "token_types": 2, **options}
    return data.open(data.TextConfig(name, data_dir=str(folder), vocabulary=words, **options))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("glue/sst2/train-00000-of-00001.parquet", "glue/sst2/validation-00000-of-00001.parquet"),
        ("sst2/train.jsonl", "sst2/validation.jsonl"),
        ("SST-2/train.tsv", "SST-2/dev.tsv"),
    ],
)
def test_single_sentences_are_read_in_each_form(tmp_path, words, train, test):
    rows = [{"sentence": text, "label": label} for text, label in SENTENCES]
    write(tmp_path / train, rows)
    write(tmp_path / test, rows[:4])
    found = open_task("glue/sst2", tmp_path, words)
    assert found.class_names == ("negative", "positive")
    assert [found.num_examples(split) for split in ("train", "validation", "test")] == [3, 2, 4]
    inputs, labels = found.arrays("test")
    assert labels.tolist() == [1, 0, 0, 1]
    expected = found.vocabulary.encode([text for text, _ in SENTENCES[:4]], length=12, token_types=2)
    assert inputs.tolist() == expected.tolist()
    assert found.arrays("validation")[1].tolist() == [1, 0]
    before = found.fingerprint()
    write(tmp_path / test, rows[1:])
    assert open_task("glue/sst2", tmp_path, words).fingerprint() != before


def test_pairs_have_their_two_texts_and_named_labels(tmp_path, words):
    rows = [{"index": i, "sentence1": "a good film", "sentence2": "good", "gold_label": "neutral"} for i in range(3)]
    write(tmp_path / "MNLI" / "train.tsv", rows)
    write(tmp_path / "MNLI" / "dev_matched.tsv", [{**rows[0], "gold_label": "contradiction"}])
    found = open_task("glue/mnli", tmp_path, words)
    assert found.class_names == ("entailment", "neutral", "contradiction")
    inputs, labels = found.arrays("test")
    assert labels.tolist() == [2]
    assert inputs[0].tolist() == found.vocabulary.encode(["a good film"], ["good"], length=12, token_types=2)[0].tolist()


def test_texts_may_hold_what_python_takes_for_the_end_of_a_line_and_be_long(tmp_path, words):
    rows = [{"sentence": text, "label": 1} for text in ("good\u2028film", "bad\x85film", "film " * 30_000)]
    (tmp_path / "sst2").mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for split in ("train", "validation"):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text(lines)
        write(tmp_path / "SST-2" / f"{'dev' if split == 'validation' else split}.tsv", rows)
    found = open_task("glue/sst2", tmp_path, words, validation=0)
    assert found.num_examples("train") == 3
    shutil.rmtree(tmp_path / "sst2")
    tsv = open_task("glue/sst2", tmp_path, words, validation=0)
    assert tsv.arrays("test")[0].tolist() == found.arrays("test")[0].tolist()


def test_files_without_a_header_and_broken_lines_are_read_as_everybody_does(tmp_path, words):
    cola = [{"source": "x", "label": label, "annotation": "*", "sentence": text} for text, label in SENTENCES]
    write(tmp_path / "CoLA" / "train.tsv", cola, header=False)
    write(tmp_path / "CoLA" / "dev.tsv", cola[:1], header=False)
    assert open_task("glue/cola", tmp_path, words).num_examples("train") == 3
    qqp = [{"id": 1, "question1": "a film", "question2": "good", "is_duplicate": 1}] * 3
    write(tmp_path / "QQP" / "train.tsv", qqp)
    with write(tmp_path / "QQP" / "dev.tsv", qqp).open("a") as file:
        file.write("2\tbroken\n")
    assert open_task("glue/qqp", tmp_path, words).num_examples("test") == 3


def test_what_is_missing_or_damaged_is_named(tmp_path, words):
    with pytest.raises(errors.DataError) as caught:
        open_task("glue/sst2", tmp_path, words)
    message = str(caught.value)
    assert "https://huggingface.co/datasets/nyu-mll/glue/tree/main/sst2 into DATA_DIR/glue/sst2" in message
    assert "pip install 'superserve-jax[prepare]'" in message
    with pytest.raises(errors.UnknownNameError, match=r"unknown task of GLUE .* 'sst3': did you mean 'sst2'"):
        open_task("glue/sst3", tmp_path, words)
    rows = [{"sentence": text, "label": label} for text, label in SENTENCES]
    write(tmp_path / "sst2" / "train.parquet", rows)
    with pytest.raises(errors.DataError, match=r"sst2 has no file validation_matched\.\* or .* of parquet, tsv, jsonl"):
        open_task("glue/sst2", tmp_path, words)
    write(tmp_path / "sst2" / "validation.parquet", [{"sentence": "good", "label": -1}])
    with pytest.raises(errors.DataError, match=r"example 1 of 'sst2' needs sentence, and a label among negative, positive"):
        open_task("glue/sst2", tmp_path, words)
    (tmp_path / "sst2" / "validation.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(errors.DataError, match=r"validation\.parquet is damaged or cannot be read"):
        open_task("glue/sst2", tmp_path, words)
    (tmp_path / "sst2" / "validation.parquet").unlink()
    (tmp_path / "sst2" / "validation.jsonl").write_text('{"sentence": \n')
    with pytest.raises(errors.DataError, match=r"validation\.jsonl is damaged or cannot be read"):
        open_task("glue/sst2", tmp_path, words)


def test_a_missing_library_for_parquet_is_named(tmp_path, words, monkeypatch):
    import sys

    for split in ("train", "validation"):
        write(tmp_path / "sst2" / f"{split}.parquet", [{"sentence": "good", "label": 1}] * 3)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.DataError, match="needs the package pyarrow: pip install pyarrow"):
        open_task("glue/sst2", tmp_path, words)
