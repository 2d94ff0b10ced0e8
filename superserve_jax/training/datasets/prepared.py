"""Prepared TFDS datasets by name, read without TensorFlow and without a network.

`cluttered_digits` and `listops` are made at first use. `prepare` makes `mnist` and `fashion_mnist`. The user must prepare any
other dataset first, which for most of them needs TensorFlow and a download. The error for a dataset that is not prepared gives
the commands.
"""

import bisect
import difflib
import itertools
import os
import pathlib
import re
import shlex
import stat
from collections.abc import Mapping
from typing import Any

import grain
import tensorflow_datasets as tfds

from superserve_jax import errors, files
from superserve_jax.training.data import fingerprints, streams
from superserve_jax.training.data.streams import Records
from superserve_jax.training.datasets import glue, making, mnist
from superserve_jax.training.datasets.cluttered_digits.cluttered_digits_dataset_builder import ClutteredDigits
from superserve_jax.training.datasets.listops.listops_dataset_builder import Listops

_OWN = (ClutteredDigits.name, Listops.name)
_WELL_KNOWN = (*_OWN, *mnist.NAMES, "cifar10", "imagenet2012", "glue")
_NAME = re.compile(r"\w+(/[\w.+-]*\w)?")
_MAX_CLASSES = 100_000

# The split to test on, for datasets whose split "test" has no labels or does not exist.
_TEST_SPLITS = {"imagenet2012": "validation", "glue": "validation", "glue/mnli": "validation_matched"}


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` can be the name of a TFDS dataset."""
    if not _NAME.fullmatch(name):
        raise errors.ConfigError(
            f"name must be a TFDS dataset such as 'cifar10' or 'glue/mnli', without a namespace; got {name!r}"
        )


def load(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """The builder of a prepared dataset, ready for `as_data_source`.

    Args:
      name: a TFDS name, "cifar10" or "name/config".
      data_dir: where TFDS keeps its datasets; None means TFDS' own default, ~/tensorflow_datasets.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: it is not prepared, or not for random access.
    """
    builder = _find(name, data_dir)
    if not builder.info.splits and builder.name in _OWN:
        making.make(builder)
        builder = _find(name, data_dir)  # a builder reads the disk only when it is constructed
    if not builder.info.splits and pathlib.Path(builder.data_dir).exists():
        raise _damaged(builder, f"{builder.data_dir} has no dataset_info.json")
    if not builder.info.splits:
        raise errors.DataError(_how_to_prepare(name, builder, data_dir))
    formats = builder.info.available_file_formats()
    if not formats & set(tfds.core.FileFormat.with_random_access()):
        stored = ", ".join(sorted(f.value for f in formats)) or "no known format"
        raise errors.DataError(
            f"dataset '{name}' in {builder.data_dir} is stored as {stored}; training reads examples in random order and needs "
            f"array_record. Remove that folder or choose another data_dir, then: {_command(name, data_dir)}"
        )
    return builder


def prepare(name: str, folder: str | None = None, data_dir: str | None = None) -> tuple[tfds.core.DatasetBuilder, bool]:
    """Makes a dataset that can be made without TensorFlow: `mnist`, `fashion_mnist`, and our own.

    Args:
      name: a TFDS name.
      folder: the four files of mnist or fashion_mnist. None downloads them.
      data_dir: where TFDS keeps its datasets; None means TFDS' own default, ~/tensorflow_datasets.

    Returns:
      The builder, and whether the dataset was there already. Then nothing is changed.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: the files cannot be used, the dataset cannot be written, or it
      must be prepared in another way, which the message gives.
    """
    if folder is not None and name not in mnist.NAMES:
        raise errors.ConfigError(
            f"files can be given for {' and '.join(mnist.NAMES)}, got '{name}'; leave out the folder {folder}"
        )
    check_name(name)
    was_there = pathlib.Path(_find(name, data_dir).data_dir).exists()
    if name in mnist.NAMES and not was_there:
        examples = mnist.download(name) if folder is None else mnist.read_folder(name, folder)
        making.make(mnist.builder(name, examples, _expanded(data_dir)))
    return load(name, data_dir), was_there


class Stored:
    """The records of a split. Every error names the shard, which is one of the files that hold a split.

    Args:
      builder: a builder that `load` returned.
      split: a TFDS expression, such as "train[:100]".
      label: the name of the feature that holds the class.
      decoders: as in `as_data_source`.

    Attributes:
      split: the TFDS expression.
      starts: the position of the first record of each shard.

    Raises DataError for a shard that is missing, or that does not hold as many records as the description of the dataset says.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, *, label: str, decoders: Any = None):
        self.split = split
        self._builder, self._label, self._num_classes = builder, label, num_classes(builder, label)
        try:
            self._shards: Any = builder.info.splits[split].file_instructions
            self.starts = [0, *itertools.accumulate(s.take for s in self._shards)][:-1]
            as_data_source: Any = builder.as_data_source
            self._source = as_data_source(split, decoders=decoders)
        except Exception as e:  # TFDS raises many kinds of errors for a damaged description
            raise _damaged(builder, f"split {split} of '{builder.name}' cannot be opened: {_first_line(e)}") from e
        for shard in self._shards:
            self._check(shard)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            record = self._source[i]
            label = int(record[self._label])
        except Exception as e:  # array_record raises RuntimeError, and TFDS many kinds for a record of another dataset
            raise _damaged(self._builder, f"{self._shard(i)} is damaged at record {i}: {_first_line(e)}") from e
        if not 0 <= label < self._num_classes:
            raise errors.DataError(
                f"record {i} of {self._shard(i)} has the label {label}, but '{self._builder.name}' has {self._num_classes} "
                f"classes; choose a dataset whose examples are all labelled"
            )
        return record

    def _check(self, shard: Any) -> None:
        path = pathlib.Path(shard.filename)
        if not path.is_file():
            raise _damaged(self._builder, f"{path} is {'not a regular file' if path.exists() else 'missing'}")
        reader: Any = grain.sources.ArrayRecordDataSource
        try:
            found = len(reader(str(path)))
        except (RuntimeError, ValueError) as e:
            raise _damaged(self._builder, f"{path} is damaged: {_first_line(e)}") from e
        if found != shard.examples_in_shard:
            raise _damaged(self._builder, f"{path} is another file: {found} records instead of {shard.examples_in_shard}")

    def _shard(self, i: int) -> str:
        return self._shards[bisect.bisect_right(self.starts, i) - 1].filename


def identity(builder: tfds.core.DatasetBuilder, stored: Mapping[str, Stored], splits: Mapping[str, Records]) -> dict[str, Any]:
    """The fingerprint of a prepared dataset: its name and version, checksums of its downloads, a sample of each split."""
    infos = builder.url_infos or {}
    return {
        "name": builder.info.full_name,
        "checksums": files.digest({url: info.checksum for url, info in infos.items()}) if infos else "none",
        **{
            name: fingerprints.of_examples(records.read, len(records), stored[name].starts) for name, records in splits.items()
        },
    }


def num_classes(builder: tfds.core.DatasetBuilder, label: str) -> int:
    """Number of classes of a feature. Raises DataError if it is too large, because every class has a name."""
    feature = features(builder)[label]
    if not 0 < feature.num_classes <= _MAX_CLASSES:
        raise errors.DataError(
            f"'{builder.name}' has {feature.num_classes:,} classes, expected 1 to {_MAX_CLASSES:,}; choose another dataset"
        )
    return feature.num_classes


def features(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
    """The features of a dataset by name."""
    found: Any = builder.info.features
    return dict(found) if isinstance(found, tfds.features.FeaturesDict) else {}


def splits(builder: tfds.core.DatasetBuilder, validation: int) -> dict[str, str]:
    """The TFDS expression for each of our splits. The last `validation` training examples are held out."""
    stored, name = builder.info.splits, builder.name
    if "train" not in stored:
        raise errors.DataError(f"dataset '{name}' has no train split, only {sorted(stored)}; choose another dataset")
    kept = streams.num_kept(stored["train"].num_examples, validation)
    found = {"train": f"train[:{kept}]"}
    if validation:
        found["validation"] = f"train[{kept}:]"
    config = builder.builder_config
    full_name = f"{name}/{config.name}" if config else name
    named = _TEST_SPLITS.get(full_name, _TEST_SPLITS.get(name, "test"))
    test = next((split for split in (named, "validation") if split in stored), None)
    return {**found, "test": test} if test else found


def _is_odd(path: pathlib.Path) -> bool:
    """Whether a path is neither a file nor a folder. One that another process has removed meanwhile is not odd."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path.is_symlink()
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _find(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    expanded = _expanded(data_dir)
    folder = files.user_path(expanded or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")) / name
    if _NAME.fullmatch(name):
        for path in (pathlib.Path(parent, file) for parent, _, found in os.walk(folder) for file in found):
            if _is_odd(path):  # TFDS would wait for a pipe
                raise errors.DataError(f"{path} is not a regular file; remove {folder}, and prepare the dataset again")
    try:
        return tfds.builder(name, data_dir=expanded, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        if glue.task_of(name) is not None:  # without TensorFlow, TFDS may not even know GLUE
            raise errors.DataError(_how_to_prepare(name, None, data_dir)) from None
        # TFDS would fetch the list of community datasets from the network.
        everything = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, everything, n=3)
        raise errors.unknown_name("dataset", name, {*near, *_WELL_KNOWN}) from None
    except ImportError as e:
        raise errors.DataError(
            f"dataset '{name}' cannot even be described without the package '{e.name}': pip install '{e.name}'"
        ) from e
    except Exception as e:  # TFDS raises many kinds of errors for a damaged description
        raise errors.DataError(
            f"TFDS cannot open dataset '{name}': {_first_line(e)}. Check its config and version; if {folder} is damaged, "
            f"remove it and prepare the dataset again"
        ) from e


def _expanded(data_dir: str | None) -> str | None:
    return None if data_dir is None else str(files.user_path(data_dir))


def _damaged(builder: tfds.core.DatasetBuilder, problem: str) -> errors.DataError:
    return errors.DataError(
        f"{problem}; restore it, or remove {builder.data_dir} and start again, which makes the dataset or says how to make it"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _how_to_prepare(name: str, builder: tfds.core.DatasetBuilder | None, data_dir: str | None) -> str:
    """The commands that prepare a dataset. `builder` is None if TFDS cannot describe the dataset."""
    about = f"dataset '{name}' is not prepared in {data_dir if builder is None else builder.data_dir}."
    if name in mnist.NAMES:
        return f"{about} {mnist.how_to_prepare(name, _command(name, data_dir))}"
    if (task := glue.task_of(name)) is not None:
        about += f" {glue.how_to_get(task)}"
    lines = [
        f"{about} Prepare it once, which needs TensorFlow:",
        "  pip install 'superserve-jax[prepare]'",
        f"  {_command(name, data_dir)}",
    ]
    if builder is not None and builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        folder = files.user_path(builder.data_dir).parents[1] / "downloads" / "manual"
        instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        lines.append(f"Before that, put its files into {folder} (TFDS' manual_dir) by hand. {instructions}")
    return "\n".join(lines)


def _command(name: str, data_dir: str | None) -> str:
    if name in mnist.NAMES:
        return f"superserve prepare {name}" + ("" if data_dir is None else f" --data-dir {shlex.quote(data_dir)}")
    where = "" if data_dir is None else f", data_dir='{data_dir}'"
    return (
        f'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}'{where}).download_and_prepare(file_format='array_record')\""
    )
