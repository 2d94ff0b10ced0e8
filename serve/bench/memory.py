"""What many subnets take of a device's memory served in place, beside a few of them extracted, a network each.

    python serve/bench/memory.py configs/ofa_resnet50.py --json memory.json

Takes an export's directory, or a config file, whose network gets fresh weights and made-up statistics for many subnets.
Each row of the table is a fresh process: in place, sliced in the call; in place with kept slices, at the default budget and at
a smaller one; and some subnets extracted, evenly spaced in FLOPs, which need no SuperNet. A process runs a subnet of every
subnet bucket, or every extracted network, twice, and then three subnets in turn, whose latencies are in the same row.

- live: the most bytes of all arrays on the device between two calls: weights, rows of statistics, kept slices.
- temporaries: the most that any executable takes during a call besides those, by XLA's own account.
- resident: on a CPU, by how much the process has grown since before the model was loaded; peak: the most while it runs. Both
  include executables' code, rows on the host and Python's own objects. On a GPU, peak is the device's own counting since the
  start of the process.
- rows on host: statistics of all subnets, of which the device holds those of the most recently used.
- executables: on a CPU, what resident grows by besides arrays when they are loaded: XLA keeps far more than their code.

All subnets extracted are not measured, but computed from their number of parameters.
Library: engines.device, engines.executables, engines.subnet_buckets, subnet.evenly_spaced, training.random_export.
"""

import concurrent.futures
import ctypes
import dataclasses
import gc
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from superserve_jax import cli, errors, exports, files
from superserve_jax.engines import prepare, subnet_buckets
from superserve_jax.engines.device import DeviceEngine, Slicing
from superserve_jax.engines.executables import build, input_spec
from superserve_jax.exports import Model
from superserve_jax.subnet import Subnet, evenly_spaced
from superserve_jax.supernets import programs
from superserve_jax.training import random_export

SHOWN = 3  # subnets whose latencies are measured
STATUS = pathlib.Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      path: an export's directory or a config file.
      subnets: how many are served, if it is a config file.
      executables: the most subnet buckets, and so executables.
      extracted: how many subnets are extracted.
      small_budget_mib: the smaller byte budget of kept slices, in MiB.
      batch_size: the batch size.
      length: of a family whose inputs have one; if left out, its longest.
      repeats: calls of each of the subnets whose latency is shown.
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
        if min(self.extracted, self.repeats, self.subnets, self.small_budget_mib, self.batch_size) < 1:
            raise errors.ConfigError(f"numbers of subnets, repeats, MiB and the batch size are at least 1; got {self}")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table, and what its process needs to know.

    Args:
      subnet_list: what it serves.
      visited: those that it runs.
      shown: those whose latencies are measured.
      shape: batch size and length; the latter is 0 where inputs have none.
      slicing: None where subnets are extracted.
      envelopes, slice_bytes: see `device_engine.DeviceEngine`.
    """

    name: str
    subnet_list: tuple[Subnet, ...]
    visited: tuple[Subnet, ...]
    shown: tuple[Subnet, ...]
    shape: tuple[int, int]
    slicing: Slicing | None
    envelopes: Mapping[Subnet, Subnet] = dataclasses.field(default_factory=dict)
    slice_bytes: int | None = None


class Extracted:
    """Subnets extracted, each a network of its own on the device, with the calls that a DeviceEngine has."""

    def __init__(self, model: Model, device: Any, *, subnet_list: Sequence[Subnet], shape: tuple[int, int]):
        self._length = shape[1]
        program_of = {s: programs.sliced(model.config, s) for s in subnet_list}
        lengths = (self._length,) if self._length else ()
        made, _ = build(program_of.values(), shape[:1], device, lengths=lengths, kept=lambda program: True)
        self.executables = tuple(e.call for e in made.values())
        whole = {name: np.asarray(value) for name, value in model.params.items()}
        cut = {
            s: tuple(whole[name][tuple(map(slice, sizes))].copy() for name, sizes in made[program, *shape].leaves)
            for s, program in program_of.items()
        }
        whole.clear()
        model.params.clear()  # a server of extracted networks has no SuperNet
        self._networks = {}
        for s, program in program_of.items():
            arguments = cut.pop(s), model.statistics_of(s), program.active(s)
            self._networks[s] = made[program, *shape].call, *jax.device_put(arguments, device)
        model.statistics.clear()

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Logits."""
        call, leaves, row, active = self._networks[subnet]
        return list(np.asarray(call(leaves, np.stack(inputs), row, active)))


