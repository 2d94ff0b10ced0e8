import types

import numpy as np
import pytest
from tiny import TINY

from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.space import Axis, SearchSpace
from superserve_jax.training import sampling
from superserve_jax.training.sampling import Sampler


@pytest.fixture
def sampler():
    return Sampler(TINY, buckets=4, random_subnets=2, seed=7)


def test_the_subnets_of_a_step_are_a_pure_function_of_seed_and_step(sampler):
    again = Sampler(TINY, buckets=4, random_subnets=2, seed=7)
    assert [sampler.step(k) for k in range(20)] == [again.step(k) for k in range(20)]
    other = Sampler(TINY, buckets=4, random_subnets=2, seed=8)
    assert [sampler.step(k) for k in range(20)] != [other.step(k) for k in range(20)]


def test_a_step_trains_the_largest_the_smallest_and_random_ones(sampler):
    space, steps = TINY.space(), [sampler.step(k) for k in range(100)]
    for choices in steps:
        assert [c.subnet for c in choices[:2]] == [space.largest(), space.smallest()]
        assert len(choices) == 4
    drawn = [c for choices in steps for c in choices[2:]]
    assert all(c.program.envelope.covers(c.subnet) for c in drawn)
    assert all(space.validate(c.subnet) == c.subnet for c in drawn)
    assert len({c.subnet for c in drawn}) > 10
    assert len({c.program for c in drawn}) == 4  # one for each subnet bucket


def test_envelopes_are_spread_over_the_logarithm_of_flops():
    config = OFAResNetConfig()
    space = config.space()
    costs = [np.log(config.flops(e)) for e in sampling.envelopes(config, 8, seed=0)]
    low, high = (np.log(config.flops(s)) for s in (space.smallest(), space.largest()))
    targets = np.linspace(low, high, 10)[1:-1]
    assert np.abs(np.array(costs) - targets).max() < 0.08 * (high - low)


def test_more_buckets_than_subnets_give_what_there_is():
    config = types.SimpleNamespace(space=lambda: SearchSpace(((1, 2),)), flops=lambda s: 1 + sum(s.gates))
    assert len(sampling.envelopes(config, 8, seed=0)) == 2


def test_every_other_spaces_draw_members_below_their_envelope():
    space = SearchSpace(((2, 3, 4, 6),), (Axis("heads", ((1.0, 2.0, 4.0),) * 6, tuple(range(6))),), "every_other")
    rng = np.random.default_rng(0)
    for _ in range(50):
        top = sampling.compound(space, rng)
        assert top.covers(sampling.member(space, top, rng))
