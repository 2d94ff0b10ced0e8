"""The default batch sizes: up to 16 on a CPU, and up to 64 on a GPU that gains."""

import pathlib
from collections.abc import Iterable, Mapping

from superserve_jax import exports
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines.keys import Device
from superserve_jax.profile import Profile

SMALL = (1, 2, 4, 8, 16)
"""The default batch sizes of a CPU. Those of a GPU begin with them."""

_LARGE = (32, 64)
_MIN_GAIN = 1.05  # a larger batch size must raise the throughput by this factor


def candidates(devices: Iterable[Device]) -> tuple[int, ...]:
    """The batch sizes to measure on devices: up to 64 on GPUs, else up to 16."""
    return SMALL + _LARGE if all(device.platform != "cpu" for device in devices) else SMALL


def to_serve(export: pathlib.Path, devices: Mapping[str, Device], compute_dtype: ComputeDtype = "float32") -> tuple[int, ...]:
    """The default batch sizes of a server: `candidates`, without those that a stored profile lacks.

    A profile that lacks a batch size up to 16 is ignored, because somebody chose its batch sizes.

    Args:
      export: the export's directory.
      devices: one device of each kind, by the name of its kind.
      compute_dtype: the dtype of the profiles.

    Raises ProfileError for a malformed profile.
    """
    sizes = candidates(devices.values())
    if sizes == SMALL:  # no profile can change it
        return sizes
    for kind in devices:
        path = exports.profile_path(export, kind, compute_dtype)
        measured = Profile.load(path).batch_sizes if path.exists() else sizes
        if set(SMALL) <= set(measured):
            sizes = tuple(size for size in sizes if size in measured)
    return sizes


def without_useless(profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """Profiles of several kinds of devices, without the largest batch sizes above 16 that gain less than 5 % of throughput.

    The throughput is that of the fastest subnet, compared with the next smaller batch size. A batch size stays if one kind of
    device gains from it.

    >>> from superserve_jax.subnet import Subnet
    >>> from superserve_jax.profile import Row
    >>> row = Row(Subnet(()), 0.5, (2.0, 3.0, 6.0))
    >>> without_useless({"L4": Profile((16, 32, 64), (row,))})["L4"].batch_sizes
    (16, 32)
    """
    sizes = max(map(_gaining, profiles.values()), key=len)
    return {kind: profile.at(sizes) for kind, profile in profiles.items()}


def _gaining(profile: Profile) -> tuple[int, ...]:
    sizes, ms = list(profile.batch_sizes), profile.each_length[-1].rows[0].latency_ms
    throughputs = [size / ms for size, ms in zip(sizes, ms, strict=True)]
    while len(sizes) > 1 and sizes[-1] > SMALL[-1]:
        if throughputs[len(sizes) - 1] >= _MIN_GAIN * throughputs[len(sizes) - 2]:
            break
        sizes.pop()
    return tuple(sizes)
