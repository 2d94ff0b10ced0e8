"""The options of `superserve replay`, and what they ask for: an export on the devices of this machine, and traffic for it.

Library: engines.prepare, loadtest.bursts, simulation.recorded, training.data.halves.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import tyro

import superserve_jax as ss
from superserve_jax import cli
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines import default_batch_sizes, prepare, profiling
from superserve_jax.engines.base import Engine
from superserve_jax.exports import Model
from superserve_jax.lengths import trim_padding
from superserve_jax.loadtest import bursts, loadgen
from superserve_jax.scheduling import policies
from superserve_jax.serving import server
from superserve_jax.simulation import recorded
from superserve_jax.simulation.traces import Trace
from superserve_jax.training import data
from superserve_jax.training.config import config_from_json
from superserve_jax.training.data import halves

TIMING_S, CHECK_S = 5.0, 0.5  # about how long latencies are measured before the first policy, and after each policy


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      policies: names such as slackfit, slackfit-paper, max-batch, fixed:0, fixed:largest, fixed:all for all subnets, or
        policies of your own, such as my_file.py:my_policy (see docs/policies.md). By default slackfit, slackfit-paper and
        fixed:all.
      seconds: length of the traffic, at least 4, because the first burst ends then.
      slo_ms: latency objective; by default 36, or four batches of the most accurate subnet if that is longer.
      calm: (arrival rate between bursts) / (throughput of all workers with the most accurate subnet).
      burst: the arrival rate in a burst: 0 is the throughput of the most accurate subnet, 1 that of the fastest one.
      cv2: squared coefficient of variation of the gaps between arrivals.
      trace: a CSV file of recorded arrivals to replay instead, see docs/traces.md.
      trace_column: the column of the arrivals in that file; by default arrival_s, or the only column.
      speed: how many times as fast the recorded arrivals come.
      batch_sizes: batch sizes to serve with; by default 1, 2, 4, 8 and 16, and on GPUs also 32 and 64 if throughput rises.
      lengths: length buckets of texts; by default powers of two from 16 up to the model's longest length.
      compute_dtype: the dtype to compute in; bfloat16 is for GPUs, and the export needs accuracies in it.
      cpu_workers: how many workers divide the cores of the CPU; by default as in the latency profile.
      simulate: repeat each replay in the simulator, and print both.
      slow_factor: every batch takes this many times as long from --slow-after on.
      slow_after: when --slow-factor takes effect, as a fraction of the traffic.
      repeats: the largest number of repeats, in all, of policies that the machine disturbed.
      seed: the seed of arrivals and inputs.
      json: write the results to this file.
      plot: write a plot over time to this file.
    """

    export: tyro.conf.Positional[pathlib.Path]
    policies: tuple[str, ...] = ()
    seconds: float = 12.0
    slo_ms: float | None = None
    calm: float = 0.5
    burst: float = 0.5
    cv2: float = 4.0
    trace: pathlib.Path | None = None
    trace_column: str | None = None
    speed: float = 1.0
    batch_sizes: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    compute_dtype: ComputeDtype = "float32"
    cpu_workers: int | None = None
    simulate: bool = False
    slow_factor: float = 1.0
    slow_after: float = 0.5
    repeats: int = 3
    seed: int = 0
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None


def check_options(options: Options) -> None:
    """Raises ConfigError for wrong values, and for options that would have no effect, before anything takes long."""
    cli.refuse_with(options, "trace", "seconds", "calm", "burst", "cv2")
    cli.refuse_without(options, "trace", "trace_column", "speed")
    cli.refuse_without(options, "slow_factor", "slow_after")
    if options.trace is None:
        bursts.check_seconds(options.seconds)
    if options.slo_ms is not None:
        cli.check_above_zero(options, "slo_ms")
    for name in ("calm", "cv2", "repeats"):
        if not getattr(options, name) >= 0:
            raise ss.ConfigError(f"--{name} must be 0 or more, got {getattr(options, name)}")
    if not 0 < options.slow_after < 1:
        raise ss.ConfigError(f"--slow-after is a fraction of the traffic between 0 and 1, got {options.slow_after:g}")
    if options.slow_factor < 1 or (options.slow_factor > 1 and options.simulate):
        raise ss.ConfigError(f"--slow-factor {options.slow_factor}: give 1 or more, and leave out --simulate if it is above 1")


@dataclasses.dataclass(frozen=True)
class Work:
    """What all policies share: engines with their profiles, and queries with their inputs and labels."""

    engines: Sequence[Engine]
    profiles: Sequence[ss.Profile]
    trace: Trace
    inputs: Sequence[np.ndarray]
    labels: np.ndarray
    slo_ms: float

    def slower(self) -> float:
        """By which factor batches take longer than before the first policy, on the engine that changed most."""
        now = measure_all(self.engines, self.profiles, CHECK_S)
        factors = list(map(profiling.slower, now, self.profiles))
        return max(factors, key=lambda factor: abs(math.log(factor)))


