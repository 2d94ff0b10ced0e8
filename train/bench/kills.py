"""Kills trainings and exports with SIGKILL at random moments, and checks that nothing is lost.

    python train/bench/kills.py
    python train/bench/kills.py --training 300 --exports 300 --seed 1 --json runs/kills.json

A training runs train/supernet.py with configs/debug.py on a small dataset: preparation, training, search, calibration,
evaluation, export. A killed training is started again, and possibly killed again. At its end everything must be bit-equal with
an undisturbed training: parameters, optimiser state, average, statistics, metrics, results of the stages, the export and the
list of files. Only times, names of TensorBoard files and the folder set_aside/ may differ.

An export replaces an older one and is killed. Then `load` must return either the old or the new one, bit by bit. The next
export to the same directory must work and leave no other files.

The moments are spread over the phases: first the phase is chosen, then a file operation or a time in it. The program prints
the number of kills of each phase. --json lists every moment.
Library: training.loop, training.stages, exports. The modules killed_trainings, killed_exports and killing are beside it.
"""

import dataclasses
import json
import pathlib
import random
import sys
import tempfile
from typing import Any

import jax
import killed_exports
import killed_trainings

from superserve_jax import cli


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      training: number of kills of trainings.
      exports: number of kills of exports.
      seed: seed of the moments.
      folder: keep all folders in this new one; by default they are temporary.
      json: write the moments and what was found to this file.
    """

    training: int = 30
    exports: int = 30
    seed: int = 0
    folder: pathlib.Path | None = None
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or pathlib.Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _share_compilations(folder / "compiled")
        of_trainings = killed_trainings.kill(folder, options.training, rng) if options.training else {}
        of_exports = killed_exports.kill(folder, options.exports, rng) if options.exports else {}
    for name, found in (("trainings", of_trainings), ("exports", of_exports)):
        if found:
            print(f"\n{len(found['kills'])} kills of {name}, by phase:")
            _print_phases(found["kills"], found["phases"])
            print(f"checks: {json.dumps(found['counts'])}")
    cli.write_results(options.json, {"seed": options.seed, "training": of_trainings, "exports": of_exports})
    problems = [problem for found in (of_trainings, of_exports) for problem in found.get("problems", ())]
    if problems:
        sys.exit("\n".join(["FAILED:", *problems]))


def _print_phases(kills: list[dict[str, Any]], phases: list[str]) -> None:
    lines = [("phase", "kills", "before an operation", "at a time", "at steps", "seconds after the start")]
    for phase in phases:
        own = [kill for kill in kills if kill["phase"] == phase]
        timed, at_s = sum(kill["before"] == "time" for kill in own), sorted(kill["after_s"] for kill in own)
        steps = ", ".join(str(step) for step in sorted({kill["step"] for kill in own}))
        times = f"{at_s[0]:.2f} to {at_s[-1]:.2f}" if at_s else "-"
        lines.append((phase, str(len(own)), str(len(own) - timed), str(timed), steps, times))
    cli.print_table(lines)


def _share_compilations(folder: pathlib.Path) -> None:
    """Makes all children share what they compile, which is most of their time."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    cli.run(main)
