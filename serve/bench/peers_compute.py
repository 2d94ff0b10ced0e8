"""Compares the time of a subnet in this project's engine, in ONNX Runtime and in OpenVINO, on the CPU of this machine.

One file because all libraries share the case, the rounds and the table.

    pip install 'superserve-jax[peers]'
    python serve/bench/peers_compute.py --json runs/peers.json
    python serve/bench/peers_compute.py runs/demo/export --batch-sizes 1 4 16 --throughput

It takes exports and config files. For a config file, it makes an export with random weights and calibrates the subnets. The
smallest, a middle and the largest subnet are extracted as ONNX. So all libraries compute the same network in float32, with the
same weights, and their logits must agree. Every call starts from a list of raw inputs, and ends with logits in NumPy. Texts
have the longest length, as in `config.flops`. `digits` comes with the package. The export of the demo, runs/demo/export, works
as well; it is the same network.

First the program finds out which batch sizes our engine runs faster in parts, as `superserve measure` does. Then the libraries
take turns in one process, several rounds, each with all cores, and another one begins in each round. A line has the median
time of a call, the GFLOP/s (a multiply-add counts as two operations), and its share of the peak. The peak is the rate of a
product of two 2048 x 2048 matrices in jax, NumPy or ONNX Runtime, whichever is fastest on this machine.

`--throughput` keeps all cores busy instead. A library runs one batch at a time with all cores, or one batch on each core. The
program prints the most inputs per second over these arrangements and the batch sizes. Cores are logical CPUs here. All
arrangements are in memory at once, since they take turns: other libraries have up to (1 + cores) copies of the weights.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
import psutil
import tyro

from superserve_jax import cli, errors, exports, extract, machine, progress
from superserve_jax.engines import cpu_clients, cpu_workers
from superserve_jax.exports import Model
from superserve_jax.extract import checking
from superserve_jax.extract.onnx_graph import Graph
from superserve_jax.profile import check_batch_sizes
from superserve_jax.subnet import Subnet, evenly_spaced
from superserve_jax.supernets import compiler, programs
from superserve_jax.supernets.family import SequenceConfig
from superserve_jax.training import random_export

PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
OURS = "ours"
CANDIDATES = 24  # subnets of a config file, from which the middle one is chosen
SHOWN = 3
TOLERANCE = 1e-4  # of the largest logit
_CALIBRATION = 8  # random inputs
_LEAST_CALLS = 2  # in a turn
_BUSY = 0.25  # of each core, before the program begins
_PEAK_SIZE, _QUICK_SIZE = 2048, 128

T = TypeVar("T")
Call = Callable[[], np.ndarray]
"""Runs one batch, and returns its logits."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      networks: directories of exports, names of shipped exports, or config files.
      batch_sizes: the batch sizes to measure.
      rounds: the number of turns of each library.
      turn_s: the seconds of a turn; a turn has at least two calls.
      throughput: measure inputs per second with all cores busy, in place of single calls.
      quick: only try it, with short turns and a small matrix product.
      json: write the figures to this file.
    """

    networks: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = (
        pathlib.Path("configs/ofa_resnet50.py"),
        pathlib.Path("configs/dynabert_mnli.py"),
        pathlib.Path("digits"),
    )
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    rounds: int = 5
    turn_s: float = 0.3
    throughput: bool = False
    quick: bool = False
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "rounds", "turn_s")


# -- the libraries ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One subnet at one batch size.

    Args:
      model: the export.
      subnet: the subnet.
      onnx: the subnet as ONNX.
      inputs: a batch of raw inputs.
      parts: the inputs in each part of our engine's batches, by batch size.
    """

    model: Model
    subnet: Subnet
    onnx: bytes
    inputs: list[np.ndarray]
    parts: Mapping[int, int]


def engine_options(model: Model) -> dict[str, Any]:
    """Options of our engine: slices of any subnet are kept, and texts have the longest length."""
    lengths = (model.config.max_length,) if isinstance(model.config, SequenceConfig) else ()
    return {"lengths": lengths, "slice_bytes": 4 * sum(value.size for value in model.params.values())}


