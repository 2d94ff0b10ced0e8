"""supernets.check accepts the built-in families, and finds each broken method of a test family.

One file because every broken family is a few lines, and all of them break the same family.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from mlp_family import MLP, Layer, MLPConfig
from plain import whole_space
from tiny import CONFIGS, TINY, TINY_BERT, TINY_VIT

import superserve_jax as ss
from superserve_jax import errors, ops, supernets
from superserve_jax.families.dynabert import DynaBERT, DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.families.vit import ViTConfig
from superserve_jax.supernets import checking
from superserve_jax.supernets.family import UnitAxis, Units
from superserve_jax.training import data
from superserve_jax.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

FAMILIES = {**CONFIGS, "transformer": TINY_BERT, "vit": TINY_VIT, "mlp": MLPConfig()}


@pytest.mark.parametrize(
    "config",
    [*FAMILIES.values(), *(SingleSubnetConfig(c, s) for c in FAMILIES.values() for s in whole_space(c)[5::29])],
    ids=lambda c: type(c).__name__,
)
def test_families_pass_without_compiling(config):
    supernets.check(config, run=False)


@pytest.mark.slow
@pytest.mark.parametrize("config", [OFAResNetConfig(), DynaBERTConfig(), ViTConfig()], ids=["OFA-ResNet50", "DynaBERT", "ViT"])
def test_the_published_networks_pass_without_compiling(config):
    supernets.check(config, run=False)


@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in [*CONFIGS, "transformer", "vit"]), "mlp"])
def test_families_pass(kind):
    supernets.check(FAMILIES[kind])


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
        r"norm_sizes: 'block0' of the subnet {'gates': \[1, 1\].* is None, expected 16, the channels that the network runs",
    ),
    "flops": (
        {"flops": lambda c, s: MLPConfig.flops(c, s) + 1},
        r"flops of the subnet .* is 593, .* multiply-adds of its program, the int 592",
    ),
    "params": (
        {"num_params": lambda c, s: MLPConfig.flops(c, s)},
        r"num_params of .* is 592, expected the weights .* the int 626",
    ),
    "vectors": (
        {"num_vector_params": lambda c, s: 1},
        r"num_vector_params of .* is 1, expected the weights in vectors that its program reads, the int 34",
    ),
    "classes": ({"create": lambda c, rngs: MLP(MLPConfig(num_classes=7), rngs=rngs)}, r"logits' shape of .* is \(1, 7\)"),
    "units": (
        {"units": lambda c: [Units(3, (UnitAxis("first.linear.bias", 0),), (UnitAxis("x", 0),))]},
        r"units\(\): axis 0 of first.linear.bias is 16",
    ),
    "an exception": (
        {"flops": lambda c, s: {}["x"]},
        r"family 'mlp': a method of its config fails, see .*test_checking.py:\d+, .* \(KeyError: 'x'\)",
    ),
    "a size for all": (
        {"sizes": lambda c, s: MLPConfig.sizes(c, c.space().largest())},
        r"sizes is {'width': 16.*} for each choice of 'width', expected other sizes",
    ),
    "random sizes": (
        {"sizes": lambda c, s: MLPConfig.sizes(c, s) | {"x": next(COUNTER)}},
        "sizes of the subnet .* is different in two calls",
    ),
    "no envelope": (
        {"sizes": lambda c, s: MLPConfig.sizes(c, s) | {"x": {(1, 0, 8): 9, (1, 1, 16): 9}.get((*s.gates, *s["width"]), 3)}},
        r"sizes: 'x' of the subnet .* is 3, expected at least the 9 of a subnet that it covers",
    ),
    "a float": ({"flops": lambda c, s: float(MLPConfig.flops(c, s))}, "flops of the subnet .* is 592.0, .* the int 592"),
    "another image": (
        {"input_spec": lambda c, n: jax.ShapeDtypeStruct((n, 9, 9, 1), jnp.uint8)},
        r"the network, for inputs of shape \(1, 9, 9, 1\) and dtype uint8 and .*, fails, see .*mlp_family.py:\d+.*81",
    ),
    "a tuple": ({"input_spec": lambda c, n: (n, 8, 8, 1)}, r"input_spec\(1\) is \(1, 8, 8, 1\), expected a jax.Shape"),
    "no module": ({"create": lambda c, rngs: nnx.Dict}, r"create\(\) is .*, expected an nnx.Module"),
}
COUNTER = itertools.count()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_found_without_compiling(name):
    members, message = BROKEN[name]
    with pytest.raises(errors.ConfigError, match=message):
        supernets.check(type("Broken", (MLPConfig,), members)(), run=False)


class IgnoresAGate(MLP):
    """Block 1 always runs."""

    def __call__(self, images, sizes, stats):
        return super().__call__(images, sizes | {"block1.gate": 1}, stats)


class IfGate(MLP):
    """Its gates are read by `if`, so a traced gate, which is a pair, is always on."""

    def __call__(self, images, sizes, stats):
        gates = {name: int(bool(size)) for name, size in sizes.items() if name.endswith("gate")}
        return super().__call__(images, sizes | gates, stats)


class Branches(MLP):
    """Its blocks are branches in training, too, so they cannot record statistics."""

    def __call__(self, images, sizes, stats):
        x = self.first(images.reshape(len(images), -1).astype(jnp.float32), sizes["width"], stats)
        for i, block in enumerate(self.blocks):
            run = lambda x, block=block: x + block(x, sizes["width"], stats)  # noqa: E731
            x = ops.layer_select(sizes[f"block{i}.gate"], run, x, skip=True)
        return self.classifier(x, self.config.num_classes)


class OneName(MLP):
    """All its norms have one name."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        for block in self.blocks:
            block.norm.name = "first"


