import jax
import jax.numpy as jnp
import numpy as np
import pytest

from superserve_jax import ops

RNG = np.random.default_rng(0)


def pair(limit, active):
    return (limit, jnp.int32(active))


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("active", [1, 4, 8])
def test_a_mask_zeroes_exactly_the_channels_beyond_the_active_size(active):
    x = normal(2, 3, 8)
    masked = ops.mask(x, pair(8, active))
    np.testing.assert_array_equal(masked[..., :active], x[..., :active])
    assert not masked[..., active:].any()
    assert ops.mask(x, 8) is x


def test_a_weight_slice_takes_the_first_entries_of_the_last_axes():
    w = normal(3, 3, 8, 6)
    np.testing.assert_array_equal(ops.weight_slice(w, 4, 2), w[:, :, :4, :2])
    np.testing.assert_array_equal(ops.weight_slice(w, 5), w[..., :5])


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("gate", [0, 1])
def test_a_traced_gate_gives_the_same_as_a_static_gate(gate, skip):
    x = normal(4)
    expected = ops.layer_select(gate, lambda x: x * 3, x, skip=skip)
    select = jax.jit(lambda g, x: ops.layer_select((1, g), lambda x: x * 3, x, skip=skip))
    np.testing.assert_array_equal(select(jnp.int32(gate), x), expected)
    np.testing.assert_array_equal(expected, x * 3 if gate else x)


def test_a_block_beyond_the_limit_is_not_even_traced():
    def never(x):
        raise AssertionError("traced")

    x = normal(2)
    assert ops.layer_select(0, never, x, skip=True) is x
    assert ops.layer_select(pair(0, 0), never, x, skip=False) is x


def test_batch_statistics_agree_with_numpy():
    x = normal(5, 4, 4, 3)
    mean, var = ops.batch_statistics(x)
    np.testing.assert_allclose(mean, np.mean(x, (0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, np.var(x, (0, 1, 2)), rtol=1e-5)
