"""Tables and the plot of serve/bench/gateway.py."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import figure

from gateway_load import cases, running
from gateway_load.cases import IN_PROCESS, Bound, Case
from superserve_jax import cli
from superserve_jax.plots import axes
from superserve_jax.simulation.paper_profile import paper_profile

Result = Mapping[str, Any]
COLUMNS: Mapping[str, Callable[[Result], str]] = {
    "case": lambda r: r["name"],
    "SLO attainment": lambda r: f"{r['attainment']:.4f}",
    "accuracy": lambda r: f"{100 * r['accuracy']:.2f} %",
    "p50 ms": lambda r: f"{r['p50_ms']:.1f}",
    "p99 ms": lambda r: f"{r['p99_ms']:.1f}",
    "server's CPU us": lambda r: f"{r['server_us']:.0f}" if "server_us" in r else "",
    "generator late, p99 ms": lambda r: f"{r['lateness_p99_ms']:.2f}",
    "other programs, cores": lambda r: f"{r['other_cores']:.2f}",
    "wrong": lambda r: f"{r['wrong']}",
    "lost": lambda r: f"{r['lost']}",
    "runs that count": lambda r: f"{r['counted']} of {r['runs']}",
}
SHOWN = {"attainment": "SLO attainment", "accuracy": "accuracy", "p50_ms": "p50 ms", "server_us": "server's CPU us"}
UNKNOWN = "not measured"


def print_cases(results: Mapping[str, Result]) -> None:
    """Prints a line for each case: medians of its runs."""
    print(f"\nMedians. A run counts if other programs used at most {running.OTHER_CORES} cores and the generator was at most")
    print(f"{running.LATENESS_MS:g} ms late at p99. CPU time is per request, of the whole server process.")
    cli.print_columns(COLUMNS, ({"name": name, **found} for name, found in results.items()))


def held(bound: Bound, results: Mapping[str, Result]) -> str:
    """Whether a bound holds: "yes", "NO", or a word that says why that is not known."""
    found = results.get(bound.case.name)
    if found is None:
        return UNKNOWN
    holds = "yes" if bound.holds(found[bound.figure]) else "NO"
    return holds if found["quiet"] else f"{holds}, but too few runs count"


def print_bounds(results: Mapping[str, Result]) -> None:
    """Prints each bound next to the figure."""
    lines = [("case", "figure", "bound", "measured", "holds")]
    for bound in cases.BOUNDS:
        value = cases.figure_of(results, bound.case, bound.figure)
        about = bound.case.name, SHOWN[bound.figure], f"{bound.sign} {bound.bound:g}"
        lines.append((*about, "" if value != value else f"{value:.4g}", held(bound, results)))
    faults = sum(found["wrong"] + found["lost"] for name, found in results.items() if name.startswith(cases.OWN))
    lines.append(("all cases of the gateway", "wrong or lost answers", "at most 0", f"{faults}", "NO" if faults else "yes"))
    print("\nBounds")
    cli.print_table(lines, left=2)


def print_rates(rates: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the highest rates at 0.99, and their ratio to the server without a network."""
    lines = [
        ("server", *(f"{which} subnet: queries/s" + more for which in cases.TOP_RATES for more in ("", ", / in process")))
    ]
    for server, found in rates.items():
        cells = []
        for which in cases.TOP_RATES:
            value, own = found.get(which), rates.get(IN_PROCESS, {}).get(which)
            cells += ["" if value is None else f"{value:,.0f}", f"{value / own:.2f}" if value is not None and own else ""]
        lines.append((server, *cells))
    print(f"\nHighest rates at an attainment of 0.99, on a grid with a step of {cases.RATE_STEP}")
    cli.print_table(lines)


def draw(path: pathlib.Path, results: Mapping[str, Result], rates: Mapping[str, Mapping[str, float]]) -> None:
    """Draws three panels: highest rates, CPU time per request, and bursts with switching against each fixed subnet."""
    shown = figure.Figure(figsize=(16, 4.5), layout="constrained")
    left, middle, right = shown.subplots(1, 3)
    _draw_rates(left, rates)
    _draw_cpu(middle, results)
    _draw_bursts(right, results)
    axes.save(shown, path, dpi=110)


def _draw_rates(panel: Any, rates: Mapping[str, Mapping[str, float]]) -> None:
    for shift, which in zip((-0.2, 0.2), cases.TOP_RATES, strict=True):
        found = [(i, each[which]) for i, each in enumerate(rates.values()) if which in each]
        bars = panel.barh([i + shift for i, _ in found], [rate for _, rate in found], 0.4, label=f"{which} subnet")
        panel.bar_label(bars, fmt="{:,.0f}", padding=2)
    panel.set_yticks(range(len(rates)), list(rates))
    panel.margins(x=0.2)
    panel.invert_yaxis()
    panel.set_xlabel("highest rate at 0.99 attainment, queries/s")
    panel.legend(loc="lower right")


def _draw_cpu(panel: Any, results: Mapping[str, Result]) -> None:
    names = [case.name for case in cases.of_bounds(cases.PEERS) if case.subnet == 0]
    shown = [(name, results[name]["server_us"]) for name in names if "server_us" in results.get(name, {})]
    bars = panel.barh([name.replace(", smallest", "") for name, _ in shown], [cpu for _, cpu in shown], color="tab:green")
    panel.bar_label(bars, fmt="{:.0f}", padding=2)
    panel.margins(x=0.15)
    panel.invert_yaxis()
    panel.set_xlabel("CPU time of the server per request, us (smallest subnet)")


def _draw_bursts(panel: Any, results: Mapping[str, Result]) -> None:
    for server, marker in zip(("HTTP", *cases.PEERS), "os^v", strict=True):
        fixed = [Case(server, "json", "number", rank, 0) for rank in range(len(paper_profile().rows))]
        points = [(100 * r["accuracy"], r["attainment"]) for case in fixed if (r := results.get(case.name))]
        if points:
            panel.plot(*zip(*points, strict=True), marker=marker, label=f"{server}, each subnet alone")
    switching = results.get(Case("HTTP", "json", "number", None, 0).name)
    if switching:
        point = 100 * switching["accuracy"], switching["attainment"]
        panel.plot(*point, "*", markersize=16, color="tab:red", label="HTTP, switching")
    panel.set_xlabel("accuracy of answers in time, %")
    panel.set_ylabel("SLO attainment")
    panel.set_title(f"bursts from {cases.CALM_QPS:.0f} to {cases.BURST_QPS:,.0f} queries/s")
    if panel.get_legend_handles_labels()[1]:
        panel.legend(loc="lower left")


def summary(results: Mapping[str, Result], names: Sequence[str]) -> str:
    """One line about all runs."""
    quiet = sum(results[name]["quiet"] for name in names)
    return f"{quiet} of {len(names)} cases have enough runs that count"
