"""The executables of one device, compiled ahead of time, in parallel and with a cache.

An executable contains no weights. It takes the weights that its program reads as a flat tuple of arguments. There are two
kinds of these arguments:

- Kept slices have the sizes of the program's envelope. A slicer, another executable, makes them ahead of the calls.
- The SuperNet's own parameters are larger. The program slices them in every call.

On a GPU, we expect that the number of kernels limits small batches, not arithmetic. So a slicer also prepares slices there:

- **Layouts.** XLA chooses the order of the axes in memory. Otherwise it would transpose the weights in every call. The
  executable of the largest batch chooses. The slicer and the other executables follow.
- **Folding.** If only one subnet uses the slices, its statistics become part of the kernels and biases (`Program.fold`).
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from superserve_jax.engines import threads
from superserve_jax.engines.cache import Executable, ExecutableCache, Layouts, Leaves, Traced
from superserve_jax.engines.keys import Device
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import compiler, programs
from superserve_jax.supernets.family import FamilyConfig, SequenceConfig
from superserve_jax.supernets.programs import Program

Key = tuple[Program, int, int]
"""Program, batch size and length. The length is 0 if all inputs have one shape."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How the executables of a program take their weights (see the module).

    Args:
      kept: whether they take kept slices instead of the SuperNet's parameters.
      laid_out: whether XLA chooses the memory layouts of the slices; needs `kept`.
      folded: whether the statistics of one subnet are folded into the slices; needs `kept`.
      dtype: the dtype of matrices, activations and products, "float32" or "bfloat16". Vectors stay float32, except folded
        biases. Statistics and logits are always float32.
    """

    kept: bool = False
    laid_out: bool = False
    folded: bool = False
    dtype: str = "float32"

    def spec(self, program: Program, name: str, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a weight that an executable takes."""
        is_folded = self.folded and name in program.folded_params
        full = programs.param_spec(program.config)[name]
        return jax.ShapeDtypeStruct(shape, self.dtype if is_folded else programs.weight_spec(full, self.dtype).dtype)


def build(
    program_list: Iterable[Program],
    batch_sizes: Iterable[int],
    device: Device,
    *,
    lengths: Sequence[int] = (),
    form: Callable[[Program], Form] = lambda program: Form(),
    use_cache: bool = True,
    command_buffers: bool = True,
    others: Sequence[Device] = (),
) -> dict[Key, Executable]:
    """Loads or compiles executables in parallel, with a progress bar. Returns them by program, batch size and length.

    Args:
      program_list: the programs, all with one config.
      batch_sizes: the batch sizes of every program.
      device: the device that runs them.
      lengths: the length buckets of every program; `()` if all inputs have one shape.
      form: a function that tells how a program takes its weights.
      use_cache: whether to load executables from the cache. All that are compiled are stored there.
      command_buffers: see `compiler.options`.
      others: further devices that run them (see `ExecutableCache`).
    """
    forms = {program: form(program) for program in program_list}
    shapes, workers = list(itertools.product(batch_sizes, lengths or (0,))), os.cpu_count() or 1
    if not shapes:
        return {}
    store = ExecutableCache(next(iter(forms)).config, device, others)
    # The executable of the largest batch chooses the layouts of prepared slices, so it comes before the others.
    chooser = {program: (program, *max(shapes)) for program, form in forms.items() if form.laid_out}
    options = compiler.options(device.platform, command_buffers=command_buffers)
    made: dict[Key, Executable] = {}

    def compiled(key: Key) -> Executable:
        program, batch, length = key
        layouts = made[chooser[program]].layouts if program in chooser and key != chooser[program] else None
        about = {**_about(program), "batch": batch, "length": length, **dataclasses.asdict(forms[program])}
        about |= {"layouts": layouts, "options": options}
        how: dict[str, Any] = {"length": length, "form": forms[program], "layouts": layouts, "options": options}
        return store.get(about, lambda on: trace_program(program, batch, on, **how), load=use_cache)

    all_keys = [(program, *shape) for program in forms for shape in shapes]
    description = f"executables for {device.platform}:{device.id}"
    for group in (list(chooser.values()), [key for key in all_keys if key not in chooser.values()]):
        if group:  # else there would be an empty progress bar
            made |= zip(group, threads.each(compiled, group, workers=workers, description=description), strict=True)
    store.shrink()
    return {key: made[key] for key in all_keys}


