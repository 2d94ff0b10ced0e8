"""A private cache of this user that keeps compiled executables between processes.

**Why this cache is our own.** jax's persistent compilation cache looks a program up by its lowered form. So every start would
still trace and lower each program, which takes 0.1 to 0.3 s each. This cache looks a program up by its key (`keys.py`). For
the families of this library, it traces nothing.

**Safety.** Loading an entry unpickles it and runs the machine code in it. So the cache reads only files that belong to this
user and that nobody else can write to. The same must hold for their directory. It follows no links, and never reads an
export. A stale or damaged entry is compiled again. Deleting the directory is always safe.

**Tuning.** While XLA compiles for a GPU, it times several kernels for each operation. It keeps the fastest ones in a folder
beside the entries. All cards of one kind share the folder. An executable cannot be shared, because it is bound to its card.

**Size.** The entries take at most `limit_bytes` together. The least recently used ones are deleted first. Results of tuning do
not count.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import pickle
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import platformdirs
from jax.experimental import serialize_executable

from superserve_jax import errors, files
from superserve_jax.engines import keys
from superserve_jax.engines.keys import Device
from superserve_jax.supernets.family import FamilyConfig

Leaves = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of parameters, in the order of an executable's arguments."""

Layouts = tuple[tuple[int, ...], ...]
"""For each of the `Leaves`, its axes from the slowest to the fastest in memory. (0, 1, 2) is row-major, the default."""

_log = logging.getLogger(__name__)
_DIGEST_BYTES = 32
_LIMIT_MB = 4_000
_NAME = re.compile(r"[0-9a-f]{32}\.bin(\.[0-9a-f]{16}\.part)?")
_TUNING = "tuning-"  # how the names of folders with the results of tuning begin
TUNING_OPTION = "xla_gpu_per_fusion_autotune_cache_dir"
"""XLA's compiler option for the folder with the results of tuning."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled program or slicer.

    Args:
      call: the compiled function. A program takes `(leaves, inputs, statistics, active)` and returns logits. A slicer takes
        `(parameters,)` or `(parameters, statistics)`, and returns slices.
      leaves: the parameters that a program takes, or the slices that a slicer returns.
      layouts: the layouts of `leaves`; `()` if all have the default one.
      takes: names of the parameters that a slicer takes.
      others: the same function on further devices (see `ExecutableCache`).
      is_from_cache: whether it was loaded from the cache.
    """

    call: Callable[..., Any]
    leaves: Leaves
    layouts: Layouts = ()
    takes: tuple[str, ...] = ()
    others: tuple[Callable[..., Any], ...] = ()
    is_from_cache: bool = False


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced program or slicer, which `compile` makes an executable of.

    Args:
      traced: the traced function.
      leaves: see `Executable`.
      options: the options of the compiler.
      takes: see `Executable`.
      is_laid_out: whether the weights have layouts of their own.
    """

    traced: jax.stages.Traced
    leaves: Leaves
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes: tuple[str, ...] = ()
    is_laid_out: bool = False

    def compile(self, options: Mapping[str, Any] | None = None) -> Executable:
        """Lowers and compiles the program. `options` are compiler options in addition to `self.options`."""
        compiled = self.traced.lower().compile(compiler_options={**self.options, **(options or {})})
        formats = compiled.input_formats[0][0] if self.is_laid_out else ()
        return Executable(compiled, self.leaves, tuple(f.layout.major_to_minor for f in formats), self.takes)


def directory() -> pathlib.Path | None:
    """The cache's directory: $SUPERSERVE_CACHE, or else superserve_jax in the user's cache folder.

    None if $SUPERSERVE_CACHE is empty, which turns the cache off, or if there is no home directory.
    """
    chosen = os.environ.get("SUPERSERVE_CACHE")
    if chosen is not None:
        return pathlib.Path(chosen) if chosen else None
    try:
        return platformdirs.user_cache_path("superserve_jax")
    except RuntimeError as e:
        _log.warning("no cache of executables: %s; set SUPERSERVE_CACHE to a directory", e)
        return None


def limit_bytes() -> int:
    """The bytes that the entries may take together: $SUPERSERVE_CACHE_MB, or else 4000 MB (1 MB is 10^6 bytes)."""
    given = os.environ.get("SUPERSERVE_CACHE_MB", str(_LIMIT_MB))
    if not given.isdecimal():
        raise errors.ConfigError(f"SUPERSERVE_CACHE_MB must be a whole number of megabytes, got {given!r}")
    return 10**6 * int(given)


class ExecutableCache:
    """The entries of one SuperNet config on one device.

    Args:
      config: the family's config.
      device: the device that runs the executables.
      others: further devices that run them: CPU devices with as many threads.
    """

    def __init__(self, config: FamilyConfig, device: Device, others: Sequence[Device] = ()):
        self._others = others
        self._device, self._is_foreign, self._limit_bytes = device, keys.is_foreign(config), limit_bytes()
        # With jax's own cache on, `compile` may return a loaded executable, which a CPU cannot serialise (see `_loaded`).
        self._beside_jaxs = device.platform == "cpu" and bool(jax.config.values.get("jax_compilation_cache_dir"))
        root = directory()
        common = keys.common_key(config, device) if root is not None else None
        self._root = _private(root) if root is not None and common is not None else None
        self._common = common or {}
        tuning = tuning_directory(self._root, device) if self._root is not None and device.platform == "gpu" else None
        is_given = TUNING_OPTION in os.environ.get("XLA_FLAGS", "")
        self._options = {} if tuning is None or is_given else {TUNING_OPTION: str(tuning)}  # no part of the key

    def get(self, about: Mapping[str, Any], trace: Callable[[Device], Traced], *, load: bool = True) -> Executable:
        """Loads the executable that `about` describes from the cache, or else compiles and stores it.

        Args:
          about: a JSON object that identifies this executable among those with the same config and device.
          load: False compiles it in any case, and replaces the entry.
          trace: traces the program for a device. For a family of this library it is called only if there is no entry.
        """
        if self._root is None:
            return self._on_others(trace(self._device).compile(), trace)
        program, digest = None, None
        if self._is_foreign:
            program = trace(self._device)
            digest = keys.program_digest(program.traced.jaxpr)
            if digest is None:
                _log.warning("an executable is not kept: its program contains a Python function, whose code has no digest")
                return self._on_others(program.compile(), trace)
        key = json.dumps({**self._common, **about, "program": digest}, sort_keys=True)
        path = self._root / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".bin")
        found = self._load(path) if load else None
        if found is None:
            found = self._on_others((program or trace(self._device)).compile(self._options), trace)
            _save(path, found)
        return found

    def _on_others(self, compiled: Executable, trace: Callable[[Device], Traced]) -> Executable:
        """A compiled executable with `others`."""
        if self._others and self._beside_jaxs:
            return dataclasses.replace(compiled, others=tuple(trace(device).compile().call for device in self._others))
        serialised = serialize_executable.serialize(compiled.call) if self._others else None  # type: ignore[arg-type]
        return dataclasses.replace(compiled, others=tuple(_loaded(serialised, device) for device in self._others))

    def shrink(self) -> None:
        """Deletes the least recently used entries until the others take at most `limit_bytes`. Call it after `get`."""
        found = entries(self._root) if self._root is not None else []
        excess = sum(info.st_size for _, info in found) - self._limit_bytes
        for path, info in found:
            if excess <= 0:
                return
            try:
                path.unlink(missing_ok=True)
            except OSError as e:
                _log.warning("the cache in %s stays larger than its limit: %s", self._root, e)
                return
            excess -= info.st_size

    def _load(self, path: pathlib.Path) -> Executable | None:
        """The entry in a file, or None if there is no file. An entry that cannot be used gives a warning and None."""
        try:
            content = _read_own(path)
            digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(body).digest() != digest:
                raise ValueError("it is damaged")
            *described, serialised = pickle.loads(body)
            call, *others = (_loaded(serialised, device) for device in (self._device, *self._others))
            return Executable(call, *described, others=tuple(others), is_from_cache=True)
        except FileNotFoundError:
            return None
        except Exception as e:  # the runtime can fail in any way on a stale entry, and the remedy is always the same
            _log.warning("cannot load an executable from %s (%s: %s); compiling again", path, type(e).__name__, e)
            return None


def _loaded(serialised: Any, device: Device) -> Callable[..., Any]:
    """A serialised executable, on a device. A loaded executable cannot be serialised again: XLA would lose some functions."""
    return serialize_executable.deserialize_and_load(*serialised, backend=device.client, execution_devices=[device])


def entries(root: pathlib.Path) -> list[tuple[pathlib.Path, os.stat_result]]:
    """The files that caches wrote into a directory, the least recently used first. Nobody else's files have such names."""
    found = []
    for path in root.glob("*"):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue  # another process has deleted it
        found.append((path, info))
    return sorted(found, key=lambda entry: entry[1].st_mtime_ns)


