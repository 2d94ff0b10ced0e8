"""The units of a traced network, such as heads and channels, which rewiring sorts by importance."""

from superserve_jax.supernets.family import UnitAxis, Units
from superserve_jax.tracing import kinds
from superserve_jax.tracing.dims import Dim, is_squared, leaves
from superserve_jax.tracing.graph import Value
from superserve_jax.tracing.network import Network
from superserve_jax.tracing.sizes import entries_of


def units_of(network: Network) -> list[Units]:
    """The units of each elastic axis that some weights read. They may be interleaved along an axis.

    An axis that is multiplied with itself has no units: each entry of the product belongs to two of them.
    """
    traced = network.reference
    read = kinds.uses(traced.graph, traced.parameters).read
    found = []
    for axis in network.elastic:
        leaf = traced.leaves[axis.group]
        if any(is_squared(dim, leaf) for value in traced.parameters.values() for dim in value.dims):
            continue
        writers, readers = [], []
        for name, value in traced.parameters.items():
            if name not in network.source.specs:  # statistics are calibrated again
                continue
            axes = [i for i, dim in enumerate(value.dims) if leaf in leaves(dim)]
            reading = _reading_axis(axes, value, leaf, read.get(name, set()))
            for i in axes:
                unit_axis = UnitAxis(name, i, entries_of(value.dims[i], leaf))
                (readers if i == reading else writers).append(unit_axis)
        if readers:
            found.append(Units(axis.size, tuple(writers), tuple(readers)))
    return found


def _reading_axis(axes: list[int], value: Value, leaf: Dim, read: set[Dim]) -> int | None:
    """The axis along which products sum over the leaf. A matrix from an axis to itself reads with its first one."""
    return axes[0] if axes and leaf in read and value.shape else None