def build_slicers(
    executable_of: Mapping[Program, Executable], device: Device, *, form: Callable[[Program], Form], use_cache: bool = True
) -> dict[Program, Executable]:
    """Loads or compiles the slicers of the programs with kept slices.

    Args:
      executable_of: one executable of each program. All programs have one config.
      device: the device that holds the weights and the slices.
      form: see `build`.
      use_cache: see `build`.
    """
    store = ExecutableCache(next(iter(executable_of)).config, device)
    leaves_of = {program: prepared_leaves(program, form(program), made) for program, made in executable_of.items()}
    prepared = {program: found for program, found in leaves_of.items() if found[0]}

    def slicer(program: Program) -> Executable:
        leaves, layouts = prepared[program]
        about = {**_about(program), "slicer": leaves, "layouts": layouts, "form": dataclasses.asdict(form(program))}
        how: dict[str, Any] = {"layouts": layouts, "form": form(program)}
        return store.get(about, lambda on: trace_slicer(program, leaves, on, **how), load=use_cache)

    slicers = dict(zip(prepared, threads.each(slicer, prepared, workers=os.cpu_count() or 1), strict=True))
    store.shrink()
    return slicers


def prepared_leaves(program: Program, form: Form, executable: Executable) -> tuple[Leaves, Layouts]:
    """The arguments of an executable that a slicer must make (sliced, folded or laid out), and their layouts."""
    full = programs.param_spec(program.config)
    default = tuple(tuple(range(len(shape))) for _, shape in executable.leaves)
    chosen = [
        ((name, shape), layout)
        for (name, shape), layout in zip(executable.leaves, executable.layouts or default, strict=True)
        if shape != full[name].shape or (form.folded and name in program.folded_params) or layout != tuple(range(len(shape)))
    ]
    return tuple(leaf for leaf, _ in chosen), tuple(layout for _, layout in chosen) if executable.layouts else ()


def trace_program(
    program: Program,
    batch: int,
    device: Device,
    *,
    length: int = 0,
    form: Form = Form(),
    layouts: Layouts | None = None,
    options: Mapping[str, Any] | None = None,
) -> Traced:
    """Traces a program.

    Args:
      program: the program.
      batch: the batch size.
      device: the device that will run it.
      length: the number of tokens; 0 if all inputs have one shape.
      form: how it takes its weights.
      layouts: with `form.laid_out`, the layouts of its weights; None lets XLA choose them.
      options: the compiler's options; None takes `compiler.options`.
    """
    full, used = programs.param_spec(program.config), programs.used_leaves(program, folded=form.folded)
    whole = {name: full[name].shape for name in program.sources(used)}
    leaves = tuple((used if form.kept else whole).items())
    names = tuple(name for name, _ in leaves)

    def infer(values: tuple[jax.Array, ...], inputs: jax.Array, statistics: jax.Array, active: jax.Array) -> jax.Array:
        run = program.infer_folded if form.folded else program.infer
        return run(dict(zip(names, values, strict=True)), inputs, statistics, active).astype(jnp.float32)

    values = tuple(form.spec(program, name, shape) for name, shape in leaves)
    inputs = input_spec(program.config, batch, length)
    statistics = jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    active = jax.ShapeDtypeStruct((len(program.traced),), jnp.int32)
    sharding: Any = SingleDeviceSharding(device)
    if form.laid_out:
        chosen = layouts or [None] * len(leaves)
        wanted = tuple(_format(device, layout, len(shape)) for layout, (_, shape) in zip(chosen, leaves, strict=True))
        sharding = wanted, sharding, sharding, sharding
    traced = jax.jit(infer, in_shardings=sharding).trace(values, inputs, statistics, active)
    options = compiler.options(device.platform) if options is None else options
    return Traced(traced, leaves, options, is_laid_out=form.laid_out)


