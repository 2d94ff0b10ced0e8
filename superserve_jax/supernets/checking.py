"""Verifies a family: whether the methods of its config agree with each other and with the network that it creates.

supernets.check(config)              # traces some subnets, then compiles and runs them
supernets.check(config, run=False)   # only traces, about a second

`ss.train` does this before the first step. It only traces a family of this library, and also runs any other family.
One file because each check is a few lines, and the checks share the traced programs.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import flax
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from superserve_jax import errors, layers
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet, envelope_of
from superserve_jax.supernets import programs, registry
from superserve_jax.supernets.family import CountedConfig, FamilyConfig, RewirableConfig, SequenceConfig, TracedConfig

_SIZED, _TRACED = 16, 3  # numbers of subnets whose sizes are checked, and that are traced
_TOLERANCE = 1e-3  # relative to the largest value; a missing mask causes larger differences
_BATCH = 4
_LIBRARIES = tuple(str(pathlib.Path(str(module.__file__)).parent) for module in (errors, jax, flax, np))
_JAXPRS = (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)  # the second one is that of jax.checkpoint


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
    _check_fields(config)
    with _calling(config, "a method of its config"):
        _check_methods(config)
        if run:
            _check_programs(config)


# -- the config's class -------------------------------------------------------------------------------------------------


def _check_fields(config: FamilyConfig) -> None:
    name = type(config).__name__
    if not dataclasses.is_dataclass(config) or not type(config).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise errors.ConfigError(f"{name} must be a frozen dataclass: write @dataclasses.dataclass(frozen=True) above it")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for field, value in values.items():
        try:
            hash(value)
        except TypeError as e:
            raise errors.ConfigError(f"{name}.{field} is {value!r}, which has no hash ({e}); use a tuple") from e
    again = dataclasses.replace(config)
    if again != config or hash(again) != hash(config):
        raise errors.ConfigError(f"two configs {config!r} must be equal; leave out eq=False, and use fields with equality")
    if not registry.is_registered(config):
        raise errors.ConfigError(
            f"family '{config.family}' is not registered, so no program could read its runs and exports: write "
            f"@families.register above {name}"
        )
    plain = "numbers, strings, bools, None, other configs, and tuples of these"
    for field, value in registry.config_to_json(config).items():
        try:
            json.dumps(value)
        except TypeError as e:
            raise errors.ConfigError(f"{name}.{field} is {value!r}, which JSON cannot hold ({e}); use {plain}") from e
    read = registry.config_from_json(json.loads(json.dumps(registry.config_to_json(config))))
    for field, value in values.items():
        if (found := getattr(read, field, None)) != value:
            raise errors.ConfigError(f"{name}.{field} is {value!r}, but becomes {found!r} through JSON; use {plain}")


# -- its methods, and its network as it is traced ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _check_methods(config: FamilyConfig) -> None:
    demand = functools.partial(_demand, config)
    demand(isinstance(config.space(), SearchSpace), "space()", type(config.space()).__name__, "a SearchSpace")
    demand(config.space() == config.space(), "space()", "different in two calls", "the same search space in every call")
    classes = config.num_classes
    demand(type(classes) is int and classes >= 1, "num_classes", repr(classes), "an int from 1 up")
    one, two = config.input_spec(1), config.input_spec(2)
    demand(isinstance(one, jax.ShapeDtypeStruct), "input_spec(1)", repr(one), "a jax.ShapeDtypeStruct")
    demand(two.shape == (2, *one.shape[1:]) and one.dtype == two.dtype, "input_spec(2)", two, f"a batch of two of {one}")
    _check_state(config)
    _check_sizes(config)
    for subnet in _subnets(config, _TRACED):
        _check_counts(config, subnet)
    for training in (True, False):
        _check_traced_sizes(config, training=training)
    if isinstance(config, SequenceConfig):
        length = math.ceil(config.max_length / 2)
        spec, packed = config.input_spec(1, length=length), config.pack(np.zeros((1, 0), np.int32), length=length)
        fits = packed.shape == spec.shape and packed.dtype == spec.dtype
        demand(fits, f"pack(..., length={length})", (packed.shape, packed.dtype), spec)
        logits = _trace(config, config.space().smallest(), spec)[1]
        demand(logits.shape == (1, classes), f"create() with inputs {spec}", logits.shape, (1, classes))
    if isinstance(config, RewirableConfig):
        spec = programs.param_spec(config)
        for units in config.units():
            for name, axis, _ in (*units.writers, *units.readers):
                length = spec[name].shape[axis] if name in spec and axis < len(spec[name].shape) else 0
                expected = f"a multiple of the {units.count} units"
                demand(length > 0 and length % units.count == 0, f"units(): axis {axis} of {name}", length, expected)


def _check_state(config: FamilyConfig) -> None:
    """Raises ConfigError if the network has other state than parameters, such as that of nnx.BatchNorm or nnx.Dropout."""

    def create():
        network = config.create(nnx.Rngs(0))
        _demand(config, isinstance(network, nnx.Module), "create()", type(network).__name__, "an nnx.Module")
        return network

    with _calling(config, "create()"):
        network = nnx.eval_shape(create)
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        kind = variable.type if hasattr(variable, "type") else type(variable)
        expected = "an nnx.Param: layers have no other state (layers.SubnetNorm instead of nnx.BatchNorm, no nnx.Dropout)"
        _demand(config, issubclass(kind, nnx.Param), f"create(): {'.'.join(map(str, path))}", kind.__name__, expected)


def _check_sizes(config: FamilyConfig) -> None:
    subnets, space = _subnets(config, _SIZED), config.space()
    top = config.sizes(space.largest())
    for subnet in subnets:
        sizes = config.sizes(subnet)
        _demand(config, list(sizes) == list(top), "sizes", list(sizes), f"the names {list(top)}", subnet)
        _demand(config, sizes == config.sizes(subnet), "sizes", "different in two calls", "the same in every call", subnet)
        for name, size in sizes.items():
            whole = type(size) is int and 0 <= size <= top[name]
            _demand(config, whole, f"sizes: '{name}'", repr(size), f"an int from 0 to the largest's {top[name]}", subnet)
    for axis in space.axes:
        choices: dict[str, Any] = {axis.name: [choices[0] for choices in axis.choices]}
        smaller = config.sizes(space.subnet(**choices))
        elastic = any(len(choices) > 1 for choices in axis.choices)
        expected = f"other sizes for other choices of the axis '{axis.name}'"
        _demand(config, not elastic or smaller != top, "sizes", f"{top} for each choice of '{axis.name}'", expected)
    columns = [list(column) for column in zip(*(config.sizes(s).values() for s in subnets), strict=True)]
    for block, gates in enumerate(zip(*(s.gates for s in subnets), strict=True)):
        found = 0 not in gates or list(gates) in columns
        _demand(config, found, "sizes", list(top), f"a gate of block {block}: 1 if a subnet keeps the block, else 0")
    for pair in itertools.combinations(subnets, 2):
        envelope = envelope_of(pair)  # its depth may be of no subnet
        limits = config.sizes(envelope)
        for subnet in pair:
            for name, size in config.sizes(subnet).items():
                expected = f"at least the {size} of a subnet that it covers, {subnet.to_json()}"
                _demand(config, limits[name] >= size, f"sizes: '{name}'", limits[name], expected, envelope)


def _check_counts(config: FamilyConfig, subnet: Subnet) -> None:
    demand = functools.partial(_demand, config, subnet=subnet)
    jaxpr, logits, norms = _trace(config, subnet, config.input_spec(1))
    again = _trace(config, subnet, config.input_spec(1))[0]
    demand(_text(jaxpr) == _text(again), "create()", "a different program in two calls", "no random numbers outside of rngs")
    expected = (1, config.num_classes)
    demand(logits.shape == expected, "create(): the logits' shape", logits.shape, expected)
    demand(jnp.issubdtype(logits.dtype, jnp.floating), "create(): the logits' dtype", logits.dtype, "floating point")
    sizes = config.norm_sizes(config.sizes(subnet))
    for name in dict.fromkeys((*sizes, *norms)):
        runs = f"{norms[name]}, the channels that the network runs" if name in norms else "none: the network does not run it"
        gate = 0 in subnet.gates and name not in sizes
        hint = ". If the norm is in a block that the subnet drops, the network ignores the gate" if gate else ""
        demand(sizes.get(name) == norms.get(name), f"norm_sizes: '{name}'", sizes.get(name), runs + hint)
    weights = list(_weights(config, subnet, jaxpr))
    products, read = multiply_adds(jaxpr.jaxpr), sum(math.prod(shape) for shape in weights)
    counts = [
        ("flops", config.flops(subnet), "multiply-adds of its program", products),
        ("num_params", config.num_params(subnet), "weights that its program reads", read),
    ]
    if isinstance(config, CountedConfig):
        in_vectors = sum(math.prod(shape) for shape in weights if len(shape) < 2)
        what = "weights in vectors that its program reads"
        counts.append(("num_vector_params", config.num_vector_params(subnet), what, in_vectors))
    for name, value, what, counted in counts:
        demand(type(value) is int and value == counted, name, repr(value), f"the {what}, the int {counted}")


def _weights(config: FamilyConfig, subnet: Subnet, jaxpr: Any) -> Iterable[tuple[int, ...]]:
    """The shapes of the weights that a subnet's program reads."""
    if isinstance(config, TracedConfig):
        return config.shapes(config.sizes(subnet)).values()
    return programs.read_shapes(jaxpr.jaxpr, sorted(programs.param_spec(config))).values()


