"""Verifies a family: whether the methods of its config agree with each other and with the network that it creates.

supernets.check(config)              # traces some subnets, then compiles and runs them
supernets.check(config, run=False)   # only traces, about a second; `ss.train` does this before the first step
"""

import functools
import math
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from superserve_jax import errors
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig, RewirableConfig, SequenceConfig

_SIZED, _TRACED = 16, 3  # numbers of subnets whose sizes are checked, and that are traced
_TOLERANCE = 1e-3  # relative to the largest value; a missing mask causes larger differences
_BATCH = 4


def check(config: FamilyConfig, *, run: bool = True) -> None:
    """Verifies a family on its smallest, its largest and a few random subnets.

    Args:
      config: the family's config, preferably a small one.
      run: also compile and run the programs, and check that each subnet gives equal results sliced and masked.

    Raises:
      ConfigError: two methods disagree. The message names the method, the subnet, the value and what was expected.
    """
    members = {"family", *(name for name in vars(FamilyConfig) if not name.startswith("_"))}
    if missing := sorted(members - set(dir(config))):
        raise errors.ConfigError(f"{type(config).__name__} is not the config of a family: it has no {', '.join(missing)}")
    with errors.refusing(errors.ConfigError, f"family '{config.family}': a method of its config fails"):
        _check_methods(config)
    if run:
        _check_programs(config)


@functools.lru_cache(maxsize=16)
def _check_methods(config: FamilyConfig) -> None:
    demand = functools.partial(_demand, config)
    demand(isinstance(config.space(), SearchSpace), "space()", type(config.space()).__name__, "a SearchSpace")
    one, two = config.input_spec(1), config.input_spec(2)
    demand(two.shape == (2, *one.shape[1:]) and one.dtype == two.dtype, "input_spec(2)", two, f"a batch of two of {one}")
    _check_sizes(config)
    for subnet in _subnets(config, _TRACED):
        _check_counts(config, subnet)
    if isinstance(config, SequenceConfig):
        length = math.ceil(config.max_length / 2)
        spec, packed = config.input_spec(1, length=length), config.pack(np.zeros((1, 0), np.int32), length=length)
        fits = packed.shape == spec.shape and packed.dtype == spec.dtype
        demand(fits, f"pack(..., length={length})", (packed.shape, packed.dtype), spec)
        logits = _trace(config, config.space().smallest(), spec)[1]
        demand(logits.shape == (1, config.num_classes), f"create() with inputs {spec}", logits.shape, (1, config.num_classes))
    if isinstance(config, RewirableConfig):
        spec = programs.param_spec(config)
        for units in config.units():
            for name, axis in (*units.writers, units.reader):
                length = spec[name].shape[axis] if name in spec and axis < len(spec[name].shape) else 0
                expected = f"a multiple of the {units.count} units"
                demand(length > 0 and length % units.count == 0, f"units(): axis {axis} of {name}", length, expected)


def _check_sizes(config: FamilyConfig) -> None:
    subnets = _subnets(config, _SIZED)
    top = config.sizes(config.space().largest())
    for subnet in subnets:
        sizes = config.sizes(subnet)
        _demand(config, list(sizes) == list(top), "sizes", list(sizes), f"the names {list(top)}", subnet)
        for name, size in sizes.items():
            whole = type(size) is int and 0 <= size <= top[name]
            _demand(config, whole, f"sizes: '{name}'", repr(size), f"an int from 0 to the largest's {top[name]}", subnet)
    columns = [list(column) for column in zip(*(config.sizes(s).values() for s in subnets), strict=True)]
    for block, gates in enumerate(zip(*(s.gates for s in subnets), strict=True)):
        found = 0 not in gates or list(gates) in columns
        _demand(config, found, "sizes", list(top), f"a gate of block {block}: 1 if a subnet keeps the block, else 0")


def _check_counts(config: FamilyConfig, subnet: Subnet) -> None:
    jaxpr, logits, norms = _trace(config, subnet, config.input_spec(1))
    expected = (1, config.num_classes)
    _demand(config, logits.shape == expected, "create(): the logits' shape", logits.shape, expected, subnet)
    sizes = config.norm_sizes(config.sizes(subnet))
    _demand(config, sizes == norms, "norm_sizes", sizes, f"the channels of the norms that run, {norms}", subnet)
    flops, params = config.flops(subnet), config.num_params(subnet)
    counted = multiply_adds(jaxpr)
    _demand(config, flops == counted, "flops", flops, f"the multiply-adds of its program, {counted}", subnet)
    counted = sum(math.prod(s) for s in programs.read_shapes(jaxpr, sorted(programs.param_spec(config))).values())
    _demand(config, params == counted, "num_params", params, f"the weights that its program reads, {counted}", subnet)


