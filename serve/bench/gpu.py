"""Runs all GPU benchmarks and GPU tests in one command, within a time limit.

One file because all stages share options and the format of their results.

    python serve/bench/gpu.py --minutes 9 --out runs/gpu
    python serve/bench/gpu.py --quick --out runs/gpu-try configs/debug.py     # tries it on a CPU

Each stage is a process with a time limit, so a stage that hangs or fails does not stop the others. The limit is a share of
the time that is left (see `STAGES`). A stage that ends early leaves more for the others. The most valuable stages come first:

1. device: the card, bandwidths of copies, and the cost of a call;
2. tests: the tests that need a GPU, in one process;
3. variants: the largest and the smallest subnet with each way to slice, with and without command buffers, and in a bucket;
4. actuation: serve/bench/actuation.py with three subnets;
5. serving: a server at 0.3, 0.6 and 0.9 of the throughput of its smallest subnet, and SlackFit's three assumptions
   (`profiling.properties`);
6. memory: serve/bench/memory.py with 500 subnets in 6 subnet buckets;
7. overlap: serve/bench/overlap.py.

The folder of --out gets two files: log.txt, and results.json, which each stage writes as its results come. A second run with
the same --out, config and --quick runs the stages that are not done. It keeps earlier results of a stage until it has more.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from unittest import mock

import actuation
import gpu_results
import jax
import memory
import numpy as np
import overlap
import tyro
from gpu_results import Results

from superserve_jax import cli, errors, exports, machine
from superserve_jax.engines import prepare, profiling
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.exports import Model
from superserve_jax.loadtest import loadgen
from superserve_jax.profile import Profile
from superserve_jax.serving.server import Server
from superserve_jax.simulation import traces
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import compiler

GPU_TESTS = ("tests/engines/test_device.py", "tests/engines/test_prepared.py", "tests/engines/test_on_a_gpu.py")
"""The files with tests that need a GPU. Other files need packages that the machine may lack."""

_ROOT = pathlib.Path(__file__).parents[2]
_LEAST_S = 5.0  # a stage does not begin with less time left
_LOG_TAIL_CHARS = 1500  # of the output of a stage that failed
_WEIGHTS, _ARGUMENTS = 48_000_000, 185  # parameters of OFA-ResNet50, and arguments of a call of its largest subnet
_NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
_SERVED_SIZES = (1, 4, 16, 64)  # batch sizes; more of them take long to tune


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      config: the config file of the network.
      out: the folder of results.json and log.txt.
      work: the folder of the random export and of the executables, which a second run uses again.
      minutes: the most minutes that all stages may take.
      quick: run each stage with few repeats, to test the program.
      only: the stages to run; if left out, all.
      stage: run this stage here, in this process. The program starts itself with this option.
    """

    config: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("configs/ofa_resnet50.py")
    out: pathlib.Path = pathlib.Path("runs/gpu")
    work: pathlib.Path = pathlib.Path("runs/gpu-work")
    minutes: float = 9.0
    quick: bool = False
    only: tuple[str, ...] = ()
    stage: str | None = None

    @property
    def results(self) -> Results:
        """The results of the stages."""
        return Results(self.out / "results.json", str(self.config), self.quick)

    def __post_init__(self):
        cli.check_above_zero(self, "minutes")
        for name in (*self.only, *([self.stage] if self.stage else [])):
            errors.check_name("stage", name, list(STAGES))


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    if options.stage is not None:
        save = functools.partial(options.results.save, options.stage)
        save(STAGES[options.stage][1](options, save), "done")
        return
    options.results.read()  # refuses results of another config
    device = device_kind(options)
    (options.work / "cache").mkdir(mode=0o700, parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline_s, lines = time.monotonic() + 60 * options.minutes, [("stage", "state", "seconds", "results", "device")]
    wanted = [stage for stage in STAGES if stage in (options.only or STAGES)]
    done = [
        stage for stage, value in options.results.read().items() if (value["state"], value.get("device")) == ("done", device)
    ]
    left = [stage for stage in wanted if stage not in done]
    for stage in wanted:
        state, seconds = "done before", 0.0
        if stage in left:
            shares = [STAGES[s][0] for s in left[left.index(stage) :]]
            limit_s = (deadline_s - time.monotonic()) * shares[0] / sum(shares)
            state, seconds = run(options, stage, limit_s) if limit_s >= _LEAST_S else ("no time left", 0.0)
        found = options.results.read().get(stage, {})
        lines.append((stage, state, f"{seconds:.0f}", str(gpu_results.size(found.get("found"))), found.get("device", "")))
        print(f"{stage}: {json.dumps(found.get('found'))}", flush=True)
    cli.print_table(lines)
    print(f"results: {options.out / 'results.json'}")


def device_kind(options: Options) -> str:
    """The kind of jax's first device. A process of its own asks, since this one must not hold the card's memory.

    Raises ConfigError if it is a CPU, unless `options.quick` tries the program.
    """
    code = "import jax; device = jax.devices()[0]; print(device.platform, device.device_kind, sep=chr(10))"
    answer = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    platform, kind = answer.splitlines()[-2:]
    if platform == "cpu" and not options.quick:
        raise errors.ConfigError(
            "jax finds no GPU here, only a CPU; install superserve-jax[cuda13] or superserve-jax[cuda], or try the program "
            "with --quick"
        )
    return kind


def run(options: Options, stage: str, limit_s: float) -> tuple[str, float]:
    """Runs a stage in a process of its own. Returns "done", "failed" or "out of time", and the seconds that it took."""
    print(f"{stage}: at most {limit_s:.0f} s", flush=True)
    command = [sys.executable, __file__, str(options.config), "--out", str(options.out), "--work", str(options.work)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # stages have child processes that share the card's memory
        "SUPERSERVE_CACHE": str((options.work / "cache").absolute()),  # tests use it, too, since tuning takes long
    }
    before, start_s, log = options.results.read().get(stage), time.monotonic(), options.out / "log.txt"
    with log.open("a") as output:
        start = output.tell()
        output.write(f"-- {stage}\n")
        output.flush()
        child = subprocess.Popen(
            [*command, "--stage", stage, *["--quick"] * options.quick],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
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
        with log.open(errors="replace") as output:
            output.seek(start)
            print(output.read()[-_LOG_TAIL_CHARS:], flush=True)
    seconds, found = time.monotonic() - start_s, options.results.read().get(stage)
    if found is None or found != before:  # or the file keeps the results of an earlier run
        options.results.write(stage, {"found": None, **(found or {}), "state": state, "seconds": round(seconds, 1)})
    return state, seconds


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


def stage_device(options: Options, save: Save) -> dict[str, Any]:
    """The card, bandwidths of copies, and the cost of a call."""
    device, repeats = jax.devices()[0], 3 if options.quick else 50
    found: dict[str, Any] = {"jax": jax.__version__, "runtime": device.client.platform_version}
    found["memory"] = device.memory_stats()

    def put(value: Any) -> Any:
        return jax.block_until_ready(jax.device_put(value, device))

    images, weights = np.zeros((16, 224, 224, 3), np.uint8), np.zeros(10**6 if options.quick else _WEIGHTS, np.float32)
    found["images_to_device_ms"] = median_ms(lambda: put(images), repeats)
    found["weights_mb"], found["weights_to_device_ms"] = weights.nbytes / 1e6, median_ms(lambda: put(weights), 3)
    save(found)
    logits, on_device = put(np.zeros((16, 1000), np.float32)), put(weights)
    found["logits_to_host_ms"] = median_ms(lambda: np.asarray(logits + 0), repeats)
    number, many = put(np.float32(0)), put(tuple(np.zeros((8, 8), np.float32) for _ in range(_ARGUMENTS)))
    small = jax.jit(lambda x: x + 1).lower(number).compile()
    found["empty_call_ms"] = median_ms(lambda: small(number).block_until_ready(), repeats)
    found["empty_call_issued_ms"] = median_ms(lambda: small(number), repeats)
    wide = jax.jit(lambda v: v[0] + v[-1]).lower(many).compile()
    found[f"call_with_{_ARGUMENTS}_arguments_issued_ms"] = median_ms(lambda: wide(many), repeats)
    copy = jax.jit(lambda x: x * 1.5).lower(on_device).compile()
    ms = median_ms(lambda: copy(on_device).block_until_ready(), 3 if options.quick else 10)
    found["copy_within_device_gb_per_s"] = 2 * weights.nbytes / ms / 1e6  # each byte is read and written
    return found


def stage_tests(options: Options, save: Save) -> list[str]:
    """The tests that need a GPU: a line for each. Fails if one of them fails; without a GPU all are skipped."""
    flags = ["-v", "-rs", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib --strict-markers"]
    command = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", *flags, *GPU_TESTS[: 1 if options.quick else None]]
    found = []
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            found.append(line.rstrip())
            save(found)
    if child.returncode:
        raise SystemExit(1)
    return found


def stage_actuation(options: Options, save: Save) -> dict[str, Any]:
    """The cost of a change of the subnet."""
    size = actuation.Options(subnets=3, rounds=20, loads=3, batch_sizes=(1, 16))
    if options.quick:
        size = actuation.Options(subnets=2, rounds=2, loads=1)
    with tempfile.TemporaryDirectory() as folder:
        return actuation.measure(random_export_of(options), size, pathlib.Path(folder), save)


def stage_memory(options: Options, save: Save) -> dict[str, Any]:
    """Memory of many subnets against extracted ones."""
    size = memory.Options(path=options.config, executables=6, repeats=3)
    if options.quick:
        size = memory.Options(path=random_export_of(options).path, executables=1, extracted=1, repeats=1)
    return memory.measure_all(size, save)


def stage_overlap(options: Options, save: Save) -> list[dict[str, Any]]:
    """Throughput with and without overlap."""
    size = overlap.Options(export=random_export_of(options).path, queries=6000)
    return overlap.measure(dataclasses.replace(size, queries=100, rounds=1) if options.quick else size, save)


def random_export_of(options: Options) -> Model:
    """An export of the config with random weights and four subnets. It is made once."""
    path = options.work / f"export-{options.config.stem}"
    if not path.exists():
        from superserve_jax.training import config, random_export  # only here, since the libraries of data sets take long

        random_export.export(config.load_config(options.config).model, path, subnets=4)
    return exports.load(path)


def time_variant(engine: DeviceEngine, subnet: Subnet, batch: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a batch alone, of one batch after the other, and until the host has launched a batch."""
    inputs = [np.zeros(engine.input_shape, engine.input_dtype)] * batch
    alone_ms, issued_ms = median_ms(lambda: engine.run(subnet, batch, inputs), repeats), []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        launched = engine.launch(subnet, batch, inputs)
        issued_ms.append(1e3 * (time.perf_counter() - begin_s))
        launched.wait()
        launched.outputs()
    between_ms = 1e3 * statistics.median(profiling.batch_s(engine, subnet, batch, inputs) for _ in range(repeats))
    return {"alone_ms": alone_ms, "back_to_back_ms": between_ms, "issued_ms": statistics.median(issued_ms)}


def stage_variants(options: Options, save: Save) -> list[dict[str, Any]]:
    """The largest and the smallest subnet in each variant: alone, back to back, and the time that the host takes."""
    model, found, repeats = random_export_of(options), [], 3 if options.quick else 40
    subnets = {"largest": model.space.largest(), "smallest": model.space.smallest()}
    one_bucket = dict.fromkeys(subnets.values(), subnets["largest"])
    variants: dict[str, dict[str, Any]] = {  # the options of the engine
        "as served": {},
        "as served, no graphs": {},
        "in the call": {"slicing": "in_call"},
        "bfloat16": {"compute_dtype": "bfloat16"},
        "one bucket": {"envelopes": one_bucket},
        "one bucket, no graphs": {"envelopes": one_bucket},
        "not prepared": {"prepared": False},
    }
    lengths = prepare.check_lengths(model.config, None)[-1:]
    for batch, (variant, engine_options) in itertools.product((2,) if options.quick else (16, 1, 64), variants.items()):
        start_s, no_graphs = time.perf_counter(), mock.patch.object(compiler, "options", return_value=_NO_GRAPHS)
        shapes: dict[str, Any] = {"batch_sizes": (batch,), "lengths": lengths}
        try:
            with no_graphs if "no graphs" in variant else contextlib.nullcontext():
                engine = DeviceEngine(model, jax.devices()[0], subnet_list=[*subnets.values()], **shapes, **engine_options)
            made_s = time.perf_counter() - start_s
            for name, subnet in subnets.items():
                times = time_variant(engine, subnet, batch, repeats)
                about = {"batch": batch, "subnet": name, "variant": variant, "command_buffers": engine.command_buffers}
                found.append({**about, **times, "made_s": made_s})
        except Exception as e:  # another variant may work, for example without command buffers
            found.append({"batch": batch, "variant": variant, "error": f"{type(e).__name__}: {str(e)[:300]}"})
        print(*found[-len(subnets) :], sep="\n", flush=True)
        save(found)
    return found


def closed_loop_qps(server: Server, example: np.ndarray, seconds: float) -> float:
    """Queries per second if four of the largest batches are always submitted: after each batch of answers, as many queries."""
    batch = [example] * server.profile.max_batch
    waiting, answered, start_s = deque(server.submit_many(batch) for _ in range(4)), 0, time.perf_counter()
    while time.perf_counter() < start_s + seconds:
        for future in waiting.popleft():
            future.result()
        answered += len(batch)
        waiting.append(server.submit_many(batch))
    return answered / (time.perf_counter() - start_s)


def stage_serving(options: Options, save: Save) -> dict[str, Any]:
    """With and without overlap: a profile, the throughput of the server, and its answers at three loads."""
    model, device = random_export_of(options), jax.devices()[0]
    sizes, repeats, seconds = ((1, 2), 2, 0.3) if options.quick else (_SERVED_SIZES, 20, 4.0)
    lengths = prepare.check_lengths(model.config, None)[-1:]
    engine = DeviceEngine(model, device, subnet_list=model.subnets, batch_sizes=sizes, lengths=lengths)
    by_cost = sorted(model.subnets, key=model.config.flops)
    accuracies = {s: 0.7 + 0.1 * i / len(by_cost) for i, s in enumerate(by_cost)}  # made up, and ascending
    example, found = np.zeros(engine.input_shape, engine.input_dtype), dict[str, Any](batch_sizes=sizes)
    for mode, overlaps in {"overlap": True, "no overlap": False}.items():
        engine.overlap = overlaps  # decides what `measure` measures
        measured = profiling.measure(engine, accuracies, sizes, device=machine.device_kind(device), repeats=repeats)
        [table] = measured.each_length
        profile = measured.monotone()
        fastest = profile.only(by_cost[:1])
        with Server.from_engines([engine], fastest, slo_ms=1e6, overlap=overlaps, **overlap.QUEUE) as server:
            limit_qps = closed_loop_qps(server, example, seconds)
        found[mode] = {
            "latency_ms": [row.latency_ms for row in table.rows],
            "properties": [(p.name, p.holding, p.of, p.worst) for p in profiling.properties(table)],
            "device_qps": table.throughput_qps(by_cost[0]),
            "closed_loop_qps": limit_qps,
            "loads": [],
        }
        save(found)
        for load in (0.3, 0.6, 0.9):
            figures = at_load(engine, profile, load * limit_qps, seconds, overlaps=overlaps)
            found[mode]["loads"].append({"load": load, **figures})
            print(mode, found[mode]["loads"][-1], flush=True)
            save(found)
    return found


def at_load(engine: DeviceEngine, profile: Profile, qps: float, seconds: float, *, overlaps: bool) -> dict[str, float]:
    """Attainment, accuracy and p99 of a server under bursty traffic."""
    example = np.zeros(engine.input_shape, engine.input_dtype)
    trace = traces.gamma(rate_qps=qps, cv2=4.0, duration_s=seconds, slo_ms=overlap.SLO_MS)
    with Server.from_engines([engine], profile, slo_ms=overlap.SLO_MS, overlap=overlaps, **overlap.QUEUE) as server:
        seen = loadgen.summarize(loadgen.replay(server, trace, [example] * len(trace)))
    return {"qps": qps, "attainment": seen.attainment, "accuracy": seen.accuracy, "p99_ms": seen.p99_ms}


STAGES: Mapping[str, tuple[float, Callable[[Options, Any], Any]]] = {
    "device": (40, stage_device),
    "tests": (120, stage_tests),
    "variants": (130, stage_variants),
    "actuation": (100, stage_actuation),
    "serving": (110, stage_serving),
    "memory": (100, stage_memory),
    "overlap": (50, stage_overlap),
}
"""The stages in order. A stage gets (its number here / the sum for all stages that are left) of the time that is left."""


if __name__ == "__main__":
    cli.run(main)
