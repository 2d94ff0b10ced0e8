import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision, Fixed, MaxAcc, MaxBatch, Planner, SlackFit, State
from superserve_jax.scheduling.policies.base import Table
from superserve_jax.simulation import paper_profile, simulator, traces
from superserve_jax.simulation.simulator import Cluster
from superserve_jax.subnet import Subnet

PAPER = paper_profile.paper_profile()
SLOWED = PAPER.scaled(1.9)
NAMES = [*policies.NAMES, "fixed:2"]


def make_profile(latencies, accuracies=None, batch_sizes=(1, 2, 4)):
    accuracies = accuracies or [0.5 + 0.01 * i for i in range(len(latencies))]
    rows = tuple(
        Row(Subnet((1,), (("width", (float(i),)),)), a, tuple(ms))
        for i, (a, ms) in enumerate(zip(accuracies, latencies, strict=True))
    )
    return Profile(batch_sizes, rows)


@st.composite
def profiles(draw):
    """Any profile at all: noisy, not monotone, with subnets that no one should use."""
    sizes = (1, 2, 4, 8)
    rows = draw(st.lists(st.lists(st.floats(0.1, 40.0), min_size=4, max_size=4), min_size=1, max_size=6))
    accuracies = draw(st.lists(st.floats(0.0, 1.0), min_size=len(rows), max_size=len(rows)))
    return make_profile(rows, accuracies, sizes)


@st.composite
def states(draw, profile, floors=False):
    waiting = draw(st.integers(1, 300))
    head = ()
    if floors:
        values = st.sampled_from([0.0, *(row.accuracy for row in profile.rows)])
        head = tuple(draw(st.lists(values, min_size=1, max_size=min(waiting, profile.max_batch))))
        waiting = max(len(head), waiting) if len(head) == profile.max_batch else len(head)
    return State(1.0, draw(st.floats(-50.0, 100.0)), waiting, head, draw(st.integers(1, 16)))


def choose(policy, profile, slack_ms, waiting=400, workers=8, floors=(), **more):
    decision = policy(profile, State(0.0, slack_ms, waiting, floors, workers, **more))
    return [r.subnet for r in profile.rows].index(decision.subnet), decision.batch


def qps(profile, decision, waiting=math.inf):
    """Throughput of one worker that repeats a decision."""
    return 1e3 * min(decision.batch, waiting) / profile.latency_ms(decision.subnet, decision.batch)


