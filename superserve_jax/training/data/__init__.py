"""Datasets for training. `open` reads the dataset of a config; `from_arrays` takes arrays of your own.

Start with `registry.py`, which lists the kinds of datasets. `streams.py` has the class `Dataset`: shuffled batches that a
resumed run repeats exactly. One file per kind: `images.py` (TFDS), `folder.py`, `text.py` (TFDS) and `arrays.py`.
"""

from superserve_jax.training.data.arrays import from_arrays
from superserve_jax.training.data.folder import FolderConfig
from superserve_jax.training.data.images import DataConfig
from superserve_jax.training.data.registry import AnyDataConfig, check_fit, check_kind, data_from_json, data_to_json, open
from superserve_jax.training.data.streams import Dataset, DatasetLike
from superserve_jax.training.data.text import TextConfig

__all__ = [
    "AnyDataConfig",
    "DataConfig",
    "Dataset",
    "DatasetLike",
    "FolderConfig",
    "TextConfig",
    "check_fit",
    "check_kind",
    "data_from_json",
    "data_to_json",
    "from_arrays",
    "open",
]
