"""Measures everything that is not known about GPUs, in the minutes that a GPU is there.

One file because all stages share options and the format of their results.

    python serve/bench/gpu.py --minutes 9 --out runs/gpu
    python serve/bench/gpu.py --quick --out runs/gpu-try configs/debug.py     # tries it on a CPU

Each stage is a process with a time limit, so that a stage that hangs or fails does not cost the others. The most important
stages come first. Each writes its results into the folder as they come. A second run with the same folder and options runs
the stages that are not finished. The stages:

1. device: the card, bandwidths of copies, and the cost of a call;
2. tests: `pytest -m gpu`, in one process;
3. actuation: serve/bench/actuation.py with three subnets;
4. variants: the largest and the smallest subnet with each way to slice, with and without command buffers, and in a bucket;
5. memory: serve/bench/memory.py with 500 subnets in 6 subnet buckets;
6. overlap: serve/bench/overlap.py;
7. serving: a measured profile, the paper's P1 to P3, and a server at 0.3, 0.6 and 0.9 of its limit.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from unittest import mock

import jax
import numpy as np
import tyro

from superserve_jax import cli, errors, exports, files
from superserve_jax.engines import default_batch_sizes, keys, prepare, profiling
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.exports import Model
from superserve_jax.loadtest import loadgen
from superserve_jax.serving.server import Server
from superserve_jax.simulation import traces
from superserve_jax.supernets import compiler
from superserve_jax.training import random_export
from superserve_jax.training.config import load_config

LIMIT_S = {"device": 60, "tests": 120, "actuation": 150, "variants": 150, "memory": 120, "overlap": 60, "serving": 90}
"""The stages in order, and the most seconds that each may take. Guesses, since tuning may take long."""

_ROOT = pathlib.Path(__file__).parents[2]
_LEAST_S = 5.0  # a stage does not begin with less time left
_SHOWN = 1500  # characters of the output of a stage that failed


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      config: the config file of the network.
      out: the folder of the results.
      minutes: the most minutes that all stages may take.
      quick: only try each stage, with few repeats.
      only: the stages to run; if left out, all.
      stage: run this stage here, in this process. The program starts itself with this option.
    """

    config: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("configs/ofa_resnet50.py")
    out: pathlib.Path = pathlib.Path("runs/gpu")
    minutes: float = 9.0
    quick: bool = False
    only: tuple[str, ...] = ()
    stage: str | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "minutes")
        for name in (*self.only, *([self.stage] if self.stage else [])):
            errors.check_name("stage", name, list(LIMIT_S))

    def result(self, stage: str) -> pathlib.Path:
        """The file with the results of a stage."""
        return self.out / f"{stage}.json"


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    if options.stage is not None:
        STAGES[options.stage](options, functools.partial(_save, options, options.stage))
        return
    (options.out / "cache").mkdir(mode=0o700, parents=True, exist_ok=True)
    ends_s, lines = time.monotonic() + 60 * options.minutes, [("stage", "state", "seconds", "device")]
    for stage in options.only or LIMIT_S:
        found = _read(options, stage)
        if found.get("state") != "done":
            left_s = min(LIMIT_S[stage], ends_s - time.monotonic())
            found = run(options, stage, left_s) if left_s >= _LEAST_S else {"state": "no time left"}
        lines.append((stage, found["state"], f"{found.get('seconds', 0):.0f}", found.get("device", "")))
    cli.print_table(lines)
    print(f"results: {options.out}/*.json")


def run(options: Options, stage: str, limit_s: float) -> dict[str, Any]:
    """Runs a stage in a process of its own. Returns its results, with "state": "done", "failed" or "out of time"."""
    print(f"{stage}: at most {limit_s:.0f} s", flush=True)
    command = [sys.executable, __file__, str(options.config), "--out", str(options.out), "--stage", stage]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # stages have child processes that share the card's memory
        "SUPERSERVE_CACHE": str((options.out / "cache").absolute()),
    }
    start_s, log = time.monotonic(), options.out / f"{stage}.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            command + ["--quick"] * options.quick,
            **{"env": environment, "stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True},
        )
        try:
            state = "failed" if child.wait(limit_s) else "done"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the stage and its own children
                child.wait()
    if state == "failed":
        print(log.read_text(errors="replace")[-_SHOWN:], flush=True)
    found = _read(options, stage) | {"state": state, "seconds": time.monotonic() - start_s}
    _write(options, stage, found)
    return found


def _save(options: Options, stage: str, found: Any) -> None:
    """Writes the results that a stage has so far."""
    _write(options, stage, {"state": "begun", "device": jax.devices()[0].device_kind, "found": found})


