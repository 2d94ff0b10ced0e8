"""Kills exports for kills.py, and checks that the old or the new export is intact."""

import collections
import dataclasses
import os
import pathlib
import random
import shutil
from typing import Any

import killing
import numpy as np
import orbax.checkpoint as ocp
from killing import Moment, Phases, Seen, Watch

import superserve_jax as ss
from superserve_jax import exports, progress
from superserve_jax.exports import Served, statistics
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training.config import load_config

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "debug.py"


def kill(folder: pathlib.Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kills exports that replace an older one. Returns the moments, the phases, counts and problems."""
    models, old = folder / "models.npz", folder / "old"

    def prepare() -> Any:
        config = load_config(CONFIG).model
        made: dict[str, Any] = {
            f"{seed}/{k}": np.asarray(v) for seed in range(3) for k, v in programs.initial_params(config, seed).items()
        }
        np.savez(models, **made)
        _export(models, 0)

    old.mkdir(exist_ok=True)
    killing.run(prepare, folder=old, output=folder / "old.txt")
    (old / "export" / "profiles").mkdir()
    (old / "export" / "profiles" / "cpu.json").write_text("{}")

    def replace(name: str, moment: Moment | None) -> Any:
        shutil.copytree(old, folder / name)

        def child() -> Any:
            watch = Watch(moment, folder / f"{name}.log", _phase_of_export)
            for method in ("save", "close"):
                watch.wrap(ocp.StandardCheckpointer, method, "weights")
            watch.wrap(statistics, "write", "statistics")
            _export(models, 1)
            return {phase: dataclasses.asdict(value) for phase, value in watch.seen().items()}

        return killing.run(child, folder=folder / name, output=folder / f"{name}.txt")

    seen = {phase: Seen(**values) for phase, values in replace("undisturbed export", None).items()}
    phases, moments, problems = Phases(seen, rng), [], []
    for i in progress.track(range(kills), "kills of exports"):
        name = f"export{i}"
        while replace(name, phases.next()) is not None:  # the process was done before the moment came
            shutil.rmtree(folder / name)
        moments.append({"export": name, **killing.last_line(folder / f"{name}.log")})

    def check() -> list[dict[str, Any]]:
        versions = [_contents(_model(models, seed)) for seed in range(3)]
        return [_check(folder / moment["export"], models, versions) for moment in moments]

    for moment, result in zip(moments, killing.run(check, folder=folder, output=folder / "check.txt"), strict=True):
        problem = result.pop("problem")
        moment |= result
        if problem:
            problems.append(f"{moment}: {problem}")
    counts = collections.Counter(f"{moment['found']} export found" for moment in moments)
    return {"kills": moments, "phases": sorted(seen), "counts": counts, "problems": problems}


def _check(folder: pathlib.Path, models: pathlib.Path, versions: list[dict[str, str]]) -> dict[str, Any]:
    """What a killed export left, and whether the next export works. Changes the current folder."""
    os.chdir(folder)
    loaded = ss.load("export")
    left, problem = sorted(os.listdir("export")), None
    found = versions.index(_contents(loaded)) if _contents(loaded) in versions else None
    if found not in (0, 1) or loaded.manifest["measured"] != f"seed {found}":
        problem = "it is neither the old export nor the new one"
    _export(models, 2)
    if _contents(again := ss.load("export")) != versions[2]:
        problem = "the next export is not the one that was written"
    if odd := {*os.listdir("export")} ^ {"manifest.json", "profiles", again.manifest["payload"]}:
        problem = f"after the next export, these files are left or missing: {sorted(odd)}"
    return {"found": "neither" if found is None else ("old", "new", "next")[found], "left": left, "problem": problem}


def _contents(model: SuperNet) -> dict[str, str]:
    return killing.digests({"params": model.params, "statistics": killing.by_text(model.statistics)})


def _model(models: pathlib.Path, seed: int) -> SuperNet:
    config = load_config(CONFIG).model
    with np.load(models) as arrays:
        params = {name: arrays[f"{seed}/{name}"] for name in programs.param_spec(config)}
    space = config.space()
    chosen = (space.smallest(), space.largest())
    sizes = {subnet: programs.sliced(config, subnet).statistics_size for subnet in chosen}
    return SuperNet(config, params, {s: np.full((2, size), seed + 1, np.float32) for s, size in sizes.items()})


def _export(models: pathlib.Path, seed: int) -> None:
    model = _model(models, seed)
    served = [Served(s, 0.5, None, model.config.flops(s), model.config.num_params(s)) for s in model.calibrated]
    exports.export("export", model, served, measured=f"seed {seed}")


def _phase_of_export(phase: str, operation: str, path: str) -> str:
    """The phase of a file operation of an export, see `killing.Classify`."""
    if "payload-part" in path:
        return "weights" if "weights" in path else "statistics" if "statistics" in path else "payload"
    if operation == "os.rename":
        return "manifest: rename" if path.endswith("manifest.json") else "payload: rename"
    if operation in ("os.remove", "os.rmdir"):
        return "old payload: delete"
    return "manifest" if "manifest.json" in path else phase
