"""Times a sandwich step against as many steps of the largest subnet: what sampling small subnets in their own programs saves.

    python train/bench/step.py configs/digits_resnet.py --batch-size 64 --repetitions 30

A sandwich step trains the largest, the smallest and two random subnets; masked to one program it would cost four steps of the
largest. Both are measured in turn, the optimiser's update in each, compilations before; so the ratio holds on a busy machine,
too. The table says what each program adds to a step of the largest. Inputs are made up: no dataset is needed.
Library: training.step.SandwichStep, training.sampling.Sampler.
"""

import dataclasses
import pathlib
import statistics
import sys
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
STEPS = 2 + RANDOM_SUBNETS  # of the largest, as many as a sandwich step trains subnets


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      config: every field of the config file can be overridden.
      repetitions: sandwich steps to time, each followed by four steps of the largest.
      json: write the figures to this file.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    repetitions: int = 20
    json: pathlib.Path | None = None


class Bench:
    """The state that the timed steps hand on to each other, and one batch."""

    def __init__(self, config: TrainConfig):
        recipe = Recipe(smoothing=config.label_smoothing, compute_dtype=config.compute_dtype)
        self._sandwich = SandwichStep(config.optim.create(10_000), recipe=recipe, ema=config.ema)
        self._state = self._sandwich.init(programs.initial_params(config.model, config.seed))
        rng, spec = np.random.default_rng(0), config.model.input_spec(config.batch_size)
        self._inputs = rng.integers(0, 2, spec.shape).astype(spec.dtype)  # pixels and token ids of every family
        self._labels = rng.integers(0, config.model.num_classes, config.batch_size).astype(np.int32)

    def step_ms(self, choices: Sequence[Choice]) -> float:
        """Milliseconds of one step of these choices, the first by labels, the others by its output."""
        start = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._sandwich(self._state, self._inputs, self._labels, choices))
        return 1e3 * (time.perf_counter() - start)


def measure(config: TrainConfig, repetitions: int) -> dict[str, Any]:
    """The figures that the program prints: times in ms, the ratio of every repetition, compilations."""
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
    bench.step_ms([largest, others[0]])  # the update sums another number of gradients
    before = compilations.count

    sandwich, alone, pairs = [], [], [[] for _ in others]
    for choices in progress.track(steps, "measuring"):
        sandwich.append(bench.step_ms(choices))
        alone.append(sum(bench.step_ms([largest]) for _ in range(STEPS)))
        for times, choice in zip(pairs, others, strict=True):
            times.append(bench.step_ms([largest, choice]))
    one = statistics.median(alone) / STEPS
    rows = [
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
        "largest_ms": statistics.median(alone),
        "ratio": statistics.median(sandwich) / statistics.median(alone),
        "ratios": [a / b for a, b in zip(sandwich, alone, strict=True)],
        "compilations": compiled,
        "compilations_bound": bound(config.buckets),
        "compilations_while_measuring": compilations.count - before,
        "programs": rows,
    }


def bound(buckets: int) -> int:
    """The most programs that training compiles, however many steps it takes: the gradients of the largest, of the smallest
    and of each subnet bucket, the update, and the accuracy."""
    return buckets + 4


def main() -> None:
    """The program."""
    path, *rest = sys.argv[1:] if sys.argv[1:] and not sys.argv[1].startswith("-") else [DEFAULT_CONFIG, *sys.argv[1:]]
    default = Options(load_config(path))
    options = tyro.cli(Options, description=__doc__, default=default, args=rest, prog=f"train/bench/step.py {path}")
    found = measure(options.config, options.repetitions)
    low, middle, high = np.percentile(found["ratios"], (10, 50, 90))
    print(f"batch {found['batch_size']} on {found['device']}, medians of {options.repetitions}:")
    cli.print_table(
        [
            ("program", "MFLOPs", "sizes traced", "ms per step", "of the largest"),
            *(
                (
                    r["name"],
                    f"{r['mflops']:.2f}",
                    str(r["traced"]),
                    f"{r['ms']:.1f}",
                    f"{r['ms'] / found['programs'][0]['ms']:.2f}",
                )
                for r in sorted(found["programs"], key=lambda r: -r["mflops"])
            ),
        ]
    )
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