@pytest.mark.parametrize("name", policies.NAMES)
def test_a_policy_carries_the_name_that_makes_it(name):
    made = policies.create(name, PAPER).name
    assert made == {"fixed:smallest": "fixed:0", "fixed:largest": "fixed:5"}.get(name, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_made_by_name_answers_with_a_subnet_and_a_batch_of_the_profile(name):
    policy = policies.create(name, PAPER)
    for slack_ms, waiting in itertools.product((-5.0, 0.0, 1.5, 8.0, 36.0, 1e4), (1, 7, 16, 1000)):
        decision = policy(PAPER, State(0.0, slack_ms, waiting))
        assert PAPER.row(decision.subnet)
        assert 1 <= decision.batch <= PAPER.max_batch


@pytest.mark.parametrize("name", [n for n in NAMES if n != "slackfit"])
@given(data=st.data())
def test_no_tuple_above_the_slack_is_chosen_while_one_of_the_policy_fits(name, data):
    profile = data.draw(profiles()).pareto().monotone()
    if name == "fixed:2" and len(profile.rows) < 3:
        return
    state = data.draw(states(profile))
    policy = policies.create(name, profile)
    decision = policy(profile, state)
    rows = [profile.row(decision.subnet)] if name.startswith(("fixed", "least")) else profile.rows
    choices = [ms for row in rows for ms in row.latency_ms]
    if name in ("slackfit-paper", "slackfit-cumulative"):  # which know no tuples but those that their buckets keep
        choices = [ms for ms in policy._latency_ms if ms > -math.inf]
        assert set(choices) <= {ms for row in rows for ms in row.latency_ms}
    if any(ms <= state.slack_ms for ms in choices):
        assert profile.latency_ms(decision.subnet, decision.batch) <= state.slack_ms


def test_max_acc_and_max_batch_weigh_accuracy_and_batch_the_other_way_round():
    profile = make_profile([(1, 2, 4), (3, 5, 9)])
    assert choose(MaxAcc(profile), profile, 4.5) == (1, 1)
    assert choose(MaxBatch(profile), profile, 4.5) == (0, 4)
    assert choose(MaxBatch(profile), profile, 9.0) == (1, 4)


def test_a_fixed_subnet_cuts_its_batch_to_the_slack_and_takes_all_it_can_when_the_head_is_lost():
    policy = policies.create("fixed:largest", PAPER)
    assert [choose(policy, PAPER, slack_ms) for slack_ms in (36, 20, 5, 4)] == [(5, 16), (5, 8), (5, 1), (5, 16)]


def test_the_papers_slackfit_keeps_of_each_latency_bucket_the_largest_batch_then_the_most_accurate():
    # Two buckets, 1 to 5.5 and above 5.5 to 10: (0, 4) at 4 ms, and of (1, 4) at 9 and (2, 4) at 10 the latter.
    profile = make_profile([(1, 2, 4), (3, 5, 9), (6, 8, 10)])
    policy = SlackFit(profile, guard=False, buckets=2)
    assert [choose(policy, profile, ms) for ms in (10, 9.9, 4, 3.9, 1, 0.9)] == [
        (2, 4),
        (0, 4),
        (0, 4),
        (0, 4),
        (0, 4),
        (0, 4),
    ]


def test_the_two_readings_differ_where_a_range_holds_only_small_batches():
    # The upper half, above 6.5 ms, holds (1, 1) and (1, 2); cumulatively it holds (0, 4) too.
    profile = make_profile([(1, 2, 4), (7, 9, 12)], batch_sizes=(1, 2, 4))
    in_range = SlackFit(profile, guard=False, buckets=4)
    cumulative = SlackFit(profile, guard=False, buckets=4, reading="cumulative")
    assert choose(in_range, profile, 9.5) == (1, 2)
    assert choose(cumulative, profile, 9.5) == (0, 4)


@given(data=st.data())
def test_as_slack_shrinks_the_guarded_policy_never_serves_a_backlog_more_slowly(data):
    profile = data.draw(profiles()).pareto().monotone()
    policy = SlackFit(profile)
    # More than the workers can clear in 50 ms, so that rescuing single heads is out of the question.
    drain_ms = min(ms / b for b, ms in zip(profile.batch_sizes, profile.rows[0].latency_ms, strict=True))
    waiting = profile.max_batch + math.ceil(50 / drain_ms) + 1
    slacks = sorted(data.draw(st.lists(st.floats(-10.0, 50.0), min_size=2, max_size=8)), reverse=True)
    rates = [qps(profile, policy(profile, State(0.0, s, waiting))) for s in slacks]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(rates))


@given(data=st.data())
def test_a_backlog_that_cannot_be_cleared_within_the_heads_slack_is_drained_at_the_highest_throughput(data):
    profile = data.draw(profiles()).pareto().monotone()
    policy, state = SlackFit(profile), data.draw(states(profile))
    decision = policy(profile, state)
    latency_ms = profile.latency_ms(decision.subnet, decision.batch)
    best = max(1e3 * min(b, state.waiting) / ms for b, ms in zip(profile.batch_sizes, profile.rows[0].latency_ms, strict=True))
    if latency_ms > state.slack_ms:
        assert qps(profile, decision, state.waiting) == pytest.approx(best)
    elif decision.subnet == profile.rows[0].subnet and qps(profile, decision, state.waiting) < best * (1 - 1e-9):
        drain_ms = min(ms / b for b, ms in zip(profile.batch_sizes, profile.rows[0].latency_ms, strict=True))
        assert latency_ms + (state.waiting - decision.batch) * drain_ms / state.workers <= state.slack_ms * (1 + 1e-9)


