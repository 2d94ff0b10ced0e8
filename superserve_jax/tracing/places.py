"""File and line of the user's code that an operation comes from."""

import importlib.util
import itertools
import pathlib
import re
from types import TracebackType

from jax.extend import core

_LIBRARIES = tuple(
    str(pathlib.Path(spec.origin).parent) + "/"
    for spec in (importlib.util.find_spec(name) for name in ("jax", "jaxlib", "flax", "superserve_jax.tracing"))
    if spec is not None and spec.origin is not None
)
UNKNOWN = "an unknown place"
_ACTIVATIONS = re.compile(r"celu|elu|gelu|hard_(sigmoid|silu|tanh)|leaky_relu|mish|relu6|selu|softplus|sparse_plus|squareplus")
"""Functions of `jax.nn` whose code has numbers."""


def of_equation(equation: core.JaxprEqn) -> str | None:
    """Such as "model.py:12". None if only libraries made the operation, as inside of a jitted function of jax."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{pathlib.Path(frame.file_name).name}:{frame.line_num}"
    return None


def is_activation(equation: core.JaxprEqn) -> bool:
    """Whether a function such as `jax.nn.gelu` made the operation. Its numbers never come from a size."""
    traceback = equation.source_info.traceback
    frames = itertools.takewhile(lambda frame: frame.file_name.startswith(_LIBRARIES), traceback.frames if traceback else ())
    return any(_ACTIVATIONS.fullmatch(frame.function_name) for frame in frames)


def of_error(error: BaseException) -> str:
    """The last line of the user's code in the traceback of an error."""
    found, traceback = UNKNOWN, error.__traceback__
    while isinstance(traceback, TracebackType):
        name = traceback.tb_frame.f_code.co_filename
        if not name.startswith(_LIBRARIES):
            found = f"{pathlib.Path(name).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
