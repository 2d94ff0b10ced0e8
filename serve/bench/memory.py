"""Measures the memory that many subnets of one SuperNet need, and the memory of a few extracted subnets.

One file because every variant is measured by the same function, each in a fresh process.

    python serve/bench/memory.py configs/ofa_resnet50.py --json memory.json

It takes an export's directory or a config file. For a config file, it makes an export with fresh weights and random
statistics for many subnets. Each line of the table is measured in a fresh process:

- in place, with slicing in the call, as in the paper;
- in place with kept slices, within the default budget and within a smaller one;
- some extracted subnets, evenly spaced in FLOPs, without the SuperNet.

A process runs one subnet of every subnet bucket, or every extracted network, twice. Then it runs three subnets in turn to
measure their latencies. The columns:

- live: the most bytes of all arrays on the device between two calls. They are weights, statistics and kept slices.
- statistics, slices: the bytes of statistics and of kept slices, which are parts of live.
- temporaries: the most bytes that any executable needs in addition during a call, as XLA counts them.
- resident: on a CPU, the growth of the process since before the model was loaded. It includes code, statistics on the host
  and Python's own objects.
- peak: the largest value of resident while the process runs. On a GPU, it is the device's own count.
- statistics on host: statistics of all subnets. The device holds only the statistics of recently used subnets.
- executables: on a CPU, the growth of resident by loading executables, without arrays. XLA keeps far more than their code.
- code: the code of the executables, loaded or serialised as the line below the table says.

Two lines are not measured but computed from numbers of parameters: all subnets extracted and, for a network with the 1,000
classes of ImageNet, four published ResNets (the paper's Figure 5a; `experiments.hand_tuned` gives the source).

On a GPU, the default gives memory for speed: it keeps a prepared copy of the weights for each subnet bucket. Compare the other
two lines in place with the paper's 2.6. The file of --json is written after each line.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import gc
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import extracted
import jax
import psutil
import tyro

from superserve_jax import cli, exports, files, machine
from superserve_jax.engines import prepare, subnet_buckets
from superserve_jax.engines.device import SLICES_SHARE, DeviceEngine, Slicing
from superserve_jax.engines.keys import Device
from superserve_jax.experiments import hand_tuned
from superserve_jax.exports import Model
from superserve_jax.subnet import Subnet, evenly_spaced
from superserve_jax.supernets.family import FamilyConfig

IMAGENET_CLASSES = 1000
SHOWN = 3  # subnets whose latencies are measured
PROCESS = pathlib.Path("/proc/self")
COLUMNS = {
    "live_bytes": "live",
    "statistics_bytes": "statistics",
    "slices_bytes": "slices",
    "temporary_bytes": "temporaries",
    "resident_bytes": "resident",
    "peak_bytes": "peak",
    "host_statistics_bytes": "statistics on host",
    "executables_bytes": "executables",
    "code_bytes": "code",
}
RATIOS = {
    "live": ("live_bytes",),
    "live, statistics on host": ("live_bytes", "host_statistics_bytes"),
    "live, temporaries": ("live_bytes", "temporary_bytes"),
    "resident": ("resident_bytes",),
    "peak": ("peak_bytes",),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      path: an export's directory or a config file.
      subnets: the number of served subnets, for a config file.
      executables: the largest number of subnet buckets, which is also the number of executables.
      extracted: the number of extracted subnets.
      small_budget_mib: the smaller byte budget of kept slices, in MiB.
      batch_size: the batch size.
      length: the length of inputs, for a model of sequences; if left out, its longest.
      repeats: the number of timed calls of each subnet whose latency is printed.
      json: write the figures to this file.
    """

    path: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("configs/ofa_resnet50.py")
    subnets: int = 500
    executables: int = prepare.MAX_SUBNET_BUCKETS
    extracted: int = 6
    small_budget_mib: int = 32
    batch_size: int = 1
    length: int | None = None
    repeats: int = 20
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "subnets", "executables", "extracted", "small_budget_mib", "batch_size", "repeats")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to hold subnets in memory: a line of the table.

    Args:
      name: the line's name.
      subnet_list: the served subnets.
      visited: the subnets that run, the largest last.
      shown: the subnets whose latencies are measured.
      shape: batch size and length; the length is 0 if all inputs have one shape.
      slicing: see `DeviceEngine`; None for extracted subnets.
      envelopes: see `DeviceEngine`.
      slice_bytes: see `DeviceEngine`.
    """

    name: str
    subnet_list: tuple[Subnet, ...]
    visited: tuple[Subnet, ...]
    shown: tuple[Subnet, ...]
    shape: tuple[int, int]
    slicing: Slicing | None
    envelopes: Mapping[Subnet, Subnet] = dataclasses.field(default_factory=dict)
    slice_bytes: int | None = None


def measure(path: pathlib.Path, variant: Variant, repeats: int) -> dict[str, Any]:
    """The figures of a variant. It must run in a fresh process."""
    device = jax.devices()[0]
    jax.block_until_ready(jax.device_put(0, device))
    before, live_before = resident(), live_bytes(device)
    model = exports.load(path)
    weights = sum(value.nbytes for value in model.params.values())
    settle()
    loaded, host_before = resident() - live_bytes(device), host_statistics(model)
    engine, calls, run = open_variant(model, variant, device)

    live = max(visit(run, variant, device))
    settle()
    after, host_after = resident(), host_statistics(model)
    growth = after - live_bytes(device) - loaded + host_before - host_after
    reset_peak()
    live = max(live, *visit(run, variant, device))
    times_ms: dict[Subnet, list[float]] = {s: [] for s in variant.shown}
    for _ in range(repeats):
        for s, times in times_ms.items():
            run(s)
            start = time.perf_counter()
            run(s)
            times.append(1e3 * (time.perf_counter() - start))
    live = max(live, live_bytes(device))  # the statistics of these subnets may be new
    stats = device.memory_stats()
    analyses = [call.memory_analysis() for call in calls]
    code = sum(a.generated_code_size_in_bytes for a in analyses)
    return {
        "name": variant.name,
        "subnets": len(variant.subnet_list),
        "executables": len(calls),
        "live_bytes": live - live_before,
        "weights_bytes": weights if engine else None,
        "statistics_bytes": engine.statistics.nbytes if engine else None,
        "slices_bytes": engine.slices.nbytes if engine else None,
        "temporary_bytes": max(a.temp_size_in_bytes for a in analyses),
        "resident_bytes": after - before,
        "peak_bytes": stats["peak_bytes_in_use"] if stats else peak() - before,
        "host_statistics_bytes": host_after,
        "executables_bytes": growth if device.platform == "cpu" else None,
        "code_bytes": code or sum(len(call.runtime_executable().serialize()) for call in calls),
        "code_counted": "loaded" if code else "serialised",
        "latency_ms": [statistics.median(times) for times in times_ms.values()],
    }


def open_variant(
    model: Model, variant: Variant, device: Device
) -> tuple[DeviceEngine | None, tuple[Any, ...], Callable[[Subnet], object]]:
    """The engine (None for extracted networks), the compiled functions, and a function that runs a batch of a subnet."""
    batch_size, length = variant.shape
    inputs = extracted.random_batch(model.config, batch_size, length)
    if variant.slicing is None:
        networks = extracted.extract(model, variant.subnet_list, device, batch_sizes=(batch_size,), length=length)
        model.params.clear()  # a server of extracted networks has no SuperNet
        model.statistics.clear()
        for network in networks.values():
            network.place(device)
            network.host.clear()
        return None, tuple(call for n in networks.values() for call in n.executables), lambda s: networks[s](inputs)
    engine = DeviceEngine(
        *(model, device),
        subnet_list=variant.subnet_list,
        batch_sizes=(batch_size,),
        lengths=(length,) if length else (),
        envelopes=variant.envelopes,
        slicing=variant.slicing,
        slice_bytes=variant.slice_bytes,
    )
    return engine, engine.executables, lambda s: engine.run(s, batch_size, list(inputs))


def visit(run: Callable[[Subnet], object], variant: Variant, device: Device) -> list[int]:
    """Runs the visited subnets. Returns the live bytes of the device after each."""
    found = []
    for s in variant.visited:
        run(s)
        found.append(live_bytes(device))
    return found


def live_bytes(device: Device) -> int:
    """Bytes of all arrays on a device. Arrays that share a buffer count once."""
    if stats := device.memory_stats():
        return stats["bytes_in_use"]
    arrays = (a for a in jax.live_arrays() if not a.is_deleted() and a.devices() == {device})
    return sum({a.unsafe_buffer_pointer(): a.nbytes for a in arrays}.values())


def host_statistics(model: Model) -> int:
    """Bytes of the statistics of all subnets on the host."""
    return sum(value.nbytes for value in model.statistics.values())


def resident() -> int:
    """Resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak() -> int:
    """The most resident bytes of this process since `reset_peak`. 0 on systems other than Linux, since psutil lacks it."""
    lines = (PROCESS / "status").read_text().splitlines() if PROCESS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def reset_peak() -> None:
    """Makes `peak` start again from the current resident memory."""
    if PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")


