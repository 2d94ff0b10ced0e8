"""serve/measure.py without a model: the checks before it compiles, and its report."""

import types

import pytest

import superserve_jax as ss
from superserve_jax import exports
from superserve_jax.engines import device, profiling
from superserve_jax.profile import Profile, Row
from superserve_jax.subnet import Subnet

# The third subnet is slower than the last one, which is more accurate. So it is not worth serving, and breaks P2.
ROWS = [(0.7, (1.0, 2.0)), (0.75, (2.0, 4.0)), (0.76, (9.0, 9.0)), (0.8, (4.0, 8.0))]
PROFILE = Profile((1, 2), tuple(Row(Subnet((i,)), a, ms) for i, (a, ms) in enumerate(ROWS)))


@pytest.fixture
def measure(run_program, monkeypatch, tmp_path):
    """Runs the program with options on a fake export and a fake engine."""
    served = [types.SimpleNamespace(subnet=r.subnet, accuracy=r.accuracy, flops=1) for r in PROFILE.rows]
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(flops=lambda subnet: 1), subnets=[r.subnet for r in PROFILE.rows], served=served
    )
    engines = []

    def make_engine(_, device, **options):
        engines.append(types.SimpleNamespace(device=device, **options))
        return engines[-1]

    monkeypatch.setattr(ss, "load", lambda path: model)
    monkeypatch.setattr(device, "DeviceEngine", make_engine)
    monkeypatch.setattr(profiling, "measure", lambda *args, **options: PROFILE)
    monkeypatch.setattr(exports, "profile_path", lambda path, kind: tmp_path / "profile.json")

    def run(*options, status=0):
        return run_program("serve/measure.py", tmp_path, *options, status=status)

    run.engines = engines
    return run


@pytest.mark.parametrize("sizes", [["0"], ["4", "1"], ["2", "2"]])
def test_batch_sizes_that_cannot_be_are_refused_before_anything_is_compiled(measure, sizes):
    assert "batch_sizes must be ascending" in measure("--batch-sizes", *sizes, status=2).stderr
    assert measure.engines == []


def test_what_slackfit_needs_is_checked_on_all_that_was_measured(measure):
    printed = measure("--batch-sizes", "1", "2", "--slicing", "kept").stdout
    assert "3 of 4 subnets worth serving" in printed
    assert "P1: a larger batch takes longer: 3 of 4 times" in printed
    assert "P2: a more accurate subnet takes longer: 4 of 6 times" in printed
