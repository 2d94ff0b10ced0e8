"""A traced module whose inputs are token ids is served in length buckets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import superserve_jax as ss
from superserve_jax import supernets


class Encoder(nnx.Module):
    def __init__(self, vocab_size: int, max_length: int, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocab_size, 8, rngs=rngs)
        self.positions = nnx.Embed(max_length, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, ids):
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1]))
        x = x + self.attention(x, mask=(ids != 0)[:, None, None])
        return self.head(x[:, 0])


@ss.elastic.family("tiny_encoder", axes={"heads": (1, 2)})
@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    vocab_size: int = 20
    max_length: int = 8
    token_types: int = 1
    pad_id: int = 0
    num_classes: int = 3

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return Encoder(self.vocab_size, self.max_length, rngs=rngs)

    def input_spec(self, batch: int, *, length: int | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, length or self.max_length), jnp.int32)

    def pack(self, ids, types=None, *, mask=None, length=None):
        ids = np.asarray(ids, np.int32)
        return np.pad(ids, ((0, 0), (0, (length or self.max_length) - ids.shape[1])))


def test_token_ids_are_served_in_length_buckets(tmp_path):
    config = EncoderConfig()
    supernets.check(config)
    net = ss.SuperNet.create(config, seed=0)
    small = net.space.smallest()
    cost = {"flops": config.flops(small), "params": config.num_params(small)}
    ss.export(tmp_path / "export", net, [ss.Served(small, 0.5, None, **cost)], measured="not at all")
    model = ss.load(tmp_path / "export")
    texts = [np.arange(1, n + 1, dtype=np.int32) for n in (2, 4, 5, 8)]
    expected = model(np.concatenate([config.pack(text[None]) for text in texts]), small)
    with ss.Server(model, slo_ms=1000, lengths=(4, 8), batch_sizes=(1, 2)) as server:
        replies = [server.submit(text).result(timeout=60) for text in texts]
    np.testing.assert_allclose([reply.output for reply in replies], expected, rtol=1e-4, atol=1e-5)
