"""Compiles the programs of a config for a GPU that this machine does not have, and counts what the GPU would run.

    python serve/bench/gpu_compile.py configs/ofa_resnet50.py configs/dynabert_sst2.py --gpus h100 a100

It needs jax's CUDA libraries (`pip install -e '.[gpu-aot]'`), but no GPU and no driver. Nothing is executed. XLA cannot tune
without a GPU. Tuning may choose other kernels, so the counts on a GPU may differ. Nobody has compared them yet. The columns:

- launches: kernels and copies of a call, including those in both branches of a conditional;
- transposes: kernels that only change the memory layout of weights;
- convolutions: "n of m": n of m convolutions also add the bias and apply the activation;
- conditionals: branches on a traced gate;
- on the host: what the host launches, one after another. "1 graph" is one command buffer (CUDA graph) with all launches;
- temporaries: memory of a call besides inputs, weights and outputs;
- lowered and compiled in: seconds to lower and compile.

The programs are the largest and the smallest subnet with executables of their own (`kept` and `in_call`), the subnet bucket of
both, and the slicers that make kept slices.
"""

import collections
import dataclasses
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.experimental import topologies

from superserve_jax import cli, errors, progress
from superserve_jax.engines import executables, prepare
from superserve_jax.engines.cache import Executable, Traced
from superserve_jax.engines.device import Slicing
from superserve_jax.engines.executables import Form
from superserve_jax.engines.keys import Device
from superserve_jax.profile import check_batch_sizes
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.programs import Program
from superserve_jax.training.config import load_config

# Without the versions, XLA assumes an old driver, which can record no library call in a command buffer.
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ {capability} }}
  fpus_per_core: {fpus} threads_per_warp: 32 core_count: {cores} clock_rate_ghz: {ghz}
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
# The numbers are from XLA's own descriptions of these cards: h100_sxm.txtpb and a100_sxm_80.txtpb in the folder
# xla/backends/gpu/target_config/specs of https://github.com/openxla/xla. They agree with NVIDIA's data sheets.
GPUS: Mapping[str, Mapping[str, Any]] = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
        "cores": 132, "fpus": 128, "ghz": 1.98, "memory": 84942979072, "bandwidth": 3352320000000, "l2": 52428800,
        "shared": 233472, "optin": 232448,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "capability": "major: 8",
        "cores": 108, "fpus": 64, "ghz": 1.41, "memory": 85100068864, "bandwidth": 2039040000000, "l2": 41943040,
        "shared": 167936, "optin": 166912,
    },
}  # fmt: skip
_NOT_LAUNCHED = ("kCommandBuffer", "kConditional", "kSequential", "kWhile")  # thunks that only contain other thunks


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      configs: config files, or names of configs that come with the package.
      gpus: the GPUs to compile for.
      batch_sizes: the batch sizes to compile.
      slicing: the ways to slice the weights.
      length: the length of inputs, for a model of sequences; if left out, its longest.
      dtype: the dtype of matrices, activations and products.
      json: write the counts to this file.
    """

    configs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = (pathlib.Path("configs/ofa_resnet50.py"),)
    gpus: tuple[Literal["h100", "a100"], ...] = ("h100",)
    batch_sizes: tuple[int, ...] = (1, 16)
    slicing: tuple[Slicing, ...] = ("kept", "in_call")
    length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a GPU would run.

    Args:
      gpu: a name in `GPUS`.
      config: the name of the config.
      program: "largest", "smallest" or "bucket", with " slicer" behind it for a slicer.
      slicing: "kept" or "in_call".
      dtype: the dtype of matrices, activations and products.
      batch: the batch size; 0 for a slicer.
      launches: kernels and copies, including those in branches.
      transposes: kernels that only change the memory layout of weights.
      convolutions: all convolutions.
      fused: the convolutions that also add the bias and apply the activation.
      conditionals: branches on traced gates.
      buffers: command buffers that the host launches.
      separate_launches: kernels, copies and conditionals that the host launches outside of command buffers.
      temporary_bytes: memory of a call besides inputs, weights and outputs.
      compile_s: seconds to lower and compile.
    """

    gpu: str
    config: str
    program: str
    slicing: str
    dtype: str
    batch: int
    launches: int
    transposes: int
    convolutions: int
    fused: int
    conditionals: int
    buffers: int
    separate_launches: int
    temporary_bytes: int
    compile_s: float


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    batch_sizes, found = check_batch_sizes(options.batch_sizes), []
    jax.config.update("jax_platforms", "cpu")  # jax itself does not use a GPU, even if there is one
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the check asks the driver
    loaded = [load_config(path) for path in options.configs]
    for gpu in options.gpus:
        device = target_device(gpu)
        for config in loaded:
            lengths = prepare.check_lengths(config.model, None if options.length is None else (options.length,))
            counted = count_programs(
                config.model, device, batch_sizes, max(lengths, default=0), slicing=options.slicing, dtype=options.dtype
            )
            for counts in progress.track(counted, f"{config.name} for {gpu}"):
                found.append(Counts(gpu=gpu, config=config.name, dtype=options.dtype, **counts))
    report(found)
    cli.write_results(options.json, [dataclasses.asdict(counts) for counts in found])


def target_device(gpu: str) -> Device:
    """A device to compile for. Raises ConfigError if jax's CUDA libraries are missing."""
    try:
        target = _TARGET.format(**GPUS[gpu])
        return topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
    except (RuntimeError, NotImplementedError, ValueError) as e:
        raise errors.ConfigError(
            f"cannot compile for {gpu}: {e}; install jax's CUDA libraries with pip install -e '.[gpu-aot]'"
        ) from e


