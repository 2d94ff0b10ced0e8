"""CPU devices with a chosen number of threads.

jax's own CPU device divides every operation among all cores. Small operations gain little from a second core. So an engine
also uses **lanes**: devices with one thread each, which compute different parts of a batch at the same time. With more than 8
cores, there are 8 lanes with several threads each, since every lane needs its own copy of an executable. A device here belongs
to an XLA client of its own, because the thread pool belongs to the client.

All CPU devices share the memory of the process: `on_device` makes arrays of one device readable on another without a copy.
"""

import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

from superserve_jax import errors

Device = Any  # a jax.Device; type checkers do not accept it as a type

_THREADS = "NPROC"  # XLA reads the size of a new client's thread pool from this environment variable
_MOST_LANES = 8
_lock = threading.Lock()
_devices: dict[
    tuple[int, int, bool], Device
] = {}  # they live as long as the process, since XLA may not free a client's threads
_threads_of: dict[Any, int] = {}  # by client


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(device: Device) -> int:
    """The number of threads that compute on a CPU device."""
    return _threads_of.get(device.client) or int(os.environ.get(_THREADS) or cores())


def are_supported() -> bool:
    """Whether this version of jaxlib can make CPU devices with a chosen number of threads."""
    return hasattr(xla_client, "make_cpu_client")


def check_workers(workers: int | None) -> None:
    """Raises ConfigError unless `workers` is None, or from 1 to the number of cores."""
    if workers is not None and not (type(workers) is int and 1 <= workers <= cores()):
        raise errors.ConfigError(f"cpu_workers must be from 1 to {cores()}, the number of cores, got {workers!r}")


def is_created(device: Device) -> bool:
    """Whether `create` made a device."""
    return device.client in _threads_of


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
    key = threads, index, inline
    with _lock:
        if key not in _devices:
            before = os.environ.get(_THREADS)
            os.environ[_THREADS] = str(threads)
            try:
                client = xla_client.make_cpu_client(asynchronous=not inline)
            finally:
                del os.environ[_THREADS]
                if before is not None:
                    os.environ[_THREADS] = before
            [_devices[key]] = client.devices()
            _threads_of[client] = threads
        return _devices[key]


def lanes(worker: int = 0, workers: int = 1) -> tuple[Device, ...]:
    """The lanes of one of several workers, which divide the cores among them. The first lane computes in the calling thread.

    >>> [threads_of(lane) for lane in lanes(0, workers=cores())]
    [1]
    """
    share = max(1, cores() // workers)
    count = min(share, _MOST_LANES)
    return tuple(create(share // count, worker * count + i, inline=i == 0) for i in range(count))


def of_workers(workers: int) -> list[Device]:
    """A device for each of several workers, which divide the cores among them. One worker takes jax's own device."""
    if workers == 1:
        return [jax.devices("cpu")[0]]
    threads = max(1, cores() // workers)
    return [create(threads, i, inline=True) if threads > 1 else lanes(i, workers)[0] for i in range(workers)]


def on_device(arrays: Sequence[jax.Array], device: Device) -> tuple[jax.Array, ...]:
    """The same arrays on another device. Between CPU devices nothing is copied.

    >>> x = jax.numpy.arange(64.0)
    >>> [y] = on_device([x], create(1, 0, inline=True))
    >>> y.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
    True
    """
    return tuple(jax.device_put([np.asarray(array) for array in arrays], device))
