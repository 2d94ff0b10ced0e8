"""Extracted subnets, each a network with weights of its own: actuation.py and memory.py compare SubNetAct with them."""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from superserve_jax.engines import executables, prepare
from superserve_jax.engines.cache import Executable
from superserve_jax.engines.executables import Form
from superserve_jax.engines.keys import Device
from superserve_jax.exports import Model
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.programs import Program


class Extracted:
    """A subnet as a network of its own. Call `place` before the first batch.

    Args:
      model: the SuperNet.
      program: the subnet's sliced program.
      form: how its executables take the weights.
      made: the program's executables by batch size.

    Attributes:
      host: the weights in host memory, by name.
      executables: the compiled functions.
    """

    def __init__(self, model: Model, program: Program, form: Form, made: Mapping[int, Executable]):
        self._calls = {batch: executable.call for batch, executable in made.items()}
        self.executables = tuple(self._calls.values())
        first = next(iter(made.values()))
        self._layouts, statistics = first.layouts, model.statistics_of(program.envelope)
        self.host = {n: np.array(np.asarray(model.params[n])[tuple(map(slice, shape))]) for n, shape in first.leaves}
        if form.folded:
            self.host |= _folded(model, program, statistics)
        self._rest = statistics, program.active(program.envelope)

    def place(self, device: Device) -> None:
        """Copies the weights and the statistics to the device. The weights get the layouts that the executables take."""
        sharding = SingleDeviceSharding(device)
        formats = tuple(Format(Layout(layout), sharding) for layout in self._layouts) or sharding
        self._leaves = jax.device_put(tuple(self.host.values()), formats)
        self._rest = jax.device_put(self._rest, device)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Logits of a batch."""
        statistics, active = self._rest
        return np.asarray(self._calls[len(inputs)](self._leaves, inputs, statistics, active))


def _folded(model: Model, program: Program, statistics: np.ndarray) -> dict[str, np.ndarray]:
    """The kernels and biases with the statistics folded into them. The CPU computes them, so the device holds no SuperNet."""
    folds = program.folds.values()
    params = {name: np.asarray(model.params[name]) for fold in folds for name in (fold.kernel, fold.bias, fold.scale)}
    with jax.default_device(jax.devices("cpu")[0]):
        found = jax.jit(program.fold)(params, statistics)
    return {name: np.asarray(found[name]) for name in program.folded_params}


def extract(
    model: Model,
    subnet_list: Iterable[Subnet],
    device: Device,
    *,
    batch_sizes: Sequence[int],
    length: int,
    prepared: bool | None = None,
) -> dict[Subnet, Extracted]:
    """Extracts subnets. Each is compiled as an engine compiles a subnet that has executables of its own.

    Args:
      model: the SuperNet.
      subnet_list: the subnets.
      device: the device that will run them.
      batch_sizes: the batch sizes to compile.
      length: the length of inputs; 0 if all inputs have one shape.
      prepared: whether statistics are folded and layouts chosen, see `DeviceEngine`. None decides as the engine does.
    """
    program_of = {s: programs.sliced(model.config, s) for s in subnet_list}
    prepares = device.platform == "gpu" if prepared is None else prepared

    def form(program: Program) -> Form:
        return Form(kept=True, laid_out=prepares, folded=prepares and bool(program.folds))

    lengths = (length,) if length else ()
    made = executables.build(program_of.values(), batch_sizes, device, lengths=lengths, form=form)
    return {s: Extracted(model, p, form(p), {b: made[p, b, length] for b in batch_sizes}) for s, p in program_of.items()}


def length_of(config: FamilyConfig, length: int | None) -> int:
    """The length to measure with. None gives the family's longest. It is 0 if all inputs have one shape."""
    return max(prepare.check_lengths(config, None if length is None else (length,)), default=0)


def random_batch(config: FamilyConfig, batch: int, length: int) -> np.ndarray:
    """A batch of zeros and ones, which are pixels or token ids."""
    spec = executables.input_spec(config, batch, length)
    return np.random.default_rng(0).integers(0, 2, spec.shape).astype(spec.dtype)
