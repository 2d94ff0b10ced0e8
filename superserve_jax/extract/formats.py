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
from superserve_jax.extract import onnx_dynabert, onnx_ofa_resnet
from superserve_jax.extract.extraction import BATCH, CONTRACT_KEY, TOKENS, Extraction
from superserve_jax.extract.onnx_graph import Graph
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets.family import SequenceConfig

Format = Literal["onnx", "stablehlo", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)

_PACKAGES = {"onnx": "onnx", "stablehlo": "flatbuffers", "safetensors": "safetensors"}  # what each format needs
_BUILDERS = {OFAResNetConfig: onnx_ofa_resnet.build, DynaBERTConfig: onnx_dynabert.build}
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_MOST_BYTES = {"onnx": 2**31 - 2**24, "stablehlo": 2**31 - 2**24}  # protobuf and flatbuffers end at 2 GiB


def format_of(path: str | os.PathLike[str], wanted: str | None = None) -> Format:
    """The format of a file: `wanted`, or else the ending of its name.

    Raises UnknownNameError for an unknown format, ConfigError for a name without a known ending.

    >>> format_of("digits.onnx")
    'onnx'
    """
    ending = pathlib.PurePath(path).suffix.removeprefix(".")
    if wanted is None and ending not in FORMATS:
        raise errors.ConfigError(
            f"the name {path} tells no format; give --format {' or '.join(FORMATS)}, or a name that ends in one, such as "
            "subnet.onnx"
        )
    found = wanted or ending
    errors.check_name("format", found, FORMATS)
    return found  # type: ignore[return-value]


def content(subnet: Extraction, kind: Format) -> bytes:
    """The content of a subnet's file.

    Args:
      subnet: the subnet.
      kind: the format. "onnx" and "stablehlo" run on batches of any size; "safetensors" holds only the weights.

    Raises:
      ExportError: the family cannot have this format, the weights are too large for it, or its package is missing.
      UnknownNameError: there is no such format.
    """
    errors.check_name("format", kind, FORMATS)
    if kind == "onnx" and type(subnet.config) not in _BUILDERS:  # a subclass may compute something else
        known = " and ".join(config.family for config in _BUILDERS)
        raise errors.ExportError(
            f"format onnx knows the families {known}, not '{subnet.config.family}'; use --format stablehlo to run this subnet "
            "with jax, or --format safetensors for its weights"
        )
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        raise errors.ExportError(f"format {kind} needs the package '{_PACKAGES[kind]}': pip install 'superserve-jax[extract]'")
    size = sum(value.nbytes for value in subnet.weights.values())
    if size > _MOST_BYTES.get(kind, size):
        raise errors.ExportError(
            f"the weights have {size:,} bytes, and a file of format {kind} holds less than 2 GiB; use --format safetensors"
        )
    return {"onnx": _onnx, "stablehlo": _stablehlo, "safetensors": _safetensors}[kind](subnet)


def _onnx(subnet: Extraction) -> bytes:
    graph = Graph()
    _BUILDERS[type(subnet.config)](graph, subnet)
    return graph.serialize(subnet.contract)


def _stablehlo(subnet: Extraction) -> bytes:
    weights: Any = subnet.params, subnet.statistics  # NumPy arrays, which become constants of the program

    def run(inputs: jax.Array) -> jax.Array:
        return subnet.program.infer_folded(weights[0], inputs, weights[1], jnp.zeros(0, jnp.int32))

    described = subnet.contract["input"]
    limits = (f"{TOKENS} <= {subnet.config.max_length}",) if isinstance(subnet.config, SequenceConfig) else ()
    shape = export.symbolic_shape(", ".join(map(str, described["shape"])), constraints=limits)
    try:
        made = export.export(jax.jit(run), platforms=_PLATFORMS)(jax.ShapeDtypeStruct(shape, described["dtype"]))
    except Exception as e:  # any exception: the network may be a user's code
        raise errors.ExportError(
            f"the network of family '{subnet.config.family}' cannot be traced for batches of any size: {type(e).__name__}: "
            f"{errors.one_line(e)[:200]}; in its code, write x.shape[0] in place of len(x), or use --format safetensors"
        ) from e
    return bytes(made.serialize())


def _safetensors(subnet: Extraction) -> bytes:
    import safetensors.numpy

    arrays = {name: np.ascontiguousarray(value) for name, value in subnet.weights.items()}
    return safetensors.numpy.save(arrays, metadata={CONTRACT_KEY: json.dumps(subnet.contract)})


def snippet(path: str | os.PathLike[str], kind: Format, contract: dict[str, Any]) -> str:
    """Five lines of Python that use the file. They do not need this package."""
    described = contract["input"]
    sizes = {BATCH: 1, TOKENS: described.get("max_length")}
    shape = tuple(sizes.get(size, size) for size in described["shape"])
    name, inputs = (
        str(path),
        f'inputs = np.zeros({shape}, "{described["dtype"]}")  # {", ".join(map(str, described["shape"]))}',
    )
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
    return "\n".join(lines[kind])
