import dataclasses
import json
import logging

import numpy as np
import published
import pytest
from mlp_family import MLPConfig
from tiny import TINY, batches_of, random_images, random_params

from superserve_jax import errors
from superserve_jax.space import Axis, SearchSpace
from superserve_jax.supernets.programs import Program
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import calibration, evaluation
from superserve_jax.training.search import (
    Candidate,
    SearchLog,
    choose_served,
    crossover,
    evolutionary_search,
    pareto_front,
    survivors,
)

SETTINGS = {"weights": "abc", "examples": 32}


def run(model, candidates, *, log=None, stop_after=None, **options):
    """The candidates of a search, which are added to the log, too."""
    images = random_images(TINY, 32)
    batches = batches_of(images, np.arange(32, dtype=np.int32) % 3, 16)()
    known = log.known if log else {}
    found = []
    for c in evolutionary_search(model, images, batches, candidates=candidates, seed=3, known=known, **options):
        if len(found) == stop_after:
            break
        found.append(c)
        if log:
            log.add(c)
    return found


def test_the_search_tries_as_many_subnets_as_asked_each_once_and_is_repeatable(model):
    tried = run(model, 14)
    assert tried == run(model, 14)
    assert len({c.subnet for c in tried}) == len(tried) == 14
    assert {TINY.space().smallest(), TINY.space().largest()} <= {c.subnet for c in tried}
    assert all(c.cost == TINY.flops(c.subnet) for c in tried)


@pytest.fixture
def judged(monkeypatch):
    """Replaces the accuracy by an invented formula, so that thousands can be tried. Returns the list of evaluated subnets."""
    seen = []

    def accuracy(model, subnet_list, batches, **_):
        seen.extend(subnet_list)
        # Depth is worth more than width, and uneven width is bad: the front is a small part of the space.
        return [
            0.9
            - 0.5 / (1 + sum(s.gates))
            - 0.2 * float(np.mean(1 - np.array(s["width"])))
            - 0.3 * float(np.std(s["width"]))
            - 0.05 * float(np.std(s["expand"]))
            for s in subnet_list
        ]

    monkeypatch.setattr(evaluation, "accuracy", accuracy)
    monkeypatch.setattr(calibration, "calibrate", lambda model, subnet_list, images: {s: None for s in subnet_list})
    return seen


@pytest.mark.parametrize("tied", [False, True])
def test_a_space_smaller_than_the_candidates_is_tried_whole_and_after_a_tied_phase_only_its_tied_subnets(model, judged, tied):
    space = TINY.space()
    expected = {space.tied(s) if tied else s for s in space.enumerate()}
    tried = run(model, 10**6, tied=tied)
    assert {c.subnet for c in tried} == expected
    assert len(tried) == len(expected)
    assert (len(expected) < space.size) == tied


WIDE = dataclasses.replace(
    TINY, stage_widths=(16, 32), depths=((1, 2, 3, 4), (1, 2, 3, 4)), width_mults=(0.25, 0.5, 0.75, 1.0), image_size=16
)


def dominated_area(candidates, worst_cost):
    """The share of (log cost, accuracy) that the front dominates."""
    area, points = 0.0, pareto_front(candidates)
    ends = [*(c.cost for c in points[1:]), worst_cost]
    for c, end in zip(points, ends, strict=True):
        area += c.accuracy * np.log(end / c.cost)
    return area


def test_evolution_finds_a_better_front_than_as_many_random_subnets(judged):
    model = SuperNet(WIDE, {})
    space, cost = WIDE.space(), WIDE.flops
    evolved = run(model, 400)
    drawn = list(dict.fromkeys([space.smallest(), space.largest(), *(space.sample(5, k) for k in range(600))]))[:400]
    random = [Candidate(s, cost(s), a) for s, a in zip(drawn, evaluation.accuracy(model, drawn, None), strict=True)]
    for others in (random, evolved[:50]):
        assert dominated_area(evolved, cost(space.largest())) > 1.02 * dominated_area(others, cost(space.largest()))
    assert run(model, 130) == evolved[:130]  # a search for fewer candidates is the beginning of this one


