import itertools
import json
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest

from superserve_jax import errors
from superserve_jax.space import Axis, SearchSpace
from superserve_jax.subnet import Subnet, envelope_of

SPACE = SearchSpace(
    ((0, 1), (1, 2, 3)),
    (Axis("expand", ((0.5, 1.0),) * 4, blocks=(0, 1, 2, 3)), Axis("width", ((0.25, 0.5, 1.0),) * 2)),
)
members = st.integers(0, 10_000).map(lambda step: SPACE.sample(0, step))


def test_enumeration_lists_every_subnet_once_and_agrees_with_size():
    found = list(SPACE.enumerate())
    assert len(found) == len(set(found)) == SPACE.size == (1 + 2) * (2 + 4 + 8) * 9
    assert [SPACE.validate(s) for s in found] == found


def test_enumerating_too_large_a_space_is_refused_with_its_size():
    with pytest.raises(errors.SpaceTooLargeError, match="378 subnets"):
        SPACE.enumerate(limit=100)


def test_choices_of_dropped_blocks_do_not_make_subnets_differ():
    a = SPACE.subnet(depth=(0, 1), expand=(0.5, 1.0, 0.5, 0.5), width=1.0)
    b = SPACE.subnet(depth=(0, 1), expand=(1.0, 1.0, 1.0, 1.0), width=1.0)
    assert a == b
    assert hash(a) == hash(b)


@hypothesis.given(members)
def test_the_largest_covers_and_the_smallest_is_covered_by_every_subnet(s):
    assert SPACE.largest().covers(s)
    assert s.covers(SPACE.smallest())


@hypothesis.given(st.lists(members, min_size=1, max_size=5))
def test_an_envelope_covers_its_members_and_is_the_smallest_that_does(group):
    top = envelope_of(group)
    assert all(top.covers(s) for s in group)
    assert all(any(s.gates[b] for s in group) for b, gate in enumerate(top.gates) if gate)
    assert all(top[a][i] in [s[a][i] for s in group] for a in ("expand", "width") for i in range(len(top[a])))


@hypothesis.given(members)
def test_json_and_pickle_give_the_same_subnet_back(s):
    assert Subnet.from_json(json.loads(json.dumps(s.to_json()))) == s
    assert pickle.loads(pickle.dumps(s)) == s


def test_an_axis_of_ints_gives_ints():
    space = SearchSpace(((1,),), (Axis("heads", ((2, 4),)), Axis("width", ((0.5, 1.0),))))
    for subnet in (space.largest(), space.subnet(heads=2.0, width=1), space.sample(0, 0)):
        for same in (subnet, Subnet.from_json(json.loads(json.dumps(subnet.to_json())))):
            assert isinstance(same["heads"][0], int)
            assert isinstance(same["width"][0], float)
    older = Subnet.from_json({"gates": [1], "heads": [4.0], "width": [1]})
    assert older == space.largest()
    assert json.dumps(space.validate(older).to_json()) == json.dumps(space.largest().to_json())


def test_sampling_is_a_pure_function_of_seed_and_step():
    first = [SPACE.sample(1, k) for k in range(50)]
    assert first == [SPACE.sample(1, k) for k in range(50)]
    assert first != [SPACE.sample(2, k) for k in range(50)]
    assert len(set(first)) > 25


@hypothesis.given(members, st.integers(0, 100))
def test_sampling_below_an_envelope_stays_below_it(top, step):
    assert top.covers(SPACE.sample(3, step, below=top))


def test_every_other_keeps_exactly_depth_blocks_evenly_spaced():
    space = SearchSpace(((1, 2, 3, 4, 5, 6),), rule="every_other")
    for depth in range(1, 7):
        gates = space.gates((depth,))
        kept = [i for i, g in enumerate(gates) if g]
        gaps = {b - a for a, b in itertools.pairwise(kept)}
        assert len(kept) == depth
        assert not gaps or max(gaps) - min(gaps) <= 1
    assert space.gates((3,)) == (1, 0, 1, 0, 1, 0)


def test_a_transformer_subnet_may_name_its_kept_blocks():
    space = SearchSpace(((2, 3, 4),), rule="every_other")
    assert space.subnet(gates=(0, 1, 1, 0)).gates == (0, 1, 1, 0)
    with pytest.raises(errors.SubnetError, match="keeps 1 blocks"):
        space.subnet(gates=(0, 1, 0, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 9}, "stage 0: depth 9 is not one of"),
        ({"depth": (1, 2, 3)}, "'depth' needs 2 values"),
        ({"width": 0.3}, r"axis 'width', position 0: 0.3 is not one of \[0.25, 0.5, 1.0\]"),
        ({"expand": (0.5,)}, "'expand' needs 4 values"),
        ({"depth": 1, "gates": (1, 1, 0, 0)}, "not both"),
        ({"gates": (1, 0, 1, 0)}, "must keep its first blocks"),
        ({"gates": (1, 1)}, "4 values of 0 or 1"),
    ],
)
def test_a_value_that_is_not_a_choice_is_refused_with_the_choices(arguments, message):
    with pytest.raises(errors.SubnetError, match=message):
        SPACE.subnet(**arguments)


def test_a_mistyped_axis_gets_the_nearest_name_suggested():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'width'"):
        SPACE.subnet(widht=1.0)
    with pytest.raises(errors.UnknownNameError, match="did you mean 'expand'"):
        SPACE.largest()["expandd"]


@pytest.mark.parametrize("data", [{}, {"gates": [2]}, {"gates": "x"}, {"gates": [1], "width": [None]}, {"gates": [True]}, []])
def test_json_that_is_no_subnet_is_refused(data):
    with pytest.raises(errors.SubnetError):
        Subnet.from_json(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SearchSpace(((2, 1),)),
        lambda: SearchSpace(((),)),
        lambda: Axis("width", ((1.0, 0.5),)),
        lambda: Axis("width", ((float("nan"),),)),
        lambda: Axis("width", ()),
        lambda: Axis(3, ((1.0,),)),
        lambda: Axis("width", ((1.0,),), blocks=(0, 1)),
        lambda: SearchSpace(((1.5,),)),
        lambda: SPACE.narrowed(choices=-1),
        lambda: SearchSpace(((1,),), (Axis("depth", ((1.0,),)),)),
        lambda: SearchSpace(((1,),), (Axis("w", ((1.0,),), blocks=(5,)),)),
    ],
)
def test_an_impossible_space_or_axis_is_refused(make):
    with pytest.raises(errors.ConfigError):
        make()


def test_the_envelope_of_nothing_is_refused():
    with pytest.raises(errors.SubnetError, match="at least one"):
        envelope_of([])