def engine_calls(case: Case, workers: int, cores: int) -> list[Call]:
    """One call for each worker: an engine on an equal share of the cores."""
    size, parts = len(case.inputs), cpu_clients.parts_of_workers(case.parts, workers)
    shapes = {"subnet_list": [case.subnet], "batch_sizes": (size,), "parts": parts, **engine_options(case.model)}
    engines = cpu_workers.create(case.model, workers, **shapes)
    return [lambda engine=engine: np.stack(engine.run(case.subnet, size, case.inputs)) for engine in engines]


def onnxruntime_calls(case: Case, workers: int, cores: int) -> list[Call]:
    """One call for each worker: a session that has an equal share of the cores."""
    made = []
    for _ in range(workers):
        session = onnxruntime_session(case.onnx, max(cores // workers, 1), np.shape(case.inputs))
        made.append(lambda session=session: session.run(None, {"inputs": np.stack(case.inputs)})[0])
    return made


def onnxruntime_session(onnx: bytes, threads: int, shape: Sequence[int]) -> Any:
    """A session for inputs of one shape."""
    onnxruntime = imported("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for axis, size in zip(("batch", "tokens"), shape, strict=False):
        options.add_free_dimension_override_by_name(axis, size)
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def openvino_calls(case: Case, workers: int, cores: int) -> list[Call]:
    """One call for each worker: a request on a stream of its own."""
    core = imported("openvino").Core()
    graph = core.read_model(case.onnx, b"")
    graph.reshape(np.shape(case.inputs))
    options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": workers, "INFERENCE_NUM_THREADS": cores}
    requests = [core.compile_model(graph, "CPU", options).create_infer_request()]
    requests += [requests[0].get_compiled_model().create_infer_request() for _ in range(workers - 1)]
    return [lambda request=request: request.infer([np.stack(case.inputs)])[0] for request in requests]


CALLS: Mapping[str, Callable[[Case, int, int], list[Call]]] = {
    OURS: engine_calls,
    "onnxruntime": onnxruntime_calls,
    "openvino": openvino_calls,
}


def imported(name: str) -> Any:
    """The module of an installed library."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # it would report the use, in a forked process
    return importlib.import_module(name)


def libraries() -> list[str]:
    """Ours and the installed ones. Raises ConfigError if none is installed."""
    found = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    if not found:
        raise errors.ConfigError("no library to compare with is installed: pip install 'superserve-jax[peers]'")
    if importlib.util.find_spec("onnx") is None:
        raise errors.ConfigError("the package onnx is missing: pip install 'superserve-jax[peers]'")
    for missing in PEERS.keys() - set(found):
        print(f"{PEERS[missing]} is not installed, so it is left out: pip install {missing}")
    return [OURS, *found]


# -- measuring ----------------------------------------------------------------------------------------------------------


def rotated(items: Mapping[T, Any], count: int) -> list[T]:
    """The keys, beginning with the one of index `count` modulo their number."""
    start = count % len(items)
    return [*items][start:] + [*items][:start]


def alternate(calls: Mapping[str, Call], options: Options) -> dict[str, list[float]]:
    """The milliseconds of every call, by name. The names take turns, and the first call of a turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(options.rounds):
        for name in rotated(calls, i):
            call = calls[name]
            call()
            ends_s, count = time.perf_counter() + options.turn_s, 0
            while count < _LEAST_CALLS or time.perf_counter() < ends_s:
                start_s = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start_s))
                count += 1
    return times


def batches_per_s(calls: Sequence[Call], seconds: float) -> float:
    """Batches per second, if every call runs again and again in a thread of its own. Raises InferenceError if one fails."""
    barrier = threading.Barrier(len(calls))

    def work(call: Call) -> float:
        try:
            call()
            barrier.wait()
        except BaseException:
            barrier.abort()  # or the other threads would wait forever
            raise
        start_s, count = time.perf_counter(), 0
        while count < _LEAST_CALLS or time.perf_counter() < start_s + seconds:
            call()
            count += 1
        return count / (time.perf_counter() - start_s)

    with futures.ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(work, call) for call in calls]
    failed = [e for f in running if (e := f.exception()) and not isinstance(e, threading.BrokenBarrierError)]
    if failed:
        raise errors.InferenceError(f"a call failed: {type(failed[0]).__name__}: {errors.one_line(failed[0])}") from failed[0]
    return sum(f.result() for f in running)


