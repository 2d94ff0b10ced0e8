"""Reads state dicts of PyTorch programs from files, and takes the weights of a network from them."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from superserve_jax import errors

StateDict = Mapping[str, Any]

_WRAPPERS = ("state_dict", "model")  # the key of the state dict in a file that also holds, say, an epoch or an optimiser
_BUFFERS = r"num_batches_tracked|position_ids|token_type_ids"  # PyTorch's buffers, which are not weights


@dataclasses.dataclass(frozen=True)
class Source:
    """Where to find one of our parameters in a state dict.

    Args:
      names: the parameter's possible names in the state dict.
      shape: the shape of our parameter.
      axes: for each axis of our parameter, the axis in the state dict. None if the axes are the same.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None

    @property
    def shape_there(self) -> tuple[int, ...]:
        """The parameter's shape in the state dict.

        >>> Source(("conv.weight",), (3, 3, 8, 16), (2, 3, 1, 0)).shape_there
        (16, 8, 3, 3)
        """
        return self.shape if self.axes is None else tuple(n for _, n in sorted(zip(self.axes, self.shape, strict=True)))


def read(state: StateDict | str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The weights of a state dict as {name: array}, without epoch, optimiser, buffers and prefixes.

    Args:
      state: a mapping of arrays or tensors, or the path of a file with such a mapping. The formats are .npz, .safetensors
        (needs the library safetensors), and .pth, .pt or .bin (needs torch, which is called with `weights_only=True`).

    Raises:
      ConversionError: the file is missing, damaged or of another format, it holds no weights, or a library is missing.
    """
    content = state if isinstance(state, Mapping) else _read_file(pathlib.Path(state))
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    weights = {str(name): value for name, value in content.items() if not re.search(rf"\b({_BUFFERS})$", str(name))}
    if not weights:
        raise errors.ConversionError(f"{'the state dict' if isinstance(state, Mapping) else state} holds no weights")
    if all(name.startswith("module.") for name in weights):  # torch.nn.DataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return {name: _array(name, value) for name, value in weights.items()}


def take(weights: Mapping[str, np.ndarray], sources: Mapping[str, Source], *, what: str, hint: str) -> dict[str, np.ndarray]:
    """The weights of a network from a state dict, as float32 arrays with our axes.

    Args:
      weights: the result of `read`.
      sources: for each of our parameters, where to find it.
      what: a description of the network, for the error message.
      hint: what the user should check, for the error message.

    Raises:
      ConversionError: weights are missing, surplus, not finite or of another shape. The message lists all of them.
    """
    left, found, problems = dict(weights), {}, []
    for ours, source in sources.items():
        name = next((n for n in source.names if n in left), None)
        if name is None:
            problems.append(f"missing: {' or '.join(source.names)} of shape {source.shape_there}")
            continue
        value = left.pop(name)
        if value.shape != source.shape_there:
            problems.append(f"misshapen: {name} has shape {value.shape} instead of {source.shape_there}")
        elif not np.isfinite(value).all():
            problems.append(f"not finite: {name}")
        else:
            found[ours] = np.array(value if source.axes is None else value.transpose(source.axes), np.float32, order="C")
    problems += [f"surplus: {name} of shape {value.shape}" for name, value in left.items()]
    if problems:
        raise errors.ConversionError(
            f"{len(problems)} of the weights do not fit {what}; {hint}\n" + "\n".join(f"  {p}" for p in sorted(problems))
        )
    return found


def _array(name: str, value: Any) -> np.ndarray:
    if callable(getattr(value, "detach", None)):  # a torch tensor; NumPy cannot read bfloat16 or memory of another device
        value = value.detach().cpu().float().numpy()
    array = np.asarray(value)
    try:
        return array if array.dtype == np.float32 else array.astype(np.float32)
    except (TypeError, ValueError) as e:
        raise errors.ConversionError(
            f"'{name}' must be an array of numbers, got {type(value).__name__}; give only the weights"
        ) from e


# -- files --------------------------------------------------------------------------------------------------------------


def _read_npz(path: pathlib.Path) -> StateDict:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_safetensors(path: pathlib.Path) -> StateDict:
    import safetensors.numpy

    return safetensors.numpy.load_file(path)


def _read_torch(path: pathlib.Path) -> StateDict:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.load(path, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[pathlib.Path], StateDict]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pth", ".pt", ".bin"), _read_torch),
}


def _read_file(path: pathlib.Path) -> StateDict:
    if path.suffix not in _READERS:
        raise errors.ConversionError(f"{path} has a format that cannot be read; the formats are {', '.join(_READERS)}")
    if not path.is_file():
        raise errors.ConversionError(f"there is no weight file {path}; check the path")
    try:
        state = _READERS[path.suffix](path)
    except ImportError as e:
        raise errors.ConversionError(
            f"reading {path} needs the library {e.name}, which cannot be imported ({e}): install it with "
            f"`pip install 'superserve-jax[convert]'`"
        ) from e
    except Exception as e:  # each library raises its own errors for a damaged file
        raise errors.ConversionError(f"{path} is damaged, or is not a {path.suffix} file of weights: {e}") from e
    if not isinstance(state, Mapping):
        raise errors.ConversionError(f"{path} holds a {type(state).__name__} instead of a state dict")
    return state