def measure(path: pathlib.Path, variant: Variant, repeats: int) -> dict[str, Any]:
    """The figures of a variant; to be called in a fresh process."""
    device = jax.devices()[0]
    jax.block_until_ready(jax.device_put(0, device))
    before, live_before = resident("VmRSS"), live_bytes(device)
    model = exports.load(path)
    weights = sum(value.nbytes for value in model.params.values())
    settle()
    loaded, host_rows = resident("VmRSS") - live_bytes(device), sum(row.nbytes for row in model.statistics.values())
    batch_size, length = variant.shape
    if variant.slicing is None:
        engine = Extracted(model, device, subnet_list=variant.subnet_list, shape=variant.shape)
    else:
        engine = DeviceEngine(
            *(model, device),
            subnet_list=variant.subnet_list,
            batch_sizes=(batch_size,),
            lengths=(length,) if length else (),
            envelopes=variant.envelopes,
            slicing=variant.slicing,
            slice_bytes=variant.slice_bytes,
        )
    spec = input_spec(model.config, batch_size, length)
    inputs = list(np.random.default_rng(0).integers(0, 2, spec.shape).astype(spec.dtype))  # pixels or token ids
    live = max(visit(engine, variant, inputs, device))
    settle()
    after = resident("VmRSS")
    dropped = host_rows - sum(row.nbytes for row in model.statistics.values())  # those of extracted networks
    growth = after - live_bytes(device) - loaded + dropped
    reset_peak()
    live = max(live, *visit(engine, variant, inputs, device))
    times_ms: dict[Subnet, list[float]] = {s: [] for s in variant.shown}
    for _ in range(repeats):
        for s in variant.shown:
            engine.run(s, batch_size, inputs)
            start = time.perf_counter()
            engine.run(s, batch_size, inputs)
            times_ms[s].append(1e3 * (time.perf_counter() - start))
    live = max(live, live_bytes(device))  # rows of what was timed have joined
    stats = device.memory_stats()
    peak = stats["peak_bytes_in_use"] if stats else resident("VmHWM") - before
    analyses = [call.memory_analysis() for call in engine.executables]
    code = sum(a.generated_code_size_in_bytes for a in analyses)
    in_place = isinstance(engine, DeviceEngine)
    return {
        "name": variant.name,
        "subnets": len(variant.subnet_list),
        "executables": len(engine.executables),
        "live_bytes": live - live_before,
        "weights_bytes": weights if in_place else None,
        "rows_bytes": engine.statistics.nbytes if in_place else None,
        "slices_bytes": engine.slices.nbytes if in_place else None,
        "temporary_bytes": max(a.temp_size_in_bytes for a in analyses),
        "resident_bytes": after - before,
        "peak_bytes": peak,
        "host_rows_bytes": host_rows - dropped,
        "executables_bytes": growth if device.platform == "cpu" else None,
        "code_bytes": code or sum(len(call.runtime_executable().serialize()) for call in engine.executables),
        "code_counted": "loaded" if code else "serialised",
        "latency_ms": [statistics.median(times) for times in times_ms.values()],
    }


def visit(engine: Any, variant: Variant, inputs: list[np.ndarray], device: Any) -> list[int]:
    """Runs the variant's subnets, the largest last; live bytes of the device after each."""
    found = []
    for s in variant.visited:
        engine.run(s, len(inputs), inputs)
        found.append(live_bytes(device))
    return found


def live_bytes(device: Any) -> int:
    """Bytes of arrays on a device; those that share a buffer count once."""
    if stats := device.memory_stats():
        return stats["bytes_in_use"]
    arrays = (a for a in jax.live_arrays() if not a.is_deleted() and a.devices() == {device})
    return sum({a.unsafe_buffer_pointer(): a.nbytes for a in arrays}.values())


def resident(field: str) -> int:
    """Bytes of this process in memory, by Linux: "VmRSS" now, "VmHWM" at most. 0 where the system does not say."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def reset_peak() -> None:
    """Lets "VmHWM" begin anew from what is resident now."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


