"""Cuts one served subnet out of an export: its own weights, with folded statistics, and the contract of its inputs."""

import dataclasses
import functools
import json
import operator
from typing import Any

import jax
import numpy as np

from superserve_jax import errors, families, ops
from superserve_jax.exports import Model
from superserve_jax.families.ofa_mobilenet import OFAMobileNetConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.families.vit import ViTConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig, SequenceConfig, TracedConfig
from superserve_jax.supernets.programs import Program

CONTRACT_FORMAT = "superserve-jax subnet"
CONTRACT_SCHEMA = 1
CONTRACT_KEY = "superserve"
"""The name of the contract in the metadata of ONNX and safetensors files."""
INPUTS, LOGITS, BATCH, TOKENS = "inputs", "logits", "batch", "tokens"
"""Names of the input, of the output, and of the axes of any length."""

_fold = jax.jit(Program.fold, static_argnums=0)  # made once, so that a process compiles it once for each subnet


@dataclasses.dataclass(frozen=True)
class Extraction:
    """A subnet without its SuperNet.

    Args:
      program: the subnet's sliced program.
      params: the parameters of `program.infer_folded`, float32, as {dotted path: array}.
      statistics: float32 (2, N), for the norms that could not be folded.
      contract: what a user of a file with the network must know, as plain values for `json.dump` (see docs/extract.md).
    """

    program: Program
    params: dict[str, np.ndarray]
    statistics: np.ndarray
    contract: dict[str, Any]

    @property
    def config(self) -> FamilyConfig:
        """The config of the whole family."""
        return self.program.config

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The name that each parameter has in a file. A folded bias belongs to its convolution, so it is named after it.

        >>> import superserve_jax as ss
        >>> take(ss.load("digits"), 0).names["stem.0.norm.bias"]
        'stem.0.conv.bias'
        """
        moved = {fold.bias: f"{fold.kernel.rpartition('.')[0]}.bias" for fold in self.program.folds.values()}
        return {path: path if moved.get(path, path) in self.params else moved.get(path, path) for path in self.params}

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """All arrays of the subnet by their names in a file: parameters, and statistics of norms that are not folded."""
        found = {name: self.params[path] for path, name in self.names.items()}
        sizes = self.config.norm_sizes(self.program.limits)
        for norm, start in self.program.offsets.items():
            if norm not in self.program.folds:
                mean, variance = self.statistics[:, start : start + sizes[norm]]
                found |= {f"{norm}.mean": mean, f"{norm}.variance": variance}
        return found


def take(model: Model, index: int = -1) -> Extraction:
    """Cuts a served subnet out of an export.

    Args:
      model: the export.
      index: the place of the subnet in `model.served`, which ascends in FLOPs. -1 is the largest.

    Raises:
      SubnetError: there is no such place, or the index is not an integer.

    >>> import superserve_jax as ss
    >>> subnet = take(ss.load("digits"), 0)
    >>> subnet.contract["input"]["shape"], subnet.contract["input"]["dtype"]
    (['batch', 32, 32, 1], 'uint8')
    """
    count = len(model.served)
    try:
        index = operator.index(index)
    except TypeError as e:
        raise errors.SubnetError(f"a subnet's index must be an integer from 0 to {count - 1}, got {index!r}") from e
    if not -count <= index < count:
        raise errors.SubnetError(
            f"subnet {index} is not one of the {count} served subnets of {model.path}; give an index from 0 (the smallest) to "
            f"{count - 1}, or -1 for the largest"
        )
    served = model.served[index]
    program, statistics = programs.sliced(model.config, served.subnet), model.statistics_of(served.subnet)
    folded = _fold(program, dict(model.params), statistics)
    network = model.config.model if isinstance(model.config, SingleSubnetConfig) else model.config
    contract = {
        "format": CONTRACT_FORMAT,
        "schema": CONTRACT_SCHEMA,
        "family": model.config.family,
        "subnet": served.subnet.to_json(),
        "index": index % count,
        "served_subnets": count,
        "accuracy": served.accuracy,
        "measured": model.manifest["measured"],
        "flops": served.flops,
        "params": served.params,
        "input": input_contract(model.config),
        "output": {"name": LOGITS, "shape": [BATCH, model.config.num_classes], "dtype": "float32"},
        "class_names": model.class_names,
        "vocabulary": {**model.manifest["vocabulary"], "tokens": model.vocabulary} if model.vocabulary else None,
        "sizes": program.limits,
        "norm_epsilon": None if isinstance(network, TracedConfig) else ops.EPS,
        "config": families.config_to_json(model.config),
    }
    return Extraction(
        program=program,
        params={path: np.asarray(value, np.float32) for path, value in folded.items()},
        statistics=statistics,
        contract=json.loads(json.dumps(contract)),  # lists in place of tuples, as a reader of the file gets it
    )


def input_contract(config: FamilyConfig, *, has_network: bool = True) -> dict[str, Any]:
    """Name, shape and dtype of the inputs, and how to make them.

    Args:
      config: the family's config.
      has_network: whether the file has the network, which scales and normalises raw pixels itself.
    """
    spec = config.input_spec(1)
    found = {"name": INPUTS, "shape": [BATCH, *spec.shape[1:]], "dtype": str(spec.dtype)}
    if isinstance(config, SequenceConfig):
        found["shape"][1] = TOKENS
        types = config.token_types
        typed = "inputs[..., 0] are token ids, inputs[..., 1] token types. " if types > 1 else ""
        ranges = f"Token ids are from 0 to {config.vocab_size - 1}. "
        ranges += f"Token types are from 0 to {types - 1}. " if types > 1 else ""
        about = (
            f"{typed}{ranges}Positions with id {config.pad_id} are padding: no token attends to them, unless a sequence is "
            f"all padding. Pad the sequences of a batch at the end to one length, from 1 to {config.max_length} tokens. "
            "More padding does not change the logits."
        )
        names = ("max_length", "vocab_size", "pad_id", "token_types")
        return {**found, "about": about, **{name: getattr(config, name) for name in names}}
    about = "Raw inputs as the server takes them, with a batch axis in front."
    if isinstance(config, OFAResNetConfig | OFAMobileNetConfig | ViTConfig):
        by_itself = "The network itself scales and normalises them with mean and std."
        first = "Compute (x / 255 - mean) / std first; mean and std are in config."
        raw = f"Raw pixels from 0 to 255, channels last. {by_itself if has_network else first}"
        about = raw if spec.dtype == np.uint8 else "Normalised images, channels last."
    return {**found, "about": about}
