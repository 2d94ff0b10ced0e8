"""A private cache of this user that keeps compiled executables between processes.

**Why this cache is our own.** jax's persistent compilation cache looks a program up by its lowered form. So every start would
still trace and lower each program, which takes 0.1 to 0.3 s each. This cache looks a program up by its key (below), and
traces nothing.

**The key** contains all that a compiled program depends on, such as the config, the batch size, the device, the versions of
jax and jaxlib, the processor's features, and the source code of the operators. Weights are not part of the key, since
executables take them as arguments. So exports with the same config share their entries.

**Safety.** Loading an entry runs the machine code in it. So the cache reads only a directory that belongs to this user and
that nobody else can write to, and never an export. A stale or damaged entry is compiled again. Deleting the directory is
always safe.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import pathlib
import pickle
import stat
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import platformdirs
from jax.experimental import serialize_executable

from superserve_jax import families, files, layers, ops, supernets
from superserve_jax.supernets.family import FamilyConfig

Device = Any  # a jax.Device; type checkers do not accept it as a type
Leaves = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of parameters, in the order of an executable's arguments."""

_log = logging.getLogger(__name__)
_DIGEST_BYTES = 32
_FORMAT = 3  # version of the entries, and of the executables' arguments and results


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled program or slicer.

    Args:
      call: the compiled function. A program takes `(leaves, inputs, statistics, active)` and returns logits. A slicer takes
        `(leaves,)`, parameters of the SuperNet, and returns their slices.
      leaves: the parameters that a program takes, or the slices that a slicer returns.
    """

    call: Callable[..., Any]
    leaves: Leaves


class ExecutableCache:
    """The entries of one SuperNet config on one device.

    The cache's directory is $SUPERSERVE_CACHE, or superserve_jax in the user's cache folder. If $SUPERSERVE_CACHE is empty,
    there is no cache.

    Args:
      config: the family's config.
      device: the device that runs the executables.
    """

    def __init__(self, config: FamilyConfig, device: Device):
        self._device = device
        folder = os.environ.get("SUPERSERVE_CACHE", platformdirs.user_cache_path("superserve_jax"))
        source = _source_digest(type(config)) if folder else None
        self._root = _private(pathlib.Path(folder)) if source is not None else None
        features = cpu_info("flags") or cpu_info("Features") if device.platform == "cpu" else ""  # "Features" on ARM
        self._about = {
            "format": _FORMAT,
            "config": families.config_to_json(config),
            "device": [device.platform, device.device_kind, device.id],
            "jax": [importlib.metadata.version(name) for name in ("jax", "jaxlib")],
            "runtime": device.client.platform_version,
            "flags": os.environ.get("XLA_FLAGS", ""),
            "settings": [str(jax.config.values["jax_default_matmul_precision"]), bool(jax.config.values["jax_enable_x64"])],
            "features": " ".join(sorted(features.split())),
            "source": source,
        }

    def get(self, about: Mapping[str, Any], make: Callable[[], Executable]) -> Executable:
        """Loads the executable that `about` describes from the cache, or else compiles and stores it.

        Args:
          about: a JSON object that identifies this executable among those with the same config and device.
          make: compiles the executable.
        """
        if self._root is None:
            return make()
        key = json.dumps({**self._about, **about}, sort_keys=True)
        path = self._root / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".bin")
        found = self._load(path)
        if found is None:
            found = make()
            _save(path, found)
        return found

    def _load(self, path: pathlib.Path) -> Executable | None:
        """The entry in a file, or None if there is no file. An entry that cannot be used gives a warning and None."""
        try:
            content = path.read_bytes()
            digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(body).digest() != digest:
                raise ValueError("it is damaged")
            leaves, serialised = pickle.loads(body)
            call = serialize_executable.deserialize_and_load(
                *serialised, backend=self._device.client, execution_devices=[self._device]
            )
            return Executable(call, leaves)
        except FileNotFoundError:
            return None
        except Exception as e:  # the runtime can fail in any way on a stale entry, and the remedy is always the same
            _log.warning("cannot load an executable from %s (%s: %s); compiling again", path, type(e).__name__, e)
            return None


def _save(path: pathlib.Path, executable: Executable) -> None:
    """Writes an entry. If the disk is full or read-only, only the next start takes longer."""
    try:
        body = pickle.dumps((executable.leaves, serialize_executable.serialize(executable.call)))  # type: ignore[arg-type]
        files.write_bytes(path, hashlib.sha256(body).digest() + body)
    except (OSError, ValueError, RuntimeError, pickle.PicklingError) as e:  # some backends cannot serialise
        _log.warning("cannot store an executable in %s: %s; the next start will compile it again", path.parent, e)


def _private(root: pathlib.Path) -> pathlib.Path | None:
    """The directory, created if necessary. If others can write to it, gives a warning and None."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = root.stat()
    except OSError as e:
        _log.warning("no cache of executables: %s", e)
        return None
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _log.warning("no cache of executables: %s belongs to another user or is writable by others; chmod 700 it", root)
        return None
    return root


@functools.cache
def _source_digest(config_class: type) -> str | None:
    """Digest of the source code that programs are traced from. So an edit of an operator invalidates all executables.

    If the source cannot be read, gives a warning and None. An example is a family that was typed into a notebook.
    """
    # All families count, since one may build on another. The config's own module may be outside of this library.
    packages = tuple(f"{package.__name__}." for package in (families, supernets))
    traced = [sys.modules[name] for name in sorted(sys.modules) if name.startswith(packages)]
    modules = [ops, layers, *traced, inspect.getmodule(config_class)]
    try:
        return hashlib.sha256("".join(inspect.getsource(m) for m in modules if m is not None).encode()).hexdigest()
    except (OSError, TypeError) as e:
        _log.warning("no cache of executables for %s: %s", config_class.__name__, e)
        return None


@functools.cache
def cpu_info(field: str) -> str:
    """A field of the first processor in Linux's /proc/cpuinfo, such as "model name" or "flags"; "" if there is none.

    Machine code depends on the flags, and psutil gives neither these nor the model name.
    """
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