def trace_slicer(
    program: Program, leaves: Leaves, device: Device, *, form: Form = Form(kept=True), layouts: Layouts = ()
) -> Traced:
    """Traces the function that makes a program's slices.

    Args:
      program: the program.
      leaves: names and shapes of the slices.
      device: the device that will run it.
      form: how the executables take the slices. With `folded`, the function takes statistics (2, N) as a second argument.
      layouts: the layouts of the slices; `()` for XLA's default ones.
    """
    full, statistics = programs.param_spec(program.config), jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    takes = program.sources(name for name, _ in leaves) + tuple(fold.scale for fold in program.folds.values() if form.folded)

    def slices(values: tuple[jax.Array, ...], *statistics: jax.Array) -> tuple[jax.Array, ...]:
        params = dict(zip(takes, values, strict=True))
        folded = program.fold(params, *statistics) if form.folded else {}  # cut already
        specs = {name: form.spec(program, name, shape) for name, shape in leaves}
        cut = (folded[n] if n in folded else program.cut(n, params, spec.shape) for n, spec in specs.items())
        return tuple(value.astype(spec.dtype) for value, spec in zip(cut, specs.values(), strict=True))

    sharding: Any = SingleDeviceSharding(device)
    out = tuple(_format(device, layout, len(layout)) for layout in layouts) if layouts else sharding
    arguments = (tuple(programs.weight_spec(full[name], form.dtype) for name in takes), statistics)[: 1 + form.folded]
    traced = jax.jit(slices, in_shardings=sharding, out_shardings=out).trace(*arguments)
    return Traced(traced, leaves, takes=takes)


def free_layout(axes: int) -> Any:
    """`Layout.AUTO`: XLA chooses. It is a function only so that tests can choose a layout, for which they need `axes`."""
    return Layout.AUTO


def _format(device: Device, layout: tuple[int, ...] | None, axes: int) -> Format:
    return Format(free_layout(axes) if layout is None else Layout(layout), SingleDeviceSharding(device))


def _about(program: Program) -> dict[str, Any]:
    return {"envelope": program.envelope.to_json(), "traced": list(program.traced)}


def input_spec(config: FamilyConfig, batch: int, length: int = 0) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a batch; `length` is 0 if all inputs have one shape."""
    if length and isinstance(config, SequenceConfig):
        return config.input_spec(batch, length=length)
    return config.input_spec(batch)


def bucket_programs(
    config: FamilyConfig, subnet_list: Iterable[Subnet], envelopes: Mapping[Subnet, Subnet]
) -> dict[Subnet, Program]:
    """The program that runs each subnet: its subnet bucket's program, or its own if it shares no subnet bucket."""
    members: dict[Subnet, list[Subnet]] = {}
    for s in subnet_list:
        members.setdefault(envelopes.get(s, s), []).append(s)
    made = {envelope: programs.bucketed(config, group, envelope=envelope) for envelope, group in members.items()}
    return {s: made[envelope] for envelope, group in members.items() for s in group}


def fit(config: FamilyConfig, envelope: Subnet, slice_bytes: int, *, itemsize: int = 4) -> bool:
    """Whether the slices of a subnet bucket fit into `slice_bytes`, if each weight takes `itemsize` bytes.

    Parameters that no subnet slices, such as embeddings, do not count. Finding them requires tracing a program, for half a
    second. Two bounds often avoid this: the bytes of these parameters are between 0 and the bytes of the smallest subnet.
    """
    read_bytes = itemsize * config.num_params(envelope)
    if read_bytes <= slice_bytes:
        return True
    smallest = config.space().smallest()
    if read_bytes - itemsize * config.num_params(smallest) > slice_bytes:
        return False
    full, read = programs.param_spec(config), programs.used_leaves(programs.sliced(config, smallest))
    whole_bytes = itemsize * sum(math.prod(shape) for name, shape in read.items() if shape == full[name].shape)
    return read_bytes - whole_bytes <= slice_bytes
