"""Small networks as plain functions of parameters and inputs. All shapes follow from the parameters.

`MODELS` gives (function, shapes of the parameters, input) under each name. Letters: B batch, T tokens, D width, F hidden
width, N heads, K heads of keys, G queries per head of keys, C features of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T = 5


def images(size=6, channels=3):
    """Random images (2, size, size, channels)."""
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, size, size, channels)), jnp.float32)


def rows(width=6):
    """Random rows (4, width)."""
    return jnp.asarray(np.random.default_rng(2).normal(size=(4, width)), jnp.float32)


def sequences(width=6):
    """Random sequences (2, T, width)."""
    return jnp.asarray(np.random.default_rng(3).normal(size=(2, T, width)), jnp.float32)


def layer_norm(x, scale, bias):
    """Written with jnp.mean and jnp.var."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * scale + bias


def mlp(p, x):
    """Two hidden layers, with a LayerNorm over the first."""
    x = layer_norm(jax.nn.gelu(x @ p["w1"] + p["b1"]), p["scale"], p["bias"])
    return jax.nn.relu(x @ p["w2"] + p["b2"]) @ p["w3"]


def attend(q, k, v):
    """Softmax attention over (B, T, N, C), scaled by a number that does not depend on a size."""
    weights = jax.nn.softmax(jnp.einsum("btnc,bsnc->bnts", q, k) * 0.3)
    return jnp.einsum("bnts,bsnc->btnc", weights, v)


def attention_three_heads_features(p, x):
    """The columns of the one matrix are (3, N, C)."""
    n, c = p["shape"].shape
    q, k, v = jnp.moveaxis((x @ p["qkv"] + p["bias"]).reshape(*x.shape[:2], 3, n, c), 2, 0)
    return x + (attend(q, k, v) * p["shape"]).reshape(*x.shape[:2], n * c) @ p["out"]


def attention_heads_three_features(p, x):
    """The columns of the one matrix are (N, 3, C)."""
    n, c = p["shape"].shape
    q, k, v = jnp.split((x @ p["qkv"] + p["bias"]).reshape(*x.shape[:2], n, 3 * c), 3, axis=-1)
    return x + (attend(q, k, v) * p["shape"]).reshape(*x.shape[:2], n * c) @ p["out"]


def attention_split_columns(p, x):
    """The columns are cut into three parts first, as in GPT-2."""
    n, c = p["shape"].shape
    q, k, v = (y.reshape(*x.shape[:2], n, c) for y in jnp.split(x @ p["qkv"] + p["bias"], 3, axis=-1))
    return x + (attend(q, k, v) * p["shape"]).reshape(*x.shape[:2], n * c) @ p["out"]


def grouped_queries(p, x):
    """G heads of queries share a head of keys and values, which are repeated."""
    k = p["k"].shape[1]
    q = jnp.einsum("btd,dnc->btnc", x, p["q"])
    group = q.shape[2] // k
    keys, values = (jnp.repeat(jnp.einsum("btd,dkc->btkc", x, p[name]), group, axis=2) for name in "kv")
    return x + attend(q, keys, values).reshape(*x.shape[:2], -1) @ p["out"].reshape(k * group * p["v"].shape[2], -1)


