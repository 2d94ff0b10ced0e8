"""`kernel_select`: kernels of several sizes, as in once-for-all. See `ops.kernel_select`, the fourth operator.

Outside of tracing, `kernel_select` returns the kernel that it is given. In a trace it is an operation of its own. The spatial
axes of its output are a size that can change, if

- the kernel and its matrices are parameters, and nothing else reads the kernel;
- only convolutions read the output, and their padding may follow it.

A small network has the kernel of its size, and no matrices.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from superserve_jax import errors
from superserve_jax.tracing.dims import Dim, fix, leaves, resolve
from superserve_jax.tracing.graph import Graph, Node, Operand, Value, all_nodes

NAME = "kernel_select"
_COPYING = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision")

_primitive = core.Primitive(NAME)
_primitive.def_impl(lambda kernel, *matrices, steps: kernel)
_primitive.def_abstract_eval(lambda kernel, *matrices, steps: kernel)
mlir.register_lowering(_primitive, mlir.lower_fun(lambda kernel, *matrices, steps: kernel, multiple_results=False))
ad.primitive_jvps[_primitive] = lambda values, tangents, *, steps: (_primitive.bind(*values, steps=steps), tangents[0])
batching.primitive_batchers[_primitive] = lambda values, axes, *, steps: (values[0], axes[0])


def kernel_select(kernel: jax.Array, transforms: Mapping[int, jax.Array | None]) -> jax.Array:
    """A convolution's kernel, whose size `ss.elastic` may change. Everywhere else it returns the kernel as it is.

    A smaller kernel is the centre of the next larger one, times a matrix that all channels share. This is the elastic kernel
    size of once-for-all (Cai et al., ICLR 2020, section 3.3).

    Args:
      kernel: (size, size, channels in, channels out), as in nnx.Conv. Or with another number of spatial axes, all of one size.
      transforms: {a smaller size: its matrix}, such as {5: a matrix (25, 25), 3: a matrix (9, 9)}. None instead of a matrix
        takes the centre alone. Sizes that are not smaller than the kernel are ignored: a small network may have them, too.

    Raises:
      ConfigError: a size or a shape is impossible.

    >>> import jax.numpy as jnp
    >>> kernel_select(jnp.ones((5, 5, 1, 8)), {3: jnp.eye(9)}).shape
    (5, 5, 1, 8)
    """
    axes = kernel.ndim - 2
    if axes < 1 or len(set(kernel.shape[:axes])) > 1:
        raise errors.ConfigError(
            f"the kernel has shape {kernel.shape}; kernel_select needs spatial axes of one size first, then the channels "
            "in and out, such as (7, 7, 1, 64)"
        )
    whole = kernel.shape[0]
    smaller = {k: transforms[k] for k in sorted(transforms, reverse=True) if k < whole}
    for k, matrix in smaller.items():
        if k < 1 or (whole - k) % 2:
            raise errors.ConfigError(f"a kernel of size {whole} has no centre of size {k}; give sizes such as 3, 5, 7")
        if matrix is not None and matrix.shape != (k**axes, k**axes):
            raise errors.ConfigError(f"the matrix of size {k} has shape {matrix.shape}; give it {(k**axes, k**axes)}")
    if not smaller:
        return kernel
    matrices = [matrix for matrix in smaller.values() if matrix is not None]
    return _primitive.bind(kernel, *matrices, steps=tuple((k, matrix is not None) for k, matrix in smaller.items()))


def transforms(node: Node, values: Sequence[Any]) -> dict[int, Any]:
    """The matrices of a `kernel_select` among its operands, by the size that they make."""
    matrices = iter(values[1:])
    return {k: next(matrices) if has_matrix else None for k, has_matrix in node.params["steps"]}


def size_of(node: Node) -> Dim:
    """The size of the kernel that a `kernel_select` makes."""
    return resolve(node.outputs[0].dims[0])


def settle(graph: Graph, parameters: Mapping[str, Value]) -> dict[Value, Node]:
    """Fixes the sizes of kernels that cannot change.

    Args:
      graph: a related graph.
      parameters: those of its inputs that are parameters.

    Returns:
      {the parameter: the `kernel_select` that reads it} of all others.
    """
    nodes = all_nodes(graph)
    found = {}
    for node in nodes:
        if node.name == NAME:
            kernel, size = node.inputs[0], size_of(node)
            if reason := _reason(node, nodes, graph, set(parameters.values())):
                fix(size, f"{reason}, at {node.where}")
            elif isinstance(kernel, Value) and size.fixed is None:
                found[kernel] = node
            for dim in kernel.dims[: len(kernel.dims) - 2]:
                fix(dim, next((leaf.fixed for leaf in leaves(size) if leaf.fixed), f"kernel_select at {node.where}"))
    return found


def _reason(node: Node, nodes: Sequence[Node], graph: Graph, parameters: set[Value]) -> str | None:
    """Why the size of a kernel cannot change. None if it can."""
    if not all(operand in parameters for operand in node.inputs):
        return "the kernel or a matrix is no parameter there"
    readers = [n for n in nodes if node.inputs[0] in n.inputs]
    if len(readers) > 1 or node.inputs[0] in graph.outputs:
        return "the kernel is used more than once"
    size = size_of(node)
    if size.kind != "leaf":
        return "the size of the kernel is that of an axis of several parts"
    others = (n for n in nodes if n is not node and any(size in leaves(dim) for dim in _read(n)))
    name = next((n.name for n in others if n.name not in _COPYING), None)
    return f"more than a convolution reads the kernel ({name})" if name else None


def _read(node: Node) -> Iterator[Dim]:
    """The axes that an operation reads, without the size of a convolution's kernel."""
    operands: list[Operand] = list(node.inputs)
    if node.name == "conv_general_dilated":
        numbers, kernel = node.params["dimension_numbers"], operands.pop(1)
        yield from (kernel.dims[axis] for axis in numbers.rhs_spec[:2])
    for operand in operands:
        yield from operand.dims