def _write(options: Options, stage: str, value: Mapping[str, Any]) -> None:
    about = {"config": str(options.config), "quick": options.quick}
    files.write_json(options.result(stage), {**about, **value})


def _read(options: Options, stage: str) -> dict[str, Any]:
    """The results of a stage with the same options; {} if there are none."""
    try:
        found = json.loads(options.result(stage).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if (found["config"], found["quick"]) == (str(options.config), options.quick) else {}


# -- stages -------------------------------------------------------------------------------------------------------------

Save = Callable[[Any], None]


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """The median time of a call, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times)


def stage_device(options: Options, save: Save) -> None:
    """The card, bandwidths of copies, and the cost of a call."""
    device, repeats = jax.devices()[0], 3 if options.quick else 50
    found: dict[str, Any] = {"jax": jax.__version__, "runtime": device.client.platform_version}
    found["memory"] = device.memory_stats()

    def put(value: Any) -> Any:
        return jax.block_until_ready(jax.device_put(value, device))

    images, weights = np.zeros((16, 224, 224, 3), np.uint8), np.zeros((1 if options.quick else 48) * 10**6, np.float32)
    found["images_to_device_ms"] = median_ms(lambda: put(images), repeats)
    found["weights_mb"], found["weights_to_device_ms"] = weights.nbytes / 1e6, median_ms(lambda: put(weights), 3)
    logits, on_device = put(np.zeros((16, 1000), np.float32)), put(weights)
    found["logits_to_host_ms"] = median_ms(lambda: np.asarray(logits + 0), repeats)
    number, many = put(np.float32(0)), put(tuple(np.zeros((8, 8), np.float32) for _ in range(185)))
    small = jax.jit(lambda x: x + 1).lower(number).compile()
    found["empty_call_ms"] = median_ms(lambda: small(number).block_until_ready(), repeats)
    found["empty_call_issued_ms"] = median_ms(lambda: small(number), repeats)
    wide = jax.jit(lambda v: v[0] + v[-1]).lower(many).compile()
    found["call_with_185_arguments_issued_ms"] = median_ms(lambda: wide(many), repeats)
    copy = jax.jit(lambda x: x * 1.5).lower(on_device).compile()
    ms = median_ms(lambda: copy(on_device).block_until_ready(), 3 if options.quick else 10)
    found["copy_within_device_gb_per_s"] = 2 * weights.nbytes / ms / 1e6
    save(found)


def stage_tests(options: Options, save: Save) -> None:
    """The tests that need a GPU. Fails if one of them fails; without a GPU all are skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    files_of = ["tests/engines/test_device.py"] if options.quick else []
    done = subprocess.run([*command, *files_of], cwd=_ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    save({"status": done.returncode, "output": done.stdout[-4000:]})
    if done.returncode:
        raise SystemExit(1)


def bench(options: Options, save: Save, name: str, *arguments: Any) -> None:
    """Runs another program of this folder, and saves its results."""
    path = options.out / f"{name}.figures.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(_ROOT / "serve" / "bench" / f"{name}.py"), *map(str, arguments), "--json", str(path)]
    subprocess.run(command, check=True)
    save(json.loads(path.read_text()))


def stage_actuation(options: Options, save: Save) -> None:
    """The cost of a change of the subnet."""
    full = ("--subnets", 3, "--rounds", 20, "--loads", 3, "--batch-sizes", 1, 16)
    size = ("--subnets", 2, "--rounds", 2, "--loads", 1) if options.quick else full
    bench(options, save, "actuation", options.config, *size)


def stage_memory(options: Options, save: Save) -> None:
    """Memory of many subnets against extracted ones."""
    quick = ("--subnets", 4, "--executables", 2, "--extracted", 2, "--repeats", 1)
    bench(options, save, "memory", options.config, *(quick if options.quick else ("--executables", 6, "--repeats", 3)))


def stage_overlap(options: Options, save: Save) -> None:
    """Throughput with and without overlap."""
    quick = ("--queries", 100, "--seconds", 0.5, "--rounds", 1)
    bench(options, save, "overlap", made_up(options).path, *(quick if options.quick else ("--queries", 6000)))


def made_up(options: Options) -> Model:
    """An export of the config with random weights and four subnets. It is made once."""
    path = options.out / f"export-{options.config.stem}"
    if not path.exists():
        random_export.export(load_config(options.config).model, path, subnets=4)
    return exports.load(path)


def stage_variants(options: Options, save: Save) -> None:
    """The largest and the smallest subnet in each variant: alone, back to back, and the time that the host takes."""
    model, found = made_up(options), []
    device, space = jax.devices()[0], model.config.space()
    ends = {"largest": space.largest(), "smallest": space.smallest()}
    shared = dict.fromkeys(ends.values(), ends["largest"])
    variants: dict[str, dict[str, Any]] = {
        "as served": {},
        "not prepared": {"prepared": False},
        "one bucket": {"envelopes": shared},
        "in the call": {"slicing": "in_call"},
        "bfloat16": {"compute_dtype": "bfloat16"},
        "as served, no graphs": {},
        "one bucket, no graphs": {"envelopes": shared},
    }
    lengths = prepare.check_lengths(model.config, None)[-1:]
    repeats = 3 if options.quick else 40
    for batch in (1, 2) if options.quick else (16, 1, 64):
        for variant, way in variants.items():
            start_s, no_graphs = time.perf_counter(), mock.patch.object(compiler, "options", return_value={})
            try:
                shapes = {"subnet_list": list(ends.values()), "batch_sizes": (batch,), "lengths": lengths}
                with no_graphs if "no graphs" in variant else contextlib.nullcontext():
                    engine = DeviceEngine(model, device, **shapes, **way)
                made_s = time.perf_counter() - start_s
                inputs = [np.zeros(engine.input_shape, engine.input_dtype)] * batch
                for name, subnet in ends.items():
                    call = engine, subnet, batch, inputs
                    alone_ms, issued_ms = median_ms(lambda c=call: c[0].run(*c[1:]), repeats), []
                    for _ in range(repeats):
                        begin_s = time.perf_counter()
                        launched = engine.launch(subnet, batch, inputs)
                        issued_ms.append(1e3 * (time.perf_counter() - begin_s))
                        launched.wait()
                        launched.outputs()
                    between_ms = 1e3 * statistics.median(profiling.batch_s(*call) for _ in range(repeats))
                    times = {"alone_ms": alone_ms, "back_to_back_ms": between_ms, "issued_ms": statistics.median(issued_ms)}
                    found.append({"batch": batch, "subnet": name, "variant": variant, **times, "made_s": made_s})
            except Exception as e:  # another variant may work, for example without command buffers
                found.append({"batch": batch, "variant": variant, "error": f"{type(e).__name__}: {str(e)[:300]}"})
            print(found[-1], flush=True)
            save(found)


def stage_serving(options: Options, save: Save) -> None:
    """A measured profile, and a server at three loads with and without overlap."""
    model, device = made_up(options), jax.devices()[0]
    sizes = (1, 2) if options.quick else default_batch_sizes.candidates([device])
    lengths = prepare.check_lengths(model.config, None)[-1:]
    engine = DeviceEngine(model, device, subnet_list=model.subnets, batch_sizes=sizes, lengths=lengths)
    by_cost = sorted(model.subnets, key=model.config.flops)
    accuracies = {s: 0.7 + 0.1 * i / len(by_cost) for i, s in enumerate(by_cost)}  # made up, and ascending
    repeats = 2 if options.quick else 20
    measured = profiling.measure(engine, accuracies, sizes, device=keys.device_kind(device), repeats=repeats)
    [table] = measured.each_length
    found: dict[str, Any] = {
        "batch_sizes": sizes,
        "latency_ms": [row.latency_ms for row in table.rows],
        "properties": [(p.name, p.holding, p.of, p.worst) for p in profiling.properties(table)],
        "loads": [],
    }
    save(found)
    profile, example = measured.monotone(), np.zeros(engine.input_shape, engine.input_dtype)
    limit_qps, seconds = table.throughput_qps(by_cost[0]), 1.0 if options.quick else 4.0
    for overlap in (True, False):
        for load in (0.3, 0.6, 0.9):
            trace = traces.gamma(rate_qps=load * limit_qps, cv2=4.0, duration_s=seconds, slo_ms=36.0)
            with Server.from_engines([engine], profile, slo_ms=36.0, overlap=overlap) as server:
                run = loadgen.summarize(loadgen.replay(server, trace, [example] * len(trace)))
            figures = {"attainment": run.attainment, "accuracy": run.accuracy, "p99_ms": run.p99_ms}
            found["loads"].append({"overlap": overlap, "load": load, "qps": load * limit_qps, **figures})
            print(found["loads"][-1], flush=True)
            save(found)


STAGES: Mapping[str, Callable[[Options, Save], None]] = {
    "device": stage_device,
    "tests": stage_tests,
    "actuation": stage_actuation,
    "variants": stage_variants,
    "memory": stage_memory,
    "overlap": stage_overlap,
    "serving": stage_serving,
}


if __name__ == "__main__":
    cli.run(main)
