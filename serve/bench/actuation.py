"""What changing the subnet costs, with another subnet in every batch, beside the ways of doing without SubNetAct.

    python serve/bench/actuation.py configs/ofa_resnet50.py --batch-sizes 1 8 --plot loading.png

Takes an export's directory, or a config file, whose network gets fresh weights and made-up statistics. Every batch of some
subnets, evenly spaced in FLOPs, is run twice in succession: first after a batch of another subnet, then of the same. So does

- the engine that slices in the call, and the one that keeps slices: their copy is made in some of the changes, in others not;
- the subnet extracted, as a network of its own: a plain jitted function whose weights, too, lie on the device;
- a server that switches models: it loads the extracted weights from host memory, or reads them from a file.

All take turns, round by round in one process, so that ratios hold on a busy machine. A ratio to extracted is the median of
those of each round. The ratio of loading to inference by model size is the paper's Figure 1a.
Library: engines.device, engines.executables, subnet.evenly_spaced, training.random_export, plots.loading.
"""

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

import jax
import numpy as np
import tyro

from superserve_jax import cli, errors, exports, files, plots, progress
from superserve_jax.engines import executables, prepare
from superserve_jax.engines.device import DeviceEngine, LeastRecentlyUsed
from superserve_jax.exports import Model
from superserve_jax.profile import check_batch_sizes
from superserve_jax.subnet import Subnet, evenly_spaced
from superserve_jax.supernets import programs, reads
from superserve_jax.training import random_export

