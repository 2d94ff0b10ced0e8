"""Compares a subnet of an elastic module with the same code built small: operations, results and latency.

    python serve/bench/elastic.py
    python serve/bench/elastic.py --mlp 768 --depth 6 --batch 4

The module is the ViT-B/16 of docs/examples/elastic_vit_b16.py, with random weights. The subnet has fewer blocks and fewer
hidden units. Its sliced program gets its cut of the weights, as a server keeps them. The small network is the same class with
smaller numbers, and runs on the same arrays. Both compile with the same options, and take turns. The program also prints how
long `ss.elastic` takes to trace the whole network. Library: tracing, supernets.programs.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from superserve_jax import cli, foreign
from superserve_jax.supernets import programs

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "elastic_vit_b16.py"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      depth: the number of blocks of the subnet: 6, 8, 10 or 12.
      mlp: the hidden units of each block of the subnet: 768, 1536, 2304 or 3072.
      image_size: height and width of the images, in pixels.
      batch: the number of images.
      repeats: how often each of the two runs.
      json: write the result to this file.
    """

    depth: int = 6
    mlp: int = 1536
    image_size: int = 224
    batch: int = 1
    repeats: int = 20
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    cli.check_above_zero(options, "batch", "repeats")
    example = foreign.import_module(str(EXAMPLE))
    config = example.ViTConfig(image_size=options.image_size)
    start = time.perf_counter()
    space = config.space()
    trace_s = time.perf_counter() - start
    subnet = space.subnet(depth=(options.depth,), expand=options.mlp / config.mlp)
    params = programs.initial_params(config, 0)
    program = programs.sliced(config, subnet)
    cut = {n: program.cut(n, params, shape) for n, shape in programs.used_leaves(program).items()}
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, config.input_spec(options.batch).shape), jnp.uint8)
    rest = jnp.zeros((2, 0)), jnp.zeros(0, jnp.int32)
    small = dataclasses.replace(config, depth=options.depth, mlp=options.mlp)
    run_small, small_params = _small(small, cut, subnet.gates)
    whole, built = compiled(program.infer, (cut, images, *rest)), compiled(run_small, (small_params, images))
    print(f"ss.elastic traced {config.num_params(space.largest()):,} parameters in {trace_s:.2f} s")
    rows = [("subnet, sliced", whole, f"{_count(cut):,}"), ("built small", built, f"{_count(small_params):,}")]
    found = compare("sliced / small", rows, "parameters", repeats=options.repeats)
    cli.write_results(options.json, {"trace_s": trace_s, **found})


class Compiled(NamedTuple):
    """A compiled program: the number of its operations, its logits, and its call, which waits for the result."""

    operations: int
    logits: np.ndarray
    call: Callable[[], Any]


def compiled(function: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> Compiled:
    """Compiles a function for its arguments, and calls it once."""
    lowered = jax.jit(function).lower(*arguments)
    program = lowered.compile()
    operations, logits = lowered.as_text().count(" = "), np.asarray(program(*arguments))
    return Compiled(operations, logits, lambda: jax.block_until_ready(program(*arguments)))


def compare(what: str, rows: Sequence[tuple[str, Compiled, str]], column: str, *, repeats: int) -> dict[str, Any]:
    """Prints a table of two programs, and the first one divided by the second one. They take turns.

    Args:
      what: names the ratio.
      rows: name, program and one more value of each.
      column: the heading of this value.
      repeats: how often each runs.

    Returns:
      the ratios "operations" and "latency" (one for each turn), and the "difference" of the logits.
    """
    (_, first, _), (_, second, _) = rows
    ratios, medians = _alternate(first.call, second.call, repeats=repeats)
    lines = [("program", column, "operations", "median ms")]
    for (name, program, value), median in zip(rows, medians, strict=True):
        lines.append((name, value, f"{program.operations}", f"{1e3 * median:.1f}"))
    cli.print_table(lines)
    operations, difference = first.operations / second.operations, np.abs(first.logits - second.logits).max()
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    relative = float(difference / np.abs(second.logits).max())
    print(f"{what}: operations {operations:.3f}, latency {middle:.3f} (quartiles {low:.3f} and {high:.3f})")
    print(f"largest difference of the logits / largest logit: {relative:.1e}")
    return {"operations": operations, "latency": ratios, "difference": relative}


def _count(params: dict[str, jax.Array]) -> int:
    return sum(x.size for x in params.values())


def _small(
    config: Any, params: dict[str, jax.Array], gates: tuple[int, ...]
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """The small network as a function of its parameters, and the parameters: those of the kept blocks, with new numbers."""
    kept = [i for i, gate in enumerate(gates) if gate]
    renamed = {}
    for name, value in params.items():
        first, *others = name.split(".")
        number = [str(kept.index(int(others[0])))] if first == "blocks" else []
        renamed[".".join([first, *number, *(others[1:] if number else others)])] = value
    graphdef, state, rest = nnx.split(config.build(nnx.Rngs(0)), nnx.Param, ...)
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}

    def run(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        given = nnx.from_flat_state([(path, nnx.Param(params[name])) for name, path in paths.items()])
        module = nnx.merge(graphdef, given, rest)
        module.eval()
        return module(images)

    return run, {name: renamed[name] for name in paths}


def _alternate(
    first: Callable[[], Any], second: Callable[[], Any], *, repeats: int
) -> tuple[list[float], tuple[float, float]]:
    """Times two functions in turns. Returns the ratio of each pair of times, and both medians, in seconds."""
    times: tuple[list[float], list[float]] = ([], [])
    first()
    second()
    for i in range(repeats):
        for call, seconds in list(zip((first, second), times, strict=True))[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return ratios, (statistics.median(times[0]), statistics.median(times[1]))


if __name__ == "__main__":
    cli.run(main)
