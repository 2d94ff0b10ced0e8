"""Writes a dataset into the folder of TFDS: whole or not at all, without TensorFlow."""

import contextlib
import logging
import pathlib
import shutil
from collections.abc import Iterator

import tensorflow_datasets as tfds

from superserve_jax import errors, files

_log = logging.getLogger(__name__)


def make(builder: tfds.core.DatasetBuilder) -> None:
    """Writes the dataset of a builder that needs no TensorFlow and no download.

    TFDS writes into a temporary folder and renames it at the end, so a killed process leaves nothing that looks complete. If
    two processes prepare at once, the second cannot rename its folder to one that exists. It then uses the first one's.
    The process that holds the lock of the dataset's folder removes what killed processes left.

    Raises DataError if the dataset cannot be written.
    """
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()  # our builders show their progress in one line, TFDS in twenty
    try:
        with _cleaned(pathlib.Path(builder.data_path)):
            builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD, download_config=offline)
    except (OSError, RuntimeError) as e:  # the native writer of array_record raises RuntimeError
        if not (builder.data_path / "dataset_info.json").exists():
            raise errors.DataError(
                f"dataset '{builder.name}' could not be written to {builder.data_dir}: {e}. "
                f"Free space there, check that the folder can be written, or choose another data_dir"
            ) from e
    finally:
        tfds.enable_progress_bar()


@contextlib.contextmanager
def _cleaned(target: pathlib.Path) -> Iterator[None]:
    """Locks the folder above `target`, and removes the unfinished copies of `target` in it.

    If another process holds the lock, it is writing such a copy now. Then nothing is removed.
    """
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(files.locked(folder))
        except BlockingIOError:
            _log.info("another process is making %s, too", target)
        else:
            for unfinished in folder.glob(f"incomplete.??????_{target.name}"):
                shutil.rmtree(unfinished, ignore_errors=True)
        yield