def peak_gflops(options: Options, cores: int) -> dict[str, float]:
    """The best rate of a large matrix product in GFLOP/s, by library."""
    n = _QUICK_SIZE if options.quick else _PEAK_SIZE
    a, b = np.random.default_rng(0).normal(size=(2, n, n)).astype(np.float32)
    on_device = jax.device_put((a, b))
    product = jax.jit(jax.numpy.matmul, compiler_options=compiler.options("cpu")).lower(*on_device).compile()
    calls: dict[str, Call] = {"jax": lambda: product(*on_device).block_until_ready(), "NumPy": lambda: a @ b}
    if importlib.util.find_spec("onnxruntime") is not None:
        graph, described = Graph(), {"shape": [n, n], "dtype": "float32"}
        graph.add("logits", "MatMul", "inputs", graph.constant("b", b))
        contract = {"family": "product", "input": {"name": "inputs", **described}, "output": {"name": "logits", **described}}
        session = onnxruntime_session(graph.serialize(contract), cores, a.shape)
        calls["ONNX Runtime"] = lambda: session.run(None, {"inputs": a})[0]
    return {name: 2e-6 * n**3 / min(ms) for name, ms in alternate(calls, options).items()}


@contextlib.contextmanager
def model_of(path: pathlib.Path) -> Iterator[tuple[Model, list[Subnet]]]:
    """A model and the subnets to measure. For a config file, they get the statistics of random inputs."""
    with random_export.export_of(path, subnets=CANDIDATES) as folder:
        model = exports.load(folder)
        chosen = evenly_spaced(model.subnets, model.config.flops, SHOWN)
        if path.suffix == ".py":
            for s in chosen:
                model.statistics[s] = calibrated(model, s)
        yield model, chosen


def calibrated(model: Model, subnet: Subnet) -> np.ndarray:
    """Statistics of a subnet on random inputs. Without them, all activations of random weights would soon be zero."""
    inputs = checking.random_inputs(model.config, _CALIBRATION)
    if inputs.ndim == 4:  # images that differ in brightness, since deep layers hardly tell noise from noise
        inputs = (inputs * np.linspace(0, 1, len(inputs))[:, None, None, None]).astype(inputs.dtype)
    program = programs.sliced(model.config, subnet)
    return np.asarray(jax.jit(program.train)(model.params, inputs, program.active(subnet))[1])


def cases(model: Model, chosen: Sequence[Subnet], parts: Mapping[int, int], options: Options) -> Iterator[Case]:
    """Every subnet at every batch size."""
    for s in chosen:
        content = extract.content(extract.take(model, model.subnets.index(s)), "onnx")
        for size in options.batch_sizes:
            yield Case(model, s, content, list(checking.random_inputs(model.config, size)), parts)


def one_call(case: Case, names: Sequence[str], cores: int, options: Options) -> dict[str, Any]:
    """Median times of single calls with all cores, and the largest difference of logits to ours."""
    calls = {name: CALLS[name](case, 1, cores)[0] for name in names}
    differences = agreement({name: call() for name, call in calls.items()})
    times = alternate(calls, options)
    return {"ms": {name: statistics.median(ms) for name, ms in times.items()}, "differences": differences}


def saturated(case: Case, names: Sequence[str], cores: int, options: Options) -> dict[str, Any]:
    """Inputs per second with all cores busy, by library and number of batches at a time."""
    counts = sorted({1, cores})
    arrangements = {(name, workers): CALLS[name](case, workers, cores) for name in names for workers in counts}
    each = [agreement({name: arrangements[name, workers][0]() for name in names}) for workers in counts]
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in arrangements}
    for i in range(options.rounds):
        for key in rotated(arrangements, i):
            rates[key].append(len(case.inputs) * batches_per_s(arrangements[key], options.turn_s))
    found: dict[str, Any] = {name: {} for name in names}
    for (name, workers), values in rates.items():
        found[name][str(workers)] = statistics.median(values)
    return {"inputs_per_s": found, "differences": {name: max(d[name] for d in each) for name in each[0]}}