@given(data=st.data())
def test_the_guarded_policy_is_late_only_where_neither_its_batch_nor_a_smaller_one_and_the_rest_fit_into_the_slack(data):
    profile = data.draw(profiles()).pareto().monotone().pareto()
    state = data.draw(states(profile))
    sizes, fastest = profile.batch_sizes, profile.rows[0].latency_ms
    queries = min(state.waiting, profile.max_batch)
    drain = max(range(len(sizes)), key=lambda i: (min(queries, sizes[i]) / fastest[i], i))
    query_ms = min(ms / b for b, ms in zip(sizes, fastest, strict=True))

    def needs_ms(i):
        rest_ms = max(state.waiting - sizes[i], 0) * query_ms / state.workers
        return fastest[i] + rest_ms * (i != drain)

    decision = SlackFit(profile)(profile, state)
    in_time = [i for i in range(drain + 1) if needs_ms(i) <= state.slack_ms]
    if not in_time:
        assert decision == Decision(profile.rows[0].subnet, min(sizes[drain], queries), fastest[drain], reason="lost")
        return
    assert profile.latency_ms(decision.subnet, decision.batch) <= state.slack_ms
    assert decision.defer_ms == -math.inf
    if decision.subnet == profile.rows[0].subnet:
        assert decision.batch == min(sizes[in_time[-1]], queries)


def test_the_guarded_policy_saves_an_urgent_head_with_a_small_batch_only_while_the_rest_can_wait():
    policy = SlackFit(SLOWED)
    assert choose(policy, SLOWED, 10.0, waiting=20) == (0, 8)  # 16 would take 14 ms
    assert choose(policy, SLOWED, 10.0, waiting=200) == (0, 16)


def test_the_guarded_policy_does_not_pad_where_a_smaller_batch_serves_what_waits_faster():
    policy = SlackFit(PAPER)
    assert [choose(policy, PAPER, 36.0, waiting=n)[1] for n in (1, 3, 9, 12, 15, 16)] == [1, 3, 8, 8, 15, 16]


def test_the_guarded_policy_is_less_accurate_the_more_queries_wait_and_the_fewer_workers_live():
    policy = SlackFit(PAPER)
    ranks = [choose(policy, PAPER, 36.0, waiting=n)[0] for n in (16, 200, 600, 1200)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1] == 0
    assert choose(policy, PAPER, 36.0, waiting=400, workers=2)[0] < choose(policy, PAPER, 36.0, waiting=400)[0]


def test_the_guarded_policy_leaves_out_subnets_that_a_mixture_of_two_others_beats():
    profile = make_profile([(1, 2, 4), (4, 6, 9), (5, 7, 10)], accuracies=[0.7, 0.71, 0.8])
    policy = SlackFit(profile, reserve=0.0, foresight=0.0)
    assert [choose(policy, profile, slack_ms, waiting=4)[0] for slack_ms in (9.9, 10.0)] == [0, 2]


@given(data=st.data())
def test_the_guarded_policy_always_meets_the_floor_of_the_head(data):
    profile = data.draw(profiles())
    policy, state = SlackFit(profile), data.draw(states(profile, floors=True))
    decision = policy(profile, state)
    assert profile.row(decision.subnet).accuracy >= state.floors[0]


def test_a_head_with_a_floor_raises_the_subnet_of_a_batch_that_has_the_time():
    policy, best = SlackFit(PAPER), PAPER.rows[5].accuracy
    assert choose(policy, PAPER, 36.0, waiting=16, floors=(best,) + (0.0,) * 15) == (5, 16)


def test_a_head_with_a_floor_goes_with_its_like_alone_where_a_full_batch_has_not_the_time():
    policy, best = SlackFit(SLOWED), SLOWED.rows[5].accuracy
    for slack_ms in (36.0, 1.0):  # 16 take the largest subnet 58 ms
        assert choose(policy, SLOWED, slack_ms, waiting=16, floors=(best, best) + (0.0,) * 14) == (5, 2)
    assert choose(policy, SLOWED, 11.0, waiting=16, floors=(best, best) + (0.0,) * 14) == (5, 1)  # 2 take it 12 ms, 1 takes 9


