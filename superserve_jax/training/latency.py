"""Latency as the cost in a search: some subnets are timed on this machine, and a linear model predicts the others.

Timing a subnet means compiling its sliced program, which takes about a second, and a search tries a thousand subnets. The
latency of a network is nearly the sum over its layers, so a linear model needs few measurements. Its error is cross-validated.
"""

import concurrent.futures
import gc
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import progress
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import compiler, programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import sampling

_WARM_UPS = 2


def spread(config: FamilyConfig, count: int, *, seed: int) -> list[Subnet]:
    """About `count` subnets to measure: the smallest, the largest, half of the others spread over FLOPs, half random."""
    space = config.space()
    half = (count - 2) // 2
    random = (space.sample(seed, k) for k in range(count - 2 - half))
    return list(dict.fromkeys([space.smallest(), space.largest(), *sampling.envelopes(config, half, seed=seed), *random]))


def measure(model: SuperNet, subnet_list: Iterable[Subnet], *, batch: int, repeats: int = 50) -> dict[Subnet, float]:
    """Latency of one batch by each subnet's sliced program, in milliseconds, on the first device.

    The result is the shortest time of several rounds, because other work on the machine can only make a call slower.

    Args:
      model: the SuperNet. It needs no statistics, because their values do not change the time.
      subnet_list: the subnets; each is compiled.
      batch: batch size.
      repeats: number of rounds.
    """
    spec = model.config.input_spec(batch)
    inputs = jax.device_put(np.zeros(spec.shape, spec.dtype))

    def compiled(subnet: Subnet) -> tuple[Any, jax.Array]:
        program = programs.sliced(model.config, subnet)
        statistics = jnp.ones((2, program.statistics_size), jnp.float32)
        infer = jax.jit(
            lambda params, x, statistics: program.infer(params, x, statistics, jnp.zeros((0,), jnp.int32)),
            compiler_options=compiler.options(jax.default_backend()),  # as in serving
        )
        return infer.lower(model.params, inputs, statistics).compile(), statistics

    order = list(subnet_list)
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        made = list(progress.track(pool.map(compiled, order), "compiling for latencies", total=len(order)))
    times_ms: list[list[float]] = [[] for _ in order]
    gc.collect()
    for turn in range(_WARM_UPS + repeats):
        for times, (call, statistics) in zip(times_ms, made, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call(model.params, inputs, statistics))
            if turn >= _WARM_UPS:
                times.append(1e3 * (time.perf_counter() - start))
    return {subnet: min(times) for subnet, times in zip(order, times_ms, strict=True)}


class Predictor:
    """Predicts latencies: a ridge regression on FLOPs, parameters, normalised channels and the depth of each stage.

    Args:
      config: the family's config.
      latencies: measured milliseconds of at least three subnets, the fastest subnet among them.

    Attributes:
      error: mean relative error of the predictions for unseen subnets, by cross-validation.
    """

    def __init__(self, config: FamilyConfig, latencies: Mapping[Subnet, float]):
        # Imported here: it takes over a second, and a search over FLOPs does not need it.
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
        """The predicted milliseconds of a subnet; never less than the fastest measurement."""
        return max(float(self._model.predict([self._features(subnet)])[0]), self._floor)

    def _features(self, subnet: Subnet) -> list[float]:
        config = self._config
        depths = [sum(subnet.gates[b] for b in stage) for stage in self._space.stages]
        channels = sum(config.norm_sizes(config.sizes(subnet)).values())
        return [config.flops(subnet), config.num_params(subnet), channels, *depths]