def agreement(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The largest difference to our logits, over the largest logit. Raises InferenceError for another network."""
    scale = float(np.abs(outputs[OURS]).max())
    if scale == 0:
        raise errors.InferenceError("all our logits are 0, so nothing can be compared; use trained weights")
    found = {name: float(np.abs(logits - outputs[OURS]).max()) / scale for name, logits in outputs.items() if name != OURS}
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            raise errors.InferenceError(
                f"the logits of {PEERS[name]} differ from ours by {difference:.1e} of the largest logit; at most "
                f"{TOLERANCE:g} is allowed"
            )
    return found


# -- the program --------------------------------------------------------------------------------------------------------


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    check_batch_sizes(options.batch_sizes)
    if jax.default_backend() != "cpu":
        raise errors.ConfigError("this program compares CPUs; set JAX_PLATFORMS=cpu")
    options = dataclasses.replace(options, rounds=1, turn_s=0.001) if options.quick else options
    names, cores = libraries(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = {name: imported(name).__version__ for name in ("jax", *names[1:])}
    measure = functools.partial(saturated if options.throughput else one_call, names=names, cores=cores, options=options)
    networks, load = [], os.getloadavg()[0]
    if load > _BUSY * cores:
        print(f"The machine is busy: its load is {load:.1f} on {cores} cores. Times are too long, and ratios uncertain.")
    for path in options.networks:
        with model_of(path) as (model, chosen):
            peaks, count = peak_gflops(options, cores), len(chosen) * len(options.batch_sizes)
            way = {"subnet_list": chosen, "rounds": options.rounds, **engine_options(model)}
            parts, _ = cpu_workers.faster_parts(model, options.batch_sizes, **way)
            found = []
            for case in progress.track(cases(model, chosen, parts, options), str(path), total=count):
                about = {"subnet": case.subnet.to_json(), "flops": model.config.flops(case.subnet), "batch": len(case.inputs)}
                found.append({**about, **measure(case)})
            about = {"network": str(path), "family": model.config.family, "parts": parts}
            networks.append({**about, "peak_gflops": peaks, "cases": found})
            (report_throughput if options.throughput else report)(networks[-1], names)
    device, physical = machine.device_kind(jax.devices()[0]), psutil.cpu_count(logical=False)
    about = {"device": device, "cores": cores, "physical_cores": physical, "load_before": load, "versions": versions}
    print(f"\n{device}; {cores} logical CPUs for this process, {physical or 'unknown'} physical cores in the machine")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    cli.write_results(options.json, {**about, "quick": options.quick, "networks": networks})


def report(network: Mapping[str, Any], names: Sequence[str]) -> None:
    """Prints a line for each subnet and batch size."""
    best = max(network["peak_gflops"].values())
    shown = ", ".join(f"{name} {value:.0f}" for name, value in network["peak_gflops"].items())
    print(f"\n{network['network']} ({network['family']}); matrix product in GFLOP/s: {shown}; peak {best:.0f}")
    print(f"inputs in each part of our batches, by batch size: {network['parts'] or 'no parts'}")
    lines = [("library", "MFLOPs", "batch", "ms", "ours / library", "GFLOP/s", "of peak", "difference")]
    for case in network["cases"]:
        for name in names:
            ms, difference = case["ms"][name], case["differences"].get(name)
            rate = 2e-6 * case["flops"] * case["batch"] / ms
            ratio = "" if name == OURS else f"{case['ms'][OURS] / ms:.2f}"
            cells = (f"{ms:.3g}", ratio, f"{rate:.0f}", f"{100 * rate / best:.0f} %")
            about = (title(name), f"{case['flops'] / 1e6:.4g}", str(case["batch"]))
            lines.append((*about, *cells, "" if difference is None else f"{difference:.0e}"))
    cli.print_table(lines)


def title(name: str) -> str:
    """The name of a library for a person to read."""
    return PEERS.get(name, name)


def report_throughput(network: Mapping[str, Any], names: Sequence[str]) -> None:
    """Prints a line for each subnet: the best of all batch sizes and arrangements."""
    print(f"\n{network['network']} ({network['family']}); most inputs per second (at batch size x batches at a time):")
    lines = [("MFLOPs", *map(title, names), *(f"ours / {title(name)}" for name in names[1:]))]
    for _, group in itertools.groupby(network["cases"], key=lambda case: case["subnet"]):
        same = list(group)
        best = [max((rate, c["batch"], n) for c in same for n, rate in c["inputs_per_s"][name].items()) for name in names]
        cells = (f"{rate:.4g} ({batch} x {workers})" for rate, batch, workers in best)
        lines.append((f"{same[0]['flops'] / 1e6:.4g}", *cells, *(f"{best[0][0] / rate:.2f}" for rate, _, _ in best[1:])))
    cli.print_table(lines, left=0)


if __name__ == "__main__":
    cli.run(main)