@settings(deadline=None)
@given(data=st.data())
def test_a_policy_is_a_pure_function_of_the_state(data):
    state = data.draw(states(PAPER))
    for name in policies.NAMES:
        policy = policies.create(name, PAPER)
        assert policy(PAPER, state) == policy(PAPER, state) == policies.create(name, PAPER)(PAPER, state)


def test_a_callable_is_a_policy_as_it_is():
    def policy(profile, state):
        return Decision(profile.rows[0].subnet, 1)

    assert policies.create(policy, PAPER) is policy


def test_a_mistyped_policy_gets_the_nearest_name_suggested():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'slackfit'"):
        policies.create("slakfit", PAPER)
    with pytest.raises(errors.UnknownNameError, match="fixed:<i>"):
        policies.create("fixed:x", PAPER)


def test_values_that_cannot_work_are_refused_at_construction():
    with pytest.raises(errors.ConfigError, match="0 to 5"):
        policies.create("fixed:6", PAPER)
    with pytest.raises(errors.ConfigError, match="buckets"):
        SlackFit(PAPER, guard=False, buckets=0)
    with pytest.raises(errors.ConfigError, match="reserve"):
        SlackFit(PAPER, reserve=1.5)
    with pytest.raises(errors.ConfigError, match="risk"):
        SlackFit(PAPER, risk=0.0)
    with pytest.raises(errors.ConfigError, match="period_s"):
        Planner(PAPER, period_s=0.0)
    with pytest.raises(errors.UnknownNameError, match="in_range"):
        SlackFit(PAPER, guard=False, reading="in-range")
    with pytest.raises(errors.ProfileError, match="not in the profile"):
        Fixed(PAPER, Subnet((0,)))


def test_the_table_finds_choices_by_rank_and_size():
    table = Table(make_profile([(1, 2, 4), (3, 5, 9), (6, 8, 10)]))
    assert [table.most_accurate(0, ms) for ms in (0.5, 1, 5.9, 6)] == [-1, 0, 1, 2]
    assert [table.largest_batch(1, ms) for ms in (2, 3, 8, 9)] == [-1, 0, 1, 2]
    assert [table.above(floor) for floor in (0.0, 0.505, 0.51, 0.9)] == [0, 1, 1, 2]


def test_the_guarded_policy_gives_accuracy_up_where_bursts_come_near_the_capacity_and_before_a_backlog_is_there():
    policy, capacity = SlackFit(SLOWED), 8 * SLOWED.throughput_qps(SLOWED.rows[0].subnet)
    calm, near = (dict(rate_qps=share * capacity, variance_qps=8 * share * capacity) for share in (0.5, 0.9))
    assert choose(policy, SLOWED, 36.0, waiting=16, **calm)[0] > choose(policy, SLOWED, 36.0, waiting=16, **near)[0] == 0
    assert choose(SlackFit(SLOWED, risk=1.0), SLOWED, 36.0, waiting=16, **near)[0] > 0
    # The same rate, evenly spaced, is no risk; and beyond the capacity nothing but the fastest will do.
    assert choose(policy, SLOWED, 36.0, waiting=16, rate_qps=0.9 * capacity, variance_qps=1.0)[0] > 0
    assert choose(policy, SLOWED, 36.0, waiting=16, rate_qps=2 * capacity, variance_qps=capacity)[0] == 0


