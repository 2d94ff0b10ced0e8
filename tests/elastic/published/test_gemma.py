"""Gemma's transformer as Flax has it in its examples, at published sizes. Only shapes are made, so no memory is needed.

Source: google/flax, examples/gemma, commit 18f8f31: transformer.py, modules.py, layers.py, positional_embeddings.py, and the
sizes in transformer_cfg.py. Flax's wheel lacks its examples, so the network is written again here from these files' sizes,
names of layers and order of operations. It has no cache for decoding.

B is the batch, T and S are tokens, N heads, K heads of keys, G queries' heads per head of keys, H features of a head, and D
features of a token.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from tracing_checks import FAST

import superserve_jax as ss
from superserve_jax.supernets import programs

FAR = -2.3819763e38  # the score of a token that must not be seen


@dataclasses.dataclass(frozen=True)
class Gemma:
    """Sizes of a Gemma.

    Args:
      layers: number of blocks.
      tokens: number of different tokens.
      features: features of a token.
      hidden: features inside of a block's MLP.
      heads: heads of queries.
      kv_heads: heads of keys and values.
      head_dim: features of a head.
      post_norms: there are norms behind the attention and the MLP, too.
      qk_norms: there are norms of queries and keys.
      score_cap: scores of the attention stay below this.
      logit_cap: logits stay below this.
      window: how many tokens a local block sees.
      local_per_global: how many local blocks come before a global one.
      global_base: base of the wave lengths of positions in global blocks. In local ones it is 10,000.
    """

    layers: int
    tokens: int
    features: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int = 256
    post_norms: bool = False
    qk_norms: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    window: int = 0
    local_per_global: int = 0
    global_base: int = 10_000

    def is_local(self, layer):
        """Whether a block sees a window only."""
        return layer % (self.local_per_global + 1) < self.local_per_global


SECOND = {"post_norms": True, "score_cap": 50.0, "logit_cap": 30.0, "window": 4096, "local_per_global": 1}
THIRD = {"post_norms": True, "qk_norms": True, "window": 512, "local_per_global": 5, "global_base": 1_000_000}
PUBLISHED = {  # {name: (sizes, parameters of the embedding, other parameters)}
    # "Gemma: Open Models Based on Gemini Research and Technology", table 2
    "gemma_2b": (Gemma(18, 256_128, 2048, 16_384, 8, 1), 524_550_144, 1_981_884_416),
    # "Gemma 2: Improving Open Language Models at a Practical Size", table 2
    "gemma2_2b": (Gemma(26, 256_128, 2304, 9216, 8, 4, **SECOND), 590_118_912, 2_024_517_888),
    # its announcement says 170 M and 100 M
    "gemma3_270m": (Gemma(18, 262_144, 640, 2048, 4, 1, **THIRD), 167_772_160, 100_326_016),
}


class Norm(nnx.Module):
    """RMSNorm. The parameter is the scale minus 1."""

    def __init__(self, features):
        self.scale = nnx.Param(jnp.zeros(features))

    def __call__(self, x):
        power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * lax.rsqrt(power + 1e-6) * (1 + self.scale[...])


def at_positions(x, positions, base):
    """RoPE: turns the features i and i + H / 2 by the position, divided by base ** (2 i / H)."""
    half = x.shape[-1] // 2
    lengths = base ** (jnp.arange(half) / half)
    angles = positions[:, :, None, None] / lengths
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
    """Heads of queries share heads of keys and values."""

    def __init__(self, sizes, layer, rngs):
        shape = (sizes.features, sizes.head_dim)
        self.q_einsum = nnx.Einsum("BTD,NDH->BTNH", (sizes.heads, *shape), rngs=rngs)
        self.kv_einsum = nnx.Einsum("BSD,CKDH->CBSKH", (2, sizes.kv_heads, *shape), rngs=rngs)
        self.attn_vec_einsum = nnx.Einsum("BTNH,NHD->BTD", (sizes.heads, *shape[::-1]), rngs=rngs)
        if sizes.qk_norms:
            self.query_norm, self.key_norm = Norm(sizes.head_dim), Norm(sizes.head_dim)
        self.sizes, self.is_local = sizes, sizes.is_local(layer)

    def __call__(self, x, positions, mask):
        sizes = self.sizes
        q, (k, v) = self.q_einsum(x), self.kv_einsum(x)
        if sizes.qk_norms:
            q, k = self.query_norm(q), self.key_norm(k)
        base = 10_000 if self.is_local else sizes.global_base
        q, k = at_positions(q, positions, base) * sizes.head_dim**-0.5, at_positions(k, positions, base)
        if self.is_local:
            mask &= jnp.abs(jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])) < sizes.window
        batch, tokens, heads, features = q.shape
        is_grouped = 1 < k.shape[2] < heads
        if is_grouped:
            q = q.reshape(batch, tokens, k.shape[2], -1, features)
            scores = jnp.einsum("BTKGH,BSKH->BTKGS", q, k).reshape(batch, tokens, heads, -1)
        else:
            scores = jnp.einsum("BTNH,BSNH->BTNS", q, k)
        if sizes.score_cap is not None:
            scores = sizes.score_cap * jnp.tanh(scores / sizes.score_cap)
        weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, FAR))
        if is_grouped:
            weights = weights.reshape(batch, tokens, k.shape[2], -1, weights.shape[-1])
            found = jnp.einsum("BTKGS,BSKH->BTKGH", weights, v).reshape(batch, tokens, heads, features)
        else:
            found = jnp.einsum("BTNS,BSNH->BTNH", weights, v)
        return self.attn_vec_einsum(found)


class MLP(nnx.Module):
    """A gated MLP without biases."""

    def __init__(self, sizes, rngs):
        self.gate_proj = nnx.Linear(sizes.features, sizes.hidden, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(sizes.features, sizes.hidden, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(sizes.hidden, sizes.features, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention, then an MLP, each between norms and with a residual."""

    def __init__(self, sizes, layer, rngs):
        self.pre_attention_norm, self.pre_ffw_norm = Norm(sizes.features), Norm(sizes.features)
        self.attn, self.mlp = Attention(sizes, layer, rngs), MLP(sizes, rngs)
        if sizes.post_norms:
            self.post_attention_norm, self.post_ffw_norm = Norm(sizes.features), Norm(sizes.features)
        self.sizes = sizes

    def __call__(self, x, positions, mask):
        y = self.attn(self.pre_attention_norm(x), positions, mask)
        x += self.post_attention_norm(y) if self.sizes.post_norms else y
        y = self.mlp(self.pre_ffw_norm(x))
        return x + (self.post_ffw_norm(y) if self.sizes.post_norms else y)