def _check_traced_sizes(config: FamilyConfig, *, training: bool) -> None:
    """Traces the masked program. Raises ConfigError if the network ignores a traced size."""
    program = programs.masked(config)
    limits, params, inputs = program.limits, programs.param_spec(config), config.input_spec(2)

    def forward(params, inputs, statistics, *active):
        sizes = limits | {name: (limits[name], size) for name, size in zip(program.traced, active, strict=True)}
        stats = layers.BatchStats() if training else layers.StoredStats(statistics, program.offsets)
        logits = programs.module(config, params)(inputs, sizes, stats)
        return logits, [jnp.stack(pair) for pair in getattr(stats, "recorded", {}).values()]

    statistics = jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    active = [jax.ShapeDtypeStruct((), jnp.int32)] * len(program.traced)
    kind = "training" if training else "inference"
    with _calling(config, f"create(): the network, in {kind} with pairs (limit, traced size) as sizes (see ops.py),"):
        traced = jax.make_jaxpr(forward)(params, inputs, statistics, *active)
    shape, expected = traced.out_avals[0].shape, (2, config.num_classes)
    _demand(config, shape == expected, "create(): the logits' shape for two inputs", shape, expected)
    leaks = any(isinstance(constant, Tracer) for constant in traced.consts)
    expected = "computed outside of branches: a branch cannot record statistics, so in training use skip=False"
    _demand(config, not leaks, "create(): a statistic or another value", "computed inside a branch", expected)
    jaxpr = traced.jaxpr
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    variables = jaxpr.invars[len(jaxpr.invars) - len(program.traced) :]
    for name, variable in zip(program.traced, variables, strict=True):
        expected = "used: give it to a layer, or a gate to ops.layer_select. `if` cannot read a traced size"
        _demand(config, id(variable) in used, f"create(): the size '{name}'", f"ignored in {kind}", expected)


