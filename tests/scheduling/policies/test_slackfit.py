import dataclasses
import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import PAPER, SLOWED, choose, make_profile, profiles, qps, states

from superserve_jax.scheduling.policies import Decision, SlackFit, State
from superserve_jax.scheduling.policies.base import Table
from superserve_jax.simulation import simulator, traces
from superserve_jax.simulation.cluster import Cluster


@given(data=st.data())
def test_as_slack_shrinks_slackfit_never_serves_a_backlog_more_slowly(data):
    profile = data.draw(profiles()).pareto().monotone()
    policy = SlackFit(profile)
    # More queries than the workers can clear in 50 ms, so that a small batch for the head alone is never right.
    query_ms = min(ms / b for b, ms in zip(profile.batch_sizes, profile.rows[0].latency_ms, strict=True))
    waiting = profile.max_batch + math.ceil(50 / query_ms) + 1
    slacks = sorted(data.draw(st.lists(st.floats(-10.0, 50.0), min_size=2, max_size=8)), reverse=True)
    rates = [qps(profile, policy(profile, State(0.0, s, waiting))) for s in slacks]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(rates))


@given(data=st.data())
def test_slackfit_is_late_only_if_no_batch_with_its_drain_time_fits_into_the_slack(data):
    profile = data.draw(profiles()).pareto().monotone().pareto()
    state = data.draw(states(profile))
    sizes, fastest = profile.batch_sizes, profile.rows[0].latency_ms
    queries = min(state.waiting, profile.max_batch)
    best = max(range(len(sizes)), key=lambda i: (min(queries, sizes[i]) / fastest[i], i))
    query_ms = min(ms / b for b, ms in zip(sizes, fastest, strict=True))

    def needs_ms(i):
        rest_ms = max(state.waiting - sizes[i], 0) * query_ms / state.workers
        return fastest[i] + rest_ms * (i != best)

    decision = SlackFit(profile)(profile, state)
    in_time = [i for i in range(best + 1) if needs_ms(i) <= state.slack_ms]
    if not in_time:
        assert decision == Decision(profile.rows[0].subnet, min(sizes[best], queries), fastest[best], reason="lost")
        return
    assert profile.latency_ms(decision.subnet, decision.batch) <= state.slack_ms
    assert decision.defer_ms == -math.inf
    if decision.subnet == profile.rows[0].subnet:
        assert decision.batch == min(sizes[in_time[-1]], queries)


def test_slackfit_runs_a_smaller_batch_instead_of_much_padding():
    policy = SlackFit(PAPER)
    assert [choose(policy, PAPER, 36.0, waiting=n)[1] for n in (1, 3, 9, 12, 15, 16)] == [1, 3, 8, 8, 15, 16]


def test_slackfit_is_less_accurate_the_more_queries_wait_and_the_fewer_workers_live():
    policy = SlackFit(PAPER)
    ranks = [choose(policy, PAPER, 36.0, waiting=n)[0] for n in (16, 200, 600, 1200)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1] == 0
    assert choose(policy, PAPER, 36.0, waiting=400, workers=2)[0] < choose(policy, PAPER, 36.0, waiting=400)[0]


def test_slackfit_leaves_out_subnets_that_a_mixture_of_two_others_beats():
    profile = make_profile([(1, 2, 4), (4, 6, 9), (5, 7, 10)], accuracies=[0.7, 0.71, 0.8])
    policy = SlackFit(profile, reserve=0.0, foresight=0.0)
    assert [choose(policy, profile, slack_ms, waiting=4)[0] for slack_ms in (9.9, 10.0)] == [0, 2]


@given(data=st.data())
def test_slackfit_always_meets_the_floor_of_the_head(data):
    profile = data.draw(profiles())
    policy, state = SlackFit(profile), data.draw(states(profile, floors=True))
    decision = policy(profile, state)
    assert profile.row(decision.subnet).accuracy >= state.floors[0]


def test_a_head_with_a_floor_gets_a_more_accurate_subnet_if_there_is_time():
    policy, best = SlackFit(PAPER), PAPER.rows[5].accuracy
    assert choose(policy, PAPER, 36.0, waiting=16, floors=(best,) + (0.0,) * 15) == (5, 16)


def test_a_head_with_a_floor_runs_with_equal_floors_only_if_a_full_batch_has_no_time():
    policy, best = SlackFit(SLOWED), SLOWED.rows[5].accuracy
    for slack_ms in (36.0, 1.0):  # the largest subnet takes 58 ms for 16 queries
        assert choose(policy, SLOWED, slack_ms, waiting=16, floors=(best, best) + (0.0,) * 14) == (5, 2)
    assert choose(policy, SLOWED, 11.0, waiting=16, floors=(best, best) + (0.0,) * 14) == (5, 1)  # 12 ms for 2, 9 ms for 1


def test_slackfit_gives_up_accuracy_before_a_backlog_exists_if_bursts_come_near_the_capacity():
    policy, capacity = SlackFit(SLOWED), 8 * SLOWED.throughput_qps(SLOWED.rows[0].subnet)
    calm, busy = (dict(rate_qps=share * capacity, variance_qps=8 * share * capacity) for share in (0.5, 0.9))
    assert choose(policy, SLOWED, 36.0, waiting=16, **calm)[0] > choose(policy, SLOWED, 36.0, waiting=16, **busy)[0] == 0
    assert choose(SlackFit(SLOWED, risk=1.0), SLOWED, 36.0, waiting=16, **busy)[0] > 0
    # The same rate, evenly spaced, is no risk. Beyond the capacity, only the fastest subnet runs.
    assert choose(policy, SLOWED, 36.0, waiting=16, rate_qps=0.9 * capacity, variance_qps=1.0)[0] > 0
    assert choose(policy, SLOWED, 36.0, waiting=16, rate_qps=2 * capacity, variance_qps=capacity)[0] == 0


