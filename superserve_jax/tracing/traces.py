"""The traces of one function, one for each combination of shapes and dtypes."""

import threading
from collections.abc import Callable
from typing import Any

import jax

from superserve_jax.tracing.traced import Traced, trace


class Traces:
    """The traces of one function, one for each combination of shapes and dtypes. Threads may share it.

    >>> import jax.numpy as jnp
    >>> traces = Traces(lambda params, x: x * params["scale"])
    >>> params = {"scale": jnp.ones(())}
    >>> traces.of(params, jnp.ones(3)) is traces.of(params, jnp.zeros(3))
    True
    """

    def __init__(self, function: Callable[[Any, Any], Any], *, has_updates: bool = False):
        self._function, self._has_updates = function, has_updates
        self._traces: dict[Any, Traced] = {}
        self._lock = threading.RLock()  # held while tracing, so that two threads do not trace the same

    def of(self, params: Any, inputs: Any) -> Traced:
        """The trace for arguments of these shapes and dtypes."""
        flat, tree = jax.tree.flatten((params, inputs))
        key = (tree, tuple((x.shape, x.dtype) for x in flat))
        with self._lock:
            if key not in self._traces:
                shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
                self._traces[key] = trace(self._function, *jax.tree.unflatten(tree, shapes), has_updates=self._has_updates)
            return self._traces[key]
