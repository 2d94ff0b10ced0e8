"""Repeats the demo's replay several times, and prints one line per run, then median and range.

    python serve/bench/demo_runs.py runs/demo/export
    python serve/bench/demo_runs.py runs/demo/export --busy 1

Each run is a new process of serve/replay.py, so it loads, times and serves everything again. `--busy 1` keeps one more
process busy meanwhile, as a neighbour on the machine would. The columns are those of the last line of a replay:
- attainment, accuracy: of the default policy. The accuracy is measured on test examples that nobody used before.
- fixed model: the most accurate fixed model that keeps up, and its measured accuracy.
- gain: the difference of the two accuracies, in points.
- next one missed: the share of deadlines that the next more accurate fixed model misses.
- repeats: how often a row that decides the gain was repeated because the machine was disturbed.
- disturbed: those of the three rows that decide the gain that stayed disturbed after all repeats.
The exit status is 1 if a run misses a bound: an attainment of at least --least-attainment, a gain of at least --least-gain. A
run with disturbed rows misses, too, because a disturbed fixed model seems not to keep up, which raises the gain. With --busy,
the only bound is a gain above 0, and disturbed rows are expected.
Library: commands.replay, loadtest.verdict.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import tyro

from superserve_jax import cli

REPLAY = pathlib.Path(__file__).parents[1] / "replay.py"
BUSY = "while True: pass"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      runs: the number of replays.
      busy: the number of processes that keep a core busy meanwhile.
      least_attainment: the bound on the default policy's SLO attainment, a fraction.
      least_gain: the bound on the gain, in points.
      seconds: length of the traffic of each policy; the replay's default if left out.
      json: write the results to this file.
    """

    export: tyro.conf.Positional[pathlib.Path]
    runs: int = 5
    busy: int = 0
    least_attainment: float = 0.999
    least_gain: float = 1.5
    seconds: float | None = None
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "runs")
        cli.refuse_with(self, "busy", "least_attainment", "least_gain")


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    found = []
    with busy(options.busy):
        for i in range(options.runs):
            found.append(replay(options))
            print(f"run {i + 1} of {options.runs}: {found[-1]['sentence']}", flush=True)
    lines = [
        (
            "run",
            "SLO attainment",
            "accuracy",
            "fixed model",
            "its accuracy",
            "gain",
            "next one missed",
            "repeats",
            "disturbed",
            "minutes",
        )
    ]
    lines += [(str(i + 1), *cells(run)) for i, run in enumerate(found)]
    for name, choose in ("median", statistics.median), ("lowest", min), ("highest", max):
        gains = [run["gain"] for run in found if run["gain"] is not None]
        of_policy = [choose([run[key] for run in found]) for key in ("attainment", "accuracy")]
        gain = f"{choose(gains):+.2f}" if gains else "-"
        minutes = f"{choose([run['minutes'] for run in found]):.1f}"
        lines.append((name, f"{100 * of_policy[0]:.2f} %", f"{of_policy[1]:.2f} %", "", "", gain, "", "", "", minutes))
    print()
    cli.print_table(lines)
    held = [holds(run, options) for run in found]
    quiet = f"attainment >= {100 * options.least_attainment:g} %, gain >= {options.least_gain:g} points, no row disturbed"
    beside = f", beside {options.busy} busy process{'es' if options.busy > 1 else ''}" if options.busy else ""
    print(f"\n{'gain > 0' if options.busy else quiet}: in {sum(held)} of {len(held)} runs{beside}")
    cli.write_results(options.json, {"busy": options.busy, "runs": found})
    sys.exit(0 if all(held) else 1)


def replay(options: Options) -> dict[str, Any]:
    """One replay in a process of its own: the numbers of its verdict."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "results.json"
        command = [sys.executable, REPLAY, options.export, "--json", path]
        command += [] if options.seconds is None else ["--seconds", options.seconds]
        start_s = time.monotonic()
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout}the replay failed with exit status {done.returncode}; its errors are above")
        minutes = (time.monotonic() - start_s) / 60
        results = json.loads(path.read_text())
    verdict = results["verdict"]
    policy, best, failing = (verdict[name] for name in ("policy", "best", "failing"))
    return {
        "attainment": policy["attainment"],
        "accuracy": policy["measured"],
        "best": best,
        "failing": failing,
        "gain": verdict["gain"],
        "repeats": results["repeats"],
        "disturbed": verdict["disturbed"],
        "minutes": minutes,
        "sentence": done.stdout.strip().splitlines()[-1],
    }


def holds(run: dict[str, Any], options: Options) -> bool:
    """Whether a run keeps the bounds, and nothing disturbed it. Beside busy processes only the sign of the gain counts."""
    gain = run["gain"] or 0.0
    if options.busy:
        return gain > 0
    return run["attainment"] >= options.least_attainment and gain >= options.least_gain and not run["disturbed"]


def cells(run: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a run in the table, after its number."""
    best, failing = run["best"], run["failing"]
    return (
        f"{100 * run['attainment']:.2f} %",
        f"{run['accuracy']:.2f} %",
        best["name"] if best else "none",
        f"{best['measured']:.2f} %" if best else "-",
        f"{run['gain']:+.2f}" if best else "-",
        f"{100 * (1 - failing['attainment']):.1f} %" if failing else "-",
        str(run["repeats"]),
        ", ".join(run["disturbed"]) or "-",
        f"{run['minutes']:.1f}",
    )


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keeps `count` more processes busy inside the `with` block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    cli.run(main)