# -- its network as it runs ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _check_programs(config: FamilyConfig) -> None:
    """Raises ConfigError unless the sliced and the masked program give equal results, in training and in inference."""
    rng = np.random.default_rng(0)
    params, again = programs.initial_params(config, 0), programs.initial_params(config, 0)
    for name, value in params.items():
        same = np.array_equal(value, again[name])
        _demand(config, same, f"create(): {name}", "different in two calls", "the same values for the same rngs")
    # If biases were zero, a channel beyond the active size would be zero even without a mask. So they get noise.
    noise = {name: rng.normal(0, 0.3, p.shape) if p.ndim == 1 else 0 for name, p in params.items()}
    params = {name: (p + noise[name]).astype(p.dtype) for name, p in params.items()}
    inputs, masked = _inputs(config, rng), programs.masked(config)
    train_masked, infer_masked = jax.jit(masked.train), jax.jit(masked.infer)
    infer_folded = jax.jit(lambda params, x, rows, active: masked.infer_folded(masked.fold(params, rows), x, rows, active))
    largest = config.space().largest()  # has no channels to mask
    for subnet in [s for s in _subnets(config, _TRACED) if s != largest] or [largest]:
        sliced, active = programs.sliced(config, subnet), masked.active(subnet)
        none = sliced.active(subnet)
        with jax.default_matmul_precision("highest"):
            logits, statistics = map(np.asarray, jax.jit(sliced.train)(params, inputs, none))
            inferred = jax.jit(sliced.infer)(params, inputs, statistics, none)
            masked_logits, masked_statistics = map(np.asarray, train_masked(params, inputs, active))
            padded = masked.pad_statistics(statistics, subnet)
            masked_inferred = infer_masked(params, inputs, padded, active)
            folded = infer_folded(params, inputs, padded, active) if masked.folds else masked_inferred
        zero = "every activation must be zero beyond its active size, see ops.py"
        between = "the sliced and the masked program"
        cut = masked.cut_statistics(masked_statistics, subnet)
        _compare(config, "logits in training", logits, masked_logits, between, zero, subnet)
        _compare(config, "statistics", statistics, cut, between, zero, subnet)
        _compare(config, "logits in inference", inferred, masked_inferred, between, zero, subnet)
        between = "programs with and without folded norms"
        rule = "each Fold must name the kernel, scale and bias of its own norm, which reads only that convolution"
        _compare(config, "logits", masked_inferred, folded, between, rule, subnet, method="folds()")
        if isinstance(config, SequenceConfig) and config.max_length > 1:
            half = math.ceil(config.max_length / 2)
            ids = 1 + rng.integers(0, config.vocab_size - 1, (_BATCH, half))
            ids = np.where(ids <= config.pad_id, ids - 1, ids)  # every id but that of padding
            infer = jax.jit(sliced.infer)
            short, whole = (infer(params, config.pack(ids, length=n), statistics, none) for n in (half, config.max_length))
            between = f"inputs padded to {half} and to {config.max_length} tokens"
            _compare(config, "logits", short, whole, between, "padding must not change them", subnet)


