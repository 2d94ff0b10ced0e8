"""The plain DynaBERT of docs/examples, made elastic, equals the hand-written family, also in length buckets."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from superserve_jax import foreign, supernets
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets import programs
from superserve_jax.training.sampling import Choice
from superserve_jax.training.step import Recipe, SandwichStep

HAND = DynaBERTConfig(
    num_classes=3, vocab_size=11, max_length=8, hidden_size=12, depths=(1, 2), heads=(1, 2, 4), ffn=(6, 12, 24), eps=1e-6
)
pytestmark = pytest.mark.usefixtures("quick_compilation")

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "plain_dynabert.py"


@pytest.fixture(scope="module")
def plain():
    return foreign.import_module(str(EXAMPLE)).PlainDynaBERTConfig(HAND)


def subnets():
    return [HAND.space().smallest(), HAND.space().largest(), *(HAND.space().sample(0, step) for step in range(2))]


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(0, 0.5, spec.shape), jnp.float32) for n, spec in programs.param_spec(HAND).items()}


def tokens(count, length):
    return HAND.pack(np.random.default_rng(0).integers(1, 11, (count, 4)), length=length)


def test_the_space_and_the_costs_are_equal(plain):
    assert plain.num_classes == 3
    assert plain.space() == HAND.space()
    assert programs.param_spec(plain) == programs.param_spec(HAND)
    for subnet in subnets():
        assert (plain.flops(subnet), plain.num_params(subnet)) == (HAND.flops(subnet), HAND.num_params(subnet))


def test_the_costs_are_equal_at_the_published_size(plain):
    hand = DynaBERTConfig()
    large = dataclasses.replace(plain, model=hand)
    for subnet in (hand.space().smallest(), hand.space().sample(0, 0), hand.space().largest()):
        assert (large.flops(subnet), large.num_params(subnet)) == (hand.flops(subnet), hand.num_params(subnet))


@pytest.mark.parametrize("length", [5, 8])
def test_logits_and_hidden_states_are_equal(plain, length):
    params, inputs = random_params(), tokens(3, length)
    masked = {config: programs.masked(config) for config in (HAND, plain)}
    run = {config: jax.jit(program.train_hidden) for config, program in masked.items()}
    for subnet in subnets():
        expected, hidden = run[HAND](params, inputs, masked[HAND].active(subnet))
        found, states = run[plain](params, inputs, masked[plain].active(subnet))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        for (gate, state), (wanted_gate, wanted) in zip(states, hidden, strict=True):
            assert int(gate) == int(wanted_gate)
            np.testing.assert_allclose(state, wanted, rtol=1e-4, atol=1e-4)


def test_logits_of_sliced_programs_are_equal(plain):
    params, inputs, rest = random_params(), tokens(3, 8), (jnp.zeros((2, 0)), jnp.zeros(0, jnp.int32))
    for subnet in subnets()[:3]:
        ours, theirs = (jax.jit(programs.sliced(config, subnet).infer)(params, inputs, *rest) for config in (plain, HAND))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_training_step_changes_the_parameters_equally(plain):
    after = {}
    for config in (HAND, plain):
        step = SandwichStep(optax.sgd(0.1), recipe=Recipe(smoothing=0.1))
        smallest, largest, *_ = subnets()
        choices = [Choice(programs.sliced(config, largest), largest), Choice(programs.masked(config), smallest)]
        state, scalars = step(step.init(random_params()), tokens(6, 8), np.arange(6) % 3, choices)
        after[config] = {**state.params, **scalars}
    for name, value in after[HAND].items():
        np.testing.assert_allclose(after[plain][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_it_is_a_family_of_sequences(plain):
    assert isinstance(plain, supernets.SequenceConfig)
    supernets.check(plain, run=False)


def test_rewiring_sorts_the_same_units(plain):
    key = lambda units: (units.count, sorted(axis.path for axis in units.writers), [axis.path for axis in units.readers])  # noqa: E731
    assert sorted(map(key, plain.units())) == sorted(map(key, HAND.units()))
