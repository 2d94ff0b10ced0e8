import json

import numpy as np
import pytest
from tiny import TINY, assert_same_arrays, random_statistics

from superserve_jax import errors
from superserve_jax.exports import statistics

SUBNETS = [TINY.space().sample(0, step) for step in range(5)]
CALIBRATED = {s: random_statistics(TINY, s) for s in SUBNETS}


def assert_equal(read):
    assert list(read) == list(CALIBRATED)
    assert {values.dtype for values in read.values()} == {np.dtype(np.float32)}
    assert_same_arrays(read, CALIBRATED)


def test_statistics_are_read_as_they_were_written(tmp_path):
    statistics.write(tmp_path / "statistics.npz", CALIBRATED)
    assert_equal(statistics.read(tmp_path / "statistics.npz", TINY))
    statistics.write(tmp_path / "statistics.npz", {})
    assert statistics.read(tmp_path / "statistics.npz", TINY) == {}


def test_the_older_format_of_runs_is_read(tmp_path):
    """It has one array for each subnet."""
    names = np.array(json.dumps([s.to_json() for s in SUBNETS]))
    arrays = {f"row{i}": values for i, values in enumerate(CALIBRATED.values())}
    np.savez(tmp_path / "statistics.npz", subnets=names, **arrays)
    assert_equal(statistics.read(tmp_path / "statistics.npz", TINY))
    arrays["row1"] = arrays["row1"][:, 1:]
    np.savez(tmp_path / "statistics.npz", subnets=names, **arrays)
    with pytest.raises(errors.ExportError, match="do not fit its 5 subnets"):
        statistics.read(tmp_path / "statistics.npz", TINY)
