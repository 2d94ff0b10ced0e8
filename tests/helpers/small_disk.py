"""Calls every writer of the library on a small disk of its own. A test reads what it prints: one JSON line per attempt.

    unshare -Urm python tests/helpers/small_disk.py FOLDER

It mounts a tmpfs on FOLDER, which needs no privileges in a new user namespace. Then the disk is full, has no place for another
file, or is read-only. Each writer is called once on the bad disk, and once after the disk is good again.
"""

import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys

os.environ["SUPERSERVE_CACHE"] = ""

import jax
import numpy as np
from cached import answer
from noise import CONFIG, Noise
from tiny import TINY, random_params, random_statistics, write_export

from superserve_jax import errors, exports, files, plots
from superserve_jax.profile import Profile, Row
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import loop, stages
from superserve_jax.training.datasets import prepared
from superserve_jax.training.datasets.cluttered_digits import render
from superserve_jax.training.runs import Run

PARTIAL = (".part", "orbax-checkpoint-tmp", "payload-part", "incomplete.")


def supernet(seed):
    chosen = [TINY.space().smallest(), TINY.space().largest()]
    return SuperNet(TINY, random_params(TINY, seed), {s: random_statistics(TINY, s) for s in chosen})


class Disk:
    """The folder, with a finished run, an export and a cache in it."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=700", "tmpfs", folder], check=True)
        self.config = dataclasses.replace(CONFIG, search=dataclasses.replace(CONFIG.search, candidates=3, examples=100))
        self.run = loop.train(self.config, folder / "run", dataset=Noise())
        stages.search(self.run)
        stages.calibrate(self.run)
        stages.evaluate(self.run)
        write_export(folder / "export", supernet(0))
        os.environ["SUPERSERVE_CACHE"] = str(folder / "cache")
        self.logits = answer()

    def spoil(self, how):
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
            return
        (self.folder / "filler").mkdir()
        try:
            if how == "full":
                with open(self.folder / "filler" / "0", "wb", buffering=0) as file:
                    for size in (1 << 16, 1 << 12, 1):
                        while file.write(b"x" * size) == size:
                            pass
            for i in range(10_000 if how == "no more files" else 0):
                (self.folder / "filler" / str(i)).touch()
        except OSError:
            return

    def repair(self, how):
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", self.folder], check=True)
        else:
            subprocess.run(["rm", "-r", self.folder / "filler"], check=True)

    def writers(self, how):
        new = self.folder / how.replace(" ", "_")
        row = Row(TINY.space().smallest(), 0.5, (1.0,))
        return {
            "results": lambda: files.write_json(new / "a.json", list(range(3000))),
            "profile": lambda: Profile((1,), (row,), "cpu").save(exports.profile_path(new, "cpu")),
            "plot": lambda: plots.metrics(self.run.metrics(), new / "plot.png"),
            "search": lambda: stages.search(self.run),
            "statistics": lambda: stages.calibrate(self.run),
            "evaluation": lambda: stages.evaluate(self.run),
            "replaced export": lambda: write_export(self.folder / "export", supernet(1)),
            "new export": lambda: stages.export(self.run, new / "export"),
            "converted run": lambda: Run.convert(self.config, new / "converted", SuperNet.create(self.config.model, seed=1)),
            "training": lambda: loop.train(self.config, new / "run", dataset=Noise()),
            "dataset": lambda: prepared.load("cluttered_digits", str(new / "data")),
        }

    def readers(self, elsewhere):
        """What must work on a bad disk."""

        def cached(config):
            assert answer(config) is not None

        return {
            "load": lambda: exports.load(self.folder / "export"),
            "model of a run": lambda: Run.open(self.folder / "run").model(),
            "export of a run": lambda: stages.export(self.run, elsewhere),
            "cached executable": lambda: np.testing.assert_array_equal(answer(), self.logits),
            "new executable": lambda: cached(dataclasses.replace(TINY, num_classes=4)),
        }


def attempt(how, name, function, folder, messages):
    messages.clear()
    try:
        function()
        result = "done"
    except errors.SuperServeError as e:
        result = f"{type(e).__name__}: {e}"
    except Exception as e:
        result = f"undocumented {type(e).__name__}: {e}"
    left = [str(path) for path in folder.rglob("*") if any(mark in path.name for mark in PARTIAL)]
    print(json.dumps({"disk": how, "name": name, "result": result, "left": left, "log": list(messages)}), flush=True)


def main():
    folder = pathlib.Path(sys.argv[1])
    render.NUM_IMAGES.update(train=5, test=2)
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("superserve_jax").addHandler(handler)
    jax.config.update("jax_compilation_cache_dir", f"{folder}.compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    disk = Disk(folder)
    for how in ("full", "no more files", "read-only"):
        writers = disk.writers(how)
        disk.spoil(how)
        for name, function in writers.items():
            attempt(how, name, function, folder, messages)
        for name, function in disk.readers(pathlib.Path(f"{folder}.export")).items():
            attempt(how, name, function, folder, messages)
        disk.repair(how)
        for name, function in writers.items():
            attempt("good again", name, function, folder, messages)
        subprocess.run(["rm", "-r", folder / how.replace(" ", "_")], check=True)


if __name__ == "__main__":
    main()
