"""Measures the cost of a change of the subnet, for SubNetAct and its alternatives.

One file because all ways to change a subnet take turns in one loop and end in one table.

    python serve/bench/actuation.py configs/ofa_resnet50.py --batch-sizes 1 8 --plot loading.png

It takes an export's directory or a config file. For a config file, it makes an export with fresh weights and random
statistics. Some subnets, evenly spaced in FLOPs, run in turn. Every batch runs twice in succession: first after a batch of
another subnet, then after a batch of the same subnet. It compares:

- in_call: an engine that slices the weights in every call;
- kept: an engine that keeps slices. It copies them only if a change is to a subnet whose slices are not there;
- extracted: the extracted subnet, a network of its own whose weights are also on the device;
- loading: a server that switches models. It loads the extracted weights from host memory, or reads them from a file first.

All of them run in turn in one process, so that ratios also hold on a busy machine. A ratio is the median of the ratios of all
rounds. The ratio of loading to inference by model size is the paper's Figure 1a. Every ten seconds, the program writes the
figures so far to the file of --json.
"""

import collections
import dataclasses
import functools
import gc
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import extracted
import jax
import numpy as np
import tyro

from superserve_jax import cli, errors, exports, files, machine, progress
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.keys import Device
from superserve_jax.exports import Model
from superserve_jax.profile import check_batch_sizes
from superserve_jax.subnet import Subnet, evenly_spaced