@settings(deadline=None)
@given(share=st.floats(0.0, 1.2), cv2=st.floats(0.0, 20.0), slack_ms=st.floats(-5.0, 40.0), waiting=st.integers(1, 300))
def test_more_traffic_and_more_variance_never_make_the_guarded_policy_more_accurate(share, cv2, slack_ms, waiting):
    policy, capacity = SlackFit(SLOWED), 8 * SLOWED.throughput_qps(SLOWED.rows[0].subnet)
    loads = [(share * capacity, cv2 * share * capacity * k) for k in (1, 2)] + [
        ((share + 0.2) * capacity, cv2 * share * capacity)
    ]
    ranks = [choose(policy, SLOWED, slack_ms, waiting, rate_qps=rate, variance_qps=v)[0] for rate, v in loads]
    assert ranks[1] <= ranks[0] >= ranks[2]


def test_a_backlog_that_has_time_is_no_reason_for_the_guarded_policy_to_hurry_or_to_give_up_a_head():
    policy = SlackFit(SLOWED)
    assert choose(policy, SLOWED, 36.0, waiting=400, near=16)[0] > choose(policy, SLOWED, 36.0, waiting=400)[0]
    assert choose(policy, SLOWED, 10.0, waiting=400, near=8) == (0, 8)  # 16 would take 14 ms
    assert choose(policy, SLOWED, 10.0, waiting=400, near=400) == (0, 16)


def test_the_guarded_policy_runs_no_batch_that_a_query_of_the_shortest_slo_could_not_wait_for():
    policy = SlackFit(PAPER)
    long, short = (choose(policy, PAPER, 150.0, waiting=16, slo_ms=slo_ms) for slo_ms in (200.0, 18.0))
    assert (long, short) == ((5, 16), (1, 16))
    assert PAPER.latency_ms(PAPER.rows[short[0]].subnet, 16) <= 0.9 * 18


def test_of_a_backlog_that_is_lost_the_guarded_policy_lets_step_back_what_a_full_batch_does_not_save():
    lost = State(0.0, 3.0, 400, workers=8)
    assert SlackFit(SLOWED)(SLOWED, lost).defer_ms == SLOWED.rows[0].latency_ms[-1]
    assert SlackFit(SLOWED, defer=False)(SLOWED, lost).defer_ms == -math.inf
    # A head that can be saved waits behind nobody.
    assert SlackFit(SLOWED)(SLOWED, lost._replace(slack_ms=36.0)).defer_ms == -math.inf


def test_while_late_queries_wait_the_guarded_policy_runs_the_fastest_subnet():
    policy = SlackFit(PAPER)
    assert choose(policy, PAPER, 36.0, waiting=16)[0] > choose(policy, PAPER, 36.0, waiting=16, late=1)[0] == 0


@settings(deadline=None)
@given(data=st.data())
def test_the_guarded_policy_defers_nothing_that_it_serves_in_time(data):
    profile = data.draw(profiles())
    policy, state = SlackFit(profile), data.draw(states(profile, floors=True))
    decision = policy(profile, state)
    if decision.defer_ms > -math.inf:
        assert profile.pareto().monotone().latency_ms(decision.subnet, decision.batch) > state.slack_ms


@settings(deadline=None, max_examples=50)
@given(share=st.floats(0.05, 0.95), workers=st.integers(1, 12))
def test_a_plan_gives_every_worker_a_subnet_and_carries_the_forecast_if_the_fastest_could(share, workers):
    policy, fastest = Planner(PAPER, headroom=0.0), PAPER.throughput_qps(PAPER.rows[0].subnet)
    plan = policy.plan(share * workers * fastest, workers=workers, slo_ms=1e6)
    assert len(plan) == workers
    assert sum(map(PAPER.throughput_qps, plan)) >= share * workers * fastest * (1 - 1e-3)


def test_a_plan_takes_the_most_accurate_subnets_that_carry_the_forecast():
    best, fast = PAPER.rows[-1].subnet, PAPER.rows[0].subnet
    policy = Planner(PAPER, headroom=0.0)
    assert policy.plan(1.0, workers=2, slo_ms=1e6) == (best, best)
    assert policy.plan(1e6, workers=2, slo_ms=1e6) == policy.plan(10.0, workers=2, slo_ms=0.1) == (fast, fast)


