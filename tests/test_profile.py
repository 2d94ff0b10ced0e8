import json

import hypothesis
import hypothesis.strategies as st
import pytest

from superserve_jax import errors
from superserve_jax import profile as profiles
from superserve_jax import subnet as subnets


def net(i):
    return subnets.Subnet((), (("width", (float(i),)),))


def make(*rows, batch_sizes=(1, 4)):
    return profiles.Profile(batch_sizes, tuple(profiles.Row(net(i), a, tuple(ms)) for i, (a, ms) in enumerate(rows)))


latencies = st.floats(0.1, 100.0)
rows = st.lists(st.tuples(st.floats(0.0, 1.0), st.tuples(latencies, latencies)), min_size=1, max_size=8)


def test_rows_stand_in_ascending_order_of_accuracy():
    assert [r.accuracy for r in make((0.9, (2, 3)), (0.7, (1, 2))).rows] == [0.7, 0.9]


def test_a_batch_costs_as_much_as_the_size_it_is_padded_to():
    profile = make((0.7, (1, 2)))
    assert [profile.latency_ms(net(0), b) for b in (1, 2, 4)] == [1, 2, 2]


@hypothesis.given(rows)
def test_the_monotone_repair_only_raises_and_leaves_nothing_falling(data):
    before = make(*data)
    after = before.monotone()
    for a, b in zip(before.rows, after.rows, strict=True):
        assert all(x <= y for x, y in zip(a.latency_ms, b.latency_ms, strict=True))
        assert b.latency_ms[0] <= b.latency_ms[1]
    for faster, slower in zip(after.rows, after.rows[1:], strict=False):
        assert all(x <= y for x, y in zip(faster.latency_ms, slower.latency_ms, strict=True))


@hypothesis.given(rows)
def test_no_row_of_the_pareto_front_is_beaten_and_every_dropped_row_is(data):
    profile = make(*data)
    front = profile.pareto().rows

    def beats(a, b):
        return a.accuracy >= b.accuracy and all(x <= y for x, y in zip(a.latency_ms, b.latency_ms, strict=True))

    assert not any(beats(a, b) and not beats(b, a) for a in front for b in front)
    assert all(any(beats(a, r) for a in front) for r in profile.rows)


def test_thinning_keeps_the_fastest_and_the_most_accurate_row():
    profile = make((0.700, (1, 2)), (0.701, (1.5, 3)), (0.75, (2, 4)), (0.799, (4, 8)), (0.80, (4.1, 8.1)))
    kept = profile.pareto(min_accuracy_gap=0.003, min_latency_ratio=1.1).rows
    assert [r.accuracy for r in kept] == [0.700, 0.75, 0.80]


def test_a_profile_survives_its_file(tmp_path):
    profile = make((0.7, (1, 2)), (0.9, (2, 3)))
    profile.save(tmp_path / "deep" / "p.json")
    assert profiles.Profile.load(tmp_path / "deep" / "p.json") == profile


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("rows"),
        lambda d: d.update(schema=99),
        lambda d: d.update(rows=[]),
        lambda d: d.update(batch_sizes=[]),
        lambda d: d.update(batch_sizes=[4, 1]),
        lambda d: d["rows"][0].update(latency_ms=[1]),
        lambda d: d["rows"][0].update(latency_ms=[1, -2]),
        lambda d: d["rows"][0].update(accuracy=75),
        lambda d: d["rows"][0].update(subnet=None),
        lambda d: d["rows"].append(d["rows"][0]),
    ],
)
def test_a_malformed_profile_is_refused_with_a_documented_error(damage, tmp_path):
    data = make((0.7, (1, 2))).to_json()
    damage(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises((errors.ProfileError, errors.ConfigError)):
        profiles.Profile.load(tmp_path / "p.json")


def test_a_file_that_is_no_json_or_missing_is_refused(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xff{")
    for name in ("p.json", "absent.json"):
        with pytest.raises(errors.ProfileError, match=name):
            profiles.Profile.load(tmp_path / name)


@pytest.mark.parametrize("sizes", [(), (0,), (2, 1), (1, 1), (1.5,), (True, 2)])
def test_batch_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(errors.ConfigError, match="batch_sizes"):
        profiles.check_batch_sizes(sizes)


def test_a_subnet_or_batch_size_that_was_not_measured_is_named():
    profile = make((0.7, (1, 2)))
    with pytest.raises(errors.ProfileError, match="not in the profile"):
        profile.row(net(5))
    with pytest.raises(errors.ProfileError, match="batch size 8"):
        profile.at((1, 8))
    assert profile.at((4,)).rows[0].latency_ms == (2,)
