"""Extracted subnets, each a network with weights of its own: actuation.py and memory.py compare SubNetAct with them."""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from superserve_jax.engines import executables, prepare
from superserve_jax.engines.cache import Executable
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
      made: the program's executables by batch size.

    Attributes:
      host: the weights in host memory, by name.
      executables: the compiled functions.
    """

    def __init__(self, model: Model, program: Program, made: Mapping[int, Executable]):
        self._calls = {batch: executable.call for batch, executable in made.items()}
        self.executables = tuple(self._calls.values())
        leaves = next(iter(made.values())).leaves
        self.host = {n: np.array(np.asarray(model.params[n])[tuple(map(slice, shape))]) for n, shape in leaves}
        self._rest = model.statistics_of(program.envelope), program.active(program.envelope)

    def place(self, device: Device) -> None:
        """Copies the weights and the statistics to the device."""
        self._leaves, self._rest = jax.device_put((tuple(self.host.values()), self._rest), device)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Logits of a batch."""
        statistics, active = self._rest
        return np.asarray(self._calls[len(inputs)](self._leaves, inputs, statistics, active))


def extract(
    model: Model, subnet_list: Iterable[Subnet], device: Device, *, batch_sizes: Sequence[int], length: int
) -> dict[Subnet, Extracted]:
    """Extracts subnets, and compiles them as an engine does; `length` is 0 if all inputs have one shape."""
    program_of = {s: programs.sliced(model.config, s) for s in subnet_list}
    lengths = (length,) if length else ()
    made, _ = executables.build(
        program_of.values(), batch_sizes, device, lengths=lengths, form=lambda program: executables.Form(kept=True)
    )
    return {s: Extracted(model, p, {b: made[p, b, length] for b in batch_sizes}) for s, p in program_of.items()}


def length_of(config: FamilyConfig, length: int | None) -> int:
    """The length to measure with. None gives the family's longest. It is 0 if all inputs have one shape."""
    return max(prepare.check_lengths(config, None if length is None else (length,)), default=0)


def random_batch(config: FamilyConfig, batch: int, length: int) -> np.ndarray:
    """A batch of zeros and ones, which are pixels or token ids."""
    spec = executables.input_spec(config, batch, length)
    return np.random.default_rng(0).integers(0, 2, spec.shape).astype(spec.dtype)
