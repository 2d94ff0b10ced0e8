"""Recorded arrivals: CSV files of users."""

import logging
import time

import numpy as np
import pytest
from pages import PAGES

from superserve_jax import errors
from superserve_jax.simulation import recorded, traces


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "a.csv").write_text(text)
        return tmp_path / "a.csv"

    return write


def test_a_recording_needs_only_the_column_of_arrivals_and_may_be_unsorted(write, caplog):
    caplog.set_level(logging.INFO)
    trace = recorded.trace(write("host,arrival_s\nx,2.5\ny,1.5\n"), slo_ms=50.0)
    assert trace.arrivals_s.tolist() == [1.5, 2.5]
    assert trace.deadlines_s.tolist() == [1.55, 2.55]
    assert (trace.name, trace.floors, trace.lengths) == ("a", 0, 0)
    assert "2 arrivals, column 'arrival_s' holds times in s; 1 rows come before an earlier one" in caplog.text
    trace = recorded.trace(write("arrival_s,slo_ms,floor,length\n2.5,20,0.79,100\n1.5,36.5,0,20\n"))
    assert (trace.slo_ms.tolist(), trace.floors.tolist(), trace.lengths.tolist()) == ([36.5, 20], [0, 0.79], [20, 100])


NOW_S = 1_795_800_605.25  # 2026-11-27T...


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("ts", [NOW_S, NOW_S + 0.5, NOW_S + 2], "Unix timestamps in s"),
        ("arrival_s", [f"{1e3 * (NOW_S + s):.0f}" for s in (0, 0.5, 2)], "Unix timestamps in ms"),
        ("ts", [int(1e6 * (NOW_S + s)) for s in (0, 0.5, 2)], "Unix timestamps in us"),
        ("ts", [int(1e9 * (NOW_S + s)) for s in (0, 0.5, 2)], "Unix timestamps in ns"),
        ("date", ["2026-11-27T23:59:59Z", "2026-11-27T23:59:59.500000Z", "2026-11-28 00:00:01+00:00"], "dates"),
        ("date", ["2026-11-27 23:59:59", "2026-11-28T00:59:59.5+01:00", "2026-11-28T00:00:01"], "dates"),
        ("uptime_s", [86_400.0, 86_400.5, 86_402.0], "times in s"),
        ("uptime_ms", [86_400_000, 86_400_500, 86_402_000], "times in ms"),
        ("uptime_ms", [int(1e3 * s) for s in (1.7e5, 1.7e5 + 0.5, 1.7e5 + 2)], "times in ms"),
        ("monotonic_ns", [int(1e9 * s) for s in (1.7e5, 1.7e5 + 0.5, 1.7e5 + 2)], "times in ns"),
        ("uptime", [2e8, 2e8 + 0.5, 2e8 + 2], "times in s"),
        ("ts_us", [int(1e6 * (NOW_S + s)) for s in (0, 0.5, 2)], "Unix timestamps in us"),
    ],
)
def test_times_of_a_clock_are_shifted_to_the_first_arrival(write, caplog, column, values, kind):
    caplog.set_level(logging.INFO)
    trace = recorded.trace(write("\n".join([column, *map(str, values)])), column=column)
    np.testing.assert_allclose(trace.arrivals_s, [0, 0.5, 2], atol=1e-6)
    assert f"holds {kind}, shifted to the first arrival" in caplog.text


def test_the_only_column_needs_no_name_and_its_ending_may_be_the_unit(write):
    assert recorded.trace(write("when_ms\n0\n500\n")).arrivals_s.tolist() == [0, 0.5]


