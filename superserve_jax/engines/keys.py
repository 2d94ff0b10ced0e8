"""The keys of the executable cache. A key contains everything that a compiled program depends on.

A wrong key would return wrong answers without a warning. So there are two kinds of key:

- **A family of this package.** The key contains a digest of every source file from which a program can be traced. A start
  that finds all executables traces nothing.
- **Any other family.** Its source may be in several files, in a notebook, or nowhere. So the key contains a digest of the
  traced program as well: the text of its jaxpr and all constants in it. Every start traces the programs, but compiles nothing.

There is no key, and so no caching, if a source file changed after this process imported the library, or if a jaxpr contains a
Python function. In both cases the loaded code is unknown.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

import superserve_jax
from superserve_jax import families, files, machine
from superserve_jax.engines import cpu_clients
from superserve_jax.engines.cpu_clients import Device
from superserve_jax.families import dynabert, ofa_mobilenet, ofa_resnet, subset, vit
from superserve_jax.supernets.family import FamilyConfig

_log = logging.getLogger(__name__)

_FORMAT = 5  # version of the entries, and of the executables' arguments and results
PACKAGE = pathlib.Path(superserve_jax.__file__).parent
NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia/version")
"""Where Linux shows the version of NVIDIA's driver."""
UNTRACED = {"convert", "experiments", "exports", "loadtest", "scheduling", "serving", "simulation", "training"}
"""The packages from which no program can be traced. Edits there keep all executables."""

# Other files in the folder of families come from users, and may import code from anywhere.
_OWN = {family.__name__ for family in (dynabert, ofa_mobilenet, ofa_resnet, subset, vit)}

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_KERNELS = ("jax-cuda", "jax-rocm", "libtpu", "nvidia-")  # how the names of packages with kernels begin
_FLAGS = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")  # environment variables that change what is computed
SETTINGS: dict[str, Callable[[Any], contextlib.AbstractContextManager[Any]] | None] = {
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_prng_impl": jax.default_prng_impl,
    "jax_enable_x64": jax.enable_x64,
    "jax_explicit_x64_dtypes": None,  # no public context manager, so all threads have the same value
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_softmax_custom_jvp": jax.softmax_custom_jvp,
    "jax_threefry_partitionable": jax.threefry_partitionable,
}
"""The settings of jax that change what a program computes, and the context manager that sets each of them in one thread."""


def settings() -> dict[str, Any]:
    """The values of `SETTINGS` in this thread.

    >>> with jax.default_matmul_precision("highest"):
    ...     settings()["jax_default_matmul_precision"]
    'highest'
    """
    return {name: jax.config.values.get(name) for name in SETTINGS}


@contextlib.contextmanager
def with_settings(values: Mapping[str, Any]) -> Iterator[None]:
    """Applies `values`, as from `settings()` in another thread, inside the `with` block."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            if (manager := SETTINGS[name]) is not None:
                stack.enter_context(manager(value))
        yield


def sources(package: pathlib.Path = PACKAGE) -> list[pathlib.Path]:
    """The source files of this library from which a program can be traced."""
    found = (path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in UNTRACED)
    return sorted(found)


def source_digest(package: pathlib.Path = PACKAGE) -> str:
    """The SHA-256 of the names and contents of `sources`."""
    digest = hashlib.sha256()
    for path in sources(package):
        digest.update(f"{path.relative_to(package).as_posix()} {files.sha256(path)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _loaded_digest() -> str | None:
    """The digest of the sources that this process imported. If it cannot be known, gives a warning and None."""
    try:
        changed = [path for path in sources() if path.stat().st_mtime_ns > superserve_jax.IMPORTED_NS]
        if not changed:
            return source_digest()
        _log.warning("no cache of executables: %s changed after it was imported; start Python again", changed[0])
    except OSError as e:
        _log.warning("no cache of executables: cannot read the source of superserve_jax: %s", e)
    return None


def is_foreign(config: FamilyConfig) -> bool:
    """Whether a program of `config` may run code from outside of this library."""
    inner = [value for value in vars(config).values() if isinstance(value, FamilyConfig)]  # of a family that wraps another
    return type(config).__module__ not in _OWN or any(map(is_foreign, inner))


def common_key(config: FamilyConfig, device: Device) -> dict[str, Any] | None:
    """The part of the key that all executables of a config on a device have in common, as a JSON object; None: do not cache.

    Weights are not part of the key, since executables take them as arguments. So exports with one config share their entries.
    """
    sources_digest = _loaded_digest()
    if sources_digest is None:
        return None
    is_cpu = device.platform == "cpu"
    features = machine.cpu_info("flags") or machine.cpu_info("Features") if is_cpu else ""  # "Features" on ARM
    return {
        "format": _FORMAT,
        "config": families.config_to_json(config),
        "sources": sources_digest,
        "device": [device.platform, device.device_kind, device.id],
        **versions(device),
        "flags": {name: os.environ.get(name, "") for name in _FLAGS},
        "settings": {name: repr(value) for name, value in settings().items()},
        "features": " ".join(sorted(features.split())),
        "threads": cpu_clients.threads_of(device) if is_cpu else 0,  # XLA divides loops among them when it compiles
    }


def versions(device: Device) -> dict[str, Any]:
    """The versions of all software that compiles programs for a device or runs them, as a JSON object."""
    driver = NVIDIA_DRIVER.read_text() if device.platform == "gpu" and NVIDIA_DRIVER.exists() else ""
    return {
        "packages": _packages(gpu=device.platform != "cpu"),
        "runtime": device.client.platform_version,
        "driver": driver,
    }


def _packages(*, gpu: bool) -> dict[str, str]:
    """The versions of the packages that trace and compile programs, or that hold the kernels which programs call."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    if gpu:
        every = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
        found |= {name: version for name, version in every if name.startswith(_KERNELS)}
    return found


def program_digest(program: ClosedJaxpr) -> str | None:
    """The SHA-256 of a traced program and its constants. If the program contains a Python function, None.

    >>> import jax.numpy as jnp
    >>> def digest(table):
    ...     return program_digest(jax.make_jaxpr(lambda x: x + jnp.asarray(table))(np.zeros(2)))
    >>> digest(np.ones(2)) == digest(np.ones(2)), digest(np.ones(2)) == digest(np.zeros(2))
    (True, False)
    """
    text = str(program)
    if " at 0x" in text:  # the text shows a function by its address, which says nothing about its code
        return None
    digest = hashlib.sha256(text.encode())
    for constant in _constants(program):  # the text shows only their shapes
        value = np.asarray(constant)
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def _constants(program: Any) -> Iterator[Any]:
    """All constants of a jaxpr and of the jaxprs inside it."""
    if isinstance(program, ClosedJaxpr):
        yield from program.consts
        program = program.jaxpr
    for equation in program.eqns:
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: isinstance(v, ClosedJaxpr | Jaxpr))
        for value in inner:
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from _constants(value)
