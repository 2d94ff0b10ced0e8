"""One query inside the server. No jax."""

import threading
from typing import Any

from superserve_jax.serving import futures


class Query(futures.Future):
    """A future, and what the server needs to know to resolve it."""

    __slots__ = ("deadline_s", "floor", "inputs", "length", "submitted_s")

    def __init__(
        self, inputs: Any, submitted_s: float, deadline_s: float, floor: float, lock: "threading.RLock | None" = None
    ):
        futures.Future.__init__(self, lock)  # a fifth faster than with super()
        self.inputs = inputs
        self.length = 0  # tokens; 0 where inputs have one shape
        self.submitted_s = submitted_s
        self.deadline_s = deadline_s
        self.floor = floor
