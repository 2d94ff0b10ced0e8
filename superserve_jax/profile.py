"""Profiles: what each served subnet costs and is worth on one kind of device. No jax.

A profile is the only thing that a policy knows about the SuperNet: for each subnet its accuracy and, for each batch size,
the latency of one batch. `serve/measure.py` measures one; the simulator and the policies read it.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from superserve_jax import errors, files
from superserve_jax.subnet import Subnet

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One subnet of a profile.

    Args:
      subnet: the subnet.
      accuracy: top-1 accuracy as a fraction of 1, measured on test data.
      latency_ms: median latency of one batch, for each of the profile's batch sizes.
      p99_ms: 99th percentile of the same; the medians where it was not measured.
    """

    subnet: Subnet
    accuracy: float
    latency_ms: tuple[float, ...]
    p99_ms: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.p99_ms:
            object.__setattr__(self, "p99_ms", self.latency_ms)
        if not 0 <= self.accuracy <= 1:
            raise errors.ProfileError(f"accuracy must be a fraction from 0 to 1, got {self.accuracy}")
        for v in (*self.latency_ms, *self.p99_ms):
            if not (math.isfinite(v) and v > 0):
                raise errors.ProfileError(f"latencies must be positive and finite milliseconds, got {list(self.latency_ms)}")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Rows in ascending order of accuracy, over common batch sizes.

    >>> row = Row(Subnet((1,)), 0.7, (1.0, 1.5))
    >>> Profile((1, 2), (row,)).latency_ms(row.subnet, 2)
    1.5
    """

    batch_sizes: tuple[int, ...]
    rows: tuple[Row, ...]
    device: str = "unknown"

    def __post_init__(self):
        check_batch_sizes(self.batch_sizes)
        if not self.rows:
            raise errors.ProfileError("a profile needs at least one row; measure at least one subnet")
        for r in self.rows:
            if len(r.latency_ms) != len(self.batch_sizes) or len(r.p99_ms) != len(self.batch_sizes):
                raise errors.ProfileError(
                    f"a row has {len(r.latency_ms)} latencies for {len(self.batch_sizes)} batch sizes {self.batch_sizes}"
                )
        index = {r.subnet: i for i, r in enumerate(sorted(self.rows, key=lambda r: r.accuracy))}
        if len(index) != len(self.rows):
            raise errors.ProfileError("a subnet stands in the profile twice; keep one row of each")
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda r: r.accuracy)))
        object.__setattr__(self, "_index", index)

    @property
    def max_batch(self) -> int:
        """The largest batch size."""
        return self.batch_sizes[-1]

    def row(self, subnet: Subnet) -> Row:
        """The row of a subnet. Raises ProfileError where it has none."""
        try:
            return self.rows[self._index[subnet]]  # type: ignore[attr-defined]
        except KeyError:
            raise errors.ProfileError(f"subnet {subnet} is not in the profile of {len(self.rows)} subnets") from None

    def batch_index(self, batch: int) -> int:
        """Index of the smallest batch size that holds `batch` queries; the last where none does."""
        for i, b in enumerate(self.batch_sizes):
            if b >= batch:
                return i
        return len(self.batch_sizes) - 1

    def latency_ms(self, subnet: Subnet, batch: int) -> float:
        """Median latency of `batch` queries, padded up to a batch size."""
        return self.row(subnet).latency_ms[self.batch_index(batch)]

    def pareto(self, *, min_accuracy_gap: float = 0.0, min_latency_ratio: float = 1.0) -> "Profile":
        """Only the rows that no other row beats: at least as accurate, and at most as slow at every batch size.

        Args:
          min_accuracy_gap, min_latency_ratio: also drop rows that are nearer than this to the next faster row kept, the
            latencies taken at the largest batch. The fastest and the most accurate row stay in any case.
        """
        front = [
            r
            for r in self.rows
            if not any(
                (o.accuracy, [-v for v in o.latency_ms]) != (r.accuracy, [-v for v in r.latency_ms])
                and o.accuracy >= r.accuracy
                and all(a <= b for a, b in zip(o.latency_ms, r.latency_ms, strict=True))
                for o in self.rows
            )
        ]
        if min_accuracy_gap <= 0 and min_latency_ratio <= 1:
            return dataclasses.replace(self, rows=tuple(front))
        kept: list[Row] = []
        for row in front:
            if not kept or (
                row.accuracy - kept[-1].accuracy >= min_accuracy_gap
                and row.latency_ms[-1] >= min_latency_ratio * kept[-1].latency_ms[-1]
            ):
                kept.append(row)
        if kept[-1] is not front[-1]:
            kept[1 if len(kept) == 1 else -1 :] = [front[-1]]
        return dataclasses.replace(self, rows=tuple(kept))

    def monotone(self) -> "Profile":
        """Repaired so that latency never falls as batch or accuracy rise (the paper's P1 and P2): noise raised to the
        running maximum, never lowered."""
        best, best_p99 = [0.0] * len(self.batch_sizes), [0.0] * len(self.batch_sizes)
        rows = []
        for r in self.rows:
            best = _running_max(best, r.latency_ms)
            best_p99 = _running_max([max(a, b) for a, b in zip(best_p99, best, strict=True)], r.p99_ms)
            rows.append(dataclasses.replace(r, latency_ms=tuple(best), p99_ms=tuple(best_p99)))
        return dataclasses.replace(self, rows=tuple(rows))

    def scaled(self, factor: float) -> "Profile":
        """The profile of a device that is `factor` times slower."""
        rows = [
            dataclasses.replace(
                r, latency_ms=tuple(v * factor for v in r.latency_ms), p99_ms=tuple(v * factor for v in r.p99_ms)
            )
            for r in self.rows
        ]
        return dataclasses.replace(self, rows=tuple(rows))

    def only(self, subnets: Iterable[Subnet]) -> "Profile":
        """The profile of some of the subnets."""
        return dataclasses.replace(self, rows=tuple(self.row(s) for s in subnets))

    def at(self, batch_sizes: Sequence[int]) -> "Profile":
        """The profile at some of its batch sizes. Raises ProfileError for one that was not measured."""
        if odd := set(batch_sizes) - set(self.batch_sizes):
            raise errors.ProfileError(f"batch size {min(odd)} was not measured, only {list(self.batch_sizes)}; measure it")
        places = [self.batch_sizes.index(b) for b in batch_sizes]
        rows = [
            dataclasses.replace(
                r, latency_ms=tuple(r.latency_ms[i] for i in places), p99_ms=tuple(r.p99_ms[i] for i in places)
            )
            for r in self.rows
        ]
        return dataclasses.replace(self, batch_sizes=tuple(batch_sizes), rows=tuple(rows))

    def throughput_qps(self, subnet: Subnet) -> float:
        """Queries per second of one worker that runs `subnet` at its best batch size."""
        row = self.row(subnet)
        return max(1e3 * b / ms for b, ms in zip(self.batch_sizes, row.latency_ms, strict=True))

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        rows = [
            {
                "subnet": r.subnet.to_json(),
                "accuracy": r.accuracy,
                "latency_ms": list(r.latency_ms),
                "p99_ms": list(r.p99_ms),
            }
            for r in self.rows
        ]
        return {"schema": SCHEMA, "device": self.device, "batch_sizes": list(self.batch_sizes), "rows": rows}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Profile":
        """The inverse of `to_json`. Raises ProfileError where `data` has not that form."""
        try:
            if data["schema"] != SCHEMA:
                raise errors.ProfileError(f"profile schema {data['schema']} is not the {SCHEMA} that this version reads")
            rows = tuple(
                Row(
                    Subnet.from_json(r["subnet"]),
                    float(r["accuracy"]),
                    tuple(float(v) for v in r["latency_ms"]),
                    tuple(float(v) for v in r["p99_ms"]),
                )
                for r in data["rows"]
            )
            return Profile(tuple(int(b) for b in data["batch_sizes"]), rows, str(data["device"]))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            if isinstance(e, errors.ProfileError | errors.ConfigError):
                raise
            raise errors.ProfileError(f"not a latency profile: {type(e).__name__}: {e}; measure it again") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; the file is replaced whole or not at all."""
        files.write_json(path, self.to_json())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Profile":
        """Reads what `save` wrote. Raises ProfileError for a missing or malformed file."""
        try:
            return Profile.from_json(json.loads(pathlib.Path(path).read_text()))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
            raise errors.ProfileError(f"cannot read a profile from {path}: {e}") from e


def check_batch_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes as a tuple. Raises ConfigError unless they are ascending whole numbers from 1 up."""
    sizes = tuple(batch_sizes)
    if not sizes:
        raise errors.ConfigError("batch_sizes is empty; give at least one, such as (1, 2, 4, 8, 16)")
    if not all(isinstance(b, int) and not isinstance(b, bool) and b >= 1 for b in sizes) or list(sizes) != sorted(set(sizes)):
        raise errors.ConfigError(f"batch_sizes must be ascending whole numbers from 1 up, got {list(sizes)}")
    return sizes


def _running_max(floor: Sequence[float], values: Sequence[float]) -> list[float]:
    """`values` raised to `floor` and to the running maximum of what stands before."""
    result, best = [], 0.0
    for f, v in zip(floor, values, strict=True):
        best = max(best, f, v)
        result.append(best)
    return result
