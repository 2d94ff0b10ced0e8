"""Turns an extracted subnet into the bytes of a file: ONNX, StableHLO (of `jax.export`) or safetensors."""

import importlib.util
import json
import os
import pathlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from superserve_jax import errors
from superserve_jax.extract import extraction, onnx_dynabert, onnx_ofa_resnet
from superserve_jax.extract.extraction import BATCH, CONTRACT_KEY, TOKENS, Extraction
from superserve_jax.extract.onnx_graph import Graph
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets.family import SequenceConfig, TracedConfig

Format = Literal["onnx", "stablehlo", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)

_PACKAGES = {"onnx": "onnx", "stablehlo": "flatbuffers", "safetensors": "safetensors"}  # what each format needs
_BUILDERS = {OFAResNetConfig: onnx_ofa_resnet.build, DynaBERTConfig: onnx_dynabert.build}
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_MOST_BYTES = {"onnx": 2**31 - 2**24, "stablehlo": 2**31 - 2**24}  # protobuf and flatbuffers end at 2 GiB


def format_of(path: str | os.PathLike[str], format: str | None = None) -> Format:
    """The format of a file: the given one, or else the ending of its name.

    Raises UnknownNameError for an unknown format, ConfigError for a name without a known ending.

    >>> format_of("digits.onnx")
    'onnx'
    """
    ending = pathlib.PurePath(path).suffix.removeprefix(".")
    if format is None and ending not in FORMATS:
        raise errors.ConfigError(
            f"the name {path} does not say which format to write; give a format: onnx, stablehlo or safetensors, or a name "
            "that ends in one, such as subnet.onnx"
        )
    found = format or ending
    errors.check_name("format", found, FORMATS)
    return found  # type: ignore[return-value]


def contract_of(subnet: Extraction, format: Format) -> dict[str, Any]:
    """The contract in a file. A file of weights only has no network that scales and normalises pixels."""
    if format != "safetensors":
        return subnet.contract
    return {**subnet.contract, "input": extraction.input_contract(subnet.config, has_network=False)}


def content(subnet: Extraction, format: Format) -> bytes:
    """The content of a subnet's file.

    Args:
      subnet: the subnet.
      format: the format. "onnx" and "stablehlo" run on batches of any size; "safetensors" holds only the weights.

    Raises:
      ExportError: the family cannot have this format, the weights are too large for it, or its package is missing.
      UnknownNameError: there is no such format.
    """
    errors.check_name("format", format, FORMATS)
    if format != "safetensors" and isinstance(subnet.config, TracedConfig):
        raise errors.ExportError(
            f"family '{subnet.config.family}' is traced for each batch size, so format {format} cannot hold it; give the "
            "format safetensors for its weights"
        )
    if format == "onnx" and type(subnet.config) not in _BUILDERS:  # a subclass may compute something else
        known = " and ".join(config.family for config in _BUILDERS)
        raise errors.ExportError(
            f"format onnx knows the families {known}, not '{subnet.config.family}'; give the format stablehlo to run this "
            "subnet with jax, or safetensors for its weights"
        )
    if importlib.util.find_spec(_PACKAGES[format]) is None:
        raise errors.ExportError(
            f"format {format} needs the package '{_PACKAGES[format]}': pip install 'superserve-jax[extract]'"
        )
    size = sum(value.nbytes for value in subnet.weights.values())
    if size > _MOST_BYTES.get(format, size):
        raise errors.ExportError(
            f"the weights have {size:,} bytes, and a file of format {format} holds less than 2 GiB; give the format "
            "safetensors"
        )
    return {"onnx": _onnx, "stablehlo": _stablehlo, "safetensors": _safetensors}[format](subnet)


def _onnx(subnet: Extraction) -> bytes:
    graph = Graph()
    _BUILDERS[type(subnet.config)](graph, subnet)
    return graph.serialize(contract_of(subnet, "onnx"))


def _stablehlo(subnet: Extraction) -> bytes:
    weights: Any = subnet.params, subnet.statistics  # NumPy arrays, which become constants of the program

    def run(inputs: jax.Array) -> jax.Array:
        return subnet.program.infer_folded(weights[0], inputs, weights[1], jnp.zeros(0, jnp.int32))

    described = subnet.contract["input"]
    limits = (f"{TOKENS} <= {subnet.config.max_length}",) if isinstance(subnet.config, SequenceConfig) else ()
    shape = export.symbolic_shape(", ".join(map(str, described["shape"])), constraints=limits)
    try:
        with jax.default_matmul_precision("float32"):  # GPUs and TPUs must not round the factors of products
            made = export.export(jax.jit(run), platforms=_PLATFORMS)(jax.ShapeDtypeStruct(shape, described["dtype"]))
    except MemoryError:
        raise
    except Exception as e:  # any exception: the network may be a user's code
        raise errors.ExportError(
            f"the network of family '{subnet.config.family}' cannot be traced for batches of any size: {type(e).__name__}: "
            f"{errors.one_line(e)[:200]}; in its code, write x.shape[0] in place of len(x), or give the format safetensors"
        ) from e
    return bytes(made.serialize())


def _safetensors(subnet: Extraction) -> bytes:
    import safetensors.numpy

    arrays = {name: np.ascontiguousarray(value) for name, value in subnet.weights.items()}
    return safetensors.numpy.save(arrays, metadata={CONTRACT_KEY: json.dumps(contract_of(subnet, "safetensors"))})


def snippet(path: str | os.PathLike[str], format: Format, contract: dict[str, Any]) -> str:
    """Five lines of Python that use the file. They do not need this package."""
    described = contract["input"]
    sizes = {BATCH: 1, TOKENS: described.get("max_length")}
    shape = tuple(sizes.get(size, size) for size in described["shape"])
    name, axes = str(path), ", ".join(map(str, described["shape"]))
    inputs = f'inputs = np.zeros({shape}, "{described["dtype"]}")  # {axes}'
    lines = {
        "onnx": (
            "import numpy as np, onnxruntime",
            f"session = onnxruntime.InferenceSession({name!r})",
            inputs,
            f'logits = session.run(None, {{"{described["name"]}": inputs}})[0]',
            "print(logits.argmax(-1))",
        ),
        "stablehlo": (
            "import jax, pathlib, numpy as np, jax.export",
            f"run = jax.jit(jax.export.deserialize(pathlib.Path({name!r}).read_bytes()).call)",
            inputs,
            "logits = run(inputs)",
            "print(logits.argmax(-1))",
        ),
        "safetensors": (
            "import json, safetensors",
            f'with safetensors.safe_open({name!r}, "numpy") as file:',
            f'    contract = json.loads(file.metadata()["{CONTRACT_KEY}"])',
            "    weights = {name: file.get_tensor(name) for name in file.keys()}",
            "print({name: value.shape for name, value in weights.items()})",
        ),
    }
    return "\n".join(lines[format])
