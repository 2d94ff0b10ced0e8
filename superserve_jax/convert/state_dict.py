"""Reads state dicts of PyTorch programs from files, and takes the weights of a network from them."""

import dataclasses
import math
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors, files

StateDict = Mapping[str, Any]

_WRAPPERS = ("state_dict", "model")  # the key of the state dict in a file that also holds, say, an epoch or an optimiser
_BUFFERS = r"num_batches_tracked|position_ids|token_type_ids"  # PyTorch's buffers, which are not weights
_SHOWN = 2  # the names of weights that a message shows of each kind of problem
_REAL = "biufV"  # the kinds of dtypes that hold real numbers; "V" is bfloat16 and its like
_SAFE_TORCH = 2, 6  # before this version, `weights_only=True` could be tricked into running code (CVE-2025-32434)


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
      ConversionError: the file is missing, damaged or of another format, or its library is missing. Or it holds no weights, or
        one that is not a dense array of real numbers. Or it holds Python objects. They are never unpickled.
    """
    content, most_bytes = state, math.inf
    if not isinstance(content, Mapping):
        with errors.refusing(errors.ConversionError, f"expected a mapping of arrays or the path of a file, got {state!r}"):
            path = files.user_path(state)  # type: ignore[arg-type]
        content, most_bytes = _read_file(path)
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    weights = {str(name): value for name, value in content.items() if not re.search(rf"\b({_BUFFERS})$", str(name))}
    if not weights:
        raise errors.ConversionError(f"{'the state dict' if isinstance(state, Mapping) else state} holds no weights")
    if all(name.startswith("module.") for name in weights):  # torch.nn.DataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    arrays = {}
    for name, value in weights.items():
        arrays[name] = _array(name, value, most_bytes=most_bytes)
        most_bytes -= arrays[name].nbytes
    return arrays


def take(weights: Mapping[str, np.ndarray], sources: Mapping[str, Source], *, what: str, hint: str) -> dict[str, np.ndarray]:
    """The weights of a network from a state dict, as float32 arrays with our axes.

    Args:
      weights: the result of `read`.
      sources: for each of our parameters, where to find it.
      what: a description of the network, for the error message.
      hint: what the user should check, for the error message.

    Raises:
      ConversionError: weights are missing, surplus, not finite or of another shape. The message counts them, and names some of
        each kind.
    """
    left, found = dict(weights), {}
    problems: dict[str, list[str]] = {"missing": [], "of another shape": [], "not finite": [], "surplus": []}
    for ours, source in sources.items():
        name = next((n for n in source.names if n in left), None)
        if name is None:
            problems["missing"].append(f"{' or '.join(source.names)} {source.shape_there}")
            continue
        value = left.pop(name)
        if value.shape != source.shape_there:
            problems["of another shape"].append(f"{name} {value.shape} instead of {source.shape_there}")
        elif not np.isfinite(value).all():
            problems["not finite"].append(name)
        else:
            found[ours] = np.array(value if source.axes is None else value.transpose(source.axes), np.float32, order="C")
    problems["surplus"] = [f"{name} {value.shape}" for name, value in left.items()]
    if count := sum(map(len, problems.values())):
        kinds = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names)
        raise errors.ConversionError(f"{count} of the weights do not fit {what}: {kinds}; {hint}")
    return found


def check_sizes(what: str, sizes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ConversionError, in one line, if the weights belong to a network of other sizes than the config.

    Args:
      what: a description of the weights, such as "a BERT classifier".
      sizes: for each field of the config, its size in the weights and in the config. None in the weights if they do not tell.
    """
    pairs = ((field, there, ours) for field, (there, ours) in sizes.items() if there not in (None, ours))
    if wrong := ", ".join(f"{field} must be {there}, got {ours}" for field, there, ours in pairs):
        raise errors.ConversionError(
            f"the weights are of {what} with other sizes than the config: {wrong}; change the config, or give other weights"
        )