def _check_programs(config: FamilyConfig) -> None:
    """Raises ConfigError unless the sliced and the masked program give equal results, in training and in inference."""
    rng = np.random.default_rng(0)
    params = programs.initial_params(config, 0)
    # If biases were zero, a channel beyond the active size would be zero even without a mask. So they get noise.
    noise = {name: rng.normal(0, 0.3, p.shape) if p.ndim == 1 else 0 for name, p in params.items()}
    params = {name: (p + noise[name]).astype(p.dtype) for name, p in params.items()}
    inputs, masked = _inputs(config, rng), programs.masked(config)
    train_masked, infer_masked = jax.jit(masked.train), jax.jit(masked.infer)
    for subnet in _subnets(config, _TRACED):
        sliced, active = programs.sliced(config, subnet), masked.active(subnet)
        none = sliced.active(subnet)
        with jax.default_matmul_precision("highest"):
            logits, statistics = map(np.asarray, jax.jit(sliced.train)(params, inputs, none))
            inferred = jax.jit(sliced.infer)(params, inputs, statistics, none)
            masked_logits, masked_statistics = map(np.asarray, train_masked(params, inputs, active))
            masked_inferred = infer_masked(params, inputs, masked.pad_statistics(statistics, subnet), active)
        for what, a, b in (
            ("logits in training", logits, masked_logits),
            ("statistics", statistics, masked.cut_statistics(masked_statistics, subnet)),
            ("logits in inference", np.asarray(inferred), np.asarray(masked_inferred)),
        ):
            difference, most = np.abs(a - b).max(initial=0), _TOLERANCE * np.abs(a).max(initial=0)
            expected = f"at most {most:.2g}: every activation must be zero beyond its active size, see ops.py"
            method = f"create(): the difference of the {what} between the sliced and the masked program"
            _demand(config, difference <= most, method, f"{difference:.2g}", expected, subnet)


def multiply_adds(jaxpr: Any) -> int:
    """Multiply-adds of the matrix products and convolutions of a jaxpr. Products with zero padding count."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            out_channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * kernel.size // out_channels
        else:
            inner = jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: isinstance(p, jax.extend.core.ClosedJaxpr)
            )
            total += sum(multiply_adds(p.jaxpr) for p in inner if isinstance(p, jax.extend.core.ClosedJaxpr))
    return total


def _trace(config: FamilyConfig, subnet: Subnet, inputs: jax.ShapeDtypeStruct) -> tuple[Any, Any, dict[str, int]]:
    """The jaxpr of a subnet's sliced program in training, its logits, and the channels of each norm that it runs."""
    program, norms = programs.sliced(config, subnet), {}

    def forward(params, inputs):
        logits, stats = program.observe(params, inputs, jnp.zeros((0,), jnp.int32))
        norms.update({name: mean.shape[0] for name, (mean, _) in stats.recorded.items()})
        return logits

    closed = jax.make_jaxpr(forward)(programs.param_spec(config), inputs)
    return closed.jaxpr, closed.out_avals[0], norms


def _subnets(config: FamilyConfig, count: int) -> list[Subnet]:
    space = config.space()
    return list(dict.fromkeys([space.smallest(), space.largest(), *(space.sample(0, i) for i in range(count))]))[:count]


def _inputs(config: FamilyConfig, rng: np.random.Generator) -> np.ndarray:
    spec = config.input_spec(_BATCH)
    if isinstance(config, SequenceConfig):
        return config.pack(rng.integers(0, config.vocab_size, (_BATCH, config.max_length)))
    if np.issubdtype(spec.dtype, np.integer):
        return rng.integers(0, 2 if spec.dtype != np.uint8 else 256, spec.shape, spec.dtype)
    return rng.normal(size=spec.shape).astype(spec.dtype)


def _demand(config: FamilyConfig, ok: bool, method: str, value: Any, expected: Any, subnet: Subnet | None = None) -> None:
    if not ok:
        of = f" of the subnet {subnet.to_json()}" if subnet else ""
        raise errors.ConfigError(f"family '{config.family}': {method}{of} is {value}, expected {expected}")