CANDIDATES = 500  # subnets in the export of a config file; some of them are measured
WARM_UP_ROUNDS = 2
EVENTS = {
    "in_call_same": "in_call, same subnet again",
    "in_call_other": "in_call, another subnet",
    "kept_same": "kept, same subnet again",
    "kept_other": "kept, another subnet, slices there",
    "kept_copied": "kept, another subnet, slices copied",
    "extracted_same": "extracted, same network again",
    "extracted_other": "extracted, another network, on the device",
}
LOADS = {"host": "host memory", "disk": "disk"}
_SAVE_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      path: an export's directory or a config file.
      subnets: the number of subnets that run in turn, evenly spaced in FLOPs.
      batch_sizes: the batch sizes to measure.
      length: the length of inputs, for a model of sequences; if left out, its longest.
      slice_bytes: the byte budget of kept slices; if left out, the engine's default.
      rounds: the number of measurements of each event.
      loads: the number of times that the weights of each subnet are loaded.
      json: write the figures to this file.
      plot: draw the ratio of loading to inference by model size into this file (PNG).
    """

    path: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("configs/ofa_resnet50.py")
    subnets: int = 5
    batch_sizes: tuple[int, ...] = (1,)
    length: int | None = None
    slice_bytes: int | None = None
    rounds: int = 30
    loads: int = 5
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "rounds", "loads")
        if self.subnets < 2:
            raise errors.ConfigError(f"subnets must be at least 2, so that they can run in turn, got {self.subnets}")


class Weights:
    """Weights of a network in host memory and in a file, which can be loaded to a device from either.

    Args:
      host: the weights by name.
      device: the device to load them to.
      file: the file to write the weights to.
    """

    def __init__(self, host: dict[str, np.ndarray], device: Device, file: pathlib.Path):
        self.host, self._device, self._file = host, device, file
        self.nbytes = sum(value.nbytes for value in host.values())
        with file.open("wb") as f:
            f.writelines(value.tobytes() for value in host.values())
            f.flush()
            os.fsync(f.fileno())  # the page cache cannot drop pages that are not on the disk
        self.load_from_host()  # the first load compiles the copies

    def load_from_host(self) -> dict[str, jax.Array]:
        """The weights, copied from host memory to the device."""
        return self._put(self.host)

    def load_from_disk(self) -> dict[str, jax.Array]:
        """The weights, read from the file and copied to the device."""
        content, start, values = self._file.read_bytes(), 0, {}
        for name, value in self.host.items():
            values[name] = np.frombuffer(content, value.dtype, value.size, start).reshape(value.shape)
            start += value.nbytes
        return self._put(values)

    def _put(self, values: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        loaded = jax.device_put(values, self._device)
        for name, value in values.items():  # on a CPU, jax uses an aligned array without copying it
            if loaded[name].unsafe_buffer_pointer() == value.ctypes.data:
                loaded[name] = loaded[name].copy()
        return jax.block_until_ready(loaded)

    def drop_pages(self) -> bool:
        """Drops the file from the page cache, and returns whether the system can do that."""
        if not hasattr(os, "posix_fadvise"):
            return False
        with self._file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return True


Times = collections.defaultdict[tuple[Any, ...], np.ndarray]
"""Milliseconds of each event by round, warm-up included; NaN if the event did not happen in a round."""


def measure(
    model: Model, options: Options, folder: pathlib.Path, save: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """The figures that the program prints.

    Args:
      model: the export.
      options: the options of the program.
      folder: a folder for files of weights.
      save: is called between rounds, every ten seconds, with the figures of all rounds so far.
    """
    device, config = jax.devices()[0], model.config
    chosen = evenly_spaced(model.subnets, config.flops, options.subnets)
    if len(chosen) < 2:
        raise errors.ConfigError(f"{model.path} serves one subnet; at least two are needed, to run in turn")
    length = extracted.length_of(config, options.length)
    engines = {
        way: DeviceEngine(
            *(model, device),
            subnet_list=chosen,
            batch_sizes=options.batch_sizes,
            lengths=(length,) if length else (),
            slicing=way,
            slice_bytes=options.slice_bytes if way == "kept" else None,
        )
        for way in ("in_call", "kept")
    }
    networks = extracted.extract(model, chosen, device, batch_sizes=options.batch_sizes, length=length)
    weights = {s: Weights(n.host, device, folder / f"{i}.weights") for i, (s, n) in enumerate(networks.items())}
    copies = {s: slices_of(engines["kept"], s, (options.batch_sizes[0], length)) for s in chosen}
    batches = {b: extracted.random_batch(config, b, length) for b in options.batch_sizes}
    rounds = WARM_UP_ROUNDS + options.rounds
    loading = set(np.linspace(WARM_UP_ROUNDS, rounds - 1, options.loads).round().astype(int).tolist())
    times: Times = collections.defaultdict(lambda: np.full(rounds, np.nan))
    order, last, dropped = random.Random(0), None, True
    for network in networks.values():
        network.place(device)
    gc.collect()

    def figures(rounds_done: int) -> dict[str, Any]:
        """The figures of the first rounds."""
        no_times = np.full(rounds_done - WARM_UP_ROUNDS, np.nan)
        measured: Times = collections.defaultdict(lambda: no_times)
        measured.update({key: ms[WARM_UP_ROUNDS:rounds_done] for key, ms in times.items()})
        return {
            "device": machine.device_kind(device),
            "measured": model.manifest["measured"],
            "rounds": rounds_done - WARM_UP_ROUNDS,
            "page_cache_dropped": dropped,
            "slice_budget_bytes": engines["kept"].slices.budget_bytes,
            "subnets": [
                {
                    "subnet": s.to_json(),
                    "flops": config.flops(s),
                    "weights_bytes": weights[s].nbytes,
                    "copy_ms": float(np.median(measured[s, "copy"])) if copies[s] else None,
                    "loading_ms": {kind: float(np.nanmedian(measured[s, kind])) for kind in LOADS},
                    "batches": [figures_of(measured, s, size) for size in options.batch_sizes],
                }
                for s in chosen
            ],
        }

    save_s = time.monotonic() + _SAVE_EVERY_S
    for turn in progress.track(range(rounds), "measuring"):
        for size, batch in batches.items():
            for s in alternating(chosen, last, order):
                for way in order.sample(("in_call", "kept", "extracted"), 3):
                    call = functools.partial(networks[s], batch)
                    if way != "extracted":
                        call = functools.partial(engines[way].run, s, size, list(batch))
                    makes = engines["kept"].slices.makes
                    ms = time_ms(call)  # after a batch of another subnet
                    event = "copied" if engines["kept"].slices.makes > makes else "other"
                    times[s, size, f"{way}_{event}"][turn] = ms
                    times[s, size, f"{way}_same"][turn] = time_ms(call)
                last = s
        for s in chosen:
            if copy := copies[s]:
                times[s, "copy"][turn] = time_ms(copy)
            if turn in loading:
                times[s, "host"][turn] = time_ms(weights[s].load_from_host)
                dropped &= weights[s].drop_pages()
                times[s, "disk"][turn] = time_ms(weights[s].load_from_disk)
        if save is not None and turn >= WARM_UP_ROUNDS and time.monotonic() > save_s:
            save(figures(turn + 1))
            save_s = time.monotonic() + _SAVE_EVERY_S
    return figures(rounds)


def alternating(chosen: Sequence[Subnet], last: Subnet | None, order: random.Random) -> list[Subnet]:
    """Every subnet once, in a random order that does not start with the one that ran last."""
    shuffled = order.sample(chosen, len(chosen))
    return shuffled[::-1] if shuffled[0] is last else shuffled


def time_ms(call: Callable[[], Any]) -> float:
    """Milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def slices_of(engine: DeviceEngine, subnet: Subnet, shape: tuple[int, int]) -> Callable[[], Any] | None:
    """A function that makes a subnet's slices as the engine does; None if the engine keeps no slices of this subnet.

    Args:
      engine: an engine that keeps slices.
      subnet: the subnet.
      shape: a batch size and a length of the engine. They do not change the slices.
    """
    _, bucket = engine.calls[(subnet, *shape)]
    if bucket.slicer is None:
        return None
    statistics = bucket.program.pad_statistics(engine.model.statistics_of(subnet), subnet)
    on_device = jax.device_put(statistics, engine.device)
    return lambda: jax.block_until_ready(bucket.sliced(on_device).arrays)


