import dataclasses
import itertools
import operator

import hypothesis
import hypothesis.strategies as st
import pytest

from superserve_jax import errors
from superserve_jax.profile import Profile, Row, check_batch_sizes, profiles_of_workers
from superserve_jax.subnet import Subnet


def net(i):
    return Subnet((), (("width", (float(i),)),))


def make(*rows, batch_sizes=(1, 4)):
    return Profile(batch_sizes, tuple(Row(net(i), a, tuple(ms)) for i, (a, ms) in enumerate(rows)))


def at_most(a, b):
    return all(map(operator.le, a, b))


latencies = st.floats(0.1, 100.0)
rows = st.lists(st.tuples(st.floats(0.0, 1.0), st.tuples(latencies, latencies)), min_size=1, max_size=8)


def test_rows_ascend_in_accuracy_and_a_batch_costs_as_much_as_the_size_it_is_padded_to():
    profile = make((0.9, (2, 3)), (0.7, (1, 2)))
    assert [r.accuracy for r in profile.rows] == [0.7, 0.9]
    assert [profile.latency_ms(net(1), b) for b in (1, 2, 4)] == [1, 2, 2]


def test_the_monotone_repair_keeps_a_single_high_percentile():
    rows = (Row(net(0), 0.7, (1.0, 2.0), (50.0, 2.5)), Row(net(1), 0.8, (1.5, 1.9), (1.8, 2.2)))
    after = Profile((1, 4), rows).monotone()
    assert [r.p99_ms for r in after.rows] == [(50.0, 2.5), (1.8, 2.2)]
    assert after.rows[1].latency_ms == (1.5, 2.0)


@hypothesis.given(rows)
def test_no_row_of_the_pareto_front_is_beaten_and_every_dropped_row_is(data):
    profile = make(*data)
    front = profile.pareto().rows

    def beats(a, b):
        return a.accuracy >= b.accuracy and at_most(a.latency_ms, b.latency_ms)

    assert not any(beats(a, b) and not beats(b, a) for a in front for b in front)
    assert all(any(beats(a, r) for a in front) for r in profile.rows)


def test_thinning_keeps_the_fastest_and_the_most_accurate_row():
    profile = make((0.700, (1, 2)), (0.701, (1.5, 3)), (0.75, (2, 4)), (0.799, (4, 8)), (0.80, (4.1, 8.1)))
    kept = profile.pareto(min_accuracy_gap=0.003, min_latency_ratio=1.1).rows
    assert [r.accuracy for r in kept] == [0.700, 0.75, 0.80]


