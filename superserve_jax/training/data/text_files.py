"""Texts with labels in the user's own files: CSV, TSV, JSON lines or Parquet.

    review,sentiment
    a film that I will see again,good
    "two hours, and no idea",bad

A column is found by its name. The labels are the names of the classes. One file because every step names the same columns.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from superserve_jax import errors, files
from superserve_jax.training import fields
from superserve_jax.training.data import fit, parquet, problems, splits
from superserve_jax.training.data.streams import Dataset, Example, Records
from superserve_jax.training.fields import Count, MaxLength
from superserve_jax.vocabulary import Vocabulary

_JSON = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".csv", ".tsv", *_JSON, ".parquet")

_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
_MAX_VALUE = 1 << 24  # characters of a text; a longer one is a sign of a quotation mark that is never closed


@dataclasses.dataclass(frozen=True)
class TextFileConfig:
    """Texts in a file, or in a folder with train.csv and, if you have them, val.csv and test.csv (or .tsv, .jsonl, .parquet).

    CSV and TSV begin with a line of names. A CSV file may also be separated by semicolons or tabs. In a TSV file, quotes have
    no meaning. A JSON file has one object per line, or is a list of objects. All files are UTF-8. A validation or test split
    without a file is a tenth of the training texts, at most 5,000: a random choice that is always the same.

    Args:
      path: the file or folder; `~` is the user's home.
      text: the name of the column of texts.
      second: the name of the column of second texts, for pairs; None for single texts.
      label: the name of the column of labels.
      class_names: the names of the classes, in the order of the model's outputs. A label is then a name or its number from 0
        up. Empty: the labels of the training texts, sorted.
      validation: number of training texts to hold out as the validation split. None: the validation file, else a tenth.
      max_length: number of tokens of an input. Shorter texts are padded, longer ones cut off.
      token_types: 2 adds to each token whether it belongs to the first or the second text of a pair; 1 does not.
      vocabulary: a WordPiece vocabulary file, such as BERT's vocab.txt. None: the most frequent words of the training texts.
      vocabulary_size: number of tokens of a vocabulary that is made from the training texts.
      lowercase: whether to lowercase texts and strip accents first, as BERT's uncased models do.
      skip_bad: whether to leave out lines without text or label. Otherwise they are an error, which lists them.

    >>> TextFileConfig("~/reviews.csv", text="review", label="sentiment").max_length
    128
    """

    path: str = ""
    text: str = "text"
    second: str | None = None
    label: str = "label"
    class_names: tuple[str, ...] = ()
    validation: Count | None = None
    max_length: MaxLength = 128
    token_types: Literal[1, 2] = 1
    vocabulary: str | None = None
    vocabulary_size: Annotated[int, msgspec.Meta(ge=5)] = 8000
    lowercase: bool = True
    skip_bad: bool = False

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class Line:
    """A labelled text.

    Args:
      texts: the text, or both texts of a pair.
      label: the name of its class.
    """

    texts: tuple[str, ...]
    label: str


def open(config: TextFileConfig, model: fit.AnyModel | None = None) -> Dataset:
    """The dataset of `config`.

    Args:
      config: the files, their columns, and how texts become token ids.
      model: the model to train. What does not fit it is listed with the other problems.

    Raises:
      DataError: files, columns, texts or labels are missing, or do not fit the model. One message lists everything.
    """
    if not config.path:
        raise errors.ConfigError("data.path is not given; set it to your file of texts, for example --data.path reviews.csv")
    paths, found = _find(files.user_path(config.path))
    if config.validation is not None:
        paths.pop("validation", None)
    given, bad = {}, []
    for split, path in paths.items():
        given[split], more_bad, more = _read(path, config)
        bad += more_bad
        found += more
    class_names = config.class_names or _classes(given["train"])
    numbers = {str(i): i for i in range(len(config.class_names))}
    labels = numbers | {name: i for i, name in enumerate(class_names)}
    if class_names:  # otherwise no training text could be read, which is a problem already
        found += _label_problems(config, given, {split: path.name for split, path in paths.items()})
    vocabulary = _vocabulary(config, given["train"])
    facts = {"num_classes": len(class_names), "max_length": config.max_length, "token_types": config.token_types}
    if class_names:
        found += fit.mismatches(model, {**facts, "vocab_size": len(vocabulary.tokens)}, config.path)
    remedy = ""
    if bad and not config.skip_bad:
        found += bad
        remedy = f"--data.skip-bad (skip_bad=True) leaves out lines that cannot be used; here it is {len(bad)}"
    problems.refuse(config.path, found, remedy=remedy)
    problems.warn_left_out(f"{config.path}: {len(bad):,} lines cannot be used and are left out", bad)
    names = {split: path.name for split, path in paths.items()}
    divided = splits.divide(given, validation=config.validation, names=names)

    def records(lines: Sequence[Line]) -> Records:
        def read(i: int) -> Example:
            parts = [[text] for text in lines[i].texts]
            inputs = vocabulary.encode(*parts, length=config.max_length, token_types=config.token_types)
            return inputs[0], labels[lines[i].label]

        shape = (config.max_length,) if config.token_types == 1 else (config.max_length, 2)
        return Records(len(lines), read, (shape, np.int32))

    def identity() -> dict[str, Any]:
        contents = {split: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for split, path in paths.items()}
        return {**contents, "vocabulary": hashlib.sha256(vocabulary.to_text().encode()).hexdigest()}

    of = {split: records(lines) for split, lines in divided.splits.items()}
    return Dataset(config.path, {**of}, class_names=class_names, vocabulary=vocabulary, identity=identity, note=divided.note)


def _label_problems(config: TextFileConfig, given: Mapping[str, Sequence[Line]], names: Mapping[str, str]) -> list[str]:
    """What is wrong with the labels.

    Args:
      config: the config.
      given: the lines of each split that has a file.
      names: the name of each file.
    """
    train, found = Counter(line.label for line in given["train"]), []
    if known := {*config.class_names, *map(str, range(len(config.class_names)))}:
        for split in given:
            for label, count in Counter(line.label for line in given[split] if line.label not in known).items():
                found.append(f"{names[split]} has the label {label!r} ({count}x), not one of {', '.join(config.class_names)}")
        return found
    if len(train) < 2:
        found.append(f"{next(iter(train))!r} is the only label in {names['train']}, and at least 2 are needed")
    if len(train) > max(50, train.total() / 2):
        found.append(
            f"column {config.label!r} has {len(train)} different labels in {train.total()} lines; is it the right one?"
        )
    for split in given:
        for label, count in Counter(line.label for line in given[split] if line.label not in train).items():
            found.append(f"{names[split]} has the label {label!r} ({count}x), which {names['train']} does not have")
    return found


def _find(path: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[str]]:
    """The file of each split, and problems. Raises DataError if there is no file for training."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise errors.DataError(f"{path} has an unknown suffix, expected one of {', '.join(SUFFIXES)}; rename it")
        return {"train": path}, []
    if not path.is_dir():
        moved = "" if path.exists() else problems.MOVED
        raise errors.DataError(
            f"{path} does not exist or is not a file; expected a file of texts, or a folder with train.csv{moved}"
        )
    inside = [f.name for f in sorted(path.iterdir()) if f.suffix.lower() in SUFFIXES and f.is_file() and f.name[0] != "."]
    named, found = splits.find(inside, suffixes=True)
    if "train" not in named:
        present = ", ".join(inside) or f"no files with a suffix of {', '.join(SUFFIXES)}"
        raise errors.DataError(f"{path} has {present}, but no train.csv (or .tsv, .jsonl); rename a file, or give its path")
    return {split: path / name for split, name in named.items()}, found