def measure_all(engines: Sequence[Engine], profiles: Sequence[ss.Profile], seconds: float) -> list[ss.Profile]:
    """Measures the latencies of each engine again. Engines that share the cores of a CPU are busy meanwhile."""
    found = []
    for engine, profile in zip(engines, profiles, strict=True):
        beside = [other for other in engines if other is not engine] if profile.cpu_workers > 1 else []
        calls = {"seconds": seconds, "background": server.background_traffic, "beside": beside}
        found.append(profiling.measure_again(engine, profile, **calls))
    return found


def prepare_work(options: Options) -> Work:
    """Loads an export onto the devices, and makes the traffic for it."""
    model = ss.load(options.export)
    trace = None
    if options.trace is not None:  # before anything that takes long
        trace = recorded.trace(options.trace, column=options.trace_column, speed=options.speed)
        print(f"{trace.name}: {len(trace):,} queries in {cli.duration(trace.arrivals_s[-1])}", flush=True)
    loadgen.check_policies(options.policies, options.batch_sizes or default_batch_sizes.SMALL, subnets=len(model.served))
    inputs, labels = test_examples(model)
    names = ("batch_sizes", "lengths", "compute_dtype", "cpu_workers")
    shapes = {name: getattr(options, name) for name in names}
    _, engines, profiles = prepare.prepare(model, background=server.background_traffic, **shapes)
    profiles = measure_all(engines, profiles, TIMING_S)
    buckets = profiles[0].lengths
    # The server measures the length of each input itself. The arrival rates and the simulator need the lengths earlier.
    lengths = np.array([len(trim_padding(x, engines[0].pad_id)) for x in inputs]) if buckets else np.zeros(len(inputs), int)
    slowest_ms = max(p.rows[-1].latency_ms[-1] for p in profiles)
    slo_ms = options.slo_ms if options.slo_ms is not None else max(36.0, 4 * slowest_ms)
    if trace is not None:
        trace = trace if np.ndim(trace.slo_ms) else dataclasses.replace(trace, slo_ms=slo_ms)
    else:
        names = ("seconds", "calm", "burst", "cv2", "seed")
        settings = {name: getattr(options, name) for name in names}
        trace = bursts.make(profiles, slo_ms=slo_ms, tokens=lengths.tolist() if buckets else (), **settings)
    if not len(trace):
        raise ss.DataError(f"no queries in the trace ({trace.name}): record at least one, or give more --seconds")
    # Random order without replacement, then again: no example is used twice before all others were used once.
    rng = np.random.default_rng(options.seed)
    chosen = np.concatenate([rng.permutation(len(inputs)) for _ in range(-(-len(trace) // len(inputs)))])[: len(trace)]
    print(
        f"{len(trace):,} queries in {trace.arrivals_s[-1]:.1f} s ({trace.name}), SLO {slo_ms:.0f} ms, "
        f"{len(engines)} worker(s) on {', '.join(dict.fromkeys(p.device for p in profiles))}"
    )
    if buckets:
        if np.ndim(trace.lengths):
            chosen = loadgen.examples_of_length(lengths, np.asarray(trace.lengths), seed=options.seed)
        trace = dataclasses.replace(trace, lengths=lengths[chosen])
        p50, p90 = np.percentile(lengths, [50, 90])
        print(f"half of the texts have up to {p50:.0f} tokens, 90 % up to {p90:.0f}; length buckets: {list(buckets)}")
    return Work(engines, profiles, trace, [inputs[i] for i in chosen], labels[chosen], slo_ms)


def policy_names(options: Options, profile: ss.Profile) -> tuple[str, ...]:
    """The policies to replay. Raises ConfigError for a fixed subnet of the export that is not worth serving on this device."""
    served = len(profile.rows)
    names = policies.expand(options.policies or ("slackfit", "slackfit-paper", "fixed:all"), subnets=served)
    for name in names:
        kind, _, number = name.partition(":")
        if kind == "fixed" and number.isdecimal() and int(number) >= served:
            raise ss.ConfigError(
                f"policy '{name}': only the subnets 0 to {served - 1} are served on this device; the others of the export are "
                "not worth serving, because a served one is about as accurate and faster; name a served one, or fixed:all"
            )
    return names


def test_examples(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the half of the test split that the export was not profiled on.

    Raises ConfigError if the export's config names no data.
    """
    config = config_from_json(model.manifest["training"])
    if config.data is None:
        raise ss.ConfigError(
            "the export was trained on a dataset that its config does not name, so there is nothing to replay; replay "
            "inputs of your own with superserve_jax.loadtest.loadgen.replay"
        )
    inputs, labels = data.open(config.data, decode=False).arrays("test")
    if not all(s.profiled_half for s in model.served):
        return inputs, labels  # an export of an older version, profiled on the whole split
    chosen = ~halves.profiling_half(labels)
    return inputs[chosen], labels[chosen]