def test_a_missing_file_or_one_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xff{")
    for name in ("p.json", "absent.json"):
        with pytest.raises(errors.ProfileError, match=name):
            Profile.load(tmp_path / name)


@pytest.mark.parametrize("sizes", [(), (0,), (2, 1), (1, 1), (1.5,), (True, 2)])
def test_impossible_batch_sizes_are_refused(sizes):
    with pytest.raises(errors.ConfigError, match="batch_sizes"):
        check_batch_sizes(sizes)


def test_a_subnet_or_batch_size_that_was_not_measured_is_named():
    profile = make((0.7, (1, 2)))
    with pytest.raises(errors.ProfileError, match="not in the profile"):
        profile.row(net(5))
    with pytest.raises(errors.ProfileError, match="batch size 8"):
        profile.at((1, 8))
    assert profile.at((4,)).rows[0].latency_ms == (2,)


def at_lengths(short, long):
    return Profile((1, 4), rows_at={32: make(*short).rows, 128: make(*long).rows})


BOTH = at_lengths([(0.7, (1, 2)), (0.9, (2, 3))], [(0.7, (3, 8)), (0.9, (6, 16))])


def test_each_length_has_a_profile_and_rows_are_for_the_longest_length():
    assert [BOTH.at_length(n).latency_ms(net(0), 4) for n in (1, 32, 33, 128, 999)] == [2, 2, 8, 8, 8]
    assert BOTH.latency_ms(net(0), 4) == 8
    plain = make((0.7, (1, 2)))
    assert plain.at_length(17) is plain


def test_the_throughput_of_a_mix_of_lengths_follows_from_their_mean_cost():
    # At batch 4 a query costs 0.5 ms at the short length and 2 ms at the long one.
    assert BOTH.throughput_qps(net(0)) == pytest.approx(500)
    assert BOTH.throughput_qps(net(0), [9, 32, 32, 100]) == pytest.approx(1e3 / (0.75 * 0.5 + 0.25 * 2))


def test_methods_that_change_a_profile_change_it_at_every_length():
    assert [t.rows[0].latency_ms for t in BOTH.scaled(2).each_length] == [(2, 4), (6, 16)]
    assert [[r.subnet for r in t.rows] for t in BOTH.only([net(1)]).each_length] == [[net(1)]] * 2
    assert [t.rows[0].latency_ms for t in BOTH.at((4,)).each_length] == [(2,), (8,)]
    assert BOTH.at((1, 4), (128,)).each_length == BOTH.each_length[1:]
    with pytest.raises(errors.ProfileError, match="length 64 was not measured"):
        BOTH.at((1, 4), (64,))


def test_the_pareto_front_at_the_longest_length_is_used_at_all_lengths():
    slow = at_lengths([(0.7, (3, 3)), (0.9, (2, 2))], [(0.7, (4, 4)), (0.9, (9, 9))])
    assert len(slow.pareto().rows) == len(slow.pareto().each_length[0].rows) == 2
    beaten = at_lengths([(0.7, (1, 1)), (0.9, (2, 2))], [(0.7, (9, 9)), (0.9, (4, 4))])
    assert [[r.accuracy for r in t.rows] for t in beaten.pareto().each_length] == [[0.9]] * 2


@hypothesis.given(rows, rows)
def test_the_monotone_repair_only_raises_latencies_and_then_none_falls_with_batch_accuracy_or_length(short, long):
    count = min(len(short), len(long))
    before = at_lengths(*([(short[i][0], made[i][1]) for i in range(count)] for made in (short, long)))
    after = before.monotone()
    for old, new in zip(before.each_length, after.each_length, strict=True):
        assert all(at_most(a.latency_ms, b.latency_ms) for a, b in zip(old.rows, new.rows, strict=True))
        assert all(at_most(faster.latency_ms, slower.latency_ms) for faster, slower in itertools.pairwise(new.rows))
        assert all(row.latency_ms[0] <= row.latency_ms[1] for row in new.rows)
    shorter, longer = after.each_length
    assert all(at_most(a.latency_ms, b.latency_ms) for a, b in zip(shorter.rows, longer.rows, strict=True))
    assert after.monotone() == after
    assert shorter == before.each_length[0].monotone()


@pytest.mark.parametrize("profile", [make((0.7, (1, 2)), (0.9, (2, 3))), BOTH], ids=["one shape", "lengths"])
def test_a_profile_survives_its_file(profile, tmp_path):
    profile.save(tmp_path / "deep" / "p.json")
    assert Profile.load(tmp_path / "deep" / "p.json") == profile
    assert ("lengths" in profile.to_json()) == ("shorter" in profile.to_json()) == bool(profile.lengths)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("rows"), "not a latency profile"),
        (lambda d: d.update(schema=99), "schema 99 is unknown"),
        (lambda d: d.update(rows=[]), "at least one row"),
        (lambda d: d.update(batch_sizes=[]), "ascending"),
        (lambda d: d.update(slicing="other"), "slicing must be 'kept' or 'in_call'"),
        (lambda d: d.update(lengths=[128, 32]), "ascending"),
        (lambda d: d.update(lengths=[32, 32]), "ascending"),
        (lambda d: d.update(shorter=[]), "not a latency profile"),
        (lambda d: d.update(shorter=[d["rows"][:1]]), "other subnets"),
        (lambda d: d["rows"][0].update(latency_ms=[1]), "1 latencies for 2 batch sizes"),
        (lambda d: d["rows"][0].update(latency_ms=[1, -2]), "positive and finite"),
        (lambda d: d["rows"][0].update(accuracy=75), "fraction from 0 to 1"),
        (lambda d: d["rows"][0].update(subnet=None), "not a subnet"),
        (lambda d: d["rows"][1].update(envelope=d["rows"][0]["subnet"]), "does not cover"),
        (lambda d: d["rows"].append(d["rows"][0]), "two rows of the same subnet"),
    ],
)
def test_a_malformed_profile_is_refused_with_the_reason(damage, message):
    data = BOTH.to_json()
    damage(data)
    with pytest.raises(errors.ProfileError, match=message):
        Profile.from_json(data)


