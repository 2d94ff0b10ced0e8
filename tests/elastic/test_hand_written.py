"""A BERT in plain Flax NNX, made elastic, equals the hand-written DynaBERT, also in length buckets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import superserve_jax as ss
from superserve_jax import supernets
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets import programs

BERT = DynaBERTConfig(
    num_classes=3, vocab_size=11, max_length=8, hidden_size=12, depths=(1, 2, 3), heads=(1, 2, 4), ffn=(6, 12, 24), eps=1e-6
)


class Embeddings(nnx.Module):
    def __init__(self, config: DynaBERTConfig, rngs: nnx.Rngs):
        d = config.hidden_size
        self.words = nnx.Param(jax.random.normal(rngs(), (config.vocab_size, d)))
        self.positions = nnx.Param(jax.random.normal(rngs(), (config.max_length, d)))
        self.types = nnx.Param(jax.random.normal(rngs(), (config.token_types, d)))
        self.norm = nnx.LayerNorm(d, epsilon=config.eps, use_fast_variance=False, rngs=rngs)

    def __call__(self, ids, types):
        return self.norm(self.words[ids] + self.positions[: ids.shape[1]] + self.types[types])


class Layer(nnx.Module):
    def __init__(self, config: DynaBERTConfig, rngs: nnx.Rngs):
        d, ffn = config.hidden_size, config.ffn[-1]
        self.heads = config.heads[-1]
        self.query, self.key, self.value, self.attention_out = (nnx.Linear(d, d, rngs=rngs) for _ in range(4))
        self.attention_norm, self.ffn_norm = (
            nnx.LayerNorm(d, epsilon=config.eps, use_fast_variance=False, rngs=rngs) for _ in range(2)
        )
        self.ffn_in, self.ffn_out = nnx.Linear(d, ffn, rngs=rngs), nnx.Linear(ffn, d, rngs=rngs)

    def __call__(self, x, mask):
        split = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        q, k, v = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))
        x = self.attention_norm(x + self.attention_out(jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)))
        return self.ffn_norm(x + self.ffn_out(nnx.gelu(self.ffn_in(x), approximate=False)))


class Bert(nnx.Module):
    def __init__(self, config: DynaBERTConfig, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.depths[-1])])
        self.pooler = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.classifier = nnx.Linear(config.hidden_size, config.num_classes, rngs=rngs)

    def __call__(self, inputs):
        ids, types = inputs[..., 0], inputs[..., 1]
        x = self.embeddings(ids, types)
        for layer in self.layers:
            x = layer(x, (ids != 0)[:, None, None, :])
        return self.classifier(jnp.tanh(self.pooler(x[:, 0])))


@ss.elastic.family(
    "plain_bert",
    axes={"heads": (1, 2, 4), "expand": (0.25, 0.5, 1.0), "pooler": None},
    depth={"layers": (1, 2, 3)},
    rule="every_other",
)
@dataclasses.dataclass(frozen=True)
class PlainBertConfig:
    vocab_size: int = BERT.vocab_size
    max_length: int = BERT.max_length
    token_types: int = 2
    pad_id: int = 0

    def build(self, rngs):
        return Bert(BERT, rngs)

    def input_spec(self, batch, *, length=None):
        return BERT.input_spec(batch, length=length)

    def pack(self, ids, types=None, *, mask=None, length=None):
        return BERT.pack(ids, types, mask=mask, length=length)


PLAIN = PlainBertConfig()


def pairs():
    """The same subnets in both spaces."""
    for step in range(4):
        hand = BERT.space().sample(0, step)
        ratios = {"heads": [h / 4 for h in hand["heads"]], "expand": [n / 24 for n in hand["ffn"]]}
        yield hand, PLAIN.space().subnet(gates=hand.gates, **ratios)


def test_the_space_and_the_costs_are_those_of_the_hand_written_family():
    assert PLAIN.num_classes == 3
    assert PLAIN.space().size == BERT.space().size
    assert programs.param_spec(PLAIN) == programs.param_spec(BERT)
    for hand, plain in pairs():
        assert PLAIN.flops(plain) == BERT.flops(hand)
        assert PLAIN.num_params(plain) == BERT.num_params(hand)


@pytest.mark.parametrize("length", [5, 8])
def test_logits_and_hidden_states_are_those_of_the_hand_written_family(length):
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(0, 0.5, spec.shape), jnp.float32) for name, spec in programs.param_spec(BERT).items()
    }
    inputs = BERT.pack(rng.integers(1, 11, (3, 4)), length=length)
    masked = {config: programs.masked(config) for config in (BERT, PLAIN)}
    run = {config: jax.jit(program.train_hidden) for config, program in masked.items()}
    for hand, plain in pairs():
        expected, hidden = run[BERT](params, inputs, masked[BERT].active(hand))
        found, states = run[PLAIN](params, inputs, masked[PLAIN].active(plain))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        for (gate, state), (wanted_gate, wanted) in zip(states, hidden, strict=True):
            assert int(gate) == int(wanted_gate)
            np.testing.assert_allclose(state, wanted, rtol=1e-4, atol=1e-4)


def test_it_is_a_family_of_sequences():
    assert isinstance(PLAIN, supernets.SequenceConfig)
    supernets.check(PLAIN, run=False)


def test_rewiring_sorts_the_same_units():
    key = lambda units: (units.count, sorted(axis.path for axis in units.writers), [axis.path for axis in units.readers])  # noqa: E731
    assert sorted(map(key, PLAIN.units())) == sorted(map(key, BERT.units()))
