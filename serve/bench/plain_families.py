"""Compares the built-in families with the same networks as plain modules, which `ss.elastic` makes elastic.

    python serve/bench/plain_families.py
    python serve/bench/plain_families.py --family dynabert --batch 4

The plain modules are docs/examples/plain_ofa_resnet.py and docs/examples/plain_dynabert.py, at the published sizes, with
random weights. Both programs of a random subnet get their cuts of the same weights, compile with the same options, and take
turns. The program also prints how long it takes until the program can be compiled. For a plain module, this includes tracing
the whole network. Library: tracing, supernets.programs.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import elastic
import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import cli, foreign
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig

EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "examples"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      family: which family.
      small: compare networks of a few channels, to try the program.
      batch: the number of inputs.
      seed: which random subnet.
      repeats: how often each of the two runs.
      json: write the result to this file.
    """

    family: Literal["ofa_resnet", "dynabert"] = "ofa_resnet"
    small: bool = False
    batch: int = 1
    seed: int = 0
    repeats: int = 20
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    cli.check_above_zero(options, "batch", "repeats")
    if options.family == "ofa_resnet":
        hand: Any = OFAResNetConfig()
        if options.small:
            hand = OFAResNetConfig(image_size=16, stem_width=8, stage_widths=(8, 16), strides=(1, 2), depths=((1, 2), (1, 2)))
        plain = foreign.import_module(str(EXAMPLES / "plain_ofa_resnet.py")).PlainOFAResNetConfig(hand)
    else:
        hand = DynaBERTConfig()
        if options.small:
            hand = DynaBERTConfig(vocab_size=20, max_length=8, hidden_size=12, depths=(1, 2), heads=(1, 2), ffn=(8, 16))
        plain = foreign.import_module(str(EXAMPLES / "plain_dynabert.py")).PlainDynaBERTConfig(hand)
    params = programs.initial_params(hand, 0)
    rng = np.random.default_rng(0)
    spec = hand.input_spec(options.batch)
    inputs = jnp.asarray(rng.integers(0, 256 if options.family == "ofa_resnet" else hand.vocab_size, spec.shape), spec.dtype)
    if options.family == "dynabert":
        inputs = inputs.at[..., 1].set(0)  # token types
    built = [_build(config, params, inputs, options.seed) for config in (hand, plain)]
    ratios, medians = elastic.alternate(built[1].call, built[0].call, repeats=options.repeats)
    rows = [("network", "seconds to the program", "operations", "median ms")]
    for name, one, median in zip(("hand-written", "plain"), built, reversed(medians), strict=True):
        rows.append((name, f"{one.seconds:.2f}", f"{one.operations}", f"{1e3 * median:.1f}"))
    cli.print_table(rows)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    operations = built[1].operations / built[0].operations
    largest = np.abs(built[0].logits).max()
    difference = float(np.abs(built[1].logits - built[0].logits).max() / largest)
    print(f"plain / hand-written: operations {operations:.3f}, latency {middle:.3f} (quartiles {low:.3f} and {high:.3f})")
    print(f"largest difference of the logits / largest logit: {difference:.1e}")
    cli.write_results(
        options.json,
        {
            "seconds": [one.seconds for one in built],
            "operations": operations,
            "latency": ratios,
            "difference": difference,
        },
    )


class _Built(NamedTuple):
    """A compiled program: how long it took until it could be compiled, its operations, its call, its logits."""

    seconds: float
    operations: int
    call: Callable[[], Any]
    logits: np.ndarray


def _build(config: FamilyConfig, params: dict[str, jax.Array], inputs: jax.Array, seed: int) -> _Built:
    """The sliced program of a random subnet, on its cut of the weights."""
    start = time.perf_counter()
    subnet = config.space().sample(seed, 0)
    program = programs.sliced(config, subnet)
    shapes = programs.used_leaves(program)
    cut = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rows = jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    lowered = jax.jit(program.infer).lower(cut, inputs, rows, jax.ShapeDtypeStruct((0,), jnp.int32))
    seconds = time.perf_counter() - start
    compiled = lowered.compile()
    statistics = jnp.stack([jnp.zeros(rows.shape[1]), jnp.ones(rows.shape[1])])
    arguments = {n: program.cut(n, params, shapes[n]) for n in shapes}, inputs, statistics, jnp.zeros(0, jnp.int32)
    return _Built(
        seconds,
        lowered.as_text().count(" = "),
        lambda: jax.block_until_ready(compiled(*arguments)),
        np.asarray(compiled(*arguments)),
    )


if __name__ == "__main__":
    cli.run(main)
