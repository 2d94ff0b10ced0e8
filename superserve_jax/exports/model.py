"""A loaded export: a SuperNet that knows which of its subnets to serve."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import dtypes, errors
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import SequenceConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Served:
    """A subnet that an export offers for serving.

    Args:
      subnet: the subnet.
      accuracy: top-1 accuracy on test data with the subnet's own statistics, from 0 to 1. None if it is unknown, as for
        converted weights without labelled data.
      accuracy_shared: the same with the statistics of the largest subnet, or None if it was not measured.
      flops: multiply-adds per input.
      params: number of weights of the subnet on its own.
      profiled_half: whether all accuracies come from the profiling half of the test split. A replay then sends the other
        half. False in exports of older versions, which measured on the whole split.
      accuracy_bfloat16: `accuracy` if the network computes in bfloat16, or None if it was not measured.
    """

    subnet: Subnet
    accuracy: float | None
    accuracy_shared: float | None
    flops: int
    params: int
    profiled_half: bool = False
    accuracy_bfloat16: float | None = None

    def __post_init__(self):
        if not isinstance(self.subnet, Subnet):
            raise errors.ConfigError(f"a served subnet must be a Subnet, got {self.subnet!r}")
        for value in (self.accuracy, self.accuracy_shared, self.accuracy_bfloat16):
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise errors.ConfigError(f"the accuracy of a served subnet must be a fraction from 0 to 1, got {value!r}")
        for value in (self.flops, self.params):
            if not isinstance(value, int) or value < 0:
                raise errors.ConfigError(f"flops and params of a served subnet must be ints from 0 up, got {value!r}")
        if not isinstance(self.profiled_half, bool):
            raise errors.ConfigError(f"profiled_half of a served subnet must be true or false, got {self.profiled_half!r}")

    @property
    def known_accuracy(self) -> float:
        """The accuracy that a server may promise: `accuracy`, or 0 if it is unknown."""
        return 0.0 if self.accuracy is None else self.accuracy

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        data = {**dataclasses.asdict(self), "subnet": self.subnet.to_json()}
        if self.accuracy_bfloat16 is None:
            del data["accuracy_bfloat16"]  # so that older versions, which do not know it, can read the export
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Served":
        """The inverse of `to_json`. Raises ConfigError if `data` does not have this form."""
        with errors.refusing(errors.ConfigError, "not a served subnet as `Served.to_json` gives it"):
            return Served(**{**data, "subnet": Subnet.from_json(data["subnet"])})


class Model(SuperNet):
    """A loaded export.

    Args:
      path: the export's directory.
      manifest: the whole manifest, as plain values.
      served: the subnets to serve with their accuracies, in ascending order of FLOPs.
      text_vocabulary: how text becomes token ids, or None if the inputs are not text.
      *args: config, parameters and statistics, as for `SuperNet`.
    """

    def __init__(
        self,
        path: pathlib.Path,
        manifest: dict[str, Any],
        served: tuple[Served, ...],
        text_vocabulary: Vocabulary | None,
        *args: Any,
    ):
        super().__init__(*args)
        self.path, self.manifest, self.served = path, manifest, served
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])  # of the logits; empty if unknown
        self._vocabulary = text_vocabulary

    def __repr__(self) -> str:
        known = [s.accuracy for s in self.served if s.accuracy is not None]
        accuracies = f"{min(known):.4g} to {max(known):.4g}" if known else "that were not measured"
        return (
            f"<Model {self.config.family} from {self.path}: {len(self.served)} subnets with accuracies {accuracies}, "
            f"{self.config.num_classes} classes>"
        )

    @property
    def largest(self) -> Subnet:
        """The served subnet with the most FLOPs, which a call runs by default."""
        return self.subnets[-1]

    @property
    def subnets(self) -> tuple[Subnet, ...]:
        """The served subnets, in ascending order of FLOPs."""
        return tuple(s.subnet for s in self.served)

    def accuracies(self, compute_dtype: ComputeDtype = "float32") -> dict[Subnet, float]:
        """The accuracy of each served subnet that a server may promise if it computes in this dtype; 0 if it is unknown.

        Raises ConfigError if accuracies were measured in float32, but not in `compute_dtype`.
        """
        dtypes.check(compute_dtype)
        if compute_dtype == "float32":
            return {s.subnet: s.known_accuracy for s in self.served}
        if missing := [s for s in self.served if s.accuracy is not None and s.accuracy_bfloat16 is None]:
            raise errors.ConfigError(
                f"{self.path} has no accuracies in {compute_dtype} for {len(missing)} of {len(self.served)} subnets: run "
                f"`superserve evaluate RUN --{compute_dtype}` and `superserve export RUN`, or serve in float32"
            )
        return {s.subnet: s.accuracy_bfloat16 or 0.0 for s in self.served}

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The token of each id. Empty if the inputs are not text."""
        return self._vocabulary.tokens if self._vocabulary else ()

    def encode(
        self, text: str | Sequence[str], second: str | Sequence[str] | None = None, *, length: int | None = None
    ) -> np.ndarray:
        """Turns text into inputs, exactly as in training.

        Args:
          text: one text, or a list of texts.
          second: the second text of a pair, such as a hypothesis, or a list of them.
          length: pad to this number of tokens; `config.max_length` if left out.

        Returns:
          One input, as `Server.submit` takes it, for one text. A batch, as the model takes it, for a list.

        Raises:
          InputError: the export has no vocabulary, or the text cannot be encoded.
          ConfigError: `length` is not from 1 to `config.max_length`.
        """
        if self._vocabulary is None or not isinstance(self.config, SequenceConfig):
            raise errors.InputError(f"{self.path} has no vocabulary, so it cannot encode text; give arrays to the model")
        single = isinstance(text, str)
        if second is not None and isinstance(second, str) != single:
            raise errors.InputError("text and second must each be one text, or each be a list of texts")
        inputs = self._vocabulary.encode(
            [text] if isinstance(text, str) else text,
            [second] if isinstance(second, str) else second,
            length=self.config.input_spec(1, length=length).shape[1],
            token_types=self.config.token_types,
        )
        return inputs[0] if single else inputs