def _read(path: pathlib.Path, config: TextFileConfig) -> tuple[list[Line], list[str], list[str]]:
    """The lines of a file, a description of each line that cannot be used, and problems of the whole file."""
    wanted = [config.text, *([config.second] if config.second is not None else []), config.label]
    lines, bad, first = [], [], None
    try:
        for number, row in _rows(path, wanted):
            first = row if first is None else first
            values = [_plain(row.get(name)) if isinstance(row, Mapping) else "" for name in wanted]
            missing = [name for name, value in zip(wanted, values, strict=True) if not value]
            if missing or None in row:
                reason = f"has no {' and no '.join(missing)}" if missing else "has more values than the first line has names"
                bad.append(f"line {number} of {path.name} {reason}")
            else:
                lines.append(Line(tuple(values[:-1]), values[-1]))
    except OSError as e:
        return [], [], [f"{path.name} cannot be read: {e.strerror or e}"]
    except UnicodeDecodeError as e:
        return [], [], [f"{path.name} is not UTF-8 (byte {e.start}); convert it, for example with iconv"]
    except errors.DataError as e:
        return [], [], [f"{path.name} has {e}"]
    except (csv.Error, ValueError, RecursionError) as e:
        return [], [], [f"{path.name} is damaged after {len(lines) + len(bad)} lines: {errors.one_line(e)}"]
    if not lines:
        present = list(first) if isinstance(first, Mapping) else []
        return [], [], [f"{path.name} has no line with {' and '.join(map(repr, wanted))}; {_named(present)}"]
    return lines, bad, []


