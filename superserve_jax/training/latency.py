"""Latency as the cost of a search: some subnets' sliced programs are timed on this machine, a linear model gives the others'.

Timing a subnet means compiling it, about a second each; a search tries a thousand. The latency of a network is close to the
sum of its layers', so few measurements suffice, and the model's error is known: it is cross-validated.
"""

import concurrent.futures
import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import sampling

_WARM_UPS = 2


def spread(config: Any, count: int, *, seed: int) -> list[Subnet]:
    """The smallest and the largest subnet and about `count` - 2 others to measure: half spread over FLOPs, half random."""
    space = config.space()
    half = (count - 2) // 2
    random = (space.sample(seed, k) for k in range(count - 2 - half))
    return list(dict.fromkeys([space.smallest(), space.largest(), *sampling.envelopes(config, half, seed=seed), *random]))


def measure(
    model: SuperNet,
    subnet_list: Iterable[Subnet],
    *,
    batch: int,
    repeats: int = 50,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[Subnet, float]:
    """Latency of one batch by each subnet's sliced program, in milliseconds, on the first device.

    The shortest of several rounds over all subnets: whatever else a machine does makes it slower, never faster.

    Args:
      model: needs no statistics; their values do not matter to the time.
      subnet_list: the subnets; each is compiled.
      batch: batch size.
      repeats: rounds.
      progress: wraps the compilations, for a progress bar.
    """
    spec = model.config.input_spec(batch)
    inputs = jax.device_put(np.zeros(spec.shape, spec.dtype))

    def compiled(subnet: Subnet) -> tuple[Any, jax.Array]:
        program = programs.sliced(model.config, subnet)
        row = jnp.ones((2, program.statistics_size), jnp.float32)
        infer = jax.jit(
            lambda params, x, row: program.infer(params, x, row, jnp.zeros((0,), jnp.int32)),
            compiler_options=programs.compiler_options(jax.default_backend()),  # as it will be served
        )
        return infer.lower(model.params, inputs, row).compile(), row

    order = list(subnet_list)
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        made = list(progress(pool.map(compiled, order)))
    times_ms: list[list[float]] = [[] for _ in order]
    gc.collect()
    for turn in range(_WARM_UPS + repeats):
        for times, (call, row) in zip(times_ms, made, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call(model.params, inputs, row))
            if turn >= _WARM_UPS:
                times.append(1e3 * (time.perf_counter() - start))
    return {subnet: min(times) for subnet, times in zip(order, times_ms, strict=True)}


class Predictor:
    """The latency of any subnet: a ridge regression on FLOPs, parameters, normalised channels and the depth of each stage.

    Args:
      config: the family's config.
      latencies: measured, in milliseconds; of three subnets at least, the fastest among them.

    Attributes:
      error: mean error relative to the measured, cross-validated: of subnets that the model has not seen.
    """

    def __init__(self, config: Any, latencies: Mapping[Subnet, float]):
        # Importing it takes over a second, and a search over FLOPs does not need it.
        from sklearn import linear_model, model_selection, pipeline, preprocessing

        self._config, self._space = config, config.space()
        features = np.array([self._features(s) for s in latencies])
        measured = np.array(list(latencies.values()))
        self._floor = float(measured.min())
        self._model = pipeline.make_pipeline(
            preprocessing.StandardScaler(), linear_model.RidgeCV(np.logspace(-4, 2, 13).tolist())
        )
        folds = model_selection.KFold(min(10, len(measured)), shuffle=True, random_state=0)
        unseen = model_selection.cross_val_predict(self._model, features, measured, cv=folds)
        self.error = float(np.mean(np.abs(unseen - measured) / measured))
        self._model.fit(features, measured)

    def __call__(self, subnet: Subnet) -> float:
        """Milliseconds; never less than the fastest that was measured."""
        return max(float(self._model.predict([self._features(subnet)])[0]), self._floor)

    def _features(self, subnet: Subnet) -> list[float]:
        config = self._config
        depths = [sum(subnet.gates[b] for b in stage) for stage in self._space.stages]
        channels = sum(config.norm_sizes(config.sizes(subnet)).values())
        return [config.flops(subnet), config.num_params(subnet), channels, *depths]