def convolution(x, kernel, groups=1):
    """NHWC and HWIO, padded to the same size."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def cnn(p, x):
    """Convolution, max pooling, flatten, dense."""
    x = jax.nn.relu(convolution(x, p["conv"]) + p["bias"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1)
    return jax.nn.relu(x @ p["dense"].reshape(x.shape[1], -1)) @ p["head"]


def depthwise(p, x):
    """Expand, depthwise, project, with squeeze and excite, as in MobileNet."""
    h = jax.nn.relu6(convolution(x, p["expand"]))
    h = jax.nn.hard_swish(convolution(h, p["depthwise"], groups=h.shape[-1]) + p["bias"])
    gate = jax.nn.sigmoid(jax.nn.relu(jnp.mean(h, (1, 2)) @ p["squeeze"]) @ p["excite"])
    return jnp.mean(x + convolution(h * gate[:, None, None, :], p["project"]), (1, 2))


def group_norm(p, x):
    """GroupNorm over (group, channel), then a grouped convolution."""
    groups, per_group = p["shape"].shape
    h = convolution(x, p["first"])
    h = h.reshape(*h.shape[:3], groups, per_group)
    mean = h.mean((1, 2, 4), keepdims=True)
    h = ((h - mean) * lax.rsqrt(h.var((1, 2, 4), keepdims=True) + 1e-5) * p["shape"]).reshape(*x.shape[:3], -1)
    h = jnp.tanh(convolution(h, p["grouped"].reshape(1, 1, per_group, -1), groups=groups))
    return h.mean((1, 2)) @ p["head"].reshape(h.shape[-1], -1)


def dense_net(p, x):
    """Every layer reads what all layers before it computed."""
    for name in ("first", "second", "third"):
        x = jnp.concatenate([x, jax.nn.silu(x @ p[name])], axis=-1)
    return x @ p["head"]


def scanned(p, x):
    """lax.scan over stacked layers, each with a LayerNorm and a residual."""

    def layer(x, w):
        h = layer_norm(x, w["scale"], w["bias"])
        x = x + jax.nn.gelu(h @ w["up"]) @ w["down"]
        return x, jnp.mean(x)

    x, means = lax.scan(layer, x @ p["first"], p["layers"])
    return x @ p["last"], means


def tied(p, tokens):
    """Embedding and output share their weights. RMSNorm by hand, under jax.checkpoint."""

    @jax.checkpoint
    def block(w, x):
        h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w["scale"]
        gate, up = jnp.split(h @ w["gate_up"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ w["down"]

    x = p["embedding"][tokens] + p["positions"]
    return block(p["block"], x) @ p["embedding"].T


def unet(p, x):
    """Down, up, and a shortcut that is concatenated. The encoder's width is padded to the middle's."""
    down = jnp.tanh(x @ p["down"])
    padded = jnp.pad(down, ((0, 0), (0, p["middle"].shape[0] - down.shape[1])))
    middle = jnp.maximum(padded @ p["middle"], 0.1)
    return jnp.concatenate([middle, down], 1) @ p["up"]


MODELS = {
    "mlp": (mlp, {"w1": (6, 8), "b1": (8,), "scale": (8,), "bias": (8,), "w2": (8, 10), "b2": (10,), "w3": (10, 4)}, rows()),
    "attention_three_heads_features": (
        attention_three_heads_features,
        {"shape": (4, 3), "qkv": (6, 36), "bias": (36,), "out": (12, 6)},
        sequences(),
    ),
    "attention_heads_three_features": (
        attention_heads_three_features,
        {"shape": (4, 3), "qkv": (6, 36), "bias": (36,), "out": (12, 6)},
        sequences(),
    ),
    "attention_split_columns": (
        attention_split_columns,
        {"shape": (4, 3), "qkv": (6, 36), "bias": (36,), "out": (12, 6)},
        sequences(),
    ),
    "grouped_queries": (
        grouped_queries,
        {"q": (6, 6, 4), "k": (6, 2, 4), "v": (6, 2, 4), "out": (6, 4, 6)},
        sequences(),
    ),
    "cnn": (cnn, {"conv": (3, 3, 3, 4), "bias": (4,), "dense": (9, 4, 7), "head": (7, 4)}, images()),
    "depthwise": (
        depthwise,
        {
            "expand": (1, 1, 3, 6),
            "depthwise": (3, 3, 1, 6),
            "bias": (6,),
            "squeeze": (6, 4),
            "excite": (4, 6),
            "project": (1, 1, 6, 3),
        },
        images(),
    ),
    "group_norm": (
        group_norm,
        {"first": (1, 1, 3, 12), "shape": (3, 4), "grouped": (4, 3, 2), "head": (3, 2, 4)},
        images(),
    ),
    "dense_net": (dense_net, {"first": (6, 4), "second": (10, 5), "third": (15, 3), "head": (18, 4)}, rows()),
    "scanned": (
        scanned,
        {"first": (6, 8), "layers": {"scale": (3, 8), "bias": (3, 8), "up": (3, 8, 10), "down": (3, 10, 8)}, "last": (8, 4)},
        rows(),
    ),
    "tied": (
        tied,
        {"embedding": (11, 8), "positions": (T, 8), "block": {"scale": (8,), "gate_up": (8, 12), "down": (6, 8)}},
        jnp.asarray([[1, 2, 3, 4, 10], [0, 5, 6, 0, 7]]),
    ),
    "unet": (unet, {"down": (6, 4), "middle": (9, 5), "up": (9, 4)}, rows()),
}

# Groups that no operation connects, but whose sizes the Python code above takes from one shape.
EQUAL = {
    "attention_heads_three_features": (("shape[1]", "qkv[1].1"),),
    "attention_split_columns": (("shape[1]", "qkv[1].1"),),
}
