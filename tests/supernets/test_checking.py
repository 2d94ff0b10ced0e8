"""supernets.check accepts the built-in families, and finds each broken method of a test family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mlp_family import MLP, Layer, MLPConfig
from plain import whole_space
from tiny import CONFIGS, TINY, TINY_BERT

import superserve_jax as ss
from superserve_jax import errors, supernets
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.supernets import checking
from superserve_jax.supernets.family import Units
from superserve_jax.training import data
from superserve_jax.training.config import TrainConfig

FAMILIES = {**CONFIGS, "transformer": TINY_BERT, "mlp": MLPConfig()}


@pytest.mark.parametrize(
    "config",
    [*FAMILIES.values(), *(SingleSubnetConfig(c, s) for c in FAMILIES.values() for s in whole_space(c)[5::29])],
    ids=lambda c: type(c).__name__,
)
def test_families_pass_without_compiling(config):
    supernets.check(config, run=False)


@pytest.mark.slow
@pytest.mark.parametrize("config", [OFAResNetConfig(), DynaBERTConfig()], ids=["OFA-ResNet50", "DynaBERT"])
def test_the_published_networks_pass_without_compiling(config):
    supernets.check(config, run=False)


@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in [*CONFIGS, "transformer"]), "mlp"])
def test_families_pass(kind):
    supernets.check(FAMILIES[kind])


class Leaky(Layer):
    """Its output is not zero beyond the active size."""

    def __call__(self, x, width, stats):
        return super().__call__(x, width, stats) + 1


def leaky(config, rngs):
    network = MLP(config, rngs=rngs)
    network.first = Leaky(config.image_size**2, config.widths[-1], name="first", rngs=rngs)
    return network


BROKEN = {
    "space": ({"space": lambda c: (0, 1)}, r"space\(\) is tuple, expected a SearchSpace"),
    "batch": (
        {"input_spec": lambda c, n: jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)},
        r"input_spec\(2\) is .*a batch of two",
    ),
    "names": ({"sizes": lambda c, s: {"width": 8} if s.gates[0] else {}}, r"sizes of the subnet {'gates': \[0, 0\].* is \[\]"),
    "floats": (
        {"sizes": lambda c, s: MLPConfig.sizes(c, s) | {"width": 8.0}},
        r"sizes: 'width' .* is 8.0, expected an int from 0",
    ),
    "gates": ({"sizes": lambda c, s: MLPConfig.sizes(c, s) | {"block1.gate": 1}}, "sizes is .* expected a gate of block 1"),
    "norms": (
        {"norm_sizes": lambda c, sizes: {"first": sizes["width"]}},
        "norm_sizes of .*the channels of the norms that run",
    ),
    "flops": (
        {"flops": lambda c, s: MLPConfig.flops(c, s) + 1},
        r"flops of the subnet .* is 593, .* multiply-adds of its program, 592",
    ),
    "params": ({"num_params": lambda c, s: MLPConfig.flops(c, s)}, r"num_params of .* is 592, expected the weights .*, 626"),
    "classes": ({"create": lambda c, rngs: MLP(MLPConfig(num_classes=7), rngs=rngs)}, r"logits' shape of .* is \(1, 7\)"),
    "units": (
        {"units": lambda c: [Units(3, (("first.linear.bias", 0),), ("x", 0))]},
        r"units\(\): axis 0 of first.linear.bias is 16",
    ),
    "an exception": ({"flops": lambda c, s: {}["x"]}, "family 'mlp': a method of its config fails .KeyError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_found_without_compiling(name):
    members, message = BROKEN[name]
    with pytest.raises(errors.ConfigError, match=message):
        supernets.check(type("Broken", (MLPConfig,), members)(), run=False)


def test_a_network_that_does_not_mask_is_found():
    broken = type("Broken", (MLPConfig,), {"create": leaky})()
    supernets.check(broken, run=False)
    with pytest.raises(errors.ConfigError, match=r"logits in training .*sliced and the masked program.*\[8\].*at most"):
        supernets.check(broken)


def test_sequences_that_do_not_fit_are_found():
    broken = type("Broken", (DynaBERTConfig,), {"pack": lambda c, ids, **_: ids})
    with pytest.raises(errors.ConfigError, match=r"pack\(..., length=3\) is \(\(1, 0\)"):
        supernets.check(broken(**dataclasses.asdict(TINY_BERT)), run=False)


def test_an_object_that_is_no_config_is_refused_with_the_members_that_it_lacks():
    with pytest.raises(errors.ConfigError, match="it has no create, family, flops"):
        supernets.check(TINY.space())


def test_training_refuses_a_broken_family_before_the_first_step(tmp_path):
    broken = type("Broken", (MLPConfig,), {"flops": lambda c, s: 1})()
    arrays = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
    dataset = data.from_arrays(train=arrays, test=arrays, validation=5)
    with pytest.raises(errors.ConfigError, match="flops of the subnet"):
        ss.train(TrainConfig(name="broken", model=broken), tmp_path / "run", dataset=dataset)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_xla_counts_the_same_flops_of_a_convolution(kernel_size, stride):
    def conv(x, kernel):  # without padding, because XLA does not count products with it
        return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    arguments = jnp.zeros((1, 9, 9, 4)), jnp.zeros((kernel_size, kernel_size, 4, 6))
    counted = checking.multiply_adds(jax.make_jaxpr(conv)(*arguments))
    assert jax.jit(conv).lower(*arguments).compile().cost_analysis()["flops"] == 2 * counted
