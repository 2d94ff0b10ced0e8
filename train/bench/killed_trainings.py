"""Kills trainings for kills.py, and compares what they leave with an undisturbed training."""

import collections
import dataclasses
import pathlib
import random
import re
import runpy
import sys
from typing import Any

import jax
import killing
import sklearn.datasets  # noqa: F401, so that no child has to import it
from killing import Moment, Phases, Seen, Watch

import superserve_jax as ss
from superserve_jax import files, plots, progress
from superserve_jax.supernets import programs
from superserve_jax.training import data, stages
from superserve_jax.training.checkpoints import Checkpoints
from superserve_jax.training.datasets.cluttered_digits import render
from superserve_jax.training.metrics_log import MetricsLog
from superserve_jax.training.runs import Run
from superserve_jax.training.step import SandwichStep

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "debug.py"
NUM_IMAGES = {"train": 300, "test": 90}
OPTIONS = (
    "--workdir run --data.data-dir data --data.validation 60 --batch-size 32 --buckets 1 --epochs 1.6 --checkpoint-every 4 "
    "--log-every 2 --eval-every 6 --ema 0.5 --calibration-examples 64 --search.calibration-examples 32 --search.examples 60"
)
_AGAIN = 0.5  # the probability that a training that goes on is killed once more


def kill(folder: pathlib.Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kills trainings until there were that many kills. Returns the moments, the phases, counts and problems."""
    render.NUM_IMAGES.update(NUM_IMAGES)
    first, _ = _train(folder / "first", None)  # compiles, so its times say nothing
    undisturbed, seen = _train(folder / "undisturbed", None)
    seen = {phase: Seen(**values) for phase, values in seen.items()}
    phases, moments, counts = Phases(seen, rng), [], collections.Counter()
    problems = [f"two undisturbed trainings differ: {difference}" for difference in _differences(first, undisturbed)]
    bar = iter(progress.track(range(kills), "kills of trainings"))
    while len(moments) < kills:
        name = f"training{counts['trainings']}"
        counts["trainings"] += 1
        moment, ended, at = phases.next(), None, []
        try:
            while ended is None:
                ended = _train(folder / name, moment)
                if ended is None:
                    next(bar, None)
                    at.append(killing.last_line(folder / f"{name}.log"))
                    moments.append({"training": name, **at[-1]})
                    moment = phases.next() if rng.random() < _AGAIN and len(moments) < kills else None
                elif moment is not None:
                    counts["moments that did not come"] += 1
                    phases.put_back(moment)
        except killing.ChildError as e:
            problems.append(f"{name}, killed at {at}: {e}")
            continue
        if different := _differences(undisturbed, ended[0]):
            problems.append(f"{name}, killed at {at}: {'; '.join(different[:5])}")
        counts["checkpoints set aside"] += len(list((folder / name / "run").glob("set_aside/*")))
        counts["bit-equal"] += not different
    next(bar, None)
    return {"kills": moments, "phases": sorted(seen), "counts": counts, "problems": problems}


def _train(folder: pathlib.Path, moment: Moment | None) -> Any:
    """Starts or goes on with a training in `folder`. Returns what it left and what it did in each phase; None if killed."""

    def child() -> Any:
        watch = Watch(moment, folder.with_suffix(".log"))
        watch.wrap(data, "open", "data")
        for name in ("latest", "restore"):
            watch.wrap(Checkpoints, name, "restore")
        watch.wrap(Checkpoints, "save", "checkpoint")
        for name in ("__init__", "flush", "validation"):
            watch.wrap(MetricsLog, name, "metrics")
        watch.wrap(plots, "metrics", "plot")
        for name in ("search", "calibrate", "evaluate", "export"):
            watch.wrap(stages, name, name)
        _note_steps(watch)
        sys.argv = ["train/supernet.py", str(CONFIG), *OPTIONS.split()]
        try:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        except SystemExit as e:
            raise RuntimeError("the training failed") from e
        seen = {phase: dataclasses.asdict(value) for phase, value in watch.seen().items()}
        return _outcome(pathlib.Path("run")), seen

    folder.mkdir(exist_ok=True)
    return killing.run(child, folder=folder, output=folder.with_suffix(".txt"))


def _note_steps(watch: Watch) -> None:
    real = SandwichStep.__call__

    def noted(*args: Any, step: int = 0, **kwargs: Any) -> Any:
        watch.step = step
        watch.enter("step")
        return real(*args, step=step, **kwargs)

    setattr(SandwichStep, "__call__", noted)  # noqa: B010


def _outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """Everything that must not depend on kills, as JSON."""
    run = Run.open(workdir)
    sandwich = SandwichStep(run.config.optim.create(1), ema=run.config.ema)
    specs = jax.eval_shape(sandwich.init, programs.param_spec(run.config.model))._asdict()
    with run.checkpoints() as saved:
        steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
        checkpoints = {
            str(step): {"damage": saved.damage(step), **killing.digests(saved.restore(step, **specs))} for step in steps
        }
    model = ss.load(workdir / "export")
    varying = ("created", "payload", "files", "sha256")
    names = ("config.json", "validation.jsonl", "search.json", "search.jsonl", "statistics.npz", "evaluation.json")
    return {
        "checkpoints": checkpoints,
        "metrics": [{k: v for k, v in line.items() if k != "examples_per_s"} for line in run.metrics()],
        "digests": {n: files.sha256(workdir / n) for n in (*names, "metrics.png", "search.png") if (workdir / n).exists()},
        "export": killing.digests({"params": model.params, "statistics": killing.by_text(model.statistics)}),
        "manifest": {name: value for name, value in model.manifest.items() if name not in varying},
        "files": _names(workdir.parent),
    }


def _names(folder: pathlib.Path) -> list[str]:
    """The files of a training. Contents of checkpoints and payloads count as one, since digests list them."""
    varying = {
        r"(checkpoints/\d+|payload-[0-9a-f]{16})/.*": r"\1/...",
        r"payload-[0-9a-f]{16}": "payload-...",
        r"events\.out\.tfevents.*": "events",
        r"set_aside/.*": "",
    }
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    for pattern, replacement in varying.items():
        names = {re.sub(pattern, replacement, name) for name in names}
    return sorted(names - {"run/set_aside", "run/"})


def _differences(expected: Any, found: Any, where: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted({*expected, *found})
        return [d for key in keys for d in _differences(expected.get(key), found.get(key), f"{where}/{key}")]
    if where == "/files":
        odd = sorted({*expected} ^ {*found})
        return [f"file {name} is {'missing' if name in expected else 'left'}" for name in odd]
    return [] if expected == found else [f"{where} is {str(found)[:100]} instead of {str(expected)[:100]}"]
