"""Traffic for `superserve serve --demo`: steady queries while a page is open, and bursts that a visitor asks for.

One thread per model submits queries through the load generator of the tests (`loadtest.loadgen`), without sockets. Its inputs
are zeros and ones: the page shows the accuracy of the subnets that answered, as it was measured on test data.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.model import ServedModel
from superserve_jax.loadtest import loadgen
from superserve_jax.simulation import traces

_log = logging.getLogger(__name__)

BURST_S = 4.0
"""Length of a burst."""
_STEP_S = 0.25  # the traffic is made in steps of this length, so a new rate counts after at most one step
_CV2 = 4.0  # squared coefficient of variation of the gaps between queries, as in `superserve replay`
_MOST_QPS = 20_000.0  # the load generator shares Python's lock with the server
_EXAMPLES = 64


class Demo:
    """The traffic of one model.

    With `best` and `fast`, the throughput of all workers with the most accurate and with the fastest subnet:

        steady rate = best / 4        burst = best + (fast - best) / 8        highest rate = 1.25 fast, at most 20,000/s

    Args:
      model: the model.
      is_watched: returns whether somebody looks at the page. If not, there is no traffic.

    Attributes:
      model: the model.
      most_qps: the highest rate that may be asked for.
    """

    def __init__(self, model: ServedModel, is_watched: Callable[[], bool]):
        self.model, self._server, self._is_watched = model, model.server, is_watched
        best, fast = (sum(p.throughput_qps(p.rows[rank].subnet) for p in model.server.profiles) for rank in (-1, 0))
        self.most_qps = _rounded(min(1.25 * max(best, fast), _MOST_QPS))
        self._steady_qps = min(_rounded(best / 4), self.most_qps)
        self._burst_qps, self._until_s = min(_rounded(best + max(fast - best, 0.0) / 8), self.most_qps), 0.0
        self._inputs, self._stop = examples(model), threading.Event()
        self._thread = threading.Thread(target=self._run, name="superserve-demo", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        with errors.StartingThreads():
            self._thread.start()

    def state(self) -> dict[str, Any]:
        """The rates, and for how long a burst still lasts."""
        left_s = max(self._until_s - time.monotonic(), 0.0)
        rates = {"steady_qps": self._steady_qps, "burst_qps": self._burst_qps, "most_qps": self.most_qps}
        return {**rates, "burst_s": BURST_S, "left_s": round(left_s, 2)}

    def set(self, *, steady_qps: float | None = None, burst_qps: float | None = None) -> None:
        """Changes the steady rate, or sends a burst. A second burst replaces the first one.

        Raises RequestError for a rate below 0 or above `most_qps`.
        """
        for name, qps in (("steady_qps", steady_qps), ("burst_qps", burst_qps)):
            if qps is not None and not 0 <= qps <= self.most_qps:
                raise RequestError(f"{name} is {qps:g}, expected a rate from 0 to {self.most_qps:g}; choose a lower one")
        if steady_qps is not None:
            self._steady_qps = steady_qps
        if burst_qps is not None:
            self._burst_qps, self._until_s = burst_qps, time.monotonic() + BURST_S

    def stop(self) -> None:
        """Ends the traffic soon, without waiting for that."""
        self._stop.set()

    def close(self) -> None:
        """Ends the traffic. Its last queries are still answered."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            start_s = time.monotonic()
            for seed in itertools.count():
                start_s = max(start_s, time.monotonic() - _STEP_S)  # after a pause, the missed queries stay missing
                self._submit(seed, start_s)
                start_s += _STEP_S
                if self._stop.wait(start_s - time.monotonic()):
                    return
        except errors.ServerClosedError:
            pass  # the caller may close the server before the gateway
        except BaseException:
            _log.exception("the demo's traffic ended by an error")

    def _submit(self, seed: int, start_s: float) -> None:
        """Submits the queries of one step, when they are due."""
        qps = self._steady_qps * self._is_watched() + self._burst_qps * (time.monotonic() < self._until_s)
        if not qps:
            return
        trace = traces.gamma(rate_qps=qps, cv2=_CV2, duration_s=_STEP_S, slo_ms=self._server.slo_ms, seed=seed)
        inputs = [*itertools.islice(itertools.cycle(self._inputs), len(trace))]
        for _ in loadgen.submit_when_due(self._server, trace, inputs, start_s=start_s):
            if self._stop.is_set():
                return


def examples(model: ServedModel) -> list[np.ndarray]:
    """Some inputs of the model: arrays of zeros and ones. Texts have random lengths and no padding."""
    spec, rng = model.server.inputs, np.random.default_rng(0)
    if not spec.lengths:
        return [rng.integers(0, 2, spec.shape).astype(spec.dtype) for _ in range(_EXAMPLES)]
    token = int(spec.pad_id == 0)  # any token but the padding
    made = []
    for length in rng.integers(1, spec.lengths[-1], _EXAMPLES, endpoint=True):
        x = np.zeros((length, *spec.shape[1:]), spec.dtype)
        x.reshape(length, -1)[:, 0] = token  # a second column has token types
        made.append(x)
    return made


def _rounded(qps: float) -> float:
    """A rate with two digits, for the scale of a slider. 4,757 becomes 4,800."""
    return float(f"{qps:.2g}")
