"""Checks the main claims of README and docs: a bound for each, and the value measured now. Exit status 1 if one fails.

One file because it is one table of claims, each with a short function that measures it.

    python serve/bench/claims.py
    python serve/bench/claims.py --only storm-lost kills-attainment --json runs/claims.json
    python serve/bench/claims.py --only policy-gain policy-attainment --export runs/demo/export

Claims about time come last. They need a quiet machine, and those about the policy need the export of `make demo`. All others
hold on any machine, and are also tests (tests/programs/test_claims.py). docs/claims.md explains each claim. A measurement that
fails counts as a claim that does not hold.
Library: training.loop, experiments.presets, experiments.runner, loadtest.storm; the benchmarks beside this file.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import actuation
import learning
import memory
import router
import tyro

from superserve_jax import cli, errors, exports
from superserve_jax.experiments import presets, runner, summaries
from superserve_jax.experiments.runner import CellResult
from superserve_jax.loadtest import storm
from superserve_jax.loadtest.checker import CheckResult
from superserve_jax.loadtest.storm import Storm
from superserve_jax.simulation import paper_profile
from superserve_jax.training import random_export
from superserve_jax.training.config import load_config

ROOT = pathlib.Path(__file__).parents[2]
AZURE_SAMPLE = ROOT / "tests" / "data" / "maf2019_762fn_total.csv"
REPLAY = ROOT / "serve" / "replay.py"
NEED_EXPORT = ("policy-gain", "policy-attainment")  # claims
PUBLISHED = ROOT / "configs" / "ofa_resnet50.py"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      only: names of claims to check; by default all.
      export: an export for the claims about the policy.
      seconds: length of the traffic in the claims about the policy and the router.
      json: write the results to this file.
    """

    only: tuple[str, ...] = ()
    export: pathlib.Path = pathlib.Path("runs/demo/export")
    seconds: float = 12.0
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "seconds")
        for name in self.only:
            errors.check_name("claim", name, CLAIMS)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about one number.

    Args:
      what: the claimed quantity, with its unit.
      sign: whether the bound is the smallest or the largest number for which the claim holds.
      bound: the bound.
      measure: measures the number now.
      timed: whether the number is a time or depends on one.
    """

    what: str
    sign: Literal["at least", "at most"]
    bound: float
    measure: Callable[[Options], float]
    timed: bool = False

    def holds(self, value: float) -> bool:
        """Whether the claim holds. NaN never does."""
        return value >= self.bound if self.sign == "at least" else value <= self.bound


# -- learning --------------------------------------------------------------------------------------------------------------


def statistics_drop(_: Options) -> float:
    """How many points the smallest subnet loses with the largest subnet's statistics."""
    found = learning.digits()
    return 100 * (found.smallest - found.smallest_shared)


def above_baseline(learn: Callable[[], learning.Learned], _: Options) -> float:
    """Points by which a briefly trained SuperNet's largest subnet beats a logistic regression."""
    found = learn()
    return 100 * (found.largest - found.baseline)


# -- simulated -------------------------------------------------------------------------------------------------------------


@functools.cache
def simulated(preset: str, policies: tuple[str, ...], scales: tuple[float, ...] = presets.SCALES) -> list[CellResult]:
    """The results of policies in a preset, on the paper's profile."""
    cells = list(presets.cells(preset, scales=scales, policies=policies))
    return runner.evaluate(cells, paper_profile.paper_profile(), maf_trace=str(AZURE_SAMPLE))


def attainment(preset: str, _: Options) -> float:
    """The lowest SLO attainment of the default policy in all cells of a preset."""
    return min(result["attainment"] for result in simulated(preset, ("slackfit",)))


def below_bound(_: Options) -> float:
    """The largest distance to the fluid bound in the bursty cells, in points of accuracy."""
    return max(result["fluid_accuracy"] - result["accuracy"] for result in simulated("bursty", ("slackfit",)))


def accuracy_shed(_: Options) -> float:
    """How many points of accuracy the default policy gives up while half of the workers are killed, at least."""
    found = simulated("worker_kills", ("slackfit",))
    return min(result["accuracy_first"] - result["accuracy_last"] for result in found)


