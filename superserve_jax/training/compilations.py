"""Counts how often XLA compiles. Programs use it to show that nothing is compiled while they train or serve."""

from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts what XLA compiles from now on.

    >>> compiled = Compilations()
    >>> _ = jax.jit(lambda x: 3 * x + 7)(1.5)
    >>> compiled.count > 0
    True
    """

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == _EVENT