def figures_of(times: Times, subnet: Subnet, size: int) -> dict[str, Any]:
    """The figures of a subnet at a batch size: the times of each event, and their ratio to the extracted network's."""
    network, copy = times[subnet, size, "extracted_same"], times[subnet, "copy"]
    events = {}
    for event in EVENTS:
        ms = times[subnet, size, event]
        if np.isnan(ms).all():
            continue
        change = ms - times[subnet, size, event.rsplit("_", 1)[0] + "_same"]
        events[event] = {
            "count": int(np.isfinite(ms).sum()),
            "median_ms": float(np.nanmedian(ms)),
            "p99_ms": float(np.nanpercentile(ms, 99)),
            "over_extracted": float(np.nanmedian(ms / network)),
            "change_ms": float(np.nanmedian(change)),
            "change_less_copy_ms": float(np.nanmedian(change - copy if event == "kept_copied" else change)),
        }
    loading = {kind: float(np.nanmedian(times[subnet, kind]) / np.median(network)) for kind in LOADS}
    return {"batch": size, "events": events, "loading_over_inference": loading}


def report(found: dict[str, Any]) -> None:
    """Prints the figures."""
    print(f"{found['device']}; accuracies: {found['measured']}; sizes are real. Median times in ms:")
    lines: list[tuple[str, ...]] = [
        ("MFLOPs", "event", "batch size", "count", "median", "p99", "/ extracted", "change of subnet", "without copy")
    ]
    for subnet in found["subnets"]:
        for batch in subnet["batches"]:
            for event, seen in batch["events"].items():
                change = (
                    ("", "") if event.endswith("same") else (f"{seen['change_ms']:.2f}", f"{seen['change_less_copy_ms']:.2f}")
                )
                cells = (f"{subnet['flops'] / 1e6:.4g}", EVENTS[event], str(batch["batch"]), str(seen["count"]))
                times = (f"{seen['median_ms']:.2f}", f"{seen['p99_ms']:.2f}", f"{seen['over_extracted']:.3f}")
                lines.append((*cells, *times, *change))
    cli.print_table(lines, left=2)
    print()
    sizes = [batch["batch"] for batch in found["subnets"][0]["batches"]]
    over = (f"{kind} / inference, batch {size}" for kind in LOADS for size in sizes)
    lines = [("MFLOPs", "weights, MB", "copy of slices", *LOADS.values(), *over)]
    for subnet in found["subnets"]:
        ratios = (batch["loading_over_inference"][kind] for kind in LOADS for batch in subnet["batches"])
        values = (subnet["copy_ms"], *subnet["loading_ms"].values(), *ratios)
        sizes = (f"{subnet['flops'] / 1e6:.4g}", f"{subnet['weights_bytes'] / 1e6:.3g}")
        lines.append((*sizes, *("-" if value is None else f"{value:.2f}" for value in values)))
    cli.print_table(lines)
    print(
        "loading: weights are copied to the device from host memory, or are read from a file first; the page cache "
        + ("does not hold the file" if found["page_cache_dropped"] else "may hold the file")
    )
    for event, name in EVENTS.items():
        key, what = "over_extracted", "times as long as extracted"
        if not event.endswith("same"):
            key, what = "change_less_copy_ms", "ms for a change of subnet, without the copy"
        values = [
            batch["events"][event][key]
            for subnet in found["subnets"]
            for batch in subnet["batches"]
            if event in batch["events"]
        ]
        if values and not event.startswith("extracted"):
            print(f"{name}: {np.median(values):.3f} {what} (median), at most {max(values):.3f}")


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """Plots (time to load a network's weights) / (time of an inference) by size of the weights (the paper's Figure 1a)."""
    from superserve_jax import plots  # needs matplotlib, which is not everywhere where the program measures
    from superserve_jax.plots import Line, Panel

    first = [subnet["batches"][0] for subnet in found["subnets"]]
    sizes_mb = [subnet["weights_bytes"] / 1e6 for subnet in found["subnets"]]
    lines = {
        f"from {name}": Line(sizes_mb, [batch["loading_over_inference"][kind] for batch in first])
        for kind, name in LOADS.items()
    }
    lines["equal"] = Line([min(sizes_mb), max(sizes_mb)], [1, 1], style=":", color="0.6")
    title = f"batch {first[0]['batch']}, {found['device']}"
    panel = Panel(title, "weights of the network (MB)", "time to load / time to infer", lines, scale_y="log")
    plots.panels([panel], path, title="Time to load a network (as the paper's Figure 1a)")


def main() -> None:
    """The program."""
    from superserve_jax.training import random_export  # only here, since it takes long and gpu.py does not need it

    options = cli.parse(Options, __doc__)
    check_batch_sizes(options.batch_sizes)  # before minutes of compiling
    with random_export.export_of(options.path, subnets=CANDIDATES) as path, tempfile.TemporaryDirectory() as folder:
        save = functools.partial(files.write_json, options.json) if options.json else None
        found = measure(exports.load(path), options, pathlib.Path(folder), save)
    report(found)
    cli.write_results(options.json, found)
    if options.plot:
        plot(found, options.plot)
        print(f"plot: {options.plot}")


if __name__ == "__main__":
    cli.run(main)
