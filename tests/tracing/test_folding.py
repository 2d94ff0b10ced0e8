"""Norms of plain modules fold into the convolution before them, and only where nothing else sees the difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import superserve_jax as ss
from superserve_jax.supernets import programs

SPEC = jax.ShapeDtypeStruct((1, 6, 6, 2), "float32")
EPS = 0.01


class Net(nnx.Module):
    """Two convolutions with norms; `variant` says what is unusual."""

    def __init__(self, variant: str = "usual"):
        rngs = nnx.Rngs(0)
        self.variant = variant
        self.conv1 = nnx.Conv(2, 8, (3, 3), use_bias=variant == "bias", rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, epsilon=EPS, use_scale=variant != "no scale", rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), feature_group_count=8 if variant == "depthwise" else 1, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(8, epsilon=EPS, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        y = self.conv1(x)
        if self.variant == "transposed":
            y = jnp.swapaxes(y, 1, 2)
        z = nnx.relu(self.norm1(y))
        if self.variant == "read twice":
            z = z + y
        if self.variant == "shared kernel":
            z = z + jnp.mean(self.conv1.kernel[...])
        return self.head(jnp.mean(nnx.relu(self.norm2(self.conv2(z))), (1, 2)))


def elastic(variant, **options):
    return ss.elastic(Net(variant), SPEC, name=f"folding {variant}", axes={"expand": (0.5, 1.0)}, **options)


def both(net, subnet, *, masked=False):
    """Logits without and with folded norms, of random parameters and statistics."""
    program = programs.masked(net.config) if masked else programs.sliced(net.config, subnet)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32) for name, p in net.params.items()}
    count = sum(net.config.norm_sizes(net.config.sizes(subnet)).values())
    rows = np.stack([rng.normal(size=count), rng.uniform(0.1, 2, count)]).astype(np.float32)
    rows, active = jnp.asarray(program.pad_statistics(rows, subnet)), program.active(subnet)
    images = jnp.asarray(rng.normal(size=(4, 6, 6, 2)), jnp.float32)
    plain = jax.jit(program.infer)(params, images, rows, active)
    folded = jax.jit(program.infer_folded)(program.fold(params, rows), images, rows, active)
    return plain, folded


@pytest.mark.parametrize("masked", [False, True], ids=["sliced", "masked"])
@pytest.mark.parametrize("variant", ["usual", "depthwise", "bias", "no scale", "read twice", "shared kernel", "transposed"])
def test_logits_with_folded_norms_are_those_without(variant, masked):
    net = elastic(variant)
    plain, folded = both(net, net.space.smallest(), masked=masked)
    np.testing.assert_allclose(folded, plain, rtol=1e-4, atol=1e-5)
    assert np.ptp(np.asarray(plain)) > 0.1


@pytest.mark.parametrize(
    ("variant", "norms"),
    [
        ("usual", ["norm1", "norm2"]),
        ("depthwise", ["norm1", "norm2"]),
        ("bias", ["norm2"]),
        ("no scale", ["norm2"]),
        ("read twice", ["norm2"]),
        ("shared kernel", ["norm2"]),
        ("transposed", ["norm2"]),
    ],
)
def test_a_norm_folds_if_nothing_else_reads_its_convolution(variant, norms):
    folds = elastic(variant).config.folds()
    assert [fold.norm for fold in folds] == norms
    number = norms[-1][-1]
    last = folds[-1]
    assert (last.kernel, last.scale, last.bias) == (f"conv{number}.kernel", f"norm{number}.scale", f"norm{number}.bias")
    assert last.eps == pytest.approx(EPS)


def test_a_program_with_folded_norms_reads_no_scale():
    net = elastic("usual")
    program = programs.sliced(net.config, net.space.smallest())
    used, folded = programs.used_leaves(program), programs.used_leaves(program, folded=True)
    assert folded == {name: shape for name, shape in used.items() if not name.endswith("scale")}


def test_a_norm_with_kernels_of_several_sizes_folds():
    class Elastic(Net):
        def __init__(self):
            super().__init__("usual")
            self.to = nnx.Param(jnp.eye(1) * 2)

        def __call__(self, x):
            kernel = ss.elastic.kernel_select(self.conv1.kernel[...], {1: self.to[...]})
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return self.head(jnp.mean(nnx.relu(self.norm2(self.conv2(nnx.relu(self.norm1(y))))), (1, 2)))

    net = ss.elastic(Elastic(), SPEC, name="folding kernels", axes={"expand": None})
    assert [fold.norm for fold in net.config.folds()] == ["norm1", "norm2"]
    for masked in (False, True):
        plain, folded = both(net, net.space.smallest(), masked=masked)
        np.testing.assert_allclose(folded, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_fold_in_half_precision_too(dtype):
    net = elastic("usual")
    network = net.config.network
    dtypes = {name: programs.weight_spec(p, dtype).dtype for name, p in net.params.items()}
    traced = network.traced(network.input_spec(2), dtypes=dtypes)
    assert traced.foldable.keys() == network.reference.foldable.keys() == {"norm1", "norm2"}