def settle() -> None:
    """Returns freed memory to the system. Loading and compiling free much, and the C library would keep it for a while."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own."""
    context = multiprocessing.get_context("spawn")  # a fork would share the memory of this process
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def variants(model: Model, options: Options) -> list[Variant]:
    """The variants to measure; the extracted subnets come last."""
    flops = model.config.flops
    envelopes = subnet_buckets.choose(model.subnets, flops, options.executables)
    by_bucket = {envelopes[s]: s for s in sorted(model.subnets, key=flops)}
    chosen = tuple(evenly_spaced(model.subnets, flops, options.extracted))
    in_call = Variant(
        name="in place, in_call",
        subnet_list=tuple(model.subnets),
        visited=tuple(sorted(by_bucket.values(), key=flops)),
        shown=tuple(evenly_spaced(chosen, flops, SHOWN)),
        shape=(options.batch_size, extracted.length_of(model.config, options.length)),
        slicing="in_call",
        envelopes=envelopes,
    )
    kept = dataclasses.replace(in_call, name="in place, kept (default)", slicing="kept")
    small = f"in place, kept within {options.small_budget_mib} MiB"
    return [
        in_call,
        kept,
        dataclasses.replace(kept, name=small, slice_bytes=options.small_budget_mib << 20),
        Variant(f"{len(chosen)} extracted", chosen, chosen, in_call.shown, in_call.shape, None),
    ]


