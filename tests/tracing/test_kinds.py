"""Kinds of axes, in attentions that are written as plain functions. B and T are fixed by the input."""

import jax
import jax.numpy as jnp
import pytest

from superserve_jax import tracing
from superserve_jax.tracing import kinds

X = jax.ShapeDtypeStruct((2, 5, 6), "float32")


def shared_keys(p, x):
    """All heads of queries share one head of keys."""
    q, k, v = jnp.einsum("btd,dnh->btnh", x, p["q"]), x @ p["k"], x @ p["v"]
    weights = jax.nn.softmax(jnp.einsum("btnh,bsh->btns", q, k))
    return jnp.einsum("btnh,nho->bto", jnp.einsum("btns,bsh->btnh", weights, v), p["out"])


def grouped_queries(p, x):
    q, k, v = jnp.einsum("btd,dkgh->btkgh", x, p["q"]), jnp.einsum("btd,dkh->btkh", x, p["k"]), x @ p["v"]
    weights = jax.nn.softmax(jnp.tanh(jnp.einsum("btkgh,bskh->btkgs", q, k)))
    found = jnp.einsum("btkgs,bskh->btkgh", weights, v.reshape(2, 5, p["k"].shape[1], -1))
    return jnp.einsum("btkgh,kgho->bto", found, p["out"])


def linear(p, x):
    """Keys meet values first, so the features of values are an axis of this product, but they are no heads."""
    memory = jnp.einsum("bsh,bsv->bhv", jnp.exp(x @ p["k"]), x @ p["v"])
    return jnp.einsum("bth,bhv->btv", jnp.exp(x @ p["q"]), memory) @ p["out"]


def state_space(p, x):
    """As in Mamba: the state of a part of the sequence is summed over the parts before it. Its features are no heads."""
    states = jnp.einsum("btn,bth->bhn", x @ p["k"], x @ p["v"])
    decays = jnp.exp(-jnp.einsum("btd,ctd->cb", x, x))
    return jnp.einsum("ctn,chn->cth", x @ p["q"], jnp.einsum("cb,bhn->chn", decays, states)) @ p["out"]


def learned_queries(p, x):
    """Learned tokens look at the input and then at themselves. Their number is no number of heads."""
    tokens = p["tokens"] + jax.nn.softmax(p["tokens"] @ (x[0] @ p["k"]).T) @ (x[0] @ p["v"])
    weights = jax.nn.softmax((tokens @ p["q"]) @ x[0].T)
    return (jnp.tanh(weights @ (x[0] @ p["out"])) @ p["last"]).sum(0)


CASES = {
    "shared keys": (
        shared_keys,
        {"q": (6, 4, 3), "k": (6, 3), "v": (6, 7), "out": (4, 7, 2)},
        {"q[1]": "heads", "q[2]": "head_dim", "out[1]": "head_dim"},
    ),
    "grouped queries": (
        grouped_queries,
        {"q": (6, 2, 4, 3), "k": (6, 2, 3), "v": (6, 14), "out": (2, 4, 7, 2)},
        {"q[1]": "heads", "q[2]": "heads", "q[3]": "head_dim", "out[2]": "head_dim"},
    ),
    "linear": (
        linear,
        {"q": (6, 3), "k": (6, 3), "v": (6, 7), "out": (7, 2)},
        {"q[1]": "head_dim", "v[1]": "head_dim"},
    ),
    "state space": (
        state_space,
        {"q": (6, 3), "k": (6, 3), "v": (6, 7), "out": (7, 2)},
        {"q[1]": "head_dim", "v[1]": "head_dim"},
    ),
    "learned queries": (
        learned_queries,
        {"tokens": (4, 3), "k": (6, 3), "v": (6, 3), "q": (3, 6), "out": (6, 8), "last": (8, 2)},
        {"tokens[0]": "head_dim", "out[1]": "head_dim"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kind_of_an_axis_follows_from_its_use(name):
    function, shapes, expected = CASES[name]
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    traced = tracing.trace(function, params, X)
    uses = kinds.uses(traced.graph, traced.parameters)
    found = {str(place): uses.kind(traced.leaves[g.name]) for g in traced.groups.values() for place in g.places}
    assert {place: found[place] for place in expected} == expected
