"""Compiled executables kept between processes, in a private cache of this user.

Loading one runs the machine code in it, so entries are only read from a directory that belongs to this user and that nobody
else may write to; never from an export. An entry is keyed by everything that the program depends on: config, program, batch
size, length, device, the versions of jax and jaxlib, processor features and the source of the operators. Weights are not among
that, since executables take them as arguments: two exports of one config share their entries. What is stale or damaged is
compiled again. Deleting the directory is always safe.
"""

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
from jax.experimental import serialize_executable

from superserve_jax import families, files, layers, ops, supernets

Device = Any  # a jax.Device, which is a variable to type checkers

_log = logging.getLogger(__name__)
_DIGEST_BYTES = 32
_FORMAT = 3  # of entries, and of what executables take and give


def directory() -> pathlib.Path:
    """Where the cache lies: $SUPERSERVE_CACHE (empty turns it off), else superserve_jax in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("SUPERSERVE_CACHE", pathlib.Path(base) / "superserve_jax"))


class ExecutableCache:
    """The entries of one SuperNet config on one device.

    Args:
      config: the family's config.
      device: an executable belongs to one device.
    """

    def __init__(self, config: Any, device: Device):
        self._device = device
        source = _source_digest(type(config)) if os.environ.get("SUPERSERVE_CACHE") != "" else None
        self._root = _private(directory()) if source is not None else None
        self._about = {
            "format": _FORMAT,
            "config": families.config_to_json(config),
            "device": [device.platform, device.device_kind, device.id],
            "jax": [importlib.metadata.version(name) for name in ("jax", "jaxlib")],
            "runtime": device.client.platform_version,
            "flags": os.environ.get("XLA_FLAGS", ""),
            "settings": [str(jax.config.values["jax_default_matmul_precision"]), bool(jax.config.values["jax_enable_x64"])],
            "features": " ".join(sorted(_cpu_features().split())) if device.platform == "cpu" else "",
            "source": source,
        }

    def load(self, about: Mapping[str, Any]) -> tuple[Callable[..., Any], Any] | None:
        """(compiled, its leaves) of the executable that `about`, JSON, describes; None where there is no sound entry."""
        path = self._path(about)
        if path is None or not path.exists():
            return None
        try:
            content = path.read_bytes()
        except OSError as e:
            _log.warning("cannot read an executable from %s: %s", path, e)
            return None
        digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            _log.warning("%s is damaged; compiling again", path)
            return None
        try:
            leaves, serialised = pickle.loads(body)
            compiled = serialize_executable.deserialize_and_load(
                *serialised, backend=self._device.client, execution_devices=[self._device]
            )
        except Exception as e:  # a stale entry may fail in any way inside the runtime; the remedy is always the same
            _log.warning("%s cannot be loaded (%s: %s); compiling again", path, type(e).__name__, e)
            return None
        return compiled, leaves

    def save(self, about: Mapping[str, Any], compiled: Any, leaves: Any) -> None:
        """Keeps an executable; a full or read-only disk costs only the next start."""
        path = self._path(about)
        if path is None:
            return
        try:
            body = pickle.dumps((leaves, serialize_executable.serialize(compiled)))
            files.write_bytes(path, hashlib.sha256(body).digest() + body)
        except (OSError, ValueError, RuntimeError, pickle.PicklingError) as e:  # not every backend can serialise
            _log.warning("cannot keep an executable in %s: %s", path.parent, e)

    def _path(self, about: Mapping[str, Any]) -> pathlib.Path | None:
        if self._root is None:
            return None
        key = json.dumps({**self._about, **about}, sort_keys=True)
        return self._root / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".bin")


def _private(root: pathlib.Path) -> pathlib.Path | None:
    """The directory, made if need be; None, with a warning, where it is not this user's alone."""
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
    """Digest of the code that a program is traced from: an edited operator must not meet an old executable. None, with a
    warning, where it cannot be read, as that of a family which was typed into a notebook."""
    # All families, since one may build on another; the config's own may stand outside of the package.
    packages = tuple(f"{package.__name__}." for package in (families, supernets))
    traced = [sys.modules[name] for name in sorted(sys.modules) if name.startswith(packages)]
    modules = [ops, layers, *traced, inspect.getmodule(config_class)]
    try:
        return hashlib.sha256("".join(inspect.getsource(m) for m in modules if m is not None).encode()).hexdigest()
    except (OSError, TypeError) as e:
        _log.warning("no cache of executables for %s: %s", config_class.__name__, e)
        return None


def _cpu_features() -> str:
    return cpu_info("flags") or cpu_info("Features")  # the latter on ARM


@functools.cache
def cpu_info(field: str) -> str:
    """A field of the first processor as Linux gives it, such as "model name" or "flags"; "" where it gives none."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