def all_extracted(model: Model) -> dict[str, Any]:
    """The live bytes of all subnets extracted. They are computed, since all of them may not fit into memory."""
    weights, config = sum(value.nbytes for value in model.params.values()), model.config
    each = weights / config.num_params(model.space.largest())
    held = sum(model.statistics_of(s).nbytes for s in model.subnets)
    live = round(each * sum(map(config.num_params, model.subnets))) + held
    return {"name": f"{len(model.subnets)} extracted (computed)", "subnets": len(model.subnets), "live_bytes": live}


def hand_tuned_resnets(model: Model) -> list[dict[str, Any]]:
    """The live bytes of four published ResNets, for a network with the classes of ImageNet. They are computed."""
    if model.config.num_classes != IMAGENET_CLASSES:
        return []
    names = ", ".join(network.name.removeprefix("ResNet-") for network in hand_tuned.RESNETS)
    live = sum(network.weights_bytes for network in hand_tuned.RESNETS)
    return [{"name": f"ResNet-{names} (computed)", "subnets": len(hand_tuned.RESNETS), "live_bytes": live}]


def ratio_from_sizes(config: FamilyConfig, subnet_list: Sequence[Subnet], *, extracted: int) -> float:
    """(live bytes of extracted subnets) / (live bytes of all subnets in place, with kept slices). Nothing is compiled or run.

    In place are the weights, slices of the default budget, and statistics of as many subnets as there are subnet buckets.
    """
    visited = evenly_spaced(subnet_list, config.flops, prepare.MAX_SUBNET_BUCKETS)
    chosen = evenly_spaced(subnet_list, config.flops, extracted)
    in_place = (1 + SLICES_SHARE) * 4 * config.num_params(config.space().largest())
    weights = sum(4 * config.num_params(s) for s in chosen)
    return (weights + _statistics_bytes(config, chosen)) / (in_place + _statistics_bytes(config, visited))


