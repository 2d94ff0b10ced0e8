"""Cells side by side: how traffic is split, what a lost cell costs, and that nothing is lost on the way."""

import dataclasses

import numpy as np
import pytest
from policy_cases import PAPER, Always, make_profile, ms

from superserve_jax import errors
from superserve_jax.simulation import simulator, traces
from superserve_jax.simulation.cells import Cells, LostCell, simulate_cells
from superserve_jax.simulation.cluster import Cluster, Outage
from superserve_jax.simulation.traces import Trace

TEN = make_profile([(10.0, 10.0, 10.0)])  # every batch takes 10 ms
FOUR = (Cluster(workers=2),) * 4
ROUTINGS = ("random", "two-choices")


def traffic(**options):
    return traces.gamma(**{"rate_qps": 8000.0, "cv2": 4.0, "duration_s": 1.0, **options})


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_single_cell_is_a_plain_simulation(routing):
    trace = traffic().mixed(slo_ms={20.0: 1, 50.0: 1}, floors={0.0: 3, 0.77: 1})
    one = simulate_cells(PAPER, "slackfit", trace, Cells((Cluster(4, noise=0.1),), routing), seed=3)
    plain = simulator.simulate(PAPER, "slackfit", trace, cluster=Cluster(4, noise=0.1), seed=3)
    for field in dataclasses.fields(plain):
        np.testing.assert_array_equal(getattr(one.queries, field.name), getattr(plain, field.name))
    assert not one.cell.any()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_cell_is_a_simulation_of_its_queries(routing):
    trace = traffic()
    result = simulate_cells(PAPER, "slackfit", trace, Cells(FOUR, routing))
    for cell in range(4):
        mine = result.cell == cell
        assert 0.2 < mine.mean() < 0.3
        alone = simulator.simulate(PAPER, "slackfit", trace.some(np.flatnonzero(mine)), cluster=FOUR[0])
        np.testing.assert_array_equal(result.queries.finish_s[mine], alone.finish_s)
        assert set(result.queries.worker[mine].tolist()) == {2 * cell, 2 * cell + 1}
    assert result.attainment_of_cells() == [1.0] * 4


def test_of_two_choices_the_cell_with_fewer_unanswered_queries_is_taken():
    # With two cells, both choices are known. The first query goes to either one, each other one to the cell with fewer.
    trace = Trace(np.arange(6) * 1e-3, slo_ms=1000.0)
    result = simulate_cells(TEN, Always(0, 1), trace, Cells((Cluster(1),) * 2, "two-choices", refresh_ms=0.5))
    first = int(result.cell[0])
    assert result.cell[1] == 1 - first
    assert sorted(result.cell[2:4].tolist()) == sorted(result.cell[4:].tolist()) == [0, 1]


def test_the_balancer_knows_at_once_what_it_has_sent_and_late_what_was_answered():
    trace = Trace(np.array([0.0, 0.011, 0.012, 0.021, 0.022, 0.051]), slo_ms=1000.0)
    result = simulate_cells(TEN, Always(0, 1), trace, Cells((Cluster(1),) * 2, "two-choices", refresh_ms=20.0))
    first = int(result.cell[0])
    # The first query was answered at 10 ms, but the balancer looks at 20 ms: the second query goes to the other cell.
    assert result.cell[1] == 1 - first
    # At 20 ms only the queries from 11 and 12 ms are unanswered, or one of them. Both cells get the next two in turn.
    assert sorted(result.cell[3:5].tolist()) == [0, 1]


def test_two_choices_are_better_than_chance_if_a_cell_has_lost_a_host():
    lost = dataclasses.replace(FOUR[0], outages=(Outage(0, 0.2),))
    trace = traffic(rate_qps=0.7 * 8 * PAPER.throughput_qps(PAPER.rows[0].subnet))
    share, attainment = {}, {}
    for routing in ROUTINGS:
        result = simulate_cells(PAPER, "slackfit", trace, Cells((lost, *FOUR[1:]), routing))
        share[routing], attainment[routing] = (result.cell == 0).mean(), result.attainment
    assert share["two-choices"] < share["random"] - 0.02
    assert attainment["two-choices"] > attainment["random"] + 0.02


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_lost_cell_costs_its_queries_until_the_balancer_knows(routing):
    trace = traffic(rate_qps=4000.0)
    cells = Cells(FOUR, routing, lost=(LostCell(1, 0.5, noticed_s=0.2),))
    result = simulate_cells(PAPER, "slackfit", trace, cells)
    missed = result.queries.outcome != simulator.MET
    assert set(result.cell[missed].tolist()) == {1}
    assert missed[(result.cell == 1) & (trace.arrivals_s > 0.5)].all()
    assert not (result.cell[trace.arrivals_s >= 0.7] == 1).any()
    assert (result.cell[(trace.arrivals_s > 0.5) & (trace.arrivals_s < 0.7)] == 1).any()
    if routing == "random":
        assert missed.sum() == pytest.approx(0.2 * 4000 / 4, rel=0.25)


def test_cells_of_several_workers_lose_little_against_one_queue():
    trace = traffic(rate_qps=0.7 * 32 * PAPER.throughput_qps(PAPER.rows[0].subnet))
    accuracy = {
        count: simulate_cells(PAPER, "slackfit", trace, Cells((Cluster(32 // count),) * count)).mean_accuracy
        for count in (1, 4, 32)
    }
    assert accuracy[4] == pytest.approx(accuracy[1], abs=0.002)
    assert accuracy[32] < accuracy[4] - 0.002


def test_queries_that_arrive_together_or_not_at_all():
    empty = simulate_cells(TEN, "slackfit", Trace(np.zeros(0)), Cells(FOUR, "two-choices"))
    assert (len(empty.cell), empty.attainment_of_cells()) == (0, [])
    together = simulate_cells(TEN, Always(0, 4), Trace(np.full(64, 0.25), slo_ms=50.0), Cells(FOUR, "two-choices"))
    assert ms(together.queries.start_s.min(keepdims=True)) == [250]
    assert together.attainment == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"routing": "randon"}, "did you mean 'random'"),
        ({"refresh_ms": 0.0}, "refresh_ms must be a positive number"),
        ({"lost": (LostCell(4, 1.0),)}, "expected one of 4 cells, counted from 0"),
        ({"lost": (LostCell(1, 1.0), LostCell(1, 2.0))}, "each is lost at most once"),
        ({"lost": tuple(LostCell(c, 1.0) for c in range(4))}, "one cell must be left"),
        ({"clusters": ()}, "one cell must be left"),
    ],
)
def test_impossible_cells_are_refused(wrong, message):
    with pytest.raises(errors.SuperServeError, match=message):
        Cells(**{"clusters": FOUR, **wrong})
