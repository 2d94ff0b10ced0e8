"""The tasks of GLUE (Wang et al., ICLR 2019) from local files, without TensorFlow and without a network.

`find` looks for the files of a task in a folder. They have the form of the Hugging Face Hub (nyu-mll/glue: Parquet) or of
gluebenchmark.com (TSV), or are JSON lines with the Hub's columns. The split "test" of GLUE has no labels, so we test on the
development set, of MNLI on the matched one.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from superserve_jax import errors, files
from superserve_jax.training.data import parquet, text_files


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Args:
      folder: its folder's name at gluebenchmark.com.
      columns: for each text of an example, the names of its column: the Hub's, then the one in the TSV files.
      class_names: the names of the labels, in the order of their numbers.
      label: the name of the column of the labels in the TSV files.
      header: the columns of TSV files without a header.
    """

    folder: str
    columns: tuple[tuple[str, ...], ...]
    class_names: tuple[str, ...]
    label: str = "label"
    header: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Examples:
    """The labelled examples of one split: for each one its texts and its label."""

    texts: list[tuple[str, ...]]
    labels: list[int]


_PAIR = (("sentence1", "#1 String"), ("sentence2", "#2 String"))
_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(
        *("CoLA", (("sentence",),), ("unacceptable", "acceptable")), header=("source", "label", "annotation", "sentence")
    ),
    "sst2": Task("SST-2", (("sentence",),), ("negative", "positive")),
    "mrpc": Task("MRPC", _PAIR, ("not_equivalent", "equivalent"), label="Quality"),
    "qqp": Task("QQP", (("question1",), ("question2",)), ("not_duplicate", "duplicate"), label="is_duplicate"),
    "mnli": Task(
        *("MNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")), ("entailment", "neutral", "contradiction")),
        label="gold_label",
    ),
    "qnli": Task("QNLI", (("question",), ("sentence",)), _ENTAILMENT),
    "rte": Task("RTE", _PAIR, _ENTAILMENT),
    "wnli": Task("WNLI", _PAIR, ("not_entailment", "entailment")),
}
_SPLITS = {"train": ("train",), "test": ("validation_matched", "dev_matched", "validation", "dev")}
_SUFFIXES = ("parquet", "tsv", "jsonl")
_HUB = "https://huggingface.co/datasets/nyu-mll/glue"


def task_of(name: str) -> str | None:
    """The task in a dataset's name, such as "sst2" for "glue/sst2". None if the dataset is not GLUE.

    Raises UnknownNameError for a task that GLUE does not have, or that has no classes.
    """
    if name.split("/")[0] != "glue":
        return None
    errors.check_name("task of GLUE (a dataset 'glue/TASK')", name.removeprefix("glue").removeprefix("/"), TASKS)
    return name.split("/")[1]


def find(task: str, data_dir: str | None) -> dict[str, list[pathlib.Path]]:
    """The files of the splits "train" and "test" of a task; empty if there are none.

    Args:
      task: a key of `TASKS`.
      data_dir: a folder with glue/TASK, TASK, or gluebenchmark's folder such as SST-2.
    """
    if data_dir is None:
        return {}
    root = files.user_path(data_dir)
    for folder in (root / "glue" / task, root / task, root / TASKS[task].folder):
        found = {split: _files(folder, names) for split, names in _SPLITS.items()}
        if missing := [split for split, paths in found.items() if not paths]:
            if len(missing) < len(found):
                wanted = " or ".join(f"{name}.*" for name in _SPLITS[missing[0]])
                raise errors.DataError(f"{folder} has no file {wanted}, of {', '.join(_SUFFIXES)}; put it there")
            continue
        return found
    return {}


def read(task: str, paths: Iterable[pathlib.Path]) -> Examples:
    """The examples in the files of a split. Raises DataError if a file is damaged or has other columns."""
    about, examples = TASKS[task], Examples([], [])
    numbers = {name: i for i, name in enumerate(about.class_names)} | {str(i): i for i in range(len(about.class_names))}
    for path in paths:
        for number, row in enumerate(_rows(path, about.header), 1):
            texts = tuple(_first(row, names) for names in about.columns)
            label = numbers.get(str(_first(row, (about.label, "label"))))
            if label is None or not all(isinstance(text, str) for text in texts):
                needed = " and ".join("/".join(names) for names in about.columns)
                raise errors.DataError(
                    f"{path}: example {number} of '{task}' needs {needed}, and a label among {', '.join(about.class_names)}; "
                    f"got {str(row)[:200]}"
                )
            examples.texts.append(texts)
            examples.labels.append(label)
    if not examples.labels:
        raise errors.DataError(f"{', '.join(map(str, paths))} has no examples; download it again")
    return examples


def how_to_get(task: str) -> str:
    """What to download so that `find` finds a task, for an error message."""
    folder = TASKS[task].folder
    return (
        f"Without TensorFlow: download the Parquet files of {_HUB}/tree/main/{task} into DATA_DIR/glue/{task}, or "
        f"gluebenchmark.com's {folder}/*.tsv into DATA_DIR/{folder}, and set data.data_dir to DATA_DIR. Or use TFDS."
    )


def _files(folder: pathlib.Path, names: Iterable[str]) -> list[pathlib.Path]:
    """The files of a split: of the first name and suffix that are there, such as train-00000-of-00001.parquet."""
    for name, suffix in itertools.product(names, _SUFFIXES):
        if found := sorted({*folder.glob(f"{name}.{suffix}"), *folder.glob(f"{name}-*.{suffix}")}):
            return found
    return []


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _rows(path: pathlib.Path, header: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, as {column: value}."""
    try:
        if path.suffix == ".parquet":
            yield from parquet.rows(path)
        elif path.suffix == ".jsonl":
            yield from (dict(row) for _, row in text_files.json_rows(text_files.read_text(path)))
        else:
            # No module csv: quotation marks are part of the texts.
            lines = (line.rstrip("\r").split("\t") for line in text_files.read_text(path).removesuffix("\n").split("\n"))
            names = header or tuple(next(lines))
            # QQP has a few broken lines, with fewer columns. Everybody skips them.
            yield from (dict(zip(names, line, strict=False)) for line in lines if len(line) >= len(names))
    except errors.DataError as e:
        raise errors.DataError(f"{path} has {e}") from e
    except (OSError, *errors.MALFORMED) as e:
        raise errors.DataError(f"{path} is damaged or cannot be read: {errors.one_line(e)[:300]}; download it again") from e
