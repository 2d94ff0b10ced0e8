"""The figures, as files and as what is drawn."""

import dataclasses

from policy_cases import MAF_SAMPLE, PAPER

from superserve_jax.experiments import figures, presets, runner


def test_every_preset_with_a_figure_draws_it(tmp_path):
    cells = [
        dataclasses.replace(c, policies=c.policies[:1] + c.policies[-2:])
        for preset in ("bursty", "worker_kills", "actuation", "scale", "slowdown", "capacity", "maf")
        for c in list(presets.cells(preset, duration_s=0.1, scales=(1.9,)))[:6]
        if c.cluster.workers < 16
    ]
    results = runner.evaluate(cells, PAPER, maf_trace=str(MAF_SAMPLE))
    drawn = [
        *figures.draw(results, tmp_path, PAPER),
        *figures.draw_over_time(cells, PAPER, tmp_path, maf_trace=str(MAF_SAMPLE)),
    ]
    names = {path.name for path in drawn}
    assert {"bursty_x1.9.png", "maf_x1.9.png", "worker_kills_over_time_x1.9.png", "actuation.png", "capacity.png"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_every_policy_has_a_line_over_the_number_of_workers(tmp_path, monkeypatch):
    names = ["slackfit", "slackfit-paper", "least-accurate", "max-acc", "proteus"]
    about = {"preset": "scale", "trace": "steady", "scale": 1.0, "seed": 0, "workers": 8, "rate_qps": 9.0}
    figures_of = {"attainment": 1.0, "accuracy": 78.0, "fluid_accuracy": 79.0}
    drawn = []
    monkeypatch.setattr(figures.plots, "panels", lambda panels, path, **options: drawn.extend(panels))
    list(figures.draw([{**about, **figures_of, "policy": name} for name in names], tmp_path, PAPER))
    assert [list(panel.lines) for panel in drawn] == [[*names, "fluid bound"]]