@settings(deadline=None)
@given(share=st.floats(0.0, 1.2), cv2=st.floats(0.0, 20.0), slack_ms=st.floats(-5.0, 40.0), waiting=st.integers(1, 300))
def test_more_traffic_and_more_variance_never_make_slackfit_more_accurate(share, cv2, slack_ms, waiting):
    policy, capacity = SlackFit(SLOWED), 8 * SLOWED.throughput_qps(SLOWED.rows[0].subnet)
    loads = [(share * capacity, cv2 * share * capacity * k) for k in (1, 2)] + [
        ((share + 0.2) * capacity, cv2 * share * capacity)
    ]
    ranks = [choose(policy, SLOWED, slack_ms, waiting, rate_qps=rate, variance_qps=v)[0] for rate, v in loads]
    assert ranks[1] <= ranks[0] >= ranks[2]


def test_slackfit_ignores_a_backlog_that_is_not_due_soon():
    policy = SlackFit(SLOWED)
    assert choose(policy, SLOWED, 36.0, waiting=400, near=16)[0] > choose(policy, SLOWED, 36.0, waiting=400)[0]
    assert choose(policy, SLOWED, 10.0, waiting=400, near=8) == (0, 8)  # 16 would take 14 ms
    assert choose(policy, SLOWED, 10.0, waiting=400, near=400) == (0, 16)


def test_slackfit_runs_no_batch_longer_than_the_shortest_slo():
    policy = SlackFit(PAPER)
    long, short = (choose(policy, PAPER, 150.0, waiting=16, slo_ms=slo_ms) for slo_ms in (200.0, 18.0))
    assert (long, short) == ((5, 16), (1, 16))
    assert PAPER.latency_ms(PAPER.rows[short[0]].subnet, 16) <= 0.9 * 18
    assert choose(SlackFit(spread(PAPER, 1.7)), PAPER, 150.0, waiting=16, slo_ms=18.0) == (0, 16)


def test_slackfit_defers_queries_of_a_lost_backlog_that_a_full_batch_does_not_save():
    lost = State(0.0, 3.0, 400, workers=8)
    assert SlackFit(SLOWED)(SLOWED, lost).defer_ms == SLOWED.rows[0].latency_ms[-1]
    assert SlackFit(SLOWED, defer=False)(SLOWED, lost).defer_ms == -math.inf
    # A head that can be saved is not deferred.
    assert SlackFit(SLOWED)(SLOWED, lost._replace(slack_ms=36.0)).defer_ms == -math.inf


def test_while_late_queries_wait_slackfit_runs_the_fastest_subnet():
    policy = SlackFit(PAPER)
    assert choose(policy, PAPER, 36.0, waiting=16)[0] > choose(policy, PAPER, 36.0, waiting=16, late=1)[0] == 0


@settings(deadline=None)
@given(data=st.data())
def test_slackfit_defers_nothing_that_it_serves_in_time(data):
    profile = data.draw(profiles())
    policy, state = SlackFit(profile), data.draw(states(profile, floors=True))
    decision = policy(profile, state)
    if decision.defer_ms > -math.inf:
        assert profile.pareto().monotone().latency_ms(decision.subnet, decision.batch) > state.slack_ms


def spread(profile, factor):
    rows = (dataclasses.replace(r, p99_ms=tuple(factor * ms for ms in r.latency_ms)) for r in profile.rows)
    return dataclasses.replace(profile, rows=tuple(rows))


@settings(deadline=None)
@given(st.data())
def test_a_spread_within_the_reserve_changes_nothing_and_a_wider_one_only_chooses_faster_subnets(data):
    state = data.draw(states(PAPER))
    plain, narrow, wide = (SlackFit(spread(PAPER, f))(PAPER, state) for f in (1.0, 1.1, 1.4))
    assert plain == SlackFit(PAPER)(PAPER, state)
    assert narrow == plain
    assert (wide.batch, wide.defer_ms) == (plain.batch, plain.defer_ms)
    assert PAPER.row(wide.subnet).accuracy <= PAPER.row(plain.subnet).accuracy


def test_with_a_wide_spread_the_99th_percentile_fits_into_the_slack():
    profile = make_profile([(10, 20, 40), (14, 28, 56)])
    assert choose(SlackFit(profile), profile, 17.0, 1) == (1, 1)
    wide = spread(profile, 1.3)
    assert choose(SlackFit(wide), wide, 17.0, 1) == (0, 1)
    assert choose(SlackFit(wide), wide, 18.3, 1) == (1, 1)


def test_a_single_high_percentile_does_not_change_the_spread():
    stalled = dataclasses.replace(PAPER.rows[2], p99_ms=(500.0, *PAPER.rows[2].latency_ms[1:]))
    profile = dataclasses.replace(PAPER, rows=(*PAPER.rows[:2], stalled, *PAPER.rows[3:]))
    assert Table(profile).tails == Table(PAPER).tails == Table(PAPER).columns


def test_on_a_noisy_device_a_measured_spread_meets_more_deadlines():
    trace, cluster = traces.bursty(duration_s=6.0), Cluster(noise=0.15)
    z99 = 2.326
    profiles = SLOWED, spread(SLOWED, math.exp(0.15 * z99))
    missed = [1 - simulator.simulate(p, "slackfit", trace, cluster=cluster).attainment for p in profiles]
    assert missed[1] < 0.4 * missed[0]
