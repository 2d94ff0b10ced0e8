"""The plain OFA-ResNet of docs/examples, made elastic, equals the hand-written family."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIGS, random_images, random_params, random_statistics

from superserve_jax import foreign, supernets
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets import programs
from superserve_jax.training.sampling import Choice
from superserve_jax.training.step import Recipe, SandwichStep

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "plain_ofa_resnet.py"


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A hand-written config, and the plain module's."""
    hand = CONFIGS[request.param]
    return hand, foreign.import_module(str(EXAMPLE)).PlainOFAResNetConfig(hand)


def subnets_of(config):
    return [config.space().smallest(), config.space().largest(), *(config.space().sample(0, i) for i in range(2))]


def norm_places(hand, plain, subnet):
    """Where the statistics of the plain module are among those of the hand-written family."""
    sizes = hand.norm_sizes(hand.sizes(subnet))
    begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    places = []
    for norm, count in plain.norm_sizes(plain.sizes(subnet)).items():
        first, number, *rest = norm.removesuffix(".norm").split(".")
        name = f"stem{number}" if first == "stem" else f"block{number}.{''.join(rest).replace('convs', 'conv')}"
        assert sizes[f"{name}.norm"] == count
        places += range(begins[f"{name}.norm"], begins[f"{name}.norm"] + count)
    assert sorted(places) == list(range(sum(sizes.values())))
    return places


def test_spaces_and_costs_are_equal(pair):
    hand, plain = pair
    assert plain.space() == hand.space()
    assert programs.param_spec(plain) == programs.param_spec(hand)
    for subnet in subnets_of(hand):
        assert (plain.flops(subnet), plain.num_params(subnet)) == (hand.flops(subnet), hand.num_params(subnet))
        norm_places(hand, plain, subnet)


def test_costs_are_equal_at_the_published_size():
    hand = OFAResNetConfig()
    plain = foreign.import_module(str(EXAMPLE)).PlainOFAResNetConfig(hand)
    for subnet in subnets_of(hand):
        assert (plain.flops(subnet), plain.num_params(subnet)) == (hand.flops(subnet), hand.num_params(subnet))


@pytest.mark.parametrize("kind", ["masked", "sliced", "folded"])
def test_logits_are_equal(pair, kind):
    hand, plain = pair
    params, images = random_params(hand), random_images(hand, 3)
    run = {config: jax.jit(programs.masked(config).infer) if kind == "masked" else None for config in (hand, plain)}
    for subnet in subnets_of(hand):
        rows, order = random_statistics(hand, subnet), norm_places(hand, plain, subnet)
        logits = []
        for config, own in ((hand, rows), (plain, rows[:, order])):
            program = programs.masked(config) if kind == "masked" else programs.sliced(config, subnet)
            weights = program.fold(params, own) if kind == "folded" else params
            infer = run[config] or (program.infer_folded if kind == "folded" else program.infer)
            logits.append(infer(weights, images, program.pad_statistics(own, subnet), program.active(subnet)))
        np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_statistics_of_a_batch_are_equal(pair):
    hand, plain = pair
    params, images = random_params(hand), random_images(hand, 8)
    for subnet in subnets_of(hand)[:3]:
        (logits, rows), (ours, found) = (
            jax.jit(programs.sliced(config, subnet).train)(params, images, jnp.zeros(0, jnp.int32)) for config in (hand, plain)
        )
        np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found, rows[:, norm_places(hand, plain, subnet)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", ["basic"], indirect=True)
def test_a_training_step_changes_the_parameters_equally(pair):
    hand, plain = pair
    images, labels = random_images(hand, 8), np.arange(8) % hand.num_classes
    after = {}
    for config in (hand, plain):
        step = SandwichStep(optax.sgd(0.1), recipe=Recipe(smoothing=0.1))
        state = step.init({name: jnp.asarray(x) for name, x in random_params(config).items()})
        chosen = subnets_of(config)
        choices = [
            Choice(programs.sliced(config, chosen[1]), chosen[1]),
            Choice(programs.sliced(config, chosen[0]), chosen[0]),
            Choice(programs.masked(config), chosen[2]),
        ]
        state, scalars = step(state, images, labels, choices)
        after[config] = {**state.params, **scalars}
    for name, value in after[hand].items():
        np.testing.assert_allclose(after[plain][name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_same_norms_fold(pair):
    hand, plain = pair
    key = lambda fold: (fold.kernel, fold.scale, fold.bias)  # noqa: E731
    assert sorted(map(key, plain.folds())) == sorted(map(key, hand.folds()))


def test_rewiring_sorts_the_same_units_and_the_channels_between_blocks(pair):
    hand, plain = pair
    key = lambda units: (units.count, tuple(sorted(a.path for a in units.writers)), tuple(a.path for a in units.readers))  # noqa: E731
    ours, theirs = (set(map(key, config.units())) for config in (plain, hand))
    assert ours > theirs
    assert len(ours - theirs) == 3  # of the stem's two widths, and of the last stage


def test_it_is_a_family(pair):
    supernets.check(pair[1], run=False)
