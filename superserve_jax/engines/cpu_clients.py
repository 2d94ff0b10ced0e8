"""CPU devices with a chosen number of threads.

jax's own CPU device divides every operation among all cores. Small operations gain little from a second core. So an engine
also uses **lanes**: devices that compute different parts of a batch at the same time. A lane has one thread. With more than 8
cores, 4 to 8 lanes divide them, since each lane needs its own copy of an executable. Such a device belongs to an XLA client of
its own, because the thread pool belongs to the client.

All CPU devices share the memory of the process: `on_device` makes arrays of one device readable on another without a copy.
"""

import ctypes
import dataclasses
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from superserve_jax import errors, machine

try:
    from jaxlib import xla_client
except ImportError:  # not a public module of jaxlib
    xla_client: Any = None

Device = Any  # a jax.Device; type checkers do not accept it as a type

_THREADS = "NPROC"  # XLA reads the size of a new client's thread pool from this environment variable
# glibc gives blocks above 32 MiB back to the system when they are freed, and free memory at the end of a heap above 64 MiB.
# Then each call of a large part gets new pages, and parts of two 224x224 images take longer (OFA-ResNet50's largest subnet).
_KEPT_BLOCK_BYTES, _KEPT_HEAP_BYTES = 64 << 20, 256 << 20
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # parameters of `mallopt`
MOST_LANES = 8
"""The largest number of lanes of all workers together, if there are not more workers."""

_lock = threading.RLock()
_devices: dict[
    tuple[int, int, bool], Device
] = {}  # they live as long as the process, since XLA may not free a client's threads
_threads_of: dict[Any, int] = {}  # by client


def threads_of(device: Device) -> int:
    """The number of threads that compute on a CPU device."""
    with _lock:
        return _threads_of.setdefault(device.client, int(os.environ.get(_THREADS) or machine.cores()))


def are_supported() -> bool:
    """Whether this version of jaxlib can make CPU devices with a chosen number of threads."""
    return hasattr(xla_client, "make_cpu_client")


@dataclasses.dataclass(frozen=True)
class Share:
    """The cores of one of several workers that divide the cores of the machine. One worker has all of them.

    Args:
      index: the number of the worker, from 0.
      workers: how many workers there are.
    """

    index: int = 0
    workers: int = 1

    @property
    def device(self) -> Device:
        """The device that computes a whole batch. One worker takes jax's own device."""
        if self.workers == 1:
            return jax.devices("cpu")[0]
        threads = max(1, machine.cores() // self.workers)
        return create(threads, self.index, inline=True)

    @property
    def lanes(self) -> tuple[Device, ...]:
        """The lanes. The first one computes in the calling thread.

        >>> [threads_of(lane) for lane in Share(0, workers=machine.cores()).lanes]
        [1]
        """
        cores_each, most = max(1, machine.cores() // self.workers), max(1, MOST_LANES // self.workers)
        threads = -(-cores_each // most)
        count = cores_each // threads
        return tuple(create(threads, self.index * count + i, inline=i == 0) for i in range(count))


def check_workers(workers: int | None) -> None:
    """Raises ConfigError unless `workers` is None, or from 1 to the number of cores."""
    if workers is not None and not (type(workers) is int and 1 <= workers <= machine.cores()):
        raise errors.ConfigError(f"cpu_workers must be from 1 to {machine.cores()}, the number of cores, got {workers!r}")


def create(threads: int, index: int, *, inline: bool = False) -> Device:
    """The CPU device with this number of threads and this index. The same arguments always give the same device.

    Args:
      threads: the number of threads that divide an operation.
      index: tells devices with equal numbers of threads apart.
      inline: whether a call computes in the calling thread. Otherwise a call only starts the computation.

    >>> lane = create(1, 0, inline=True)
    >>> threads_of(lane), lane is create(1, 0, inline=True), lane is create(1, 0)
    (1, True, False)
    """
    if not are_supported():
        raise errors.ConfigError(
            "this version of jaxlib makes no CPU devices with a chosen number of threads; run `superserve measure` with it"
        )
    key = threads, index, inline
    with _lock:
        if key not in _devices:
            threads_of(jax.devices("cpu")[0])  # jax's own client must not get this number of threads
            if not _devices:
                keep_freed_memory()
            before = os.environ.get(_THREADS)
            os.environ[_THREADS] = str(threads)
            try:
                client = xla_client.make_cpu_client(asynchronous=not inline, num_devices=1)
            finally:
                del os.environ[_THREADS]
                if before is not None:
                    os.environ[_THREADS] = before
            [_devices[key]] = client.devices()
            _threads_of[client] = threads
        return _devices[key]


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks of up to 64 MiB in the process, and up to 256 MiB at the end of a heap.

    Changes nothing if the environment already has settings of glibc's allocator, or with another C library. Returns whether it
    changed the settings.
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_HEAP_BYTES))


def on_device(arrays: Sequence[jax.Array], device: Device) -> tuple[jax.Array, ...]:
    """The same arrays on another device. Between CPU devices nothing is copied.

    >>> x = jax.numpy.arange(64.0)
    >>> [y] = on_device([x], create(1, 0, inline=True))
    >>> y.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
    True
    """
    return tuple(jax.device_put([np.asarray(array) for array in arrays], device))


def parts_of(batch_sizes: Sequence[int], most: int, lanes: int) -> dict[int, int]:
    """The inputs of a part by batch size: one part for each lane, or more parts of `most` inputs.

    >>> parts_of((1, 2, 4, 16), most=4, lanes=2)
    {1: 1, 2: 1, 4: 2, 16: 4}
    """
    return {size: min(most, -(-size // lanes)) for size in batch_sizes}


def parts_of_workers(parts: Mapping[int, int], workers: int) -> dict[int, int]:
    """The parts of each of several workers, from those of one worker with all cores. The limit of a part stays.

    A worker with one core computes the parts one after another. It needs executables for fewer sizes of parts, which makes its
    start shorter: a size runs as two parts of half the size, if it is not the largest, and if its half is a size, too.

    >>> parts_of_workers({1: 1, 2: 1, 4: 2, 8: 4, 16: 8}, workers=max(2, machine.cores()))
    {1: 1, 2: 2, 4: 2, 8: 8, 16: 8}
    """
    if not parts or workers == 1:
        return dict(parts)
    lanes = len(Share(0, workers).lanes)
    divided = parts_of(sorted(parts), max(parts.values()), lanes)
    if lanes > 1:
        return divided
    sizes, kept = {*divided.values()}, set[int]()
    for size in sorted(sizes, reverse=True):
        if not (2 * size in kept and size % 2 == 0 and size // 2 in sizes):
            kept.add(size)
    return {batch: part if part in kept else part // 2 for batch, part in divided.items()}
