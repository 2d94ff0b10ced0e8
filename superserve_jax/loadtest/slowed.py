"""A device that becomes slower than its profile while it serves. No jax."""

import math
import time
from typing import Any

import numpy as np

from superserve_jax.engines.base import Engine, Wrapper
from superserve_jax.subnet import Subnet


class Slowed(Wrapper):
    """An engine whose batches take `factor` times as long from `from_s` on, on the clock `time.monotonic`."""

    def __init__(self, inner: Engine, factor: float):
        super().__init__(inner)
        self.from_s = math.inf
        self._factor = factor

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Any:
        """See `engines.base.Engine.run`."""
        start_s = time.monotonic()
        outputs = super().run(subnet, batch_size, inputs)
        if start_s >= self.from_s:
            time.sleep((self._factor - 1) * (time.monotonic() - start_s))
        return outputs
