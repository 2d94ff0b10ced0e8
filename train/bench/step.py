"""Times a sandwich step of four subnets against four steps of the largest: how much time separate programs save.

    python train/bench/step.py configs/digits_resnet.py --batch-size 64 --repetitions 30

A sandwich step trains the largest, the smallest and two random subnets. With one masked program for all of them, it would cost
as much as four steps of the largest. Both are timed in turn, so the ratio also holds on a busy machine. Times include the
optimiser's update, but no compilation. The table shows the time that each program adds to a step of the largest. Inputs are
random, so no dataset is needed.
Library: training.step.SandwichStep, training.sampling.Sampler.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from superserve_jax import cli, files, progress
from superserve_jax.supernets import programs
from superserve_jax.training.compilations import Compilations
from superserve_jax.training.config import TrainConfig, load_config
from superserve_jax.training.sampling import Choice, Sampler
from superserve_jax.training.step import Recipe, SandwichStep

DEFAULT_CONFIG = "configs/digits_resnet.py"
RANDOM_SUBNETS = 2
STEPS = 2 + RANDOM_SUBNETS  # number of steps of the largest: one for each subnet of a sandwich step


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      config: the experiment; an option can override every field of the config file.
      repetitions: sandwich steps to time, each followed by four steps of the largest.
      json: write the numbers to this file.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    repetitions: int = 20
    json: pathlib.Path | None = None


class Bench:
    """One batch, and the training state, which each timed step replaces."""

    def __init__(self, config: TrainConfig):
        recipe = Recipe(smoothing=config.label_smoothing, compute_dtype=config.compute_dtype)
        self._sandwich = SandwichStep(config.optim.create(10_000), recipe=recipe, ema=config.ema)
        self._state = self._sandwich.init(programs.initial_params(config.model, config.seed))
        rng, spec = np.random.default_rng(0), config.model.input_spec(config.batch_size)
        self._inputs = rng.integers(0, 2, spec.shape).astype(spec.dtype)  # pixels and token ids of every family
        self._labels = rng.integers(0, config.model.num_classes, config.batch_size).astype(np.int32)

    def step_ms(self, choices: Sequence[Choice]) -> float:
        """Milliseconds of one step with these choices."""
        start = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._sandwich(self._state, self._inputs, self._labels, choices))
        return 1e3 * (time.perf_counter() - start)


def measure(config: TrainConfig, repetitions: int) -> dict[str, Any]:
    """The numbers that the program prints: times in ms, the ratio of every repetition, compilations."""
    sampler = Sampler(config.model, buckets=config.buckets, random_subnets=RANDOM_SUBNETS, seed=config.seed)
    steps = [sampler.step(k) for k in range(repetitions)]
    largest = steps[0][0]
    others = list({choice.program: choice for choices in steps for choice in choices[1:]}.values())
    bench, compilations = Bench(config), Compilations()
    seen = set()
    for choices in progress.track(steps, "compiling"):
        if not seen >= (used := {choice.program for choice in choices}):
            bench.step_ms(choices)
            seen |= used
    compiled = compilations.count
    bench.step_ms([largest])
    bench.step_ms([largest, others[0]])  # compiles the update for two gradients
    before = compilations.count

    sandwich, largest_only, pairs = [], [], [[] for _ in others]
    for choices in progress.track(steps, "measuring"):
        sandwich.append(bench.step_ms(choices))
        largest_only.append(sum(bench.step_ms([largest]) for _ in range(STEPS)))
        for times, choice in zip(pairs, others, strict=True):
            times.append(bench.step_ms([largest, choice]))
    one = statistics.median(largest_only) / STEPS
    table = [
        {"name": name, "mflops": config.model.flops(c.program.envelope) / 1e6, "traced": len(c.program.traced), "ms": ms}
        for name, c, ms in [
            ("largest, and the update", largest, one),
            *(
                ("bucket" if c.program.traced else "smallest", c, statistics.median(times) - one)
                for c, times in zip(others, pairs, strict=True)
            ),
        ]
    ]
    return {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "sandwich_ms": statistics.median(sandwich),
        "largest_ms": statistics.median(largest_only),
        "ratio": statistics.median(sandwich) / statistics.median(largest_only),
        "ratios": [a / b for a, b in zip(sandwich, largest_only, strict=True)],
        "compilations": compiled,
        "compilations_bound": bound(config.buckets),
        "compilations_while_measuring": compilations.count - before,
        "programs": table,
    }


def bound(buckets: int) -> int:
    """The largest number of programs that training compiles, see `SandwichStep`."""
    return buckets + 4


def main() -> None:
    """The program."""
    _, options = cli.options_after_path(lambda path: Options(load_config(path)), __doc__, path=DEFAULT_CONFIG)
    found = measure(options.config, options.repetitions)
    low, middle, high = np.percentile(found["ratios"], (10, 50, 90))
    print(f"batch {found['batch_size']} on {found['device']}, medians of {options.repetitions}:")
    largest_ms = found["programs"][0]["ms"]
    columns = {
        "program": lambda p: p["name"],
        "MFLOPs": lambda p: f"{p['mflops']:.2f}",
        "sizes traced": lambda p: str(p["traced"]),
        "ms per step": lambda p: f"{p['ms']:.1f}",
        "relative to the largest": lambda p: f"{p['ms'] / largest_ms:.2f}",
    }
    cli.print_columns(columns, sorted(found["programs"], key=lambda p: -p["mflops"]))
    print(
        f"a sandwich step of {STEPS} subnets takes {found['sandwich_ms']:.1f} ms, {STEPS} steps of the largest "
        f"{found['largest_ms']:.1f} ms: ratio {found['ratio']:.3f}; step by step median {middle:.3f}, 80 % within "
        f"{low:.3f} to {high:.3f}"
    )
    print(
        f"{found['compilations']} programs compiled, at most {found['compilations_bound']}; "
        f"{found['compilations_while_measuring']} more while measuring"
    )
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    cli.run(main)