def _compare(
    config: FamilyConfig, what: str, a: Any, b: Any, between: str, rule: str, subnet: Subnet, *, method: str = "create()"
) -> None:
    a, b = np.asarray(a), np.asarray(b)
    difference, most = np.abs(a - b).max(initial=0), _TOLERANCE * np.abs(a).max(initial=0)
    what = f"{method}: the difference of the {what} between {between}"
    _demand(config, bool(difference <= most), what, f"{difference:.2g}", f"at most {most:.2g}: {rule}", subnet)


def multiply_adds(jaxpr: Any) -> int:
    """Multiply-adds of the matrix products and convolutions of a jaxpr. Products with zero padding count.

    Of several branches, the one with the most products counts.
    """
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
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: isinstance(p, _JAXPRS))
            counts = [multiply_adds(getattr(p, "jaxpr", p)) for p in inner if isinstance(p, _JAXPRS)]
            turns = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += max(counts) if equation.primitive.name == "cond" else turns * sum(counts)
    return total


class _Norms(layers.BatchStats):
    """Statistics of the batch, in which every name may occur once."""

    def __init__(self, family: str):
        super().__init__()
        self._family = family

    def __call__(self, name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if name in self.recorded:
            raise errors.ConfigError(
                f"family '{self._family}': create(): two norms have the name '{name}', so the statistics of one would replace "
                "the other's; give every SubnetNorm a name of its own, and call it once"
            )
        return super().__call__(name, x)


def _trace(config: FamilyConfig, subnet: Subnet, inputs: jax.ShapeDtypeStruct) -> tuple[Any, Any, dict[str, int]]:
    """The jaxpr of a subnet's sliced program in training, its logits, and the channels of each norm that it runs."""
    stats = _Norms(config.family)

    def forward(params, inputs):
        return programs.module(config, params)(inputs, config.sizes(subnet), stats)

    of = f"create(): the network, for inputs of shape {inputs.shape} and dtype {inputs.dtype} and {subnet.to_json()},"
    with _calling(config, of):
        closed = jax.make_jaxpr(forward)(programs.param_spec(config), inputs)
    return closed, closed.out_avals[0], {name: mean.shape[0] for name, (mean, _) in stats.recorded.items()}


def _text(program: Any) -> tuple[str, list[Any]]:
    """A traced program and its constants, without the addresses of Python objects."""
    is_key = (jnp.issubdtype(c.dtype, jax.dtypes.prng_key) for c in program.consts)
    constants = [np.asarray(jax.random.key_data(c) if key else c) for c, key in zip(program.consts, is_key, strict=True)]
    return re.sub(r" at 0x[0-9a-f]+", "", str(program)), [(c.dtype, c.shape, c.tobytes()) for c in constants]


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


@contextlib.contextmanager
def _calling(config: FamilyConfig, what: str) -> Iterator[None]:
    """Turns any exception of a family's code into a ConfigError that names the line of the family's code."""
    try:
        yield
    except errors.SuperServeError:
        raise
    except Exception as e:  # any exception: it is the code of a user
        frames = (f for f in reversed(traceback.extract_tb(e.__traceback__)) if not f.filename.startswith(_LIBRARIES))
        frame = next(frames, None)
        place = f", see {frame.filename}:{frame.lineno}, `{frame.line}`" if frame else ""
        message = errors.one_line(e)[:300]
        raise errors.ConfigError(f"family '{config.family}': {what} fails{place} ({type(e).__name__}: {message})") from e