def count_programs(
    config: FamilyConfig,
    device: Device,
    batch_sizes: Sequence[int],
    length: int,
    *,
    slicing: Collection[Slicing],
    dtype: str,
) -> Iterator[dict[str, Any]]:
    """Compiles everything that an engine would compile. Yields the counts of each program, as arguments of `Counts`."""
    largest, smallest = config.space().largest(), config.space().smallest()
    chosen = {
        "largest": programs.sliced(config, largest),
        "smallest": programs.sliced(config, smallest),
        "bucket": programs.bucketed(config, [largest, smallest]),
    }
    for name, program in chosen.items():
        shapes = weight_shapes(program)
        for way in slicing:
            form, layouts = Form(dtype=dtype), None
            if way == "kept":
                form = Form(kept=True, laid_out=True, folded=name != "bucket" and bool(program.folds), dtype=dtype)
            for batch in sorted(batch_sizes, reverse=True):  # the largest comes first, because it chooses the layouts
                traced = executables.trace_program(program, batch, device, length=length, form=form, layouts=layouts)
                counts, executable = count(traced, shapes)
                yield {"program": name, "slicing": way, "batch": batch, **counts}
                if way == "in_call" or layouts is not None:
                    continue
                layouts = executable.layouts
                leaves, wanted = executables.prepared_leaves(program, form, executable)
                if leaves:
                    slicer = executables.trace_slicer(program, leaves, device, form=form, layouts=wanted)
                    counts, _ = count(slicer, ())
                    yield {"program": f"{name} slicer", "slicing": way, "batch": 0, **counts}


def weight_shapes(program: Program) -> set[tuple[int, ...]]:
    """The sorted shapes of a program's weights with at least two axes, whole and sliced."""
    full, used = programs.param_spec(program.config), programs.used_leaves(program)
    both = (shape for name in used for shape in (tuple(full[name].shape), used[name]))
    return {_sorted_shape(shape) for shape in both if len(shape) > 1}


def _sorted_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a shape above 1, ascending. An array and its transpose have the same."""
    return tuple(sorted(n for n in shape if n > 1))


def count(traced_program: Traced, shapes: Collection[tuple[int, ...]]) -> tuple[dict[str, Any], Executable]:
    """Compiles one program. Returns its counts, as arguments of `Counts`, and the executable.

    Args:
      traced_program: the program.
      shapes: the sorted shapes of its weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        executable = traced_program.compile({"xla_dump_to": folder})
        compile_s = time.perf_counter() - start_s
        # The last one is "thunk_sequence_after_thunk_passes.txt" if XLA made command buffers, or else "thunk_sequence.txt".
        plan = max(pathlib.Path(folder).glob("*.jit_*.thunk_sequence*.txt"))
        thunks = re.findall(r"^( *)\d+: (k\w+)", plan.read_text(), re.M)
    kinds = collections.Counter(kind for _, kind in thunks)
    on_host = collections.Counter(kind for indent, kind in thunks if not indent)
    compiled: Any = executable.call
    text = compiled.as_text()
    targets = collections.Counter(re.findall(r'custom_call_target="__cudnn\$(conv\w+)"', text))
    counts = {
        "launches": sum(n for kind, n in kinds.items() if kind not in _NOT_LAUNCHED),
        "transposes": transposes(text, shapes),
        "convolutions": targets.total(),
        "fused": targets["convBiasActivationForward"],
        "conditionals": kinds["kConditional"],
        "buffers": on_host["kCommandBuffer"],
        "separate_launches": sum(n for kind, n in on_host.items() if kind != "kCommandBuffer"),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_s": compile_s,
    }
    return counts, executable


def transposes(text: str, shapes: Collection[tuple[int, ...]]) -> int:
    """The kernels of an optimised program that transpose or copy an array with the shape of a weight."""
    moves = re.compile(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy)\(")
    bodies = re.findall(r"^(?:ENTRY )?%?([\w.\-]+)[^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    kinds = {body: kind for kind, body in re.findall(r"kind=(k\w+), calls=%?([\w.\-]+)", text)}
    found = 0
    for name, body in bodies:
        moved = [_sorted_shape([int(n) for n in shape.split(",")]) in shapes for shape in moves.findall(body)]
        if name not in kinds:
            found += sum(moved)  # each is a kernel of its own
        elif kinds[name] != "kCustom":  # a matrix product reads its inputs in any order
            found += any(moved)
    return found


def report(found: Sequence[Counts]) -> None:
    """Prints a table."""
    lines: list[tuple[str, ...]] = [
        (
            *("GPU", "config", "program", "slices", "dtype", "batch"),
            *("launches", "transposes", "convolutions", "conditionals", "on the host"),
            *("temporaries, MB", "lowered and compiled in, s"),
        )
    ]
    for c in found:
        host = (_number(c.buffers, "graph", "graphs"), _number(c.separate_launches, "launch", "launches"))
        lines.append(
            (
                *(c.gpu, c.config, c.program, c.slicing, c.dtype, str(c.batch or "-")),
                *(str(c.launches), str(c.transposes)),
                *(f"{c.fused} of {c.convolutions}" if c.convolutions else "-", str(c.conditionals)),
                *(", ".join(filter(None, host)), f"{c.temporary_bytes / 1e6:.1f}", f"{c.compile_s:.1f}"),
            )
        )
    cli.print_table(lines, left=5)
    print(f"jax {jax.__version__}; compiled only, nothing was executed, and nothing was tuned")


def _number(n: int, one: str, many: str) -> str:
    """A number and its unit, or "" for 0."""
    return f"{n} {one if n == 1 else many}" if n else ""


if __name__ == "__main__":
    cli.run(main)