def settle() -> None:
    """Gives what was freed back to the system, which the C library else puts off: loading and compiling leave much."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    """What a function returns that runs in a process of its own."""
    context = multiprocessing.get_context("spawn")  # a fork would share what this one has allocated
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def variants(model: Model, options: Options) -> list[Variant]:
    """What is measured."""
    flops = model.config.flops
    [length] = prepare.check_lengths(model.config, None if options.length is None else (options.length,))[-1:] or (0,)
    envelopes = subnet_buckets.choose(model.subnets, flops, options.executables)
    by_bucket = {envelopes[s]: s for s in sorted(model.subnets, key=flops)}
    extracted = tuple(evenly_spaced(model.subnets, flops, options.extracted))
    shown = tuple(evenly_spaced(extracted, flops, SHOWN))
    in_place = Variant(
        name="in place, in_call",
        subnet_list=tuple(model.subnets),
        visited=tuple(sorted(by_bucket.values(), key=flops)),
        shown=shown,
        shape=(options.batch_size, length),
        slicing="in_call",
        envelopes=envelopes,
    )
    kept = dataclasses.replace(in_place, name="in place, kept (default)", slicing="kept")
    small = f"in place, kept within {options.small_budget_mib} MiB"
    return [
        in_place,
        kept,
        dataclasses.replace(kept, name=small, slice_bytes=options.small_budget_mib << 20),
        Variant(f"{len(extracted)} extracted", extracted, extracted, shown, in_place.shape, None),
    ]


def all_extracted(model: Model) -> dict[str, Any]:
    """Bytes of all subnets extracted: computed, since they may not fit into memory."""
    weights, config = sum(value.nbytes for value in model.params.values()), model.config
    each = weights / config.num_params(model.space.largest())
    rows = sum(model.statistics_of(s).nbytes for s in model.subnets)
    live = round(each * sum(map(config.num_params, model.subnets))) + rows
    return {"name": f"{len(model.subnets)} extracted (computed)", "subnets": len(model.subnets), "live_bytes": live}


def report(found: dict[str, Any]) -> None:
    """Prints the figures."""
    print(f"{found['device']}; accuracies: {found['measured']}; sizes are real. MB, and median ms at {found['shape']}:")
    columns = {
        "live_bytes": "live",
        "rows_bytes": "of it rows",
        "slices_bytes": "slices",
        "temporary_bytes": "temporaries",
        "resident_bytes": "resident",
        "peak_bytes": "peak",
        "host_rows_bytes": "rows on host",
        "executables_bytes": "executables",
        "code_bytes": "code",
    }
    latencies = [f"{flops / 1e6:.4g} MFLOPs" for flops in found["shown_flops"]]
    rows = [("", "programs", *columns.values(), *latencies)]
    for of in found["variants"]:
        sizes = (f"{of[key] / 1e6:.1f}" if of.get(key) is not None else "" for key in columns)
        times = [f"{ms:.3g}" for ms in of.get("latency_ms", ())] or [""] * len(latencies)
        rows.append((of["name"], str(of.get("executables", "")), *sizes, *times))
    cli.print_table(rows)
    print(f"code: as it is {found['variants'][0]['code_counted']}")
    print(f"{found['reference']} take so many times as much as the subnets in place:")
    cli.print_table(
        [
            ("", "live", "live, rows on host", "live, temporaries", "resident", "peak"),
            *((name, *(f"{value:.2f}" for value in ratios.values())) for name, ratios in found["ratios"].items()),
        ]
    )


def ratios(reference: Mapping[str, Any], of: Mapping[str, Any]) -> dict[str, float]:
    """How many times as much the reference takes, by what is counted."""
    sums = (
        ("live_bytes",),
        ("live_bytes", "host_rows_bytes"),
        ("live_bytes", "temporary_bytes"),
        ("resident_bytes",),
        ("peak_bytes",),
    )
    return {" + ".join(keys): sum(reference[k] for k in keys) / sum(of[k] for k in keys) for keys in sums}


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    with random_export.export_of(options.path, subnets=options.subnets) as path:
        model = exports.load(path)
        todo = variants(model, options)
        for variant in todo:  # into the cache, since compiling leaves a process larger
            in_fresh_process(measure, path, variant, 1)
        rows = [in_fresh_process(measure, path, variant, options.repeats) for variant in todo]
    *in_place, reference = rows
    found = {
        "device": prepare.device_kind(jax.devices()[0]),
        "measured": model.manifest["measured"],
        "shape": f"batch {options.batch_size}" + (f", length {todo[0].shape[1]}" if todo[0].shape[1] else ""),
        "shown_flops": [model.config.flops(s) for s in todo[0].shown],
        "variants": [*rows, all_extracted(model)],
        "reference": reference["name"],
        "ratios": {of["name"]: ratios(reference, of) for of in in_place},
    }
    report(found)
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    cli.run(main)