def azure(value: Callable[[Iterable[CellResult]], float], _: Options) -> float:
    """A value of the Azure sample's results, of the default policy and all fixed models at the profile's own speed."""
    return value(simulated("maf", ("slackfit", "fixed:all"), (1.0,)))


def azure_gain(results: Iterable[CellResult]) -> float:
    """Points of accuracy above the fixed models at equal attainment, read on the lines that join them."""
    [found] = summaries.gains(summaries.summarize(results), "slackfit").values()
    return found.points_line


def azure_misses(results: Iterable[CellResult]) -> float:
    """(missed queries of the default policy) / (missed queries of the best fixed model)."""
    missed = {result["policy"]: 1 - result["attainment"] for result in results}
    return missed.pop("slackfit") / min(missed.values())


# -- memory and faults -----------------------------------------------------------------------------------------------------


def memory_ratio(_: Options) -> float:
    """Bytes of six extracted subnets / bytes of 500 in place, computed from the sizes of the published OFA-ResNet50."""
    config = load_config(PUBLISHED).model
    return memory.ratio_from_sizes(config, random_export.subnet_list(config, 500), extracted=6)


@functools.cache
def storm_check() -> CheckResult:
    """What clients saw of 100,000 queries while workers fail, hang and leave."""
    logger = logging.getLogger("superserve_jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failed batches are expected
    try:
        return storm.run_storm(Storm(queries=100_000)).check
    finally:
        logger.setLevel(level)


# -- timed -----------------------------------------------------------------------------------------------------------------


@functools.cache
def policy_replay(options: Options) -> dict[str, Any]:
    """The verdict of a replay (see `loadtest.verdict`). Raises RuntimeError if the replay fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "replay.json"
        command = [sys.executable, REPLAY, options.export, "--seconds", str(options.seconds), "--json", file]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise RuntimeError(f"the replay failed: {last[0]}")
        return json.loads(file.read_text())["verdict"]


def policy_verdict(options: Options) -> dict[str, Any]:
    """The verdict of a replay that both claims share. Raises RuntimeError if it proves nothing."""
    verdict = policy_replay(options)
    if verdict["disturbed"]:
        raise RuntimeError(f"the machine was disturbed during {', '.join(verdict['disturbed'])}; try again when it is quiet")
    if verdict["best"] is None:
        raise RuntimeError("no fixed model keeps up, so there is none to compare with")
    return verdict


def policy_gain(options: Options) -> float:
    """Points of measured accuracy of the default policy above the most accurate fixed model that keeps up."""
    return policy_verdict(options)["gain"]


def policy_attainment(options: Options) -> float:
    """SLO attainment of the default policy in the same replay."""
    return policy_verdict(options)["policy"]["attainment"]


def change_beyond_copy(_: Options) -> float:
    """Milliseconds that a change of the subnet takes beyond the copy of its slices: the median over subnets."""
    with random_export.export_of(PUBLISHED, subnets=actuation.CANDIDATES) as path, tempfile.TemporaryDirectory() as folder:
        found = actuation.measure(exports.load(path), actuation.Options(), pathlib.Path(folder))
    events = [batch["events"] for subnet in found["subnets"] for batch in subnet["batches"]]
    changes = [e[name]["change_less_copy_ms"] for e in events for name in ("kept_other", "kept_copied") if name in e]
    return statistics.median(changes)


def router_attainment(options: Options) -> float:
    """SLO attainment of 33,000 queries/s on 32 sleeping workers that are as fast as the paper's."""
    return router.measure(router.Options(seconds=options.seconds))["attainment"]


CLAIMS: Mapping[str, Claim] = {
    "statistics": Claim(
        "points of accuracy that the smallest subnet loses with the largest's statistics", "at least", 20.0, statistics_drop
    ),
    "digits": Claim(
        "points of a digits SuperNet above a logistic regression on pixels, after 200 steps",
        *("at least", 30.0),
        functools.partial(above_baseline, learning.digits),
    ),
    "listops": Claim(
        "points of a ListOps SuperNet above a logistic regression on token counts, after 400 steps",
        *("at least", 3.0),
        functools.partial(above_baseline, learning.texts),
    ),
    "memory": Claim("memory of six extracted subnets / memory of 500 in place, from sizes", "at least", 2.6, memory_ratio),
    "bursty-attainment": Claim(
        "lowest SLO attainment, nine bursty workloads at two speeds",
        "at least",
        0.999,
        functools.partial(attainment, "bursty"),
    ),
    "bursty-bound": Claim("largest distance to the fluid bound there, points of accuracy", "at most", 0.4, below_bound),
    "azure-gain": Claim(
        "points above fixed models that attain as much, Azure sample", "at least", 4.67, functools.partial(azure, azure_gain)
    ),
    "azure-misses": Claim(
        "missed deadlines / those of the best fixed model, Azure sample",
        "at most",
        0.5,
        functools.partial(azure, azure_misses),
    ),
    "kills-attainment": Claim(
        "lowest SLO attainment, four of eight workers killed", "at least", 0.999, functools.partial(attainment, "worker_kills")
    ),
    "kills-accuracy": Claim("points of accuracy given up as workers die", "at least", 1.0, accuracy_shed),
    "storm-lost": Claim("queries lost of 100,000, with random faults", "at most", 0, lambda _: storm_check().lost),
    "storm-twice": Claim("queries answered twice of these", "at most", 0, lambda _: storm_check().twice),
    "storm-wrong": Claim("answers, errors or orders that break a rule", "at most", 0, lambda _: storm_check().violations),
    "policy-gain": Claim(
        "points above the most accurate fixed model that keeps up, real executables", "at least", 0.5, policy_gain, timed=True
    ),
    "policy-attainment": Claim("SLO attainment of the default policy there", "at least", 0.999, policy_attainment, timed=True),
    "actuation": Claim(
        "ms of a change of the subnet beyond one copy of its slices", "at most", 1.0, change_beyond_copy, timed=True
    ),
    "router": Claim(
        "SLO attainment at 33,000 queries/s on 32 workers that sleep", "at least", 0.999, router_attainment, timed=True
    ),
}

COLUMNS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "name": lambda r: r["name"],
    "claim": lambda r: r["what"],
    "bound": lambda r: f"{r['sign']} {r['bound']:g}",
    "measured": lambda r: f"{r['measured']:.5g}",
    "holds": lambda r: "yes" if r["holds"] else "NO",
    "seconds": lambda r: f"{r['seconds']:.0f}",
}