def _some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _array(name: str, value: Any, *, most_bytes: float) -> np.ndarray:
    array, dtype, reason = value, getattr(value, "dtype", ""), "not an array of real numbers"
    try:
        if "complex" not in str(dtype):
            # A torch tensor may repeat one number without end.
            _check_size(f"'{name}'", 4 * math.prod(getattr(value, "shape", ())), most_bytes)
            if callable(getattr(value, "detach", None)):
                # A torch tensor. NumPy cannot read bfloat16 or the memory of another device.
                array = value.detach().cpu().float().numpy()
            array = np.asarray(array)
            if array.dtype.kind in _REAL and array.dtype.itemsize and not isinstance(value, np.ma.MaskedArray):
                with np.errstate(over="ignore"):  # infinity; `take` refuses it with the name of the weight
                    return array if array.dtype == np.float32 else array.astype(np.float32)
    except errors.ConversionError:
        raise
    except Exception as e:  # torch raises its own errors for sparse, quantised, nested and meta tensors
        reason = f"{type(e).__name__}: {errors.one_line(e)[:300]}"
    about = " ".join(str(v) for v in (type(value).__name__, dtype) if v)
    raise errors.ConversionError(
        f"'{name}' must be a dense array of real numbers, got {about} ({reason}); convert it where it was written, and give "
        "only the weights"
    )


# -- files --------------------------------------------------------------------------------------------------------------


def _read_npz(path: pathlib.Path) -> StateDict:
    if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle, and say how to read that
        raise zipfile.BadZipFile("it is not a zip archive")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_safetensors(path: pathlib.Path) -> StateDict:
    import safetensors.numpy

    return safetensors.numpy.load_file(path)


def _read_torch(path: pathlib.Path) -> StateDict:
    import torch  # pyright: ignore[reportMissingImports]

    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise ImportError(f"torch {torch.__version__} is too old to read files of others safely", name="torch")
    return torch.load(path, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[pathlib.Path], StateDict]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pth", ".pt", ".bin"), _read_torch),
}


def _read_file(path: pathlib.Path) -> tuple[StateDict, float]:
    """The content of a file, and how many bytes its weights may take as float32."""
    if path.suffix not in _READERS:
        raise errors.ConversionError(f"{path} has a format that cannot be read; the formats are {', '.join(_READERS)}")
    if not path.is_file():
        raise errors.ConversionError(f"there is no weight file {path}; check the path")
    most_bytes = 64 * path.stat().st_size + 2**30  # a file that holds more is made to exhaust the memory
    try:
        if zipfile.is_zipfile(path):  # also what torch writes
            with zipfile.ZipFile(path) as archive:
                _check_size(str(path), sum(entry.file_size for entry in archive.infolist()), most_bytes)
        state = _READERS[path.suffix](path)
    except errors.ConversionError:
        raise
    except ImportError as e:
        raise errors.ConversionError(
            f"reading {path} needs the library {e.name}, which cannot be imported ({e}): install it with "
            f"`pip install 'superserve-jax[convert]'`"
        ) from e
    except Exception as e:  # each library raises its own errors for a damaged file
        if isinstance(e, pickle.UnpicklingError) or re.search("allow_pickle|weights_only", str(e)):
            # Without the library's own message, which says how to run the code.
            found = re.search(r"GLOBAL ([\w.]+)", str(e))
            raise errors.ConversionError(
                f"{path} is damaged, or holds Python objects{f' ({found[1]})' if found else ''} besides weights. They could "
                "run code, so they are not read; have the weights saved alone, by torch.save(model.state_dict(), path) or "
                "as .safetensors"
            ) from None
        raise errors.ConversionError(f"{path} is damaged, or is not a {path.suffix} file of weights: {e}") from e
    if not isinstance(state, Mapping):
        raise errors.ConversionError(f"{path} holds a {type(state).__name__} instead of a state dict")
    return state, most_bytes


def _check_size(what: str, found_bytes: int, most_bytes: float) -> None:
    if found_bytes > most_bytes:
        raise errors.ConversionError(
            f"{what} claims to hold {found_bytes:,} bytes, far more than a weight file of its size can; it is damaged, or "
            "made to exhaust the memory"
        )