def test_one_compilation_of_each_program_judges_every_candidate(count_calls):
    fresh = dataclasses.replace(TINY, image_size=10)
    traced = [count_calls(Program, name) for name in ("infer", "train")]
    run(SuperNet(fresh, random_params(fresh)), 12)
    assert [len(calls) for calls in traced] == [1, 1]


def test_a_family_without_batch_statistics_is_searched_too():
    config = published.BERT
    model, tokens = published.bert_model(), np.ones(config.input_spec(8).shape, config.input_spec(8).dtype)
    batch = {"inputs": tokens, "label": np.zeros(8, np.int32), "weight": np.ones(8, np.float32)}
    tried = list(evolutionary_search(model, tokens, [batch], candidates=60, seed=0))
    assert len({c.subnet for c in tried}) == 60
    assert {c.accuracy for c in tried} <= {0.0, 1.0}  # all inputs are the same
    assert all(c.cost == config.flops(c.subnet) for c in tried)


@pytest.mark.parametrize(("written", "torn"), [(0, False), (1, False), (70, False), (70, True)])
def test_an_interrupted_search_goes_on_to_the_result_of_an_undisturbed_one(judged, tmp_path, written, torn):
    model, path = SuperNet(WIDE, {}), tmp_path / "search.jsonl"
    undisturbed = run(model, 130)
    run(model, 130, log=SearchLog(path, SETTINGS), stop_after=written)
    if torn:
        path.write_bytes(path.read_bytes()[:-30])
    kept = written - torn
    del judged[:]
    log = SearchLog(path, SETTINGS)
    assert len(log.known) == kept
    assert run(model, 130, log=log) == undisturbed
    assert len(judged) == 130 - kept
    assert list(SearchLog(path, SETTINGS).known.values()) == undisturbed


def test_other_settings_or_weights_begin_the_log_anew_and_say_so(judged, tmp_path, caplog):
    path = tmp_path / "search.jsonl"
    run(SuperNet(WIDE, {}), 10, log=SearchLog(path, SETTINGS))
    with caplog.at_level(logging.INFO):
        assert SearchLog(path, {**SETTINGS, "weights": "def"}).known == {}
    assert "search.jsonl was written with other weights; searching anew" in caplog.text
    assert len(path.read_text().splitlines()) == 1


def test_a_log_damaged_in_its_middle_is_refused(tmp_path):
    path = tmp_path / "search.jsonl"
    path.write_text('{"settings": {}, "latencies": []}\n{"subn\n' + json.dumps({}) + "\n")
    with pytest.raises(errors.ConfigError, match=r"damaged.*remove it"):
        SearchLog(path, {})


def test_latencies_are_measured_once(tmp_path):
    path, smallest = tmp_path / "search.jsonl", TINY.space().smallest()
    for measure in (lambda: {smallest: 1.25}, lambda: pytest.fail("measured again")):
        assert SearchLog(path, SETTINGS, measure=measure).latencies == {smallest: 1.25}


def test_a_child_has_every_position_of_one_of_its_parents():
    space, rng = WIDE.space(), np.random.default_rng(0)
    mother, father = space.sample(1, 1), space.sample(1, 2)
    for _ in range(50):
        child = crossover(space, mother, father, rng)
        for stage in space.stages:
            assert sum(child.gates[b] for b in stage) in {sum(p.gates[b] for b in stage) for p in (mother, father)}
        for i, width in enumerate(child["width"]):
            assert width in {mother["width"][i], father["width"][i]}
    assert len({crossover(space, mother, father, rng) for _ in range(50)}) > 10


def candidates(points):
    """Candidates with the given costs and accuracies, and different subnets."""
    subnets = dict.fromkeys(TINY.space().sample(9, k) for k in range(60))
    return [Candidate(s, cost, accuracy) for s, (cost, accuracy) in zip(subnets, points, strict=False)]


def test_the_front_ascends_in_cost_and_accuracy():
    cloud = candidates([(1, 0.5), (2, 0.4), (2, 0.6), (3, 0.6), (4, 0.9)])
    assert pareto_front(cloud) == [cloud[0], cloud[2], cloud[4]]


