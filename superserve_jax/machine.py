"""What this machine is: its number of cores, its processor, and the name of a device. No jax."""

import functools
import os
import pathlib
from typing import Any


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_kind(device: Any) -> str:
    """The kind of a jax device: a card's name, or a CPU's model and number of cores. jax calls every CPU "cpu".

    It names latency profiles and latency tables.
    """
    if device.platform != "cpu":
        return device.device_kind
    return f"cpu {cpu_info('model name') or 'unknown'} {cores()} cores"


@functools.cache
def cpu_info(field: str) -> str:
    """A field of the first processor in Linux's /proc/cpuinfo, such as "model name" or "flags"; "" if there is none.

    Machine code depends on the flags, and psutil gives neither these nor the model name.
    """
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