class Transformer(nnx.Module):
    """The whole network. The embedding's table also makes the logits."""

    def __init__(self, sizes, rngs):
        self.embedder = nnx.Embed(sizes.tokens, sizes.features, rngs=rngs)
        self.layers = nnx.List([Block(sizes, layer, rngs) for layer in range(sizes.layers)])
        self.final_norm = Norm(sizes.features)
        self.sizes = sizes

    def __call__(self, tokens, positions, mask):
        x = self.embedder(tokens) * self.sizes.features**0.5
        for layer in self.layers:
            x = layer(x, positions, mask)
        logits, cap = self.embedder.attend(self.final_norm(x)), self.sizes.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def last_logits(transformer, tokens):
    """Logits of the last position. Sequences may be padded with 0 in front of their first token."""
    is_token = tokens > 0
    positions = jnp.maximum(jnp.cumsum(is_token, axis=-1) - 1, 0)
    mask = is_token[:, None, :] & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    return transformer(tokens, positions, mask)[:, -1]


def elastic(module):
    return ss.elastic(module, jax.ShapeDtypeStruct((1, 12), "int32"), call=last_logits)


def shapes_of(sizes):
    return nnx.eval_shape(lambda: Transformer(sizes, nnx.Rngs(0)))


def num_params(sizes):
    """By hand."""
    attention = (2 * sizes.heads + 2 * sizes.kv_heads) * sizes.features * sizes.head_dim
    norms = (4 if sizes.post_norms else 2) * sizes.features + (2 * sizes.head_dim if sizes.qk_norms else 0)
    block = attention + 3 * sizes.features * sizes.hidden + norms
    return sizes.tokens * sizes.features + sizes.layers * block + sizes.features


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request):
    sizes, *parts = PUBLISHED[request.param]
    return sizes, sum(parts), elastic(shapes_of(sizes))


