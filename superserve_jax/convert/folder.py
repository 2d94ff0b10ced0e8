"""Reads JSON files and weights from a directory of Hugging Face's `save_pretrained`."""

import json
import pathlib
from typing import Any

import numpy as np

from superserve_jax import errors, files
from superserve_jax.convert import state_dict

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in this order; each may also be in parts, with an index
_OTHER = ("tf_model.h5", "flax_model.msgpack", "adapter_model.safetensors", "adapter_model.bin", "model.onnx")
_MOST_BYTES = 64 << 20  # of a JSON file


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConversionError if the file is missing, damaged, or holds no object."""
    if not path.exists():
        near = ", ".join(sorted(f.name for f in path.parent.iterdir())[:5]) if path.parent.is_dir() else "no such directory"
        raise errors.ConversionError(
            f"{path.parent} has no {path.name} ({near or 'it is empty'}); give a directory that save_pretrained wrote"
        )
    try:
        found = json.loads(files.read_bytes(path, most=_MOST_BYTES))
    except (OSError, RecursionError, ValueError) as e:
        raise errors.ConversionError(f"{path} is damaged or cannot be read: {errors.one_line(e)}; save it again") from e
    if not isinstance(found, dict):
        raise errors.ConversionError(f"{path} must hold a JSON object, got {type(found).__name__}; save it again")
    return found


def read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The weights of a directory, from one file or from several parts. Raises the errors of `state_dict.read`."""
    for name in _WEIGHTS:
        if (folder / name).exists():
            return state_dict.read(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_parts(index)
    others = [name for name in _OTHER if (folder / name).exists()]
    what = f"only {', '.join(others)}, which cannot be read" if others else "none"
    hint = "; merge the adapter into its model first, by merge_and_unload()" if "adapter" in "".join(others) else ""
    raise errors.ConversionError(
        f"{folder} needs weights as {' or '.join(_WEIGHTS)}, and has {what}{hint}; save the model again with save_pretrained"
    )


def _read_parts(index: pathlib.Path) -> dict[str, np.ndarray]:
    """The weights in the files that an index names."""
    places = read_json(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and all(isinstance(v, str) for v in places.values()) else set()
    if not names or any(name != pathlib.Path(name).name for name in names):
        raise errors.ConversionError(f"{index} must map each weight to a file of its own directory; save the model again")
    weights: dict[str, np.ndarray] = {}
    for name in sorted(names):
        weights |= state_dict.read(index.parent / name)
    return weights
