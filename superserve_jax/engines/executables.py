"""Compiled XLA executables of the SuperNet's programs, for one device: made ahead, in parallel, and kept in a private cache.

Each takes a flat tuple of just the weights that its program reads, as arguments, so that no weight is copied into an
executable. With `kept` slices these have the sizes of the program's envelope already, made once by a `slicer`; else they are
the SuperNet's own, and the program slices them in every call.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from superserve_jax import progress
from superserve_jax.engines.cache import ExecutableCache
from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Program

Device = Any  # a jax.Device, which is a variable to type checkers
Shape = tuple[int, ...]
Leaves = tuple[tuple[str, Shape], ...]
"""Names of parameters, in the order in which an executable takes them, with the shapes in which it does."""


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled program.

    Args:
      call: compiled. A program's takes `(leaves, inputs, row, active)` and gives logits; a slicer's takes `(leaves,)`, the
        SuperNet's own, and gives their slices.
      leaves: the parameters that it takes; of a slicer, those that it gives.
    """

    call: Callable[..., Any]
    leaves: Leaves


Key = tuple[Program, int, int]
"""A program, a batch size and a length; the last is 0 where inputs have one shape."""


def build(
    program_list: Iterable[Program],
    batch_sizes: Iterable[int],
    device: Device,
    *,
    lengths: Sequence[int] = (),
    kept: Callable[[Program], bool] = lambda program: False,
) -> tuple[dict[Key, Executable], dict[Program, Executable]]:
    """The executables of every program at every batch size and length, and the slicers of those that take kept slices.

    Cached ones are loaded, the others compiled, in parallel and with progress.

    Args:
      kept: which programs take slices that are made before.
    """
    program_list = list(program_list)
    keys = list(itertools.product(program_list, batch_sizes, lengths or (0,)))
    store = ExecutableCache(program_list[0].config, device)

    def load_or_compile(key: Key) -> Executable:
        program, batch, length = key
        about = {**_about(program), "batch": batch, "length": length, "kept": kept(program)}
        about["options"] = programs.compiler_options(device.platform)
        make = functools.partial(compile_program, program, batch, device, length=length, kept=kept(program))
        return _cached(store, about, make)

    def load_or_compile_slicer(program: Program) -> Executable:
        make = functools.partial(compile_slicer, program, leaves[program], device)
        return _cached(store, {**_about(program), "slicer": True}, make)

    full = programs.param_spec(program_list[0].config)
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            jobs = [pool.submit(load_or_compile, key) for key in keys]
            made = [job.result() for job in progress.track(jobs, f"executables for {device.platform}:{device.id}")]
            leaves = {
                program: e.leaves
                for (program, _, _), e in zip(keys, made, strict=True)
                if any(shape != full[name].shape for name, shape in e.leaves)
            }
            slicers = list(pool.map(load_or_compile_slicer, leaves))
        except BaseException:  # Ctrl-C, or one that cannot be compiled: the others are of no use
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return dict(zip(keys, made, strict=True)), dict(zip(leaves, slicers, strict=True))


def compile_program(program: Program, batch: int, device: Device, *, length: int = 0, kept: bool = False) -> Executable:
    """Traces, lowers and compiles a program for one device; `length` is 0 where inputs have none."""
    full = programs.param_spec(program.config)
    leaves = tuple((name, shape if kept else full[name].shape) for name, shape in used_leaves(program).items())
    names = tuple(name for name, _ in leaves)

    def infer(values: tuple[jax.Array, ...], inputs: jax.Array, row: jax.Array, active: jax.Array) -> jax.Array:
        return program.infer(dict(zip(names, values, strict=True)), inputs, row, active)

    on_device = _placed(device)
    values = tuple(on_device(jax.ShapeDtypeStruct(shape, full[name].dtype)) for name, shape in leaves)
    inputs, row, active = map(on_device, _arguments(program, batch, length))
    lowered = jax.jit(infer).lower(values, inputs, row, active)
    return Executable(lowered.compile(compiler_options=programs.compiler_options(device.platform)), leaves)


def compile_slicer(program: Program, leaves: Leaves, device: Device) -> Executable:
    """Compiles what makes a program's slices, `leaves`, out of those of the SuperNet's parameters that are larger."""
    full = programs.param_spec(program.config)
    cut = tuple((name, shape) for name, shape in leaves if shape != full[name].shape)

    def slices(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.slice(v, (0,) * v.ndim, shape) for v, (_, shape) in zip(values, cut, strict=True))

    values = tuple(_placed(device)(full[name]) for name, _ in cut)
    return Executable(jax.jit(slices).lower(values).compile(), cut)


def _cached(store: ExecutableCache, about: Mapping[str, Any], make: Callable[[], Executable]) -> Executable:
    found = store.load(about)
    if found is not None:
        return Executable(*found)
    executable = make()
    store.save(about, executable.call, executable.leaves)
    return executable


def _about(program: Program) -> dict[str, Any]:
    return {"envelope": program.envelope.to_json(), "traced": list(program.traced)}


def _placed(device: Device) -> Callable[[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(device)
    return lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)


def input_spec(config: Any, batch: int, length: int = 0) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a batch; `length` is 0 where inputs have one shape."""
    return config.input_spec(batch, length=length) if length else config.input_spec(batch)


def _arguments(program: Program, batch: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    row = jax.ShapeDtypeStruct((2, program.row_size), jnp.float32)
    active = jax.ShapeDtypeStruct((len(program.traced),), jnp.int32)
    return input_spec(program.config, batch, length), row, active


@functools.lru_cache(maxsize=1024)
def used_leaves(program: Program) -> dict[str, Shape]:
    """The parameters that a program reads, and how much of each: the smallest shape that holds all slices of it.

    Found in the program itself: WeightSlice takes the first entries along every axis, so what it takes of a parameter that has
    been cut to this shape is the same, and the program runs on the cut parameters unchanged.
    """
    spec = programs.param_spec(program.config)
    jaxpr = jax.make_jaxpr(program.infer)(spec, *_arguments(program, 1, 0)).jaxpr
    found = {}
    for name, variable in zip(sorted(spec), jaxpr.invars, strict=False):
        if uses := list(_uses(jaxpr, variable)):
            found[name] = tuple(map(max, zip(*uses, strict=True)))
    return found


def _uses(jaxpr: Any, variable: Any) -> Iterator[Shape]:
    """For each use of a variable, the shape of what is read of it: the first so many entries along every axis."""
    for equation in jaxpr.eqns:
        places = [i for i, v in enumerate(equation.invars) if v is variable]
        if not places:
            continue
        if equation.primitive.name == "slice" and equation.params["strides"] is None:
            yield tuple(equation.params["limit_indices"])
        elif equation.primitive.name == "cond":
            for place, branch in itertools.product(places, equation.params["branches"]):  # the first argument is the index
                yield from _uses(branch.jaxpr, branch.jaxpr.invars[place - 1])  # type: ignore[attr-defined]
        elif equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"].jaxpr
            for place in places:
                yield from _uses(inner, inner.invars[place])
        else:
            yield tuple(variable.aval.shape)
    if any(v is variable for v in jaxpr.outvars):
        yield tuple(variable.aval.shape)