def test_heads_hidden_units_and_blocks_are_elastic(published):
    sizes, _, net = published
    kinds = collections.Counter(axis.kind for axis in net.found.axes if len(axis.sizes) > 1)
    of_heads = [n for n in (sizes.kv_heads, sizes.heads // sizes.kv_heads) if n > 1]
    assert kinds == {"heads": len(of_heads) * sizes.layers, "expand": sizes.layers}
    assert [axis.size for axis in net.found.axes if axis.kind == "heads" and axis.block == "layers.0"] == of_heads[::-1]
    assert [(stage.name, stage.depths) for stage in net.found.stages] == [
        ("layers", tuple(range(sizes.layers // 2, sizes.layers + 1)))
    ]


def test_features_that_positions_turn_and_different_tokens_are_fixed(published):
    sizes, _, net = published
    reasons = {fixed.reason.partition(" at ")[0]: fixed.size for fixed in net.found.fixed}
    # the two matrices of a gated unit, or keys and values; jax 0.12 takes them with `unstack`
    assert {reasons.pop(reason, 2) for reason in ("its entries are used one by one", "unstack")} == {2}
    assert reasons == {
        "a look-up": sizes.tokens,
        "an axis is numbered (arange, one-hot, positions)": sizes.head_dim // 2,
    }


def test_parameters_are_those_of_the_published_network_and_of_a_smaller_one(published):
    sizes, parameters, net = published
    assert net.config.num_params(net.space.largest()) == net.found.num_params == parameters
    kv, group = (max(1, n // 4) for n in (sizes.kv_heads, sizes.heads // sizes.kv_heads))
    small = {"layers": sizes.layers // 2, "hidden": sizes.hidden // 4, "heads": kv * group, "kv_heads": kv}
    assert net.config.num_params(net.space.smallest()) == num_params(dataclasses.replace(sizes, **small))


@pytest.mark.parametrize(("name", "kv_heads"), [("gemma_2b", 1), ("gemma2_2b", 2), ("gemma3_270m", 1)])
def test_a_subnet_is_the_same_class_built_small(name, kv_heads):
    """With blocks of the published kind, but few and narrow ones. Sequences are longer than the window of local blocks."""
    sizes = PUBLISHED[name][0]
    few = {"layers": 3, "tokens": 50, "features": 24, "hidden": 16, "heads": 4, "kv_heads": kv_heads, "head_dim": 6}
    local = {"window": 5, "local_per_global": 1} if sizes.window else {}
    sizes = dataclasses.replace(sizes, **few, **local)
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(shapes_of(sizes))
    net = elastic(nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), state)))
    tokens = np.concatenate([np.zeros((2, 2), int), rng.integers(1, 50, (2, 10))], axis=1).astype(np.int32)
    subnet = net.space.subnet(depth=2, heads=0.5, expand=0.75)

    small = {"layers": 2, "hidden": 12, "heads": 2 // kv_heads, "kv_heads": 1}
    graphdef, state = nnx.split(shapes_of(dataclasses.replace(sizes, **small)))
    flat, values = nnx.to_flat_state(state), net.extract(subnet)
    flat = [(path, v, values[".".join(map(str, path))]) for path, v in flat]
    assert all(v.shape == value.shape for _, v, value in flat)
    state = nnx.from_flat_state([(path, v.replace(value)) for path, v, value in flat])
    program = programs.sliced(net.config, subnet)

    @functools.partial(jax.jit, compiler_options=FAST)
    def compute(params, state):
        logits = program.infer(params, tokens, np.zeros((2, 0), np.float32), program.active(subnet))
        return logits, last_logits(nnx.merge(graphdef, state), tokens)

    logits, expected = compute(net.params, state)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