def test_a_trace_may_run_faster_than_it_was_recorded(write):
    trace = recorded.trace(write("arrival_s\n1\n3\n"), speed=4)
    assert (trace.arrivals_s.tolist(), trace.slo_ms) == ([0.25, 0.75], 36)
    assert trace.name == "a, 4 times as fast"
    with pytest.raises(errors.ConfigError, match="speed must be a positive number"):
        recorded.trace(write("arrival_s\n1\n"), speed=0)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("time,host\n1,a\n", None, r"no column 'arrival_s', only \['time', 'host'\]; name the column .*--trace-column"),
        ("time,host\n1,a\n", "tiem", r"no column 'tiem', only \['time', 'host'\]; choose one of them"),
        (",".join(f"c{i}" for i in range(99)) + "\n", None, "'c19'] and 79 more"),
        ("", None, r"no column 'arrival_s', only \[\]"),
        ("1.5\n2.5\n", None, "line 1: it must name the columns"),
        ("arrival_s\n", None, "has no arrivals"),
        ("arrival_s\n1\nsoon\n", None, "line 3: .*'arrival_s' must be a finite number.*'soon'"),
        ("arrival_s\nsoon\n1\n", None, "line 2: .* a date such as .*'soon'"),
        ("arrival_s,host\n1,a\n,b\n", None, "line 3: .*got ''"),
        ("arrival_s,slo_ms\n1,36\n2\n", None, "line 3: column 'slo_ms' must be a number, got None"),
        ("arrival_s,slo_ms\n1,36\n2,fast\n", None, "line 3: column 'slo_ms' must be a number, got 'fast'"),
        ("arrival_s\n1\n-2\n", None, "line 3: .*from 0 up, got '-2'"),
        ("arrival_s\nnan\n", None, "line 2: .*finite number from 0 up, got 'nan'"),
        ("arrival_s\n1e300\n", None, "line 2: .*1e\\+300, too much for a time"),
        ("arrival_s\n0\n1.7e9\n", None, "line 3: .* 53.9 years after the one in line 2; give all times in one unit"),
        ("uptime\n1.7e11\n", None, "line 2: column 'uptime' has 1.7e\\+11, too much for a time in s; .*its unit: _ms"),
        ("ts_ms\n1.7e18\n", None, "line 2: column 'ts_ms' has 1.7e\\+18, too much for a time in ms"),
        ("arrival_s,slo_ms\n1,1e300\n", None, "line 2: .*up to 1e\\+12"),
        ("arrival_s,slo_ms\n1,0\n", None, "line 2: .*positive"),
        ("arrival_s,slo_ms\n1,inf\n", None, "line 2: .*finite"),
        ("arrival_s,floor\n1,0.5\n1,2\n", None, "line 3: .*from 0 to 1, got 2"),
        ("arrival_s,length\n1,2.5\n", None, "line 2: .*whole numbers of tokens"),
        ("arrival_s,length\n1,nan\n", None, "line 2: .*whole numbers of tokens"),
    ],
)
def test_a_malformed_recording_is_refused_with_the_reason(write, text, column, message):
    with pytest.raises(errors.DataError, match=message):
        recorded.trace(write(text), column=column)


def test_a_missing_recording_is_a_data_error(tmp_path):
    with pytest.raises(errors.DataError, match="nowhere"):
        recorded.trace(tmp_path / "nowhere.csv")


def test_a_recording_may_have_as_many_rows_as_a_trace(write, monkeypatch):
    monkeypatch.setattr(traces, "MAX_QUERIES", 3)
    assert len(recorded.trace(write("arrival_s\n1\n2\n3\n"))) == 3
    with pytest.raises(errors.DataError, match="line 5: a trace may have at most 3 queries; cut the file"):
        recorded.trace(write("arrival_s\n1\n2\n3\nthis row is not read\n"))


def test_a_large_recording_is_read_in_seconds(write):
    path = write("arrival_s\n" + "\n".join(f"{NOW_S + i / 1000}" for i in range(100_000)))
    start_s = time.process_time()
    assert len(recorded.trace(path)) == 100_000
    assert time.process_time() - start_s < 30


def test_the_file_in_the_docs_is_read(write):
    [page] = [page for page in PAGES if page.name == "docs/traces.md"]
    text = next(block.text for block in page.blocks if block.language == "text")
    trace = recorded.trace(write(text), column="timestamp")
    np.testing.assert_allclose(trace.arrivals_s, [0, 0.006, 0.615], atol=1e-6)
    assert trace.slo_ms.tolist() == [50, 50, 200]
