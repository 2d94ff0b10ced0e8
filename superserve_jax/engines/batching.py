"""The default batch sizes: up to 16 on a CPU, and up to 64 on a GPU that gains."""

import pathlib
from collections.abc import Iterable, Mapping

from superserve_jax import exports
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines.keys import Device
from superserve_jax.profile import Profile

SMALL = (1, 2, 4, 8, 16)
"""The batch sizes of every device."""

_LARGE = (32, 64)
_MIN_GAIN = 1.05  # the least ratio of the throughputs of a batch size and the one before it that makes it worth serving


def candidates(devices: Iterable[Device]) -> tuple[int, ...]:
    """The batch sizes to measure on devices: up to 64 on GPUs, else up to 16."""
    more = all(device.platform != "cpu" for device in devices)
    return SMALL + _LARGE * more


def default(export: pathlib.Path, devices: Mapping[str, Device], compute_dtype: ComputeDtype = "float32") -> tuple[int, ...]:
    """The batch sizes to serve with: those of `candidates` that the stored profiles have.

    A profile without all batch sizes up to 16 does not count, because it was measured for other batch sizes.

    Args:
      export: the export's directory.
      devices: one device of each kind, by the name of its kind.
      compute_dtype: the dtype of the profiles.
    """
    sizes = candidates(devices.values())
    for kind in devices:
        path = exports.profile_path(export, kind, compute_dtype)
        measured = Profile.load(path).batch_sizes if path.exists() else sizes
        if set(SMALL) <= set(measured):
            sizes = tuple(size for size in sizes if size in measured)
    return sizes


def gaining(profile: Profile) -> tuple[int, ...]:
    """The batch sizes of a profile, without the largest ones above 16 if they gain nothing.

    A batch size gains if the fastest subnet has at least 5 % more throughput with it than with the one before it.

    >>> from superserve_jax.subnet import Subnet
    >>> from superserve_jax.profile import Row
    >>> gaining(Profile((16, 32, 64), (Row(Subnet(()), 0.5, (2.0, 3.0, 6.0)),)))
    (16, 32)
    """
    sizes, ms = list(profile.batch_sizes), profile.each_length[-1].rows[0].latency_ms
    throughputs = [size / ms for size, ms in zip(sizes, ms, strict=True)]
    while len(sizes) > 1 and sizes[-1] > SMALL[-1]:
        if throughputs[len(sizes) - 1] >= _MIN_GAIN * throughputs[len(sizes) - 2]:
            break
        sizes.pop()
    return tuple(sizes)
