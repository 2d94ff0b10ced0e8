"""Background load for the measurement of a latency profile: a server under traffic. No jax."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.serving import threads
from superserve_jax.subnet import Subnet

_MAX_RATE_QPS = 50_000.0
_SLEEPER_BATCH = 16
_QUERY = np.zeros((), np.float32)


@contextlib.contextmanager
def traffic(open_server: Callable[..., Any], rate_qps: float) -> Iterator[None]:
    """Runs a server and a load generator inside the `with` block, so that batches measured there take as long as in serving.

    Server and generator use the processor and the interpreter's lock as in serving, and batches take longer beside them. The
    server's only engine sleeps, so it needs no device.

    Args:
      open_server: `Server.from_engines`.
      rate_qps: evenly spaced queries per second, at most 50,000 (the limit of a generator in Python).
    """
    rate_qps = min(rate_qps, _MAX_RATE_QPS)
    row = Row(Subnet((1,)), 1.0, (1e3 * _SLEEPER_BATCH / max(2 * rate_qps, 1.0),))
    table = Profile((_SLEEPER_BATCH,), (row,))
    stop = threading.Event()

    def generate() -> None:
        due, before_s = 0.0, time.monotonic()
        while not stop.wait(1e-3):
            now_s = time.monotonic()
            due, before_s = due + rate_qps * (now_s - before_s), now_s
            with contextlib.suppress(errors.QueueFullError):
                server.submit_many([_QUERY] * int(due))
            due %= 1

    with open_server([FakeEngine(table)], table) as server:
        thread = threads.start(generate, "superserve-traffic")
        try:
            yield
        finally:
            stop.set()
            thread.join()