def test_the_planner_keeps_a_plan_for_its_period_and_makes_another_when_a_worker_leaves():
    policy = Planner(PAPER, period_s=5.0)
    busy = PAPER.rows[0].accuracy

    def at(now_s, rate_qps, workers=2):
        state = State(now_s, 36.0, 16, workers=workers, rate_qps=rate_qps, slo_ms=36.0)
        return PAPER.row(policy(PAPER, state).subnet).accuracy

    assert at(0.0, 0.0) == busy  # nothing is known yet
    assert at(0.1, 10.0) == at(1.0, 9000.0) > busy  # the first plan lasts a second
    assert at(1.2, 9000.0) == at(6.1, 10.0) == busy
    assert at(6.3, 10.0) > busy
    assert at(6.4, 4000.0) > at(6.5, 4000.0, workers=1) == busy


def spread(profile, factor):
    rows = (dataclasses.replace(r, p99_ms=tuple(factor * ms for ms in r.latency_ms)) for r in profile.rows)
    return dataclasses.replace(profile, rows=tuple(rows))


@settings(deadline=None)
@given(st.data())
def test_a_spread_within_the_reserve_changes_nothing_and_a_wider_one_only_makes_faster(data):
    state = data.draw(states(PAPER))
    plain, narrow, wide = (SlackFit(spread(PAPER, f))(PAPER, state) for f in (1.0, 1.1, 1.4))
    assert plain == SlackFit(PAPER)(PAPER, state)
    assert narrow == plain
    assert (wide.batch, wide.defer_ms) == (plain.batch, plain.defer_ms)
    assert PAPER.row(wide.subnet).accuracy <= PAPER.row(plain.subnet).accuracy


def test_a_wide_spread_keeps_so_much_that_the_99th_percentile_fits_into_the_slack():
    profile = make_profile([(10, 20, 40), (14, 28, 56)])
    assert choose(SlackFit(profile), profile, 17.0, 1) == (1, 1)
    wide = spread(profile, 1.3)
    assert choose(SlackFit(wide), wide, 17.0, 1) == (0, 1)
    assert choose(SlackFit(wide), wide, 18.3, 1) == (1, 1)


def test_one_percentile_that_stands_out_is_not_taken_for_the_spread():
    stalled = dataclasses.replace(PAPER.rows[2], p99_ms=(500.0, *PAPER.rows[2].latency_ms[1:]))
    profile = dataclasses.replace(PAPER, rows=(*PAPER.rows[:2], stalled, *PAPER.rows[3:]))
    assert Table(profile).tails == Table(PAPER).tails == Table(PAPER).columns


def test_with_a_measured_spread_more_deadlines_are_met_on_a_device_that_has_one():
    trace, cluster = traces.bursty(duration_s=6.0), Cluster(noise=0.15)
    z99 = 2.326
    profiles = SLOWED, spread(SLOWED, math.exp(0.15 * z99))
    missed = [1 - simulator.simulate(p, "slackfit", trace, cluster=cluster).attainment for p in profiles]
    assert missed[1] < 0.4 * missed[0]


@pytest.mark.parametrize("name", ["slackfit", "max-acc"])
def test_a_named_policy_decides_by_the_profile_that_it_is_passed(name):
    fast, slow = PAPER, SLOWED
    both = policies.create(name, fast, slow)
    for profile in (fast, slow, dataclasses.replace(slow)):
        for slack_ms in (12.0, 30.0):
            alone = policies.create(name, profile)
            assert choose(both, profile, slack_ms) == choose(alone, profile, slack_ms)
    assert both.name == name
    other = PAPER.scaled(3.0)  # of a worker that is added later
    assert choose(both, other, 30.0) == choose(policies.create(name, other), other, 30.0)


def test_a_planner_counts_workers_that_differ_in_units_of_the_one_that_asks():
    planner = Planner(PAPER)
    options = {"rate_qps": 2000.0, "slo_ms": 36.0}
    whole, parts = (State(0.0, 30.0, 9, (), workers, **options) for workers in (3, 2.7))
    assert planner(PAPER, whole) == Planner(PAPER)(PAPER, parts)
