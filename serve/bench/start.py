"""Times the start of a server in a fresh process: cold, with everything to compile, and warm, from the cache of executables.

    python serve/bench/start.py runs/digits_resnet/export
    python serve/bench/start.py configs/ofa_resnet50.py --subnets 6

A config file stands for an export of its network with made-up values; that of the published OFA-ResNet50 has 30 executables.
Each start is a process of its own, from the import of the library to the first answer. The cold one has an empty cache in a
temporary folder, and the warm ones find what it left there. An export without a latency profile has a made-up one meanwhile,
or measuring it would be most of the start. Library: ss.Server, engines.prepare, engines.cache.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import jax
import tyro

import superserve_jax as ss
from superserve_jax import cli, exports, files
from superserve_jax.engines import prepare, subnet_buckets
from superserve_jax.profile import Profile, Row, check_batch_sizes
from superserve_jax.training import random_export

STAGES = ("import", "load", "server", "answer")
LABELS = {
    "import": "import of the library",
    "load": "export read and checked",
    "server": "server opened",
    "answer": "first answer",
    "ready": "ready, all in all",
}

START = """
import json, sys, time
import numpy as np
import superserve_jax as ss

ends = [time.time()]
model = ss.load(sys.argv[1])
ends.append(time.time())
with ss.Server(model, batch_sizes=tuple(map(int, sys.argv[2:]))) as server:
    ends.append(time.time())
    spec = model.config.input_spec(1)
    server.submit(np.zeros(spec.shape[1:], spec.dtype), slo_ms=60_000).result(timeout=60)
    ends.append(time.time())
print(json.dumps(ends))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      source: an export's directory, or a config file.
      subnets: how many are served, if it is a config file.
      batch_sizes: batch sizes to serve with.
      warm: number of warm starts.
      json: write the figures to this file.
    """

    source: Annotated[pathlib.Path, tyro.conf.Positional]
    subnets: int = 6
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    warm: int = 3
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    batch_sizes = check_batch_sizes(options.batch_sizes)
    if options.warm < 1:
        raise ss.ConfigError(f"--warm must be at least 1, got {options.warm}")
    with random_export.export_of(options.source, subnets=options.subnets) as source, tempfile.TemporaryDirectory() as folder:
        export, cache = pathlib.Path(folder) / "export", str(pathlib.Path(folder) / "cache")
        shutil.copytree(source, export)  # which may get a made-up profile
        count = ensure_profile(export, batch_sizes)
        starts = [start(export, batch_sizes, cache) for _ in range(1 + options.warm)]
        cached = sum(f.stat().st_size for f in pathlib.Path(cache).glob("*.bin"))
    cold, warm = starts[0], {stage: statistics.median(s[stage] for s in starts[1:]) for stage in starts[0]}
    cli.print_table(
        [
            ("seconds", "cold", f"warm, median of {options.warm}"),
            *((LABELS[stage], f"{cold[stage]:.2f}", f"{warm[stage]:.2f}") for stage in (*STAGES, "ready")),
        ]
    )
    print(f"{count} executables, {cached / 1e6:.0f} MB in the cache, on {prepare.device_kind(jax.devices()[0])}")
    if options.json:
        figures: dict[str, Any] = {"executables": count, "cache_bytes": cached, "cold_s": cold, "warm_s": starts[1:]}
        files.write_json(options.json, figures)


def ensure_profile(export: pathlib.Path, batch_sizes: tuple[int, ...]) -> int:
    """The number of executables that a server will have; where there is no profile, one is made up."""
    model = ss.load(export)
    kind = prepare.device_kind(jax.devices()[0])
    lengths = prepare.check_lengths(model.config, None)
    stored = prepare.stored_profile(model, kind, batch_sizes, lengths)
    if stored is None:
        rows = tuple(Row(s.subnet, s.accuracy, tuple(1e-8 * s.flops * b for b in batch_sizes)) for s in model.served)
        stored = Profile(batch_sizes, rows, kind, rows_at=dict.fromkeys(lengths, rows))
        stored = stored.with_envelopes(subnet_buckets.choose(model.subnets, model.config.flops, prepare.MAX_SUBNET_BUCKETS))
        stored.save(exports.profile_path(export, kind))
    buckets = {r.envelope or r.subnet for r in stored.rows}
    return len(buckets) * len(batch_sizes) * max(1, len(lengths))


def start(export: pathlib.Path, batch_sizes: tuple[int, ...], cache: str) -> dict[str, float]:
    """Seconds of each stage of a start in a process of its own."""
    environment = {**os.environ, "SUPERSERVE_CACHE": cache}
    command = [sys.executable, "-c", START, str(export), *map(str, batch_sizes)]
    began_s = time.time()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ss.ConfigError(f"the server did not start (status {done.returncode}); what it said stands above")
    times = [began_s, *json.loads(done.stdout.splitlines()[-1])]
    stages = {stage: b - a for stage, (a, b) in zip(STAGES, itertools.pairwise(times), strict=True)}
    return {**stages, "ready": times[-1] - times[0]}


if __name__ == "__main__":
    cli.run(main)