def check(names: Iterable[str], options: Options) -> Iterator[dict[str, Any]]:
    """Measures claims one after another, and yields what the table shows. Results that claims share are measured once.

    A measurement that fails gives NaN, so that the claim does not hold, and the reason.
    """
    for name in names:
        claim, start_s = CLAIMS[name], time.monotonic()
        value, reason = math.nan, ""
        try:
            value = claim.measure(options)
        except Exception as e:  # whatever fails, the claim does not hold, and the others are still checked
            reason = f"{type(e).__name__}: {errors.one_line(e)}"
        yield {
            "name": name,
            **{key: getattr(claim, key) for key in ("what", "sign", "bound", "timed")},
            "measured": value,
            "holds": claim.holds(value),
            "reason": reason,
            "seconds": time.monotonic() - start_s,
        }


def check_export(names: Iterable[str], export: pathlib.Path) -> None:
    """Raises ConfigError if one of these claims needs the export, and it cannot be loaded."""
    if needing := [name for name in names if name in NEED_EXPORT]:
        try:
            exports.load(export)
        except errors.ExportError as e:
            raise errors.ConfigError(
                f"{' and '.join(needing)} cannot be checked without a trained export: run `make demo`, "
                f"give --export PATH, or choose other claims with --only NAMES ({e})"
            ) from e


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process and its children share the card's memory
    names = options.only or tuple(CLAIMS)
    check_export(names, options.export)  # before the first claim, since the claims take minutes
    found = []
    for result in check(names, options):
        found.append(result)
        print(f"{result['name']}: {result['reason'] or COLUMNS['measured'](result)}, {COLUMNS['bound'](result)}", flush=True)
    print()
    cli.print_columns(COLUMNS, found, left=2)
    failed = [result["name"] for result in found if not result["holds"]]
    print(f"\n{len(found) - len(failed)} of {len(found)} claims hold" + f"; not {', '.join(failed)}" * bool(failed))
    cli.write_results(options.json, found)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    cli.run(main)
