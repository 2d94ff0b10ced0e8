"""Constraints on a subnet: the largest latency, size and number of multiply-adds. Also the costs that they limit."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import jax
import numpy as np

from superserve_jax import errors
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import CountedConfig, FamilyConfig

_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_UNITS = {  # in lower case, with their factors
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "size": {f"{prefix}b": factor for prefix, factor in (_DECIMAL | _BINARY).items()},
    "flops": {prefix + end: factor for prefix, factor in _DECIMAL.items() for end in ("", "flop", "flops")},
}
_EXAMPLES = {"latency": "5ms", "size": "20MB", "flops": "1G"}
_STATISTICS_BYTES = 8  # of a channel: its mean and its variance in float32


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a subnet costs. The latency is None if no constraint needs it.

    Args:
      flops: multiply-adds of one input.
      size_bytes: bytes of weights and statistics, see `constraints.size_bytes`.
      latency_ms: milliseconds of one batch.
    """

    flops: int
    size_bytes: int
    latency_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Constraints:
    """Limits that hold together. None is no limit.

    >>> under = Constraints.parse(["latency=5ms", "size=20MB"])
    >>> print(under)
    latency <= 5 ms, size <= 20 MB
    >>> under.hold_for(Costs(flops=10**9, size_bytes=19_000_000, latency_ms=5.5))
    False

    Args:
      latency_ms: the largest latency of a batch, in milliseconds.
      size_bytes: the largest size of weights and statistics, in bytes.
      flops: the largest number of multiply-adds of one input.
    """

    latency_ms: float | None = None
    size_bytes: float | None = None
    flops: float | None = None

    def __post_init__(self):
        limits = dataclasses.asdict(self)
        if all(limit is None for limit in limits.values()):
            raise errors.ConfigError("constraints need at least one limit, such as latency_ms=5.0")
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < 1e300:
                raise errors.ConfigError(f"{name} must be above 0 and finite, got {limit}")

    @staticmethod
    def parse(texts: Iterable[str]) -> "Constraints":
        """Constraints from texts such as "latency=5ms", "size=20MB" and "flops=1G".

        Units of latency are us, ms and s; units of size are B, kB, MB, GB, KiB, MiB and GiB. The number of multiply-adds takes
        the prefixes k, M, G and T. Upper and lower case are equal.

        Raises:
          ConfigError: a text has another form, a limit is given twice, or its unit is unknown.
          UnknownNameError: the name is not latency, size or flops.
        """
        limits: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition("=")
            errors.check_name("constraint", name, _UNITS)
            if name in limits:
                raise errors.ConfigError(f"the constraint '{name}' is given twice; give it once")
            limits[name] = _number(name, value)
        return Constraints(limits.get("latency"), limits.get("size"), limits.get("flops"))

    def hold_for(self, costs: Costs) -> bool:
        """Whether costs are within all limits. A latency of None is within any limit."""
        pairs = (
            (costs.flops, self.flops),
            (costs.size_bytes, self.size_bytes),
            (costs.latency_ms, self.latency_ms),
        )
        return all(cost is None or limit is None or cost <= limit for cost, limit in pairs)

    def check_reachable(self, costs: Costs, *, margin: float = 1.0) -> None:
        """Raises ConfigError if the costs of the smallest subnet are above a limit.

        Args:
          costs: the costs. A latency of None is within any limit.
          margin: the latency times this factor must be within its limit.
        """
        time = costs.latency_ms
        if self.hold_for(costs if time is None else dataclasses.replace(costs, latency_ms=time * margin)):
            return
        has = f"{costs.flops / 1e6:.4g} M multiply-adds, {costs.size_bytes / 1e6:.4g} MB"
        if time is not None:
            has += f", {time:.3g} ms by prediction, and {time * margin:.3g} ms with the margin for its error"
        raise errors.ConfigError(f"no subnet has {self}: the smallest one has {has}; allow more")

    def __str__(self) -> str:
        size = None if self.size_bytes is None else self.size_bytes / 1e6
        flops = None if self.flops is None else self.flops / 1e6
        parts = (("latency", self.latency_ms, "ms"), ("size", size, "MB"), ("FLOPs", flops, "M"))
        return ", ".join(f"{name} <= {limit:g} {unit}" for name, limit, unit in parts if limit is not None)


class CostModel:
    """The costs of subnets.

    Args:
      config: the family's config.
      latency: predicts milliseconds, as `latency.Predictor` does. None leaves latencies out.
      dtype: the dtype of the weights, see `size_bytes`.
    """

    def __init__(
        self, config: FamilyConfig, *, latency: Callable[[Subnet], float] | None = None, dtype: ComputeDtype = "float32"
    ):
        self._config, self._latency = config, latency
        self._dtype: ComputeDtype = dtype

    def __call__(self, subnet: Subnet) -> Costs:
        """The costs of a subnet."""
        size = size_bytes(self._config, subnet, self._dtype)
        return Costs(self._config.flops(subnet), size, self._latency(subnet) if self._latency else None)


def size_bytes(config: FamilyConfig, subnet: Subnet, dtype: ComputeDtype = "float32") -> int:
    """Bytes that a subnet needs on its own if it computes in `dtype`: its weights, and mean and variance of each channel.

    In bfloat16, matrices and kernels take two bytes per weight. Vectors (biases, scales of norms) and statistics stay float32.
    """
    channels = sum(config.norm_sizes(config.sizes(subnet)).values())
    return _weight_bytes(config, subnet, dtype) + channels * _STATISTICS_BYTES


def _weight_bytes(config: FamilyConfig, subnet: Subnet, dtype: ComputeDtype) -> int:
    """Bytes of the weights that a subnet reads, in the dtypes of `programs.weight_spec`."""
    full = programs.param_spec(config)
    if all(spec.dtype == np.float32 for spec in full.values()):  # then two sums are enough, and no program is traced
        count = config.num_params(subnet)
        if dtype == "float32":
            return 4 * count
        if isinstance(config, CountedConfig):
            return 2 * (count + config.num_vector_params(subnet))
    shapes = programs.used_leaves(programs.sliced(config, subnet))
    read = (programs.weight_spec(jax.ShapeDtypeStruct(shape, full[name].dtype), dtype) for name, shape in shapes.items())
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in read)


def _number(name: str, text: str) -> float:
    """The value of one limit, in milliseconds, bytes or multiply-adds."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([a-z]*)", text.strip().lower())
    if not found or found[3] not in _UNITS[name]:
        unit = "" if name == "flops" else ", with its unit"
        raise errors.ConfigError(f"{name} must be a number above 0{unit}, such as {name}={_EXAMPLES[name]}; got {text!r}")
    return float(found[1] + (found[2] or "")) * _UNITS[name][found[3]]
