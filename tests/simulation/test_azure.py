import numpy as np
import pytest
from policy_cases import MAF_SAMPLE

from superserve_jax import errors
from superserve_jax.simulation import azure


def minutes(tmp_path, text):
    path = tmp_path / "day.csv"
    path.write_text(text)
    return azure.invocations_per_minute(path).tolist()


PUBLISHED = "HashOwner,HashApp,HashFunction,Trigger,1,2,3\na,b,c,http,1,0,5\na,b,d,timer,2,0,0\n"


@pytest.mark.parametrize(
    "text",
    [
        PUBLISHED,
        "3,Trigger,1,func,2\n5,http,1,c,0\n0,timer,2,d,0\n",
        "\ufefffunction, Minute 1 ,minute_002,MIN3\nc,1,0,5\nd,2,0,0\n",
        "f,1.0,2.0,3.0\n\nc,1.0,,5.0\nd,2.0,,\n",
        '"m1","m2","m3"\r\n"3","0","5"\r\n',
        "f,1001,1002,1003\nc,3,0,5\n",
    ],
    ids=["as published", "other order", "other spellings", "floats and empty cells", "minutes only", "a subset of minutes"],
)
def test_files_with_other_columns_hold_the_same_minutes(tmp_path, text):
    assert minutes(tmp_path, text) == [3, 0, 5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c,1", "line 3: 2 cells where the header has 3"),
        ("c,1,x", "line 3: .*'x'"),
        ("c,1,-2", "line 3: .*'-2'"),
        ("c,1,2.5", "line 3: .*'2.5'"),
        ("c,1,nan", "line 3: .*'nan'"),
        ("f,1,2", "line 3: the header again; keep the rows of one day"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message):
    with pytest.raises(errors.DataError, match=message):
        minutes(tmp_path, f"f,1,2\nc,1,2\n{row}\n")


SUMS = MAF_SAMPLE.with_name("maf2019_762fn_total.csv")


def test_the_sums_of_the_whole_sample_have_its_invocations_and_its_peak():
    counts = azure.invocations_per_minute(SUMS)
    assert (len(counts), counts.sum()) == (1440, 1_636_279)
    assert counts.max() / counts.mean() == pytest.approx(4.07, abs=0.005)
    assert (counts >= azure.invocations_per_minute(MAF_SAMPLE)).all()


def test_files_without_minutes_or_without_rows_and_missing_files_are_refused(tmp_path):
    with pytest.raises(errors.DataError, match="no column is a minute"):
        minutes(tmp_path, "HashOwner,Trigger\na,b\n")
    with pytest.raises(errors.DataError, match="two columns are minute 1; keep the rows"):
        minutes(tmp_path, "f,1,2,01\nc,1,2,3\n")
    with pytest.raises(errors.DataError, match="has no rows"):
        minutes(tmp_path, "f,1,2\n")
    with pytest.raises(errors.DataError, match="nowhere"):
        azure.invocations_per_minute(tmp_path / "nowhere.csv")
    (tmp_path / "quiet.csv").write_text("f,1,2\nc,0,0\n")
    with pytest.raises(errors.DataError, match="not one invocation"):
        azure.trace(tmp_path / "quiet.csv")


def test_each_minute_keeps_its_share_and_its_slice_of_time(tmp_path):
    (tmp_path / "a.csv").write_text("f,1,2,3\nc,1,0,3\n")
    trace = azure.trace(tmp_path / "a.csv", mean_qps=100.0, duration_s=3.0)
    assert np.histogram(trace.arrivals_s, bins=[0, 1, 2, 3])[0].tolist() == [75, 0, 225]
    again, other = (azure.trace(tmp_path / "a.csv", mean_qps=100.0, duration_s=3.0, seed=s) for s in (0, 1))
    assert np.array_equal(trace.arrivals_s, again.arrivals_s)
    assert not np.array_equal(trace.arrivals_s, other.arrivals_s)


@pytest.mark.parametrize("bad", [{"mean_qps": 0.0}, {"duration_s": float("nan")}])
def test_an_impossible_scale_is_refused(tmp_path, bad):
    with pytest.raises(errors.ConfigError, match=next(iter(bad))):
        azure.trace(tmp_path / "a.csv", **bad)


def test_the_sample_keeps_its_shape_when_a_day_becomes_two_minutes():
    counts = azure.invocations_per_minute(MAF_SAMPLE)
    assert (len(counts), counts.sum()) == (1440, 1_157_390)
    assert counts.max() / counts.mean() == pytest.approx(5.33, abs=0.01)
    trace = azure.trace(MAF_SAMPLE, mean_qps=6400.0, duration_s=120.0)
    assert len(trace) == 768_000
    shrunk = np.histogram(trace.arrivals_s, bins=np.linspace(0, 120, 1441))[0]
    np.testing.assert_allclose(shrunk, counts * 768_000 / counts.sum(), atol=1.01)
