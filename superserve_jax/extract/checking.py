"""Runs an extracted file on random inputs, and compares its logits with the SuperNet's own program."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export

from superserve_jax.exports import Model
from superserve_jax.extract.extraction import INPUTS, Extraction
from superserve_jax.extract.formats import Format
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig, SequenceConfig
from superserve_jax.supernets.programs import Program

TOLERANCE = 1e-4
"""The largest difference between a file's logits and ours, relative to the largest logit."""

_BATCH = 3
_infer = jax.jit(Program.infer, static_argnums=0)  # made once, so that a process compiles it once for each subnet


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of comparing a file's logits with the server's.

    Args:
      ran_with: the library that ran the file, with its version; None if they were not compared.
      difference: the largest difference of a logit, divided by the largest logit; None if they were not compared.
      not_checked: why they were not compared; None if they were.
    """

    ran_with: str | None = None
    difference: float | None = None
    not_checked: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether the difference is above the tolerance, or a logit is NaN."""
        return self.difference is not None and not self.difference <= TOLERANCE


def check(model: Model, subnet: Extraction, format: Format, content: bytes) -> Check:
    """Compares a file with the subnet's program, which reads the export's own weights and statistics.

    Weights only are not compared, nor is ONNX without the package onnxruntime. If all logits are zero, as for random weights
    without statistics, equal logits would prove nothing.
    """
    if format == "safetensors":
        return Check(not_checked="the file has only weights")
    if format == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        return Check(not_checked="the package onnxruntime is missing: pip install onnxruntime")
    inputs = random_inputs(subnet.config, _BATCH)
    with jax.default_device(_exact_device()), jax.default_matmul_precision("float32"):
        expected = logits(model, subnet, inputs)
        if not expected.any():
            return Check(not_checked="all logits are zero")
        ran_with, run = _runner(format, content)
        found = np.asarray(run(inputs))
    return Check(ran_with, float(np.abs(found - expected).max() / np.abs(expected).max()))


def _exact_device() -> Any:
    """The CPU, since a GPU may round the factors of products to TF32. None (the default device) if jax cannot use a CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names only other devices
        return None


def logits(model: Model, subnet: Extraction, inputs: np.ndarray) -> np.ndarray:
    """Logits of the subnet's program without folding, as the server computes them."""
    program = subnet.program
    shapes = programs.used_leaves(program)
    weights = {name: np.asarray(program.cut(name, model.params, shape)) for name, shape in shapes.items()}
    rest = model.statistics_of(program.envelope), program.active(program.envelope)
    return np.asarray(_infer(program, weights, inputs, *rest))


def random_inputs(config: FamilyConfig, batch: int, *, length: int | None = None, seed: int = 0) -> np.ndarray:
    """Random pixels, token ids or values. Sequences have different lengths, and the first is the longest.

    Args:
      config: the family's config.
      batch: the number of inputs.
      length: the number of tokens; the longest if left out.
      seed: of the random generator.

    >>> from superserve_jax.families.dynabert import DynaBERTConfig
    >>> inputs = random_inputs(DynaBERTConfig(max_length=8), 2)
    >>> inputs.shape, [sum(ids > 0).item() for ids in inputs[..., 0]]
    ((2, 8, 2), [8, 5])
    """
    rng = np.random.default_rng(seed)
    if isinstance(config, SequenceConfig):
        shape = config.input_spec(batch, length=length).shape[:2]
        ids = rng.integers(0, config.vocab_size - 1, shape)
        lengths = np.concatenate([[shape[1]], rng.integers(1, max(shape[1], 2), batch - 1)])
        types, mask = rng.integers(0, config.token_types, shape), np.arange(shape[1]) < lengths[:, None]
        return config.pack(ids + (ids >= config.pad_id), types, mask=mask, length=length)
    spec = config.input_spec(batch)
    if spec.dtype == np.uint8:
        return rng.integers(0, 256, spec.shape, np.uint8)
    is_integer = np.issubdtype(spec.dtype, np.integer) or spec.dtype == bool
    return (rng.integers(0, 2, spec.shape) if is_integer else rng.normal(size=spec.shape)).astype(spec.dtype)


def _runner(format: Format, content: bytes) -> tuple[str, Callable[[np.ndarray], Any]]:
    """A description of the library that runs a file, and a function that runs it."""
    if format == "stablehlo":
        return f"jax {jax.__version__}", jax.jit(export.deserialize(bytearray(content)).call)
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return f"onnxruntime {onnxruntime.__version__}", lambda inputs: session.run(None, {INPUTS: inputs})[0]
