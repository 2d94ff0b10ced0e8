"""Compares the built-in families with the same networks as plain modules, which `ss.elastic` makes elastic.

    python serve/bench/plain_families.py
    python serve/bench/plain_families.py --family dynabert --batch 4

The plain modules are docs/examples/plain_ofa_resnet.py and docs/examples/plain_dynabert.py, at the published sizes, with
random weights. Both programs of a random subnet get their cuts of the same weights, compile with the same options, and take
turns. The table also has the CPU time until the program can be lowered. For a plain module, most of it is the trace of the
whole network. Library: tracing, supernets.programs.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import elastic
import jax
import jax.numpy as jnp
import numpy as np
from elastic import Compiled

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
    jax.jit(jnp.sum).lower(inputs)  # the first use of jax takes longer
    (ours, our_s), (theirs, their_s) = (_build(config, params, inputs, options.seed) for config in (plain, hand))
    rows = [("plain", ours, f"{our_s:.2f}"), ("hand-written", theirs, f"{their_s:.2f}")]
    found = elastic.compare("plain / hand-written", rows, "CPU s to begin", repeats=options.repeats)
    cli.write_results(options.json, {"seconds": [our_s, their_s], **found})


def _build(config: FamilyConfig, params: dict[str, jax.Array], inputs: jax.Array, seed: int) -> tuple[Compiled, float]:
    """The sliced program of a random subnet, and the CPU time until it could be lowered. It gets its cut of the weights."""
    start_s = time.process_time()
    program = programs.sliced(config, config.space().sample(seed, 0))
    shapes, count = programs.used_leaves(program), program.statistics_size
    seconds = time.process_time() - start_s
    statistics = jnp.stack([jnp.zeros(count), jnp.ones(count)])
    cut = {name: program.cut(name, params, shape) for name, shape in shapes.items()}
    return elastic.compiled(program.infer, (cut, inputs, statistics, jnp.zeros(0, jnp.int32))), seconds


if __name__ == "__main__":
    cli.run(main)