IN_PARTS = dataclasses.replace(make((0.7, (1, 2)), (0.75, (3, 3)), (0.9, (2, 3))), parts={4: 2}, cpu_workers=2)
BOTH_IN_PARTS = dataclasses.replace(BOTH, parts={1: 1, 4: 2}, cpu_workers=3)


@pytest.mark.parametrize("profile", [IN_PARTS, BOTH_IN_PARTS], ids=["one shape", "lengths"])
def test_parts_and_workers_survive_a_file_and_changes_of_the_latencies(profile, tmp_path):
    profile.save(tmp_path / "p.json")
    found = Profile.load(tmp_path / "p.json")
    assert found == profile
    assert (found.parts, found.cpu_workers) == (profile.parts, profile.cpu_workers)
    thinned = profile.pareto(min_accuracy_gap=0.1)
    for changed in (profile.monotone(), profile.pareto(), thinned, profile.scaled(2.0), profile.with_envelopes({})):
        assert (changed.parts, changed.cpu_workers) == (profile.parts, profile.cpu_workers)
    assert all((p.parts, p.cpu_workers) == (profile.parts, profile.cpu_workers) for p in profile.each_length)
    assert profile.only([profile.rows[0].subnet]).parts == profile.parts


def test_a_profile_at_some_batch_sizes_has_their_parts():
    assert (IN_PARTS.at((1,)).parts, IN_PARTS.at((4,)).parts, IN_PARTS.at((1,)).cpu_workers) == ({}, {4: 2}, 2)
    assert BOTH_IN_PARTS.at((4,), BOTH.lengths[:1]).parts == {4: 2}
    assert Profile.from_json(IN_PARTS.at((1,)).to_json()) == IN_PARTS.at((1,))


def test_a_file_without_parts_is_of_one_worker_and_whole_batches_write_no_parts():
    plain = make((0.7, (1, 2)))
    data = plain.to_json()
    assert not {"parts", "cpu_workers"} & set(data)
    assert (Profile.from_json(data).parts, Profile.from_json(data).cpu_workers) == ({}, 1)
    assert Profile.from_json({**data, "cpu_workers": 2}).cpu_workers == 2
    assert Profile.from_json({**data, "parts": {"4": 1}}).parts == {4: 1}


@pytest.mark.parametrize(
    "damage",
    [
        *({"parts": parts} for parts in ({"2": 1}, {"4": 0}, {"4": 5}, {"4": -1}, {"4": 1.5}, {"4": "2"}, {"4": None})),
        *({"parts": parts} for parts in ({"four": 2}, {"": 1}, [[4, 2]], [4], 4, "4", None)),
        *({"cpu_workers": workers} for workers in (0, -1, 1.5, "2", None, [2], {})),
    ],
    ids=str,
)
def test_damaged_parts_or_workers_are_refused(damage):
    with pytest.raises(errors.ProfileError, match="measure it again"):
        Profile.from_json({**IN_PARTS.to_json(), **damage})


@pytest.mark.parametrize("changes", [{"parts": {2: 1}}, {"parts": {4: 5}}, {"parts": {4: 0}}, {"cpu_workers": 0}], ids=str)
def test_impossible_parts_or_workers_are_refused(changes):
    with pytest.raises(errors.ProfileError, match="is impossible; measure it again"):
        dataclasses.replace(IN_PARTS, **changes)


def test_profiles_of_workers_are_one_for_all_or_one_for_each_and_equal_ones_become_one_object():
    profile, again = make((0.7, (1, 2))), make((0.7, (1, 2)))
    each = profiles_of_workers([profile, profile.scaled(2.0), again], 3)
    assert each[0] is each[2] is profile is not again
    with pytest.raises(errors.ConfigError, match="2 profiles for 3 workers"):
        profiles_of_workers([profile, profile], 3)
    with pytest.raises(errors.ConfigError, match="same batch sizes"):
        profiles_of_workers([profile, profile.at((1,))], 2)
