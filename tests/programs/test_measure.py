"""serve/measure.py without a model: its report."""

import types

import superserve_jax as ss
from superserve_jax import exports
from superserve_jax.engines import profiling
from superserve_jax.exports import Served
from superserve_jax.profile import Profile, Row
from superserve_jax.subnet import Subnet

# The third subnet is slower than the last one, which is more accurate. So it is not worth serving, and breaks P2.
ROWS = [(0.7, (1.0, 2.0)), (0.75, (2.0, 4.0)), (0.76, (9.0, 9.0)), (0.8, (4.0, 8.0))]
PROFILE = Profile((1, 2), tuple(Row(Subnet((i,)), a, ms) for i, (a, ms) in enumerate(ROWS)))


def test_what_slackfit_needs_is_checked_on_all_that_was_measured(run_program, monkeypatch, tmp_path):
    served = [Served(r.subnet, r.accuracy, None, flops=1, params=1) for r in PROFILE.rows]
    config = types.SimpleNamespace(flops=lambda subnet: 1)
    training = {"training": {"data": None}}
    subnets = [r.subnet for r in PROFILE.rows]
    model = types.SimpleNamespace(path=tmp_path, manifest=training, config=config, subnets=subnets, served=served)
    model.accuracies = lambda compute_dtype: {r.subnet: r.accuracy for r in PROFILE.rows}
    monkeypatch.setattr(ss, "load", lambda path: model)
    engine = {"DeviceEngine": lambda _, device, **options: types.SimpleNamespace(device=device, **options)}
    engine["choose_cores"] = lambda *_, **__: (1, {})
    monkeypatch.setattr(profiling, "measure", lambda *args, **options: PROFILE)
    monkeypatch.setattr(exports, "profile_path", lambda *_: tmp_path / "profile.json")
    options = ("--batch-sizes", 1, 2, "--slicing", "kept")
    files = ("--plot", tmp_path / "plot.png", "--plot-flops", tmp_path / "flops.png")
    measure = ("serve/measure.py", tmp_path, *options)
    printed = run_program(*measure, patches=engine).stdout
    assert f"profile: {tmp_path}/profile.json; go on with `superserve serve {tmp_path}`" in printed
    training["training"] = {"data": {"name": "mnist"}}
    printed = run_program(*measure, *files, patches=engine).stdout
    replaces = f"profile: {tmp_path}/profile.json (replaces the one measured before)"
    assert f"{replaces}; go on with `superserve replay {tmp_path}`" in printed
    assert f"plot: {tmp_path}/plot.png" in printed
    assert (tmp_path / "flops.png").read_bytes().startswith(b"\x89PNG")
    assert "3 of 4 subnets worth serving" in printed
    assert "P1: a larger batch takes longer: 3 of 4 times" in printed
    assert "P2: a more accurate subnet takes longer: 4 of 6 times" in printed
