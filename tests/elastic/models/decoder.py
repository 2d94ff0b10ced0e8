"""The Llama of docs/examples: `nnx.Linear`, `jax.nn.dot_product_attention`, padding, and the state of the last real token."""

import dataclasses
import pathlib

import numpy as np
from flax import nnx

from models.case import Case, Shapes, kept, sizes_of
from superserve_jax import foreign

EXAMPLE = pathlib.Path(__file__).parents[3] / "docs" / "examples" / "listops_llama.py"
HEAD_DIM, VOCAB, LENGTH = 8, 12, 9


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One entry per block, except the width. `group` counts the heads of queries for each head of keys and values."""

    width: int = 24
    kv_heads: tuple[int, ...] = (2, 4, 2)
    group: tuple[int, ...] = (3, 2, 2)
    hidden: tuple[int, ...] = (32, 16, 48)


def build(sizes: Sizes, rngs: nnx.Rngs) -> nnx.Module:
    llama = foreign.import_module(str(EXAMPLE))
    config = llama.LlamaConfig(vocab_size=VOCAB, max_length=LENGTH, width=sizes.width, depth=1, head_dim=HEAD_DIM)
    network = llama.Llama(config, rngs=rngs)
    blocks = zip(sizes.kv_heads, sizes.group, sizes.hidden, strict=True)
    network.blocks = nnx.List(
        llama.Block(dataclasses.replace(config, kv_heads=k, group=g, hidden=h), rngs=rngs) for k, g, h in blocks
    )
    return network


def shrink(shapes: Shapes) -> Sizes:
    blocks = kept(shapes, r"blocks\.(\d+)\.")
    queries, keys = (np.array(sizes_of(shapes, f"blocks.{{}}.attention.{n}.kernel", blocks, 1)) for n in ("query", "key"))
    hidden = sizes_of(shapes, "blocks.{}.mlp.gate.kernel", blocks, 1)
    kv_heads, group = (keys // HEAD_DIM).tolist(), (queries // keys).tolist()
    return Sizes(shapes["tokens.embedding"][1], tuple(kv_heads), tuple(group), hidden)


CASE = Case(
    name="decoder",
    build=build,
    sizes=Sizes(),
    shrink=shrink,
    shape=(LENGTH,),
    dtype="int32",
    vocab=VOCAB,
    blocks=(r"blocks\.(\d+)\.",),
    options={"axes": {"width": (0.5, 0.75, 1.0)}, "rule": "every_other"},
)
