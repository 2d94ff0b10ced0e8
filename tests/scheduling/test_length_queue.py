"""Length buckets without a model: the queue, the policy's state, the simulator, and the server on fake engines.

One file because all tests share the profile of three length buckets.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import PAPER, Always, ms, simulate

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import dispatch, length_queue, policies
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.length_queue import LengthQueue
from superserve_jax.scheduling.policies import Decision
from superserve_jax.scheduling.queue import DeadlineQueue
from superserve_jax.serving.server import Server
from superserve_jax.simulation import bounds, simulator, traces
from superserve_jax.simulation.cluster import Cluster, Outage
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

LENGTHS = (8, 16, 32)
SUBNETS = (Subnet((0,)), Subnet((1,)))


def rows(length):
    """Batches of 1, 2 and 4 take 1, 1.5 and 2.5 ms for each 8 tokens, and twice as long on the more accurate subnet."""
    return tuple(
        Row(s, a, tuple(k * ms * length / 8 for ms in (1.0, 1.5, 2.5)))
        for s, a, k in zip(SUBNETS, (0.7, 0.8), (1, 2), strict=True)
    )


PROFILE = Profile((1, 2, 4), rows_at={length: rows(length) for length in LENGTHS})
DEADLINES = st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0])
FLOORS = st.sampled_from([0.0, 0.0, 0.7, 0.8])
ENTRIES = st.lists(st.tuples(DEADLINES, FLOORS, st.integers(1, 32)), max_size=12)


def bucket(length):
    return next(limit for limit in LENGTHS if limit >= length)


def filled(entries):
    q = LengthQueue(PROFILE)
    for i, (deadline_s, floor, length) in enumerate(entries):
        q.push(deadline_s, i, floor, length)
    return q


def decide(q, policy, now_s=0.0, meter=None):
    return dispatch.next_batch(Turn(q, meter or ArrivalMeter(), policy, PROFILE), now_s)


def test_inputs_of_one_shape_or_one_length_wait_in_a_deadline_queue():
    for profile in (Profile((1, 2, 4), rows(8)), PROFILE.at_length(8)):
        assert type(length_queue.make_queue(profile)) is DeadlineQueue


@given(ENTRIES, st.integers(1, 5), st.sampled_from([0.7, 0.8]), st.sampled_from([0.0, 2.5]))
def test_a_batch_starts_with_the_head_and_has_no_query_longer_than_its_length_bucket(entries, n, accuracy, deferred_s):
    q, seen = filled(entries), []
    while len(q):
        q.defer(deferred_s)
        head, length, floors, before = q.head(), q.head_length, q.head_floors(n), len(q)
        batch = q.pop(n, accuracy) or q.pop(n)
        assert batch[0] == head
        assert bucket(entries[head][2]) == length == max(bucket(entries[i][2]) for i in batch)
        assert len(q) == before - len(batch)
        if all(floor <= accuracy for _, floor, _ in entries):
            assert (floors or (0.0,) * len(batch)) == tuple(entries[i][1] for i in batch)
        seen += batch
    assert sorted(seen) == list(range(len(entries)))


@given(st.lists(st.integers(1, 32)), DEADLINES)
def test_push_all_puts_each_text_into_its_own_length_bucket(lengths, deadline_s):
    together, one_by_one = LengthQueue(PROFILE), filled([(deadline_s, 0.0, length) for length in lengths])
    together.push_all(deadline_s, range(len(lengths)), lengths=lengths)
    for q in together, one_by_one:
        q.choose_head(0.0)
    while len(one_by_one):
        assert together.head_length == one_by_one.head_length
        assert together.pop(4) == one_by_one.pop(4)
    assert not len(together)


@given(ENTRIES, st.integers(1, 5))
def test_the_head_is_the_earliest_deadline_and_each_length_bucket_is_served_in_order(entries, n):
    q, taken = filled(entries), []
    while len(q):
        assert q.head_deadline_s == min(entries[i][0] for i in set(range(len(entries))) - set(taken))
        taken += q.pop(n)
    for limit in LENGTHS:
        own = [i for i in taken if bucket(entries[i][2]) == limit]
        assert own == sorted(own, key=lambda i: (entries[i][0], i))


@given(
    st.lists(st.tuples(DEADLINES, FLOORS, st.just(20)), max_size=12),
    st.integers(1, 5),
    st.lists(st.sampled_from([0.0, 2.0, 4.0]), max_size=2),
    st.sampled_from([0.5, 2.5, 9.0]),
)
def test_with_equal_lengths_a_length_queue_acts_like_a_deadline_queue(entries, n, times, time_s):
    q, plain = filled(entries), DeadlineQueue()
    for i, (deadline_s, floor, _) in enumerate(entries):
        plain.push(deadline_s, i, floor)
    for t in times:
        assert q.defer(t) == plain.defer(t)
    for ask in (len, lambda q: q.late, lambda q: q.head(), lambda q: q.head_deadline_s):
        assert ask(q) == ask(plain)
    assert (q.head_floors(n) or (0.0,) * n)[:n] == (plain.head_floors(n) or (0.0,) * n)[:n]
    assert q.due_by(time_s) == pytest.approx(plain.due_by(time_s))
    for accuracy in (0.0, 0.7, math.inf):
        assert q.pop(n, accuracy) == plain.pop(n, accuracy)
    extra_s = 1e-3 * (PROFILE.rows[0].latency_ms[0] - PROFILE.each_length[0].rows[0].latency_ms[0])
    assert q.pop_before(time_s - extra_s) == plain.pop_before(time_s)
    assert q.drain() == plain.drain()


@given(ENTRIES, st.sampled_from(["slackfit", "slackfit-paper", "max-acc", "max-batch", "fixed:1", "proteus"]), st.floats(0, 9))
def test_the_policy_decides_by_the_latency_of_the_program_that_runs(entries, name, now_s):
    q, policy, asked = filled(entries), policies.create(name, PROFILE), []

    def spy(profile, state):
        asked.append((profile, state))
        return policy(profile, state)

    while len(q):
        before = len(q)
        row, batch, _ = decide(q, spy, now_s)
        profile, state = asked[-1]
        ran = PROFILE.at_length(max(entries[i][2] for i in batch))
        assert profile == ran
        assert row == ran.row(row.subnet)
        assert len(batch) <= state.waiting <= before
        assert all(entries[i][1] <= row.accuracy for i in batch)


def test_the_state_counts_work_in_queries_like_the_head():
    # At the fastest subnet's best throughput a query of 32 tokens costs 2.5 ms, and a query of 8 tokens a quarter.
    q, meter = filled([(0.1, 0.0, 5), (0.2, 0.0, 30), (0.3, 0.0, 8)]), ArrivalMeter()
    meter.read(0.0, 0.0)
    policy = Always(0, 2)
    assert decide(q, policy, 0.05, meter)[1] == [0, 2]
    assert decide(q, policy, 0.05, meter)[1] == [1]
    first, second = policy.states
    assert [profile.lengths for profile in policy.profiles] == [(8,), (32,)]
    assert (first.waiting, first.near) == (2, pytest.approx(6.0))
    assert (second.waiting, second.near) == (1, pytest.approx(1.0))
    assert first.rate_qps == pytest.approx(6 / 0.05)
    assert second.rate_qps == pytest.approx(1.5 / 0.05)
    assert first.variance_qps == pytest.approx(16 * second.variance_qps)


def test_the_first_reading_assumes_a_compound_poisson_process():
    for tokens, variance_per_mean in ([5] * 8, 1.0), ([32] * 8, 1.0), ([32] * 4 + [5] * 4, (1 + 1 / 16) / (1 + 1 / 4)):
        q, meter, policy = filled([]), ArrivalMeter(), Always(0, 4)
        meter.read(0.0, 0.0)
        for i, n in enumerate(tokens):
            q.push(1.0, i, 0.0, n)
        decide(q, policy, 0.05, meter)
        assert policy.states[0].variance_qps == pytest.approx(variance_per_mean * policy.states[0].rate_qps)


def test_if_the_decision_defers_the_head_the_policy_is_asked_again_for_the_next_head():
    # Alone, a query of 32 tokens takes 4 ms, so the first is lost. The second takes 1 ms and can be saved.
    q, states = filled([(0.001, 0.0, 32), (0.0015, 0.0, 8)]), []
    policy = policies.create("slackfit", PROFILE)

    def spy(profile, state):
        states.append((profile.lengths, state.late))
        return policy(profile, state)

    row, batch, _ = decide(q, spy)
    assert (batch, row) == ([1], PROFILE.each_length[0].rows[0])
    assert states == [((32,), 0), ((8,), 0)]  # the lost one is too long for the second batch
    assert (q.head(), q.late) == (0, 1)


def lost_and_on_time(lost_tokens, on_time=1, deadline_s=1.0):
    """A queue of one lost query, and `on_time` queries of 8 tokens that have time."""
    q = filled([(0.001, 0.0, lost_tokens), *[(deadline_s, 0.0, 8)] * on_time])
    assert q.defer(0.01) == 1
    return q


def test_deferred_queries_of_a_longer_length_bucket_run_when_on_time_queries_do_not_fill_a_batch():
    q = lost_and_on_time(32, on_time=5)
    assert (q.head(), q.head_length, q.late, q.eligible, q.pop(4)) == (1, 8, 0, 5, [1, 2, 3, 4])
    assert (q.head(), q.head_length, q.late, q.eligible, q.pop(4)) == (0, 32, 1, 2, [0, 5])


def test_deferred_queries_wait_while_on_time_queries_of_their_own_and_of_shorter_length_buckets_fill_a_batch():
    for long, head_length in (2, 32), (3, 8):
        q = lost_and_on_time(32)
        for i in range(long):
            q.push(2.0, 10 + i, 0.0, 32)
        assert q.head_length == head_length


def test_a_batch_of_deferred_queries_is_small_enough_for_on_time_queries_to_meet_their_deadlines():
    # A batch of 1, 2 or 4 long queries takes 4, 6 or 10 ms. The next batch, of four short queries, takes 2.5 ms.
    for now_s, length, size in (0.987, 32, 3), (0.991, 32, 2), (0.993, 32, 1), (0.994, 8, 1):
        q = lost_and_on_time(32)
        q.push(0.002, "another", 0.0, 32)
        q.defer(0.01)
        q.choose_head(now_s)
        assert (q.head_length, q.eligible) == (length, size), now_s
        _, batch, _ = decide(q, Always(0, 4), now_s)  # a policy that ignores the number of eligible queries
        assert len(batch) == size, now_s


@pytest.mark.parametrize("workers", [1, 4])
def test_lost_long_texts_are_answered_as_soon_as_lost_short_texts_of_equal_work(workers):
    profile = Profile(PAPER.batch_sizes, rows_at={8: PAPER.rows, 32: PAPER.scaled(4).rows})
    short = traces.gamma(rate_qps=0.9 * workers * PAPER.throughput_qps(PAPER.rows[0].subnet), duration_s=4.0, cv2=0.0)
    done_s, accuracy = {}, {}
    for tokens, count in (8, 160), (32, 40):
        arrivals = np.concatenate([short.arrivals_s, np.full(count, 0.5)])
        order, lost = np.argsort(arrivals, kind="stable"), np.repeat([False, True], [len(short), count])
        slo_ms, lengths = np.where(lost, 0.1, 36.0)[order], np.where(lost, tokens, 5)[order]
        trace = Trace(arrivals[order], slo_ms, lengths=lengths)
        result = simulator.simulate(profile, "slackfit", trace, cluster=Cluster(workers))
        assert (result.outcome[slo_ms > 1] == simulator.MET).mean() > 0.997
        done_s[tokens] = result.finish_s[slo_ms < 1].max() - 0.5
        accuracy[tokens] = result.accuracy[result.arrival_s > 3].mean()
    assert done_s[32] < 1.25 * done_s[8] < 2
    assert accuracy[32] > accuracy[8] - 0.001
    assert accuracy[32] > profile.rows[0].accuracy + 0.003


def test_pop_before_allows_longer_queries_more_time():
    q = filled([(0.0035, 0.0, 32), (0.0035, 0.0, 8)])
    assert q.pop_before(0.001) == [0]  # alone on the fastest subnet, query 0 takes 4 ms and query 1 takes 1 ms
    assert q.drain() == [1]


def serve(policy, arrivals_ms, lengths, **options):
    return simulate(PROFILE, policy, arrivals_ms, slo_ms=100.0, lengths=lengths, **options)


def test_the_simulator_equals_an_example_worked_out_by_hand():
    # The first query runs alone, padded to 8 tokens, for 1 ms. Then the head has 30 tokens. It runs with the other long query:
    # two take 6 ms. Then the two short queries take 1.5 ms. The query of 12 tokens is too long for their batch and takes 2 ms.
    result = serve(Always(0, 2), [0, 0.1, 0.2, 0.3, 0.4, 0.5], [5, 30, 8, 20, 3, 12])
    assert ms(result.start_s) == [0, 1, 7, 1, 7, 8.5]
    assert ms(result.finish_s) == [1, 7, 8.5, 7, 8.5, 10.5]
    assert result.batch.tolist() == [1, 2, 2, 2, 2, 1]


def test_shorter_queries_fill_the_rest_of_a_batch():
    result = serve(Always(0, 4), [0, 0.1, 0.2, 0.3], [32, 17, 9, 3])
    assert ms(result.start_s) == [0, 4, 4, 4]
    assert ms(result.finish_s) == [4, 14, 14, 14]


def test_a_change_of_length_is_no_change_of_subnet():
    equal = Subnet((0,))  # equal to the profile's, but another object
    result = serve(lambda profile, state: Decision(equal, 1), [0, 10, 30], [5, 30, 5], actuation_ms=3.0)
    assert ms(result.finish_s - result.start_s) == [4, 4, 1]


def test_queries_of_unknown_length_are_padded_to_the_longest_length_bucket():
    trace = traces.gamma(rate_qps=200.0, duration_s=0.5)
    known = dataclasses.replace(trace, lengths=32)
    plain = simulator.simulate(PROFILE.at_length(32), "slackfit", trace)
    for t in (trace, known):
        result = simulator.simulate(PROFILE, "slackfit", t)
        np.testing.assert_allclose(result.finish_s, plain.finish_s)
    with pytest.raises(errors.InputError, match="40 tokens, but the longest length bucket has 32"):
        simulator.simulate(PROFILE, "slackfit", dataclasses.replace(trace, lengths=40))


def test_a_worker_that_dies_gives_back_queries_with_their_lengths():
    result = serve(Always(0, 1), [0], [5], outages=(Outage(worker=0, from_s=0.0005, until_s=0.002),))
    assert ms(result.finish_s) == [3]


def test_length_buckets_beat_padding_to_the_longest():
    capacity_qps = PROFILE.throughput_qps(SUBNETS[0])
    trace = traces.gamma(rate_qps=capacity_qps, duration_s=5.0, cv2=4.0).mixed(lengths={6: 6, 14: 3, 30: 1})
    padded, bucketed = (
        simulator.simulate(p, "slackfit", trace, cluster=Cluster(workers=1)) for p in (PROFILE.at_length(32), PROFILE)
    )
    assert bucketed.attainment > padded.attainment + 0.1
    assert bucketed.mean_accuracy > padded.mean_accuracy + 0.02


def test_the_fluid_bound_uses_the_latency_of_each_length():
    trace = traces.gamma(rate_qps=2 * PROFILE.throughput_qps(SUBNETS[0]), duration_s=5.0, cv2=0)
    long, short = (bounds.fluid(PROFILE, dataclasses.replace(trace, lengths=n), workers=1) for n in (32, 8))
    assert long.attainment == pytest.approx(0.5 * 5.036 / 5, abs=1e-3)
    assert (short.attainment, short.accuracy) == (pytest.approx(1.0), pytest.approx(0.8))


# -- the server ---------------------------------------------------------------------------------------------------------------


def ids(*values):
    return np.array(values, np.int32)


def open_server(on_run=None, policy=None, **options):
    fake = FakeEngine(PROFILE, speed=math.inf, input_shape=(32,), input_dtype=np.int32, on_run=on_run)
    options = {"slo_ms": 60_000.0, "tune_runtime": False, **options}
    return Server.from_engines([fake], PROFILE, policy=policy or Always(0, 4), **options)


def test_inputs_of_any_length_are_answered_and_trailing_padding_does_not_count():
    seen = []
    with open_server(lambda subnet, size, inputs: seen.append([len(x) for x in inputs])) as s:
        for x in (ids(7, 1), np.pad(ids(8, 0, 2), (0, 40)), np.full(32, 9, np.int32), np.zeros(12, np.int32)):
            assert s.submit(x).result(10).output[0] == x[0]
    assert seen == [[2], [3], [32], [1]]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones(33, np.int32), "33 tokens, padding at the end not counted; expected 1 to 32"),
        (np.ones(0, np.int32), "0 tokens"),
        (np.ones((4, 2), np.int32), r"shape \(4, 2\)"),
        (np.ones(4, np.int64), "int64"),
        (np.int32(4), r"shape \(\)"),
    ],
)
def test_an_input_of_a_wrong_length_shape_or_dtype_is_refused(x, message):
    with open_server() as s, pytest.raises(errors.InputError, match=message):
        s.submit(x)


def test_every_policy_answers_each_query_of_a_mix_of_lengths_once():
    rng = np.random.default_rng(0)
    crowd = [np.full(n, i + 1, np.int32) for i, n in enumerate(rng.integers(1, 33, 200))]
    for name in ("slackfit", "slackfit-paper", "max-batch", "fixed:0", "proteus"):
        with open_server(policy=name) as s:
            futures = list(itertools.chain(*(s.submit_many(crowd[i : i + 20], slo_ms=50.0) for i in range(0, 200, 20))))
            assert [f.result(10).output[0] for f in futures] == list(range(1, 201)), name


def test_engines_and_profile_must_agree_on_the_lengths():
    fake = FakeEngine(PROFILE.at_length(32), input_shape=(32,), input_dtype=np.int32)
    with pytest.raises(errors.ConfigError, match=r"length buckets \[32\], profile \[8, 16, 32\]"):
        Server.from_engines([fake], PROFILE)
