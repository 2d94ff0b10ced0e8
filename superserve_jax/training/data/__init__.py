"""The data that a SuperNet is trained on: its configs, and streams of batches."""

from superserve_jax.training.data.registry import (
    DataConfig,
    Dataset,
    FolderConfig,
    TextConfig,
    check_fit,
    check_kind,
    data_from_json,
    data_to_json,
    from_arrays,
    open,
)

__all__ = [
    "DataConfig",
    "Dataset",
    "FolderConfig",
    "TextConfig",
    "check_fit",
    "check_kind",
    "data_from_json",
    "data_to_json",
    "from_arrays",
    "open",
]
