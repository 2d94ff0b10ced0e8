"""Measures the start of a server: cold, when everything must be compiled, and warm, from the cache of executables.

    python serve/bench/start.py runs/digits_resnet/export
    python serve/bench/start.py configs/ofa_resnet50.py --subnets 6
    python serve/bench/start.py configs/ofa_resnet50.py --foreign

It takes an export's directory or a config file. For a config file, it makes an export with fresh weights. Six subnets of the
published OFA-ResNet50 have 30 executables. Every start is timed from the launch of a new Python process to the first answer.
The cold start has an empty cache in a temporary folder. Warm starts use the executables that the cold start left there. An
export without a latency profile gets an estimated one, since measuring it would take most of the time of a start.

With --foreign, the same network counts as a family of another package. Its code may be anywhere, so a warm start traces every
program to make the keys of the cache (see `engines.keys`). The difference to a run without --foreign is the price of that.
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
from typing import Annotated

import jax
import tyro

import superserve_jax as ss
from superserve_jax import cli, exports, machine
from superserve_jax.engines import default_batch_sizes, prepare, subnet_buckets
from superserve_jax.profile import Profile, Row, check_batch_sizes
from superserve_jax.training import random_export

STAGES = {
    "import": "Python started, library imported",
    "load": "export read and checked",
    "server": "server opened",
    "answer": "first answer",
}

START = """
import json, sys, time
import numpy as np
import superserve_jax as ss

ends = [time.time()]
FOREIGN
model = ss.load(sys.argv[1])
ends.append(time.time())
with ss.Server(model, batch_sizes=tuple(map(int, sys.argv[2:]))) as server:
    ends.append(time.time())
    spec = model.config.input_spec(1)
    server.submit(np.zeros(spec.shape[1:], spec.dtype), slo_ms=60_000).result(timeout=60)
    ends.append(time.time())
print(json.dumps(ends))
"""

FOREIGN = """
from superserve_jax import families
from superserve_jax.engines import keys
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.families.vit import ViTConfig

for built_in in OFAResNetConfig, DynaBERTConfig, ViTConfig:
    families.register(type(built_in.__name__, (built_in,), {"__module__": __name__}))
assert keys.is_foreign(families.config_from_json({"family": built_in.family}))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      source: an export's directory or a config file.
      subnets: the number of served subnets, for a config file.
      batch_sizes: the batch sizes to serve with; if left out, the server's default (see `engines.default_batch_sizes`).
      warm: the number of warm starts.
      foreign: whether the network counts as a family of another package.
      json: write the figures to this file.
    """

    source: Annotated[pathlib.Path, tyro.conf.Positional]
    subnets: int = 6
    batch_sizes: tuple[int, ...] | None = None
    warm: int = 3
    foreign: bool = False
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "subnets", "warm")


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process and its children share the card's memory
    given = None if options.batch_sizes is None else check_batch_sizes(options.batch_sizes)
    with random_export.export_of(options.source, subnets=options.subnets) as source, tempfile.TemporaryDirectory() as folder:
        export, cache = pathlib.Path(folder) / "export", str(pathlib.Path(folder) / "cache")
        shutil.copytree(source, export)  # a copy, because it may get an estimated profile
        device = jax.devices()[0]
        batch_sizes = given or default_batch_sizes.to_serve(export, {machine.device_kind(device): device})
        count = ensure_profile(export, batch_sizes)
        starts = [start(export, batch_sizes, cache, foreign=options.foreign) for _ in range(1 + options.warm)]
        cached = sum(f.stat().st_size for f in pathlib.Path(cache).glob("*.bin"))
    cold, warm = starts[0], {stage: statistics.median(s[stage] for s in starts[1:]) for stage in starts[0]}
    cli.print_table(
        [
            ("seconds", "cold", f"warm, median of {options.warm}"),
            *((name, f"{cold[key]:.2f}", f"{warm[key]:.2f}") for key, name in {**STAGES, "ready": "total"}.items()),
        ]
    )
    family = "a foreign family" if options.foreign else "a family of this package"
    print(f"{count} executables of {family}, {cached / 1e6:.0f} MB in the cache, on {machine.device_kind(jax.devices()[0])}")
    figures = {"foreign": options.foreign, "executables": count, "cache_bytes": cached, "cold_s": cold, "warm_s": starts[1:]}
    cli.write_results(options.json, figures)


def ensure_profile(export: pathlib.Path, batch_sizes: tuple[int, ...]) -> int:
    """Gives an export without a latency profile an estimated one. Returns the number of executables of its server."""
    model = ss.load(export)
    kind = machine.device_kind(jax.devices()[0])
    lengths = prepare.check_lengths(model.config, None)
    stored = prepare.stored_profile(model, kind, batch_sizes, lengths)
    if stored is None:
        rows = tuple(Row(s.subnet, s.known_accuracy, tuple(1e-8 * s.flops * b for b in batch_sizes)) for s in model.served)
        stored = Profile(batch_sizes, rows, kind, rows_at=dict.fromkeys(lengths, rows))
        stored = stored.with_envelopes(subnet_buckets.choose(model.subnets, model.config.flops, prepare.MAX_SUBNET_BUCKETS))
        stored.save(exports.profile_path(export, kind))
    buckets = {r.envelope or r.subnet for r in stored.rows}
    return len(buckets) * len(batch_sizes) * max(1, len(lengths))


def start(export: pathlib.Path, batch_sizes: tuple[int, ...], cache: str, *, foreign: bool) -> dict[str, float]:
    """Seconds of each stage of a start in a process of its own."""
    environment = {**os.environ, "SUPERSERVE_CACHE": cache}
    program = START.replace("FOREIGN", FOREIGN if foreign else "")
    command = [sys.executable, "-c", program, str(export), *map(str, batch_sizes)]
    began_s = time.time()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ss.ConfigError(f"the server did not start (status {done.returncode}); see its output above")
    times = [began_s, *json.loads(done.stdout.splitlines()[-1])]
    stages = {stage: b - a for stage, (a, b) in zip(STAGES, itertools.pairwise(times), strict=True)}
    return {**stages, "ready": times[-1] - times[0]}


if __name__ == "__main__":
    cli.run(main)