def _rows(path: pathlib.Path, wanted: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Number and values of each line or row of a file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return enumerate(parquet.rows(path), 1)
    return json_rows(read_text(path)) if suffix in _JSON else _csv_rows(read_text(path), wanted, tabs=suffix == ".tsv")


def read_text(path: pathlib.Path) -> str:
    """The text in a file of UTF-8, without the mark that Excel puts first. Raises OSError, or ValueError for other bytes."""
    return files.read_bytes(path).decode("utf-8-sig")


def _csv_rows(content: str, wanted: Sequence[str], *, tabs: bool) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    """Number and values of each line. Raises DataError if a column is missing."""
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    delimiters = "\t" if tabs else ",;\t"
    limit = csv.field_size_limit(_MAX_VALUE)  # the usual limit of the module csv is 131,072
    try:
        names = {d: next(csv.reader(_lines(content), delimiter=d, quoting=quoting), []) for d in delimiters}
        delimiter = next((d for d in delimiters if set(wanted) <= set(names[d])), None)
        if delimiter is None:
            present = max(names.values(), key=len)
            absent = " and no column ".join(repr(name) for name in wanted if name not in present)
            raise errors.DataError(f"no column {absent}; {_named(present)}")
        reader = csv.DictReader(_lines(content), delimiter=delimiter, quoting=quoting)
        for row in reader:
            yield reader.line_num, row
    finally:
        csv.field_size_limit(limit)


def _lines(content: str) -> Iterator[str]:
    """The lines of a text with their ends, one by one. `io.StringIO` would copy the text, with 4 bytes per character."""
    return (found.group() for found in _LINE.finditer(content))


def json_rows(content: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each line of JSON lines, or of each element of a list. Raises ValueError for other text.

    >>> list(json_rows('{"text": "a"}\\n\\n{"text": "b"}'))
    [(1, {'text': 'a'}), (3, {'text': 'b'})]
    """
    if content.lstrip().startswith("["):
        yield from enumerate(json.loads(content), 1)
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, json.loads(line)


def _named(present: Sequence[str]) -> str:
    names = ", ".join(map(repr, present[:20])) or "nothing"
    return f"its first line names {names}; choose with --data.text, --data.second and --data.label"


def _plain(value: Any) -> str:
    """A value as text; "" if there is none, or if it cannot be a text or label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        return ""
    text = str(value).strip()
    return text if text.isascii() or text.encode(errors="replace").decode() == text else ""


def _classes(lines: Sequence[Line]) -> tuple[str, ...]:
    """The labels, in order of their numbers if all are numbers, otherwise of their letters."""
    names = {line.label for line in lines}
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int) if numbers else sorted(names))


def _vocabulary(config: TextFileConfig, lines: Sequence[Line]) -> Vocabulary:
    if config.vocabulary is not None:
        words = Vocabulary.read(config.vocabulary, lowercase=config.lowercase)
        words.encode([""], length=3)  # raises now if the package tokenizers is missing
        return words
    texts = tuple(text for line in lines for text in line.texts)
    return _built(texts, config.vocabulary_size, config.lowercase)


@functools.lru_cache(maxsize=1)  # the stages of one program open the same files several times
def _built(texts: tuple[str, ...], size: int, lowercase: bool) -> Vocabulary:
    return Vocabulary.build(texts, size=size, lowercase=lowercase)
