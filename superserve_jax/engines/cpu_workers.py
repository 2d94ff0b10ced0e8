"""How workers use the cores of a CPU: makes their engines, and measures the faster way.

Two things are measured, and kept in the latency profile:

- **Parts.** A batch runs in one call with all cores, or in parts of at most P inputs, each on one core (see `engines.device`).
- **Workers.** One worker uses all cores for each batch, or several workers run different batches and divide the cores. They
  share one copy of the weights and of the kept slices.
"""

import itertools
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from superserve_jax import machine
from superserve_jax.engines import cpu_clients, profiling
from superserve_jax.engines.cpu_clients import Share
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.subnet import Subnet, evenly_spaced
from superserve_jax.supernets.supernet import SuperNet

_MEASURED = 3  # subnets
_MIN_GAIN = 1.03  # the least (time of a whole batch) / (time in parts) for which a batch size runs in parts
_MIN_WORKERS_GAIN = 1.05  # several workers must raise the throughput by this factor, since their batches take longer


def create(model: SuperNet, workers: int, **options: Any) -> list[DeviceEngine]:
    """An engine for each of several workers that divide the cores. They share the weights and the kept slices.

    `options` are arguments of `DeviceEngine`.
    """
    first = DeviceEngine(model, Share(0, workers), **options)
    return [first, *(DeviceEngine(model, Share(i, workers), shares=first, **options) for i in range(1, workers))]


def faster_parts(
    model: SuperNet, batch_sizes: Sequence[int], *, subnet_list: Sequence[Subnet], rounds: int = 5, **options: Any
) -> tuple[dict[int, int], float]:
    """The parts of the batches of one worker, and the ratio (time of whole batches) / (time in these parts).

    The smallest, the middle and the largest subnet run at every batch size: in one call, and in parts of at most 1, 2, 4 and
    so on inputs. The way with the highest mean gain is chosen; of equal ways, the one with the largest parts. Batch sizes that
    gain less than 3 % with it are left out.

    Args:
      model: the SuperNet.
      batch_sizes: the batch sizes to measure.
      subnet_list: the subnets to choose from.
      rounds: the number of times that everything is measured.
      **options: other arguments of `DeviceEngine`.
    """
    lanes, chosen = len(Share().lanes), evenly_spaced(subnet_list, model.config.flops, _MEASURED)
    options = _options(options, chosen, batch_sizes)
    whole = DeviceEngine(model, Share(), **options)
    ways = [cpu_clients.parts_of(batch_sizes, 2**i, lanes) for i in range((-(-batch_sizes[-1] // lanes)).bit_length())]
    engines = [whole, *(DeviceEngine(model, Share(), parts=way, shares=whole, **options) for way in ways)]
    cases = list(itertools.product(batch_sizes, chosen))
    calls = [(s, size, _inputs(whole, size)) for size, s in cases]
    seconds = np.array([[[profiling.time_s(e, *c) for e in engines] for c in calls] for _ in range(rounds)])
    times = np.log(np.median(seconds, axis=0)).reshape(len(batch_sizes), len(chosen), len(engines)).mean(axis=1)
    gains = np.exp(times[:, :1] - times[:, 1:])  # by batch size and limit
    mean = np.log(gains).mean(axis=0)
    best = len(ways) - 1 - int(mean[::-1].argmax())
    parts = {size: part for (size, part), gain in zip(ways[best].items(), gains[:, best], strict=True) if gain > _MIN_GAIN}
    return parts, float(gains[-1, best])


def faster_workers(
    model: SuperNet,
    batch_sizes: Sequence[int],
    parts: Mapping[int, int],
    *,
    subnet_list: Sequence[Subnet],
    rounds: int = 3,
    **options: Any,
) -> tuple[int, float]:
    """The better number of workers, and the ratio (throughput of several workers) / (throughput of one worker).

    Several means one on each core, but at most 8. A throughput is the higher one of two: at the smallest and at the largest
    batch size. The ratio is the mean of the smallest, the middle and the largest subnet. One worker is chosen if the ratio is
    below 1.05, since its batches take less time.

    Args:
      model: the SuperNet.
      batch_sizes: the batch sizes of the profile.
      parts: the parts of one worker (see `faster_parts`).
      subnet_list: the subnets to choose from.
      rounds: the number of times that everything is measured.
      **options: other arguments of `DeviceEngine`.
    """
    several = min(machine.cores(), cpu_clients.MOST_LANES)
    if several == 1:
        return 1, 1.0
    chosen, sizes = evenly_spaced(subnet_list, model.config.flops, _MEASURED), sorted({batch_sizes[0], batch_sizes[-1]})
    options = _options(options, chosen, sizes)
    ways = [create(model, n, parts=cpu_clients.parts_of_workers(parts, n), **options) for n in (1, several)]
    rates = np.zeros((rounds, len(chosen), len(ways)))
    for i, (j, s), k in itertools.product(range(rounds), enumerate(chosen), range(len(ways))):
        rates[i, j, k] = max(_throughput_qps(ways[k], s, size) for size in sizes)
    ratio = float(np.exp(np.log(np.median(rates, axis=0)) @ [-1, 1]).mean())
    return several if ratio >= _MIN_WORKERS_GAIN else 1, ratio


def _options(given: Mapping[str, Any], subnet_list: Sequence[Subnet], batch_sizes: Sequence[int]) -> dict[str, Any]:
    """Options of an engine that is only measured: texts have the longest length."""
    lengths = tuple(given.get("lengths", ()))[-1:]
    return {**given, "subnet_list": subnet_list, "batch_sizes": batch_sizes, "lengths": lengths}


def _throughput_qps(engines: Sequence[DeviceEngine], subnet: Subnet, size: int) -> float:
    """Inputs per second of engines that all run batches of one size at the same time."""
    inputs = _inputs(engines[0], size)
    calls = max(2, math.ceil(0.1 / profiling.time_s(engines[0], subnet, size, inputs)))
    left = threading.Semaphore(calls * len(engines))

    def run(engine: DeviceEngine) -> int:
        """Makes calls until all calls of all engines have begun, so that no engine runs alone."""
        count = 0
        while left.acquire(blocking=False):
            engine.run(subnet, size, inputs)
            count += 1
        return count

    start_s = time.perf_counter()
    with futures.ThreadPoolExecutor(len(engines)) as pool:
        count = sum(pool.map(run, engines))
    return size * count / (time.perf_counter() - start_s)


def _inputs(engine: DeviceEngine, size: int) -> list[np.ndarray]:
    shape = (engine.lengths[-1], *engine.input_shape[1:]) if engine.lengths else engine.input_shape
    return [np.zeros(shape, engine.input_dtype)] * size