def test_choosing_takes_the_best_of_each_band_and_keeps_what_must_be_kept():
    *cloud, bad = candidates([*((2**i, 0.5 + 0.05 * i) for i in range(8)), (300, 0.2)])
    chosen = choose_served([*cloud, bad], 5, keep=(cloud[0].subnet,))
    assert cloud[0] in chosen
    assert bad not in chosen
    assert len(chosen) <= 5
    assert [c.cost for c in chosen] == sorted(c.cost for c in chosen)
    assert len(choose_served([*cloud, bad], 9, tolerance=1.0)) >= len(chosen)


def test_choosing_divides_the_costs_among_the_subnets_that_need_not_be_kept():
    course = ((1.0, 0.1), (1.2, 0.3), (1.5, 0.35), (1.9, 0.4), (3.0, 0.5), (6.0, 0.6), (12.0, 0.7), (16.0, 0.8))
    front = candidates(course)
    chosen = choose_served(front, 4, keep=(front[0].subnet, front[-1].subnet))  # bands from 1 to 4 and from 4 to 16
    assert [c.cost for c in chosen] == [1.0, 1.2, 3.0, 16.0]


def test_survivors_are_the_first_front_before_the_second_and_lonely_ones_before_crowded_ones():
    cloud = candidates([(1, 0.1), (2, 0.5), (2.1, 0.51), (8, 0.9), (1.5, 0.05), (9, 0.85)])
    first, second = cloud[:4], cloud[4:]
    found = survivors([*second, *first], 5)
    assert set(found[:2]) == {first[0], first[3]}
    assert found[2:4] == [first[2], first[1]]
    assert found[4] in second


def test_a_tolerance_lets_as_many_be_served_as_are_asked_for():
    cloud = candidates((10 + i, 0.8 if i % 3 else 0.81) for i in range(24))
    ends = (cloud[0].subnet, cloud[-1].subnet)
    assert len(choose_served(cloud, 20, keep=ends, tolerance=0.02)) == 20
    assert len(choose_served(cloud, 100, keep=ends, tolerance=0.02)) == 24
    assert len(choose_served(cloud, 20, keep=ends)) < 20
    assert choose_served(cloud, 2, keep=ends, tolerance=0.02) == [cloud[0], cloud[-1]]


def test_no_dominated_subnet_is_chosen_without_a_tolerance():
    smallest, *middle, largest = cloud = candidates(
        [(1.0, 0.5), (2.0, 0.5), (3.0, 0.7), (3.0, 0.69), (4.0, 0.7), (5.0, 0.69), (6.0, 0.8), (9.0, 0.75)]
    )
    keep = (smallest.subnet, largest.subnet)
    chosen = choose_served(cloud, 8, keep=keep)
    assert chosen == [smallest, middle[1], middle[5], largest]
    assert choose_served(cloud, 8) == pareto_front(cloud)
    assert len(choose_served(cloud, 8, keep=keep, tolerance=0.02)) == 8  # in any case, also the largest


def test_of_subnets_with_equal_cost_and_accuracy_only_one_is_chosen():
    smallest, *middle, largest = candidates([(1.0, 0.5), *[(5.0, 0.7)] * 6, (5.0, 0.69), (9.0, 0.9)])
    chosen = choose_served([smallest, *middle, largest], 9, keep=(smallest.subnet, largest.subnet), tolerance=0.1)
    assert [(c.cost, c.accuracy) for c in chosen] == [(1.0, 0.5), (5.0, 0.7), (5.0, 0.69), (9.0, 0.9)]
    alike = candidates([(1.0, 0.5)] * 2)
    assert len(choose_served(alike, 2, keep=[c.subnet for c in alike])) == 2  # these are chosen in any case


class UnusedAxisConfig(MLPConfig):
    """An MLP whose space has an axis that the network does not use."""

    def space(self):
        return SearchSpace((self.depths,), (Axis("width", (self.widths,)), Axis("unused", ((1, 2, 3),))))


def test_subnets_that_differ_only_in_an_unused_axis_are_chosen_once():
    config = UnusedAxisConfig()
    images = random_images(config, 20)
    batches = list(batches_of(images, np.arange(20, dtype=np.int32) % 10, 20)())
    tried = list(evolutionary_search(SuperNet(config, random_params(config)), images, batches, candidates=18, seed=0))
    chosen = choose_served(tried, 18, tolerance=0.9)
    assert len({config.flops(c.subnet) for c in tried}) == len(chosen) == 6
    assert len(tried) == 18
