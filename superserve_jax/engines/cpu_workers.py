"""How workers use the cores of a CPU: makes their engines, and measures the faster way.

Two things are measured, and kept in the latency profile:

- **Parts.** A batch runs in one call with all cores, or in parts of at most P inputs, each on one core (see `engines.device`).
- **Workers.** One worker uses all cores for each batch, or several workers run different batches and divide the cores. They
  share one copy of the weights and of the kept slices.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from superserve_jax.engines import cpu_clients, profiling
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.subnet import Subnet, evenly_spaced
from superserve_jax.supernets.supernet import SuperNet

_MEASURED = 3  # subnets
_MIN_GAIN = 1.03  # the least (time of a whole batch) / (time in parts) for which a batch size runs in parts
_MIN_WORKERS_GAIN = 1.05  # the least gain of throughput for which batches take longer, because each has fewer cores


def create(model: SuperNet, workers: int, **options: Any) -> list[DeviceEngine]:
    """An engine for each of several workers that divide the cores. They share the weights and the kept slices.

    `options` are arguments of `DeviceEngine`.
    """
    made: list[DeviceEngine] = []
    for i, device in enumerate(cpu_clients.of_workers(workers)):
        shares = made[0] if made else None
        made.append(DeviceEngine(model, device, lanes=cpu_clients.lanes(i, workers), shares=shares, **options))
        made[-1].name = f"cpu:{i}"
    return made


def parts_of(batch_sizes: Sequence[int], most: int, lanes: int) -> dict[int, int]:
    """The inputs of a part by batch size: one part for each lane, or more parts of `most` inputs.

    >>> parts_of((1, 2, 4, 16), most=4, lanes=2)
    {1: 1, 2: 1, 4: 2, 16: 4}
    """
    return {size: min(most, -(-size // lanes)) for size in batch_sizes}


def faster_parts(
    model: SuperNet, batch_sizes: Sequence[int], *, subnet_list: Sequence[Subnet], rounds: int = 5, **options: Any
) -> tuple[dict[int, int], float]:
    """The parts of the batches of one worker, and the ratio (time of whole batches) / (time in these parts).

    The smallest, the middle and the largest subnet run at every batch size: in one call, and in parts of at most 1, 2, 4 and
    so on inputs. The largest part with the shortest time counts, on the mean of all subnets and batch sizes. Batch sizes that
    gain less than 3 % are left out.

    Args:
      model: the SuperNet.
      batch_sizes: the batch sizes to measure.
      subnet_list: the subnets to choose from.
      rounds: the number of times that everything is measured.
      **options: other arguments of `DeviceEngine`.
    """
    device, lanes = jax.devices("cpu")[0], cpu_clients.lanes()
    chosen = evenly_spaced(subnet_list, model.config.flops, _MEASURED)
    options |= {"subnet_list": chosen, "batch_sizes": batch_sizes}
    whole = DeviceEngine(model, device, **options)
    largest = -(-batch_sizes[-1] // len(lanes))
    ways = {2**i: parts_of(batch_sizes, 2**i, len(lanes)) for i in range(largest.bit_length())}
    engines = [whole, *(DeviceEngine(model, device, parts=way, lanes=lanes, shares=whole, **options) for way in ways.values())]
    cases = list(itertools.product(batch_sizes, chosen))
    calls = [(s, size, _inputs(whole, size)) for size, s in cases]
    seconds = np.array([[[profiling.time_s(e, *c) for e in engines] for c in calls] for _ in range(rounds)])
    times = np.log(np.median(seconds, axis=0)).reshape(len(batch_sizes), len(chosen), len(engines)).mean(axis=1)
    gains = np.exp(times[:, :1] - times[:, 1:])  # by batch size and limit
    best = int(np.exp(np.log(gains).mean(axis=0)).round(2).argmax())
    chosen_way = [*ways.values()][best]
    parts = {size: part for (size, part), gain in zip(chosen_way.items(), gains[:, best], strict=True) if gain > _MIN_GAIN}
    return parts, float(gains[-1, best]) if batch_sizes[-1] in parts else 1.0


def faster_workers(
    model: SuperNet,
    batch_sizes: Sequence[int],
    parts: Mapping[int, int],
    *,
    subnet_list: Sequence[Subnet],
    rounds: int = 3,
    **options: Any,
) -> tuple[int, float]:
    """The better number of workers, and the ratio (throughput of one worker on each core) / (throughput of one worker).

    A throughput is the highest of the smallest and the largest batch size. The ratio is the mean of the smallest, the middle
    and the largest subnet. One worker is better, unless the ratio is at least 1.05, since its batches take less time.

    Args:
      model: the SuperNet.
      batch_sizes: the batch sizes of the profile.
      parts: the parts of one worker (see `faster_parts`).
      subnet_list: the subnets to choose from.
      rounds: the number of times that everything is measured.
      **options: other arguments of `DeviceEngine`.
    """
    cores = cpu_clients.cores()
    if cores == 1:
        return 1, 1.0
    chosen, sizes = evenly_spaced(subnet_list, model.config.flops, _MEASURED), sorted({batch_sizes[0], batch_sizes[-1]})
    options |= {"subnet_list": chosen, "batch_sizes": sizes}
    ways = [create(model, n, parts=parts_of_workers(parts, n), **options) for n in (1, cores)]
    rates = np.zeros((rounds, len(chosen), len(ways)))
    for i, (j, s), k in itertools.product(range(rounds), enumerate(chosen), range(len(ways))):
        rates[i, j, k] = max(_throughput_qps(ways[k], s, size) for size in sizes)
    ratio = float(np.exp(np.log(np.median(rates, axis=0)) @ [-1, 1]).mean())
    return cores if ratio >= _MIN_WORKERS_GAIN else 1, ratio


def parts_of_workers(parts: Mapping[int, int], workers: int) -> dict[int, int]:
    """The parts of each of several workers, from those of one worker with all cores: parts are not larger.

    >>> parts_of_workers({4: 2, 16: 4}, workers=2)
    {4: 2, 16: 4}
    """
    if not parts or workers == 1:
        return dict(parts)
    return parts_of(sorted(parts), max(parts.values()), len(cpu_clients.lanes(0, workers)))


def _throughput_qps(engines: Sequence[DeviceEngine], subnet: Subnet, size: int) -> float:
    """Inputs per second of engines that all run batches of one size at the same time."""
    inputs = _inputs(engines[0], size)
    calls = max(2, math.ceil(0.1 / profiling.time_s(engines[0], subnet, size, inputs)))

    def run(engine: DeviceEngine) -> float:
        start_s = time.perf_counter()
        for _ in range(calls):
            engine.run(subnet, size, inputs)
        return size * calls / (time.perf_counter() - start_s)

    with futures.ThreadPoolExecutor(len(engines)) as pool:
        return sum(pool.map(run, engines))


def _inputs(engine: DeviceEngine, size: int) -> list[np.ndarray]:
    shape = (engine.lengths[-1], *engine.input_shape[1:]) if engine.lengths else engine.input_shape
    return [np.zeros(shape, engine.input_dtype)] * size
