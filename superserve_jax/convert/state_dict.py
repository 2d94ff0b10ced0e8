"""State dicts of PyTorch programs: reading them from a file, and taking the weights that a network expects out of them."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from superserve_jax import errors

StateDict = Mapping[str, Any]

_WRAPPERS = ("state_dict", "model")  # under which training programs save it, beside epoch and optimiser
_BUFFERS = r"num_batches_tracked|position_ids|token_type_ids"  # what PyTorch keeps beside weights


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a weight of ours stands in a state dict.

    Args:
      names: the names it may have there.
      shape: ours.
      axes: which of its axes there is each of our axes; None where they are the same.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None

    @property
    def shape_there(self) -> tuple[int, ...]:
        """The shape that it must have in the state dict.

        >>> Source(("conv.weight",), (3, 3, 8, 16), (2, 3, 1, 0)).shape_there
        (16, 8, 3, 3)
        """
        return self.shape if self.axes is None else tuple(n for _, n in sorted(zip(self.axes, self.shape, strict=True)))


def read(state: StateDict | str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The weights of a state dict, {name: array}, without what programs wrap around them.

    Args:
      state: a mapping of arrays or tensors, or the path of a file that holds one: .npz, .safetensors (needs the library of
        that name), .pth, .pt or .bin (needs torch, which is told to load weights only).

    Raises:
      ConversionError: the file is not there, damaged or of another kind, a library is missing, or there are no weights.
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
    """The weights that `sources` asks for, float32, with our axes.

    Args:
      weights: as `read` returns them.
      sources: {our name: where it stands}.
      what: the network that they should make, for the error.
      hint: what to check where they do not.

    Raises:
      ConversionError: weights are missing, surplus, misshapen or not finite; all of them are listed.
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
    if callable(getattr(value, "detach", None)):  # a torch tensor; numpy knows neither bfloat16 nor other devices
        value = value.detach().cpu().float().numpy()
    array = np.asarray(value)
    try:
        return array if array.dtype == np.float32 else array.astype(np.float32)
    except (TypeError, ValueError) as e:
        raise errors.ConversionError(f"'{name}' is no array of numbers but {type(value).__name__}") from e


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


_READERS: dict[str, tuple[Callable[[pathlib.Path], StateDict], str]] = {
    ".npz": (_read_npz, "numpy"),
    ".safetensors": (_read_safetensors, "safetensors"),
    ".pth": (_read_torch, "torch"),
    ".pt": (_read_torch, "torch"),
    ".bin": (_read_torch, "torch"),
}


def _read_file(path: pathlib.Path) -> StateDict:
    if path.suffix not in _READERS:
        raise errors.ConversionError(f"{path} is not of a kind that can be read; those are {', '.join(_READERS)}")
    if not path.is_file():
        raise errors.ConversionError(f"no weight file {path}")
    reader, library = _READERS[path.suffix]
    try:
        state = reader(path)
    except ImportError as e:
        raise errors.ConversionError(
            f"{path} needs the library {library}, which cannot be imported ({e}): install it with "
            f"`pip install 'superserve-jax[convert]'`"
        ) from e
    except Exception as e:  # each library raises kinds of its own for a damaged file
        raise errors.ConversionError(f"{path} is damaged, or is no {path.suffix} file of weights: {e}") from e
    if not isinstance(state, Mapping):
        raise errors.ConversionError(f"{path} holds no state dict but {type(state).__name__}")
    return state