CANDIDATES = 500  # of a config file: made-up subnets, out of which evenly spaced ones are picked
WARM_UP_ROUNDS = 2
EVENTS = {
    ("in_call", "same"): "in_call, same subnet again",
    ("in_call", "other"): "in_call, another subnet",
    ("kept", "same"): "kept, same subnet again",
    ("kept", "other"): "kept, another subnet, its slices there",
    ("kept", "copied"): "kept, another subnet, its slices made",
    ("extracted", "same"): "extracted, same network again",
    ("extracted", "other"): "extracted, another network, on the device",
}
LOADS = {"host": "host memory", "disk": "disk"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      path: an export's directory or a config file.
      subnets: how many alternate, evenly spaced in FLOPs.
      batch_sizes: batch sizes.
      length: of a family whose inputs have one; if left out, its longest.
      slice_bytes: the byte budget of kept slices; if left out, the engine's default.
      rounds: how often each is measured.
      loads: how often weights are loaded.
      json: write the figures to this file.
      plot: draw loading over inference by model size into this file (PNG).
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
        if min(self.rounds, self.loads, self.subnets - 1) < 1:
            raise errors.ConfigError(
                f"rounds and loads must be at least 1, subnets at least 2; got {self.rounds}, {self.loads}, {self.subnets}"
            )


class Extracted:
    """A subnet as a network of its own, with its own weights on the device, in host memory and in a file.

    Args:
      model: where the weights come from.
      file: is made.
    """

    def __init__(self, model: Model, subnet: Subnet, device: Any, *, file: pathlib.Path):
        program = programs.sliced(model.config, subnet)
        self.host = {
            name: np.array(np.asarray(model.params[name])[tuple(map(slice, shape))])
            for name, shape in reads.used_leaves(program).items()
        }
        self.nbytes = sum(value.nbytes for value in self.host.values())
        self._device, self._row = device, jax.device_put(model.statistics_of(subnet), device)
        self._params = self.load_from_host()
        active = program.active(subnet)
        self._infer = jax.jit(
            lambda params, inputs, row: program.infer(params, inputs, row, active),  # type: ignore[arg-type]
            compiler_options=programs.compiler_options(device.platform),
        )
        self._file = file
        with file.open("wb") as f:
            f.writelines(value.tobytes() for value in self.host.values())
            f.flush()
            os.fsync(f.fileno())  # or its pages could not be dropped

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Logits."""
        return np.asarray(self._infer(self._params, inputs, self._row))

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
        for name, value in values.items():  # on a CPU an aligned array becomes the device's as it is, whatever may_alias says
            if loaded[name].unsafe_buffer_pointer() == value.ctypes.data:
                loaded[name] = loaded[name].copy()
        return jax.block_until_ready(loaded)

    def drop_pages(self) -> bool:
        """Drops the file from the page cache, where the system can; whether it can."""
        if not hasattr(os, "posix_fadvise"):
            return False
        with self._file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return True


class Times:
    """Milliseconds of each event in each round, NaN where it did not happen."""

    def __init__(self, rounds: int):
        self._rounds = rounds
        self._ms: dict[tuple[Any, ...], np.ndarray] = {}

    def take(self, key: tuple[Any, ...], turn: int, call: Callable[[], Any]) -> Any:
        """Runs and times `call`; those of negative turns warm up and are not kept."""
        start = time.perf_counter()
        result = call()
        self.put(key, turn, 1e3 * (time.perf_counter() - start))
        return result

    def put(self, key: tuple[Any, ...], turn: int, ms: float) -> None:
        """Keeps a time."""
        of_key = self._ms.setdefault(key, np.full(self._rounds, np.nan))
        if turn >= 0:
            of_key[turn] = ms

    def get(self, *key: Any) -> np.ndarray:
        """The times of an event by round."""
        return self._ms.get(key, np.full(self._rounds, np.nan))


def measure(model: Model, options: Options, folder: pathlib.Path) -> dict[str, Any]:
    """The figures that the program prints.

    Args:
      folder: for files of weights.
    """
    device, config = jax.devices()[0], model.config
    chosen = evenly_spaced(model.subnets, config.flops, options.subnets)
    if len(chosen) < 2:
        raise errors.ConfigError(f"{model.path} serves one subnet; there must be at least two to alternate")
    lengths = prepare.check_lengths(config, None if options.length is None else (options.length,))[-1:]
    engines = {
        way: DeviceEngine(
            *(model, device),
            subnet_list=chosen,
            batch_sizes=options.batch_sizes,
            lengths=lengths,
            slicing=way,
            slice_bytes=options.slice_bytes if way == "kept" else None,
        )
        for way in ("in_call", "kept")
    }
    extracted = {s: Extracted(model, s, device, file=folder / f"{i}.weights") for i, s in enumerate(chosen)}
    copies = {s: slices_of(model, s, device) for s in chosen}
    rng, specs = np.random.default_rng(0), {b: executables.input_spec(config, b, *lengths) for b in options.batch_sizes}
    batches = {b: rng.integers(0, 2, spec.shape).astype(spec.dtype) for b, spec in specs.items()}  # pixels or token ids
    times, order, last, dropped = Times(options.rounds), random.Random(0), None, True
    loading = set(np.linspace(0, options.rounds - 1, options.loads).round().astype(int).tolist())
    for network in extracted.values():
        for batch in batches.values():
            network(batch)  # compiles
    gc.collect()

    for turn in progress.track(range(-WARM_UP_ROUNDS, options.rounds), "measuring"):
        for size, batch in batches.items():
            for s in alternating(chosen, last, order):
                for way in order.sample(("in_call", "kept", "extracted"), 3):
                    call = functools.partial(extracted[s], batch)
                    if way != "extracted":
                        call = functools.partial(engines[way].run, s, size, list(batch))
                    twice(times, (s, size, way), turn, call, engines["kept"].slices if way == "kept" else None)
                last = s
        for s in chosen:
            times.take((s, "copy"), turn, copies[s])
            if turn in loading:
                times.take((s, "host"), turn, extracted[s].load_from_host)
                dropped &= extracted[s].drop_pages()
                times.take((s, "disk"), turn, extracted[s].load_from_disk)
    return {
        "device": prepare.device_kind(device),
        "measured": model.manifest["measured"],
        "page_cache_dropped": dropped,
        "slice_budget_bytes": engines["kept"].slices.budget_bytes,
        "subnets": [
            {
                "subnet": s.to_json(),
                "flops": config.flops(s),
                "weights_bytes": extracted[s].nbytes,
                "copy_ms": float(np.median(times.get(s, "copy"))),
                "loading_ms": {kind: float(np.nanmedian(times.get(s, kind))) for kind in LOADS},
                "batches": [of_batch(times, s, size) for size in options.batch_sizes],
            }
            for s in chosen
        ],
    }


def alternating(chosen: Sequence[Subnet], last: Subnet | None, order: random.Random) -> list[Subnet]:
    """Every subnet once, in a random order that does not begin with the one that was run last."""
    shuffled = order.sample(chosen, len(chosen))
    return shuffled[::-1] if shuffled[0] is last else shuffled


def twice(times: Times, key: tuple[Any, ...], turn: int, call: Callable[[], Any], slices: LeastRecentlyUsed | None) -> None:
    """Times a call after a batch of another subnet, and again after itself."""
    makes = slices.makes if slices else 0
    start = time.perf_counter()
    call()
    ms = 1e3 * (time.perf_counter() - start)
    times.put((*key, "copied" if slices and slices.makes > makes else "other"), turn, ms)
    times.take((*key, "same"), turn, call)


def slices_of(model: Model, subnet: Subnet, device: Any) -> Callable[[], Any]:
    """A function that makes a subnet's slices, as the engine does when they are not there."""
    program = programs.sliced(model.config, subnet)
    leaves = tuple(reads.used_leaves(program).items())
    slicer = executables.compile_slicer(program, leaves, device)
    values = tuple(model.params[name] for name, _ in slicer.leaves)
    return lambda: jax.block_until_ready(slicer.call(values))


def of_batch(times: Times, subnet: Subnet, size: int) -> dict[str, Any]:
    """What was measured of a subnet at a batch size: for each event its times, and what follows from them."""
    alone, copy = times.get(subnet, size, "extracted", "same"), times.get(subnet, "copy")
    events = {}
    for way, event in EVENTS:
        ms = times.get(subnet, size, way, event)
        count = int(np.isfinite(ms).sum())
        if not count:
            continue
        change = ms - times.get(subnet, size, way, "same")
        events[f"{way}_{event}"] = {
            "count": count,
            "median_ms": float(np.nanmedian(ms)),
            "p99_ms": float(np.nanpercentile(ms, 99)),
            "over_extracted": float(np.nanmedian(ms / alone)),
            "change_ms": float(np.nanmedian(change)),
            "change_less_copy_ms": float(np.nanmedian(change - copy if event == "copied" else change)),
        }
    median_ms = float(np.median(alone))
    loading = {kind: float(np.nanmedian(times.get(subnet, kind))) / median_ms for kind in LOADS}
    return {"batch": size, "events": events, "loading_over_inference": loading}


def report(found: dict[str, Any]) -> None:
    """Prints the figures."""
    print(f"{found['device']}; accuracies: {found['measured']}; sizes are real. Median times in ms:")
    width = max(map(len, EVENTS.values()))
    rows = [
        ("MFLOPs", "batch", "batch of".ljust(width), "times", "median", "p99", "over extracted", "change", "less the copy")
    ]
    for of in found["subnets"]:
        for at in of["batches"]:
            for (way, event), name in EVENTS.items():
                e = at["events"].get(f"{way}_{event}")
                if e is None:
                    continue
                cells = [f"{of['flops'] / 1e6:.4g}", str(at["batch"]), name.ljust(width), str(e["count"])]
                cells += [f"{e['median_ms']:.2f}", f"{e['p99_ms']:.2f}", f"{e['over_extracted']:.3f}"]
                cells += ["", ""] if event == "same" else [f"{e['change_ms']:.2f}", f"{e['change_less_copy_ms']:.2f}"]
                rows.append(tuple(cells))  # type: ignore[arg-type]
    cli.print_table(rows)
    print()
    sizes = [at["batch"] for at in found["subnets"][0]["batches"]]
    over = [f"{kind} / inference, batch {size}" for kind in LOADS for size in sizes]
    rows = [("MFLOPs", "weights, MB", "copy of slices", *LOADS.values(), *over)]
    for of in found["subnets"]:
        ratios = (at["loading_over_inference"][kind] for kind in LOADS for at in of["batches"])
        rows.append(
            (  # type: ignore[arg-type]
                f"{of['flops'] / 1e6:.4g}",
                f"{of['weights_bytes'] / 1e6:.3g}",
                *(f"{ms:.2f}" for ms in (of["copy_ms"], *of["loading_ms"].values(), *ratios)),
            )
        )
    cli.print_table(rows)
    print(
        "loading: weights copied to the device from host memory; or read from a file first, "
        + ("which was dropped from the page cache before" if found["page_cache_dropped"] else "which the page cache may hold")
    )
    for (way, event), name in EVENTS.items():
        seen = [e for of in found["subnets"] for at in of["batches"] if (e := at["events"].get(f"{way}_{event}"))]
        if seen and way != "extracted":
            key, what = (
                ("over_extracted", "of extracted") if event == "same" else ("change_less_copy_ms", "ms beside the copy")
            )
            values = [e[key] for e in seen]
            print(f"{name}: {np.median(values):.3f} {what}, at worst {max(values):.3f}")


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    check_batch_sizes(options.batch_sizes)  # before minutes of compiling
    with random_export.export_of(options.path, subnets=CANDIDATES) as path, tempfile.TemporaryDirectory() as folder:
        found = measure(exports.load(path), options, pathlib.Path(folder))
    report(found)
    if options.json:
        files.write_json(options.json, found)
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        first = [of["batches"][0] for of in found["subnets"]]
        plots.loading(
            [of["weights_bytes"] / 1e6 for of in found["subnets"]],
            {f"from {name}": [at["loading_over_inference"][kind] for at in first] for kind, name in LOADS.items()},
            options.plot,
            title=f"batch {first[0]['batch']}, {found['device']}",
        )
        print(f"plot: {options.plot}")


if __name__ == "__main__":
    cli.run(main)
