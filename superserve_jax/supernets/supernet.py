"""A SuperNet: a family's config, its parameters, and the SubnetNorm statistics of the subnets that were calibrated."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.programs import Params

Norm = Literal["own", "shared"]


class SuperNet:
    """One weight-shared network that runs any of its subnets. The subnet is always an explicit argument.

    Args:
      config: the family's config.
      params: parameters of maximum size, as {dotted path: array}.
      statistics: SubnetNorm statistics by subnet, each a float32 array (2, n) of means and variances.

    >>> from superserve_jax.families.ofa_resnet import OFAResNetConfig
    >>> config = OFAResNetConfig(num_classes=3, image_size=8, channels=1, stem_width=8, stage_widths=(8,), strides=(1,),
    ...                          depths=((0, 1),), block="basic", stem_pool=False, divisor=4, mean=(0.5,), std=(0.5,))
    >>> model = SuperNet.create(config, seed=0)
    >>> model(np.zeros((2, 8, 8, 1), np.uint8), model.space.smallest())
    Traceback (most recent call last):
    superserve_jax.errors.NotCalibratedError: ...
    """

    def __init__(self, config: FamilyConfig, params: Params, statistics: Mapping[Subnet, np.ndarray] | None = None):
        self.config = config
        self.params = dict(params)
        self.statistics = dict(statistics or {})
        self.space = config.space()
        self._masked = programs.masked(config)

    @classmethod
    def create(cls, config: FamilyConfig, *, seed: int) -> "SuperNet":
        """A SuperNet with fresh weights."""
        return cls(config, programs.initial_params(config, seed))

    def __repr__(self) -> str:
        params = sum(p.size for p in self.params.values())
        return f"<SuperNet {self.config.family}: {params:,} parameters, {len(self.statistics)} calibrated subnets>"

    @property
    def largest(self) -> Subnet:
        """The largest subnet, which a call runs by default."""
        return self.space.largest()

    @property
    def calibrated(self) -> tuple[Subnet, ...]:
        """The subnets that have statistics of their own."""
        return tuple(self.statistics)

    def statistics_of(self, subnet: Subnet, *, norm: Norm = "own") -> np.ndarray:
        """The statistics (2, n) that a subnet runs with.

        Args:
          subnet: a subnet of `space`.
          norm: "own" for the subnet's own statistics. "shared" for the statistics of the largest subnet, cut to the
            subnet's channels. Use "shared" for converted weights before calibration, and for the paper's comparison.

        Raises:
          NotCalibratedError: the model does not have these statistics.
        """
        errors.check_name("norm", norm, ["own", "shared"])
        if not self._masked.offsets:  # a family without batch statistics needs none
            return np.zeros((2, 0), np.float32)
        owner = subnet if norm == "own" else self.space.largest()
        if owner not in self.statistics:
            raise errors.NotCalibratedError(
                f"{'this' if norm == 'own' else 'the largest'} subnet has no SubnetNorm statistics of its own (calibrated: "
                f"{len(self.statistics)} subnets): run `superserve calibrate` on it, or choose one of model.calibrated; "
                f"the subnet: {owner.to_json()}"
            )
        if norm == "own":
            return self.statistics[subnet]
        return self._masked.cut_statistics(self._masked.pad_statistics(self.statistics[owner], owner), subnet)

    def __call__(self, inputs: Any, subnet: Subnet | None = None, *, norm: Norm = "own") -> jax.Array:
        """Logits of any calibrated subnet. Runs the masked program: one compilation per batch shape serves all subnets.

        Args:
          inputs: raw inputs, shape (B, ...) and dtype of `config.input_spec(B)`.
          subnet: a subnet of `space`; the largest one if left out.
          norm: which statistics the subnet runs with, as in `statistics_of`.

        Returns:
          float32 (B, num_classes).

        Raises:
          InputError: the inputs have another shape or dtype.
          SubnetError: the subnet is not one of `space`.
          NotCalibratedError: the model does not have the statistics.
        """
        subnet = self.space.validate(self.largest if subnet is None else subnet)
        check_inputs(self.config, inputs)
        statistics = self._masked.pad_statistics(self.statistics_of(subnet, norm=norm), subnet)
        return _infer(self._masked, self.params, inputs, statistics, self._masked.active(subnet))


@errors.refusing(errors.InputError, "inputs must be one array with a batch dimension")
def check_inputs(config: FamilyConfig, inputs: Any) -> None:
    """Raises InputError unless `inputs` has the shape and dtype of `config.input_spec`."""
    shape, dtype = tuple(np.shape(inputs)), getattr(inputs, "dtype", None)
    spec = config.input_spec(shape[0] if shape else 1)
    if isinstance(inputs, np.ma.MaskedArray):
        raise errors.InputError("inputs are a masked array, and the network has no masks; fill it before: inputs.filled(0)")
    if shape != spec.shape or dtype != spec.dtype:
        raise errors.InputError(
            f"expected inputs of shape (batch, {', '.join(map(str, spec.shape[1:]))}) and dtype {spec.dtype}, got shape "
            f"{shape} and dtype {dtype or type(inputs).__name__}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _infer(program, params, inputs, statistics, active) -> jax.Array:
    return program.infer(params, inputs, statistics, active)
