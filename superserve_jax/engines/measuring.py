"""Measures an engine of an export: its latency profile, the subnets worth serving, and the faster way of slicing."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from superserve_jax import machine
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines import profiling
from superserve_jax.engines.device import DeviceEngine, Slicing
from superserve_jax.engines.keys import Device
from superserve_jax.engines.profiling import Background
from superserve_jax.exports import Model
from superserve_jax.profile import Profile

_MIN_GAIN = 1.03  # the least (time with slicing in the call) / (time with kept slices) that is worth the memory of slices
# A subnet is not worth serving if the next faster subnet is nearly as accurate, or nearly as slow.
_MIN_ACCURACY_GAP, _MIN_LATENCY_RATIO = 0.001, 1.05


def measure(
    model: Model,
    engine: DeviceEngine,
    *,
    repeats: int = 30,
    background: Background | None = None,
    beside: Sequence[DeviceEngine] = (),
) -> Profile:
    """Measures the latency profile of an engine with all served subnets of an export. Noise is not repaired.

    Args:
      model: the export that the engine runs.
      engine: the engine to measure.
      repeats: the number of measurements of each latency.
      background: see `profiling.measure`.
      beside: see `profiling.measure`.
    """
    accuracies, kind = model.accuracies(engine.compute_dtype), machine.device_kind(engine.device)
    calls = {"repeats": repeats, "background": background, "beside": beside}
    measured = profiling.measure(engine, accuracies, engine.batch_sizes, device=kind, **calls)
    how: dict[str, Any] = {"slicing": engine.slicing, "parts": engine.parts, "cpu_workers": 1 + len(beside)}
    return dataclasses.replace(measured.with_envelopes(engine.envelopes), **how)


def worth_serving(measured: Profile) -> Profile:
    """The monotone profile of the subnets worth serving.

    No other subnet is both faster and more accurate, and neighbours differ enough to matter.
    """
    return measured.pareto(min_accuracy_gap=_MIN_ACCURACY_GAP, min_latency_ratio=_MIN_LATENCY_RATIO).monotone()


def faster_slicing(
    model: Model,
    device: Device,
    batch_sizes: Sequence[int],
    *,
    lengths: Sequence[int] = (),
    compute_dtype: ComputeDtype = "float32",
    repeats: int = 10,
) -> tuple[Slicing, float]:
    """The way of slicing to serve with on a device, and the ratio (time with slicing in the call) / (time with kept slices).

    The smallest, the middle and the largest subnet run in turn, at the smallest and the largest batch size. So every call
    changes the subnet, and the measurement includes the cost of a change with kept slices. A change costs more than this if
    the slices of all served subnets exceed the byte budget.
    """
    by_cost = sorted(model.subnets, key=model.config.flops)
    chosen = list(dict.fromkeys((by_cost[0], by_cost[len(by_cost) // 2], by_cost[-1])))
    sizes, lengths = sorted({batch_sizes[0], batch_sizes[-1]}), lengths[-1:]
    ways: tuple[Slicing, ...] = ("kept", "in_call")
    shapes = {"subnet_list": chosen, "batch_sizes": sizes, "lengths": lengths, "compute_dtype": compute_dtype}
    engines = [DeviceEngine(model, device, slicing=way, **shapes) for way in ways]
    inputs = [np.zeros(engines[0].input_shape, engines[0].input_dtype)]
    cases = list(itertools.product(chosen, sizes))
    seconds = np.array([[[profiling.time_s(e, *c, inputs) for e in engines] for c in cases] for _ in range(repeats)])
    ratio = float(np.exp(np.median(np.log(seconds[..., 1] / seconds[..., 0]), axis=0).mean()))
    return "kept" if ratio > _MIN_GAIN else "in_call", ratio