def _statistics_bytes(config: FamilyConfig, subnet_list: Iterable[Subnet]) -> int:
    return sum(8 * sum(config.norm_sizes(config.sizes(s)).values()) for s in subnet_list)


def report(found: dict[str, Any]) -> None:
    """Prints the figures."""
    print(f"{found['device']}; accuracies: {found['measured']}; sizes are real. MB, and median ms at {found['shape']}:")
    latencies = [f"{flops / 1e6:.4g} MFLOPs" for flops in found["shown_flops"]]
    lines = [("", "number of executables", *COLUMNS.values(), *latencies)]
    for variant in found["variants"]:
        sizes = (f"{variant[key] / 1e6:.1f}" if variant.get(key) is not None else "" for key in COLUMNS)
        times = [f"{ms:.3g}" for ms in variant.get("latency_ms", ())] or [""] * len(latencies)
        lines.append((variant["name"], str(variant.get("executables", "")), *sizes, *times))
    cli.print_table(lines)
    if not found["device"].startswith("cpu"):
        print("On this device, kept (default) gives memory for speed. Compare the other lines in place with the paper's 2.6.")
    print(f"code: size when {found['variants'][0]['code_counted']}")
    print(f"memory of {found['reference']} / memory of the subnets in place:")
    lines = [("", *RATIOS)]
    for name, ratios in found["ratios"].items():
        lines.append((name, *(f"{value:.2f}" for value in ratios.values())))
    cli.print_table(lines)
    for resnets in found["variants"][len(found["ratios"]) + 2 :]:
        live = (
            f"{resnets['live_bytes'] / v['live_bytes']:.2f} of {v['name']}" for v in found["variants"][: len(found["ratios"])]
        )
        print(f"memory of {resnets['name']} / live memory: {'; '.join(live)}")


def ratios(reference: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, float]:
    """Memory of the reference / memory of a variant, for each way of counting in `RATIOS`."""
    return {name: sum(reference[k] for k in keys) / sum(variant[k] for k in keys) for name, keys in RATIOS.items()}


def measure_all(options: Options, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The figures that the program prints. Calls `save` after each variant with the figures of the variants so far."""
    from superserve_jax.training import random_export  # only here, since it takes long and no child process needs it

    with random_export.export_of(options.path, subnets=options.subnets) as path:
        model = exports.load(path)
        to_measure = variants(model, options)
        for variant in to_measure:  # fills the cache of executables, since a process that compiles grows larger
            open_variant(exports.load(path), variant, jax.devices()[0])
        measured = []
        for variant in to_measure:
            measured.append(in_fresh_process(measure, path, variant, options.repeats))
            save({"variants": measured})
    *in_place, reference = measured
    batch_size, length = to_measure[0].shape
    return {
        "device": machine.device_kind(jax.devices()[0]),
        "measured": model.manifest["measured"],
        "shape": f"batch {batch_size}" + (f", length {length}" if length else ""),
        "shown_flops": [model.config.flops(s) for s in to_measure[0].shown],
        "variants": [*measured, all_extracted(model), *hand_tuned_resnets(model)],
        "reference": reference["name"],
        "ratios": {variant["name"]: ratios(reference, variant) for variant in in_place},
    }


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process and its children share the card's memory
    found = measure_all(options, functools.partial(files.write_json, options.json) if options.json else lambda _: None)
    report(found)
    cli.write_results(options.json, found)


if __name__ == "__main__":
    cli.run(main)