class Random(MLP):
    """Its output depends on NumPy's random numbers."""

    def __call__(self, images, sizes, stats):
        return super().__call__(images, sizes, stats) + np.random.normal(size=10).astype(np.float32)


class BatchNorm(MLP):
    """It has a norm with statistics of its own."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)


class Dropout(MLP):
    """It has a layer with random numbers."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Classes(MLP):
    """Its output is the class, and not a logit for each class."""

    def __call__(self, images, sizes, stats):
        return super().__call__(images, sizes, stats).argmax(1)


class Integers(MLP):
    """Its logits are whole numbers."""

    def __call__(self, images, sizes, stats):
        return super().__call__(images, sizes, stats).astype(jnp.int32)


class LeakyLayer(Layer):
    """Its output is not zero beyond the active size."""

    def __call__(self, x, width, stats):
        return super().__call__(x, width, stats) + 1


class Leaky(MLP):
    """Its first layer leaks."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.first = LeakyLayer(config.image_size**2, config.widths[-1], name="first", rngs=rngs)


class NotReproducible(MLP):
    """It is created with NumPy's random numbers."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.classifier.bias[...] = np.random.normal(size=10).astype(np.float32)


NETWORKS = {
    IgnoresAGate: r"norm_sizes: 'block1' of the subnet {'gates': \[0, 0\].* is None.*the network ignores the gate",
    IfGate: r"create\(\): the size 'block0.gate' is ignored in training, expected used: .*`if` cannot read",
    Branches: r"a statistic or another value is computed inside a branch.*in training use skip=False",
    OneName: r"two norms have the name 'first'.*give every SubnetNorm a name of its own",
    Random: r"create\(\) of the subnet .* is a different program in two calls, expected no random numbers",
    BatchNorm: r"create\(\): norm.* is BatchStat, expected an nnx.Param.*layers.SubnetNorm instead of nnx.BatchNorm",
    Dropout: r"create\(\): dropout.* is Rng\w+, expected an nnx.Param.*no nnx.Dropout",
    Classes: r"create\(\): the logits' shape of .* is \(1,\), expected \(1, 10\)",
    Integers: r"the logits' dtype of .* is int32, expected floating point",
}
RUNNING = {
    Leaky: r"logits in training .*sliced and the masked program.*\[8\].*at most.*zero beyond its active size",
    NotReproducible: r"create\(\): classifier.bias is different in two calls, expected the same values for the same rngs",
}


def creating(network):
    return type("Broken", (MLPConfig,), {"create": lambda config, rngs: network(config, rngs=rngs)})()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_a_broken_network_is_found_without_compiling(network):
    with pytest.raises(errors.ConfigError, match=NETWORKS[network]):
        supernets.check(creating(network), run=False)


@pytest.mark.parametrize("network", RUNNING, ids=lambda network: network.__name__)
def test_a_broken_network_is_found_when_it_runs(network):
    supernets.check(creating(network), run=False)
    with pytest.raises(errors.ConfigError, match=RUNNING[network]):
        supernets.check(creating(network))


@dataclasses.dataclass(frozen=True, eq=False)
class ByIdentity(MLPConfig):
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class Unregistered(MLPConfig):
    family = "unregistered"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MLPConfig(widths=[8, 16]), r"MLPConfig.widths is \[8, 16\], which has no hash \(.*'list'\); use a tuple"),
        (ByIdentity(), "must be equal; leave out eq=False"),
        (Unregistered(), "family 'unregistered' is not registered.*write @families.register above Unregistered"),
        (MLPConfig(image_size=np.int64(8)), "MLPConfig.image_size is .*8.*, which JSON cannot hold .*use numbers, strings"),
    ],
    ids=["a list", "by identity", "unregistered", "no plain value"],
)
def test_a_config_that_cannot_be_stored_is_found(config, message):
    with pytest.raises(errors.ConfigError, match=message):
        supernets.check(config, run=False)


def test_a_config_that_can_change_is_found():
    mutable = dataclasses.make_dataclass("Mutable", [], namespace={k: v for k, v in vars(MLPConfig).items() if k[0] != "_"})
    with pytest.raises(
        errors.ConfigError, match=r"Mutable must be a frozen dataclass: write @dataclasses.dataclass\(frozen=True"
    ):
        supernets.check(mutable(), run=False)


@dataclasses.dataclass(frozen=True)
class WrongFolds(OFAResNetConfig):
    def folds(self):
        first, *others = super().folds()
        return [dataclasses.replace(first, scale="stem.2.norm.scale"), *others]


@pytest.mark.slow
def test_norms_that_cannot_be_folded_as_the_family_says_are_found():
    with pytest.raises(errors.ConfigError, match=r"folds\(\): .*must name the kernel, scale and bias of its own norm"):
        supernets.check(WrongFolds(**vars(TINY)))


@pytest.mark.slow
def test_sequences_whose_padding_changes_the_answer_are_found():
    class Blind(DynaBERT):
        """It attends to padding."""

        def __call__(self, inputs, sizes, stats):
            return super().__call__(jnp.maximum(inputs, 1), sizes, stats)

    broken = type("Broken", (DynaBERTConfig,), {"create": lambda config, rngs: Blind(config, rngs=rngs)})
    with pytest.raises(errors.ConfigError, match=r"the logits between inputs padded to 3 and to 6 tokens .*must not change"):
        supernets.check(broken(**dataclasses.asdict(TINY_BERT)))


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
