"""The figures, as files and as what is drawn."""

import dataclasses

import pytest
from policy_cases import MAF_SAMPLE, PAPER

from superserve_jax.experiments import figures, presets, runner


def test_every_preset_with_a_figure_draws_it(tmp_path):
    cells = [
        dataclasses.replace(c, policies=c.policies[:1] + c.policies[-2:])
        for preset in ("bursty", "worker_kills", "dynamics", "actuation", "scale", "slowdown", "capacity", "maf")
        for c in list(presets.cells(preset, duration_s=0.1, scales=(1.9,)))[: 4 if preset == "dynamics" else 2]
        if c.cluster.workers < 16
    ]
    results = runner.evaluate(cells, PAPER, maf_trace=str(MAF_SAMPLE))
    over_time = [c for c in cells if c.preset in ("dynamics", "worker_kills")]
    drawn = [*figures.draw(results, tmp_path, PAPER), *figures.draw_over_time(over_time, PAPER, tmp_path)]
    names = {path.name for path in drawn}
    assert {"bursty_x1.9.png", "maf_x1.9.png", "dynamics_over_time_x1.9.png", "actuation.png", "capacity.png"} <= names
    assert {path.name for path in figures.draw_profile(PAPER, tmp_path)} == {"latency.png", "flops.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_figure_says_what_it_shows_and_where_its_latencies_come_from(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plots, "panels", lambda panels, path, **options: drawn.append((panels, options)))
    cell = next(presets.cells("scale_batches", duration_s=0.1, scales=(1.9,), policies=("slackfit",)))
    list(figures.draw(runner.run_cell(cell, PAPER), tmp_path, PAPER))
    [([panel], options)] = drawn
    assert "Figure 11" in options["title"]
    assert options["note"].startswith("ours, settings from the paper's text")
    assert "from memory, unverified, about twice the paper's throughput" in options["note"]
    assert set(panel.lines) == {"slackfit", "fluid bound"}


def test_your_own_policy_is_always_among_those_over_time_and_the_note_names_the_others(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plots, "timelines", lambda columns, path, **options: drawn.append((columns, options)))
    (tmp_path / "mine.py").write_text(
        "from superserve_jax.scheduling.policies import Decision\n\n"
        "def mine(profile, state):\n    return Decision(profile.rows[0].subnet, 1)\n"
    )
    names = ("slackfit", "slackfit-paper", "proteus", "max-acc", f"{tmp_path}/mine.py:mine", "fixed:0", "fixed:1")
    cell = next(presets.cells("bursty", duration_s=0.1, scales=(1.0,), policies=names))
    list(figures.draw_over_time([cell], PAPER, tmp_path))
    [([column], options)] = drawn
    assert list(column.runs) == ["slackfit", "slackfit-paper", "mine"]
    assert options["note"].endswith("; not shown: proteus, max-acc, fixed models")


@pytest.mark.parametrize("preset", [name for name in presets.PRESETS if name != "decisions"])
def test_every_plot_has_a_title(preset):
    assert figures.TITLES[preset]


def test_every_policy_has_a_line_over_the_number_of_workers(tmp_path, monkeypatch):
    names = ["slackfit", "slackfit-paper", "least-accurate", "max-acc", "proteus"]
    about = {"preset": "scale", "trace": "steady", "scale": 1.0, "seed": 0, "workers": 8, "rate_qps": 9.0}
    figures_of = {"attainment": 1.0, "accuracy": 78.0, "fluid_accuracy": 79.0}
    drawn = []
    monkeypatch.setattr(figures.plots, "panels", lambda panels, path, **options: drawn.extend(panels))
    list(figures.draw([{**about, **figures_of, "policy": name} for name in names], tmp_path, PAPER))
    assert [list(panel.lines) for panel in drawn] == [[*names, "fluid bound"]]