def tuning_directory(root: pathlib.Path, device: Device) -> pathlib.Path | None:
    """The folder with XLA's results of tuning for this kind of device and these versions. Creates it.

    Logs a warning and returns None if it is not writable.
    """
    text = json.dumps([device.device_kind, keys.versions(device)], sort_keys=True)
    path = root / (_TUNING + hashlib.sha256(text.encode()).hexdigest()[:32])
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
        problem = f"{path} is not writable"
    except OSError as e:
        problem = str(e)
    remedy = "get write permission, or set SUPERSERVE_CACHE to another directory"
    _log.warning("each device tunes its kernels again: %s; %s", problem, remedy)
    return None


def clear(root: pathlib.Path) -> int:
    """Deletes all entries and the results of tuning. Returns the number of entries.

    Raises WriteError if the directory is read-only.
    """
    found = entries(root)
    try:
        for path, _ in found:
            path.unlink(missing_ok=True)
        for path in root.glob(f"{_TUNING}{'[0-9a-f]' * 32}"):
            if not path.is_symlink():
                shutil.rmtree(path)
    except OSError as e:
        raise errors.WriteError(f"entries of {root} cannot be deleted: {e}; get permission to write there") from e
    return len(found)


def _read_own(path: pathlib.Path) -> bytes:
    """The content of a regular file that belongs to this user and that nobody else can write to. Marks it as used."""
    with files.open_regular(path, os.O_NOFOLLOW) as file:
        info = os.fstat(file.fileno())
        if info.st_uid != os.getuid() or info.st_mode & _OTHERS_WRITE:
            raise ValueError("another user owns it or can write to it")
        with contextlib.suppress(OSError):  # a read-only file system; no entry is deleted there, so the time does not matter
            os.utime(file.fileno())
        return file.read()


def _save(path: pathlib.Path, executable: Executable) -> None:
    """Writes an entry. If the disk is full or read-only, only the next start takes longer."""
    described = executable.leaves, executable.layouts, executable.takes
    try:
        body = pickle.dumps((*described, serialize_executable.serialize(executable.call)))  # type: ignore[arg-type]
        files.write_bytes(path, hashlib.sha256(body).digest() + body, mode=0o600)
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
    if info.st_uid != os.getuid() or info.st_mode & _OTHERS_WRITE:
        _log.warning("no cache of executables: %s belongs to another user or is writable by others; chmod 700 it", root)
        return None
    return root
