"""Finds out from the traced program which parameters it reads."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Program

Shape = tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def used_leaves(program: Program) -> dict[str, Shape]:
    """The smallest shape that a program needs of each parameter that it reads.

    WeightSlice reads the first entries along every axis. So a program reads the same values from parameters that are cut to
    these shapes, and needs no change.
    """
    spec = programs.param_spec(program.config)
    statistics = jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    active = jax.ShapeDtypeStruct((len(program.traced),), jnp.int32)
    jaxpr = jax.make_jaxpr(program.infer)(spec, program.config.input_spec(1), statistics, active).jaxpr
    return read_shapes(jaxpr, sorted(spec))


def read_shapes(jaxpr: Any, names: Sequence[str]) -> dict[str, Shape]:
    """The smallest shape that a jaxpr needs of each argument that it reads.

    Args:
      jaxpr: the jaxpr.
      names: names for its first arguments. Later arguments are ignored.
    """
    found = {}
    for name, variable in zip(names, jaxpr.invars, strict=False):
        if uses := list(_uses(jaxpr, variable)):
            found[name] = tuple(map(max, zip(*uses, strict=True)))
    return found


def _uses(jaxpr: Any, variable: Any) -> Iterator[Shape]:
    """For each use of a variable: how many entries are read along every axis, counted from the first entry."""
    for equation in jaxpr.eqns:
        places = [i for i, v in enumerate(equation.invars) if v is variable]
        if not places:
            continue
        if equation.primitive.name == "slice" and equation.params["strides"] is None:
            yield tuple(equation.params["limit_indices"])
        elif equation.primitive.name == "cond":  # its first argument is the index of the branch
            for place, branch in itertools.product(places, equation.params["branches"]):
                yield from _uses(branch.jaxpr, branch.jaxpr.invars[place - 1])  # type: ignore[attr-defined]
        elif equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"].jaxpr
            for place in places:
                yield from _uses(inner, inner.invars[place])
        else:
            yield tuple(variable.aval.shape)
    if any(v is variable for v in jaxpr.outvars):
        yield tuple(variable.aval.shape)
