"""Profiles: the accuracy and the latencies of each served subnet on one kind of device. No jax.

A policy knows nothing else about the SuperNet. `superserve measure` measures a profile. Policies and simulator read it.
A text server pads each input to one of a few lengths, the **length buckets**. Its profile holds rows for each length bucket.
One file because the classes, the checks of their values, and their file format change together.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from superserve_jax import dtypes, errors, files
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.lengths import check_ascending, check_length_buckets
from superserve_jax.subnet import Subnet

SCHEMA, _SCHEMA_OF_CORES = 1, 2  # the second one is for parts or several workers, which older versions do not know
_MOST_BYTES = 64 << 20  # of a profile's file

_LEAST_MS, _MOST_MS = 1e-9, 1e12  # range of plausible latencies; outside of it the arithmetic of a policy could overflow


@dataclasses.dataclass(frozen=True)
class Row:
    """One subnet of a profile.

    Args:
      subnet: the subnet.
      accuracy: top-1 accuracy as a fraction of 1, measured on test data.
      latency_ms: median latency of one batch, for each of the profile's batch sizes.
      p99_ms: 99th percentile of the same latencies. Defaults to the medians.
      envelope: the subnet bucket whose executables ran the subnet. None if the subnet had executables of its own.
    """

    subnet: Subnet
    accuracy: float
    latency_ms: tuple[float, ...]
    p99_ms: tuple[float, ...] = ()
    envelope: Subnet | None = None

    @errors.refusing(errors.ProfileError, "a row needs a Subnet, an accuracy and a tuple of latencies")
    def __post_init__(self):
        if not self.p99_ms:
            object.__setattr__(self, "p99_ms", self.latency_ms)
        if not isinstance(self.subnet, Subnet):
            raise errors.ProfileError(f"a row needs a Subnet, got {self.subnet!r}")
        if self.envelope is not None and not self.envelope.covers(self.subnet):
            raise errors.ProfileError(f"the envelope {self.envelope} does not cover {self.subnet}; choose a larger one")
        if not 0 <= self.accuracy <= 1:
            raise errors.ProfileError(f"accuracy must be a fraction from 0 to 1, got {self.accuracy}")
        for v in (*self.latency_ms, *self.p99_ms):
            if not _LEAST_MS <= v <= _MOST_MS:
                raise errors.ProfileError(f"latencies must be positive and finite milliseconds, got {list(self.latency_ms)}")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Rows in ascending order of accuracy, measured at common batch sizes.

    Give either `rows` or `rows_at`. With `rows_at`, `rows` becomes the rows of the longest length bucket.

    Args:
      batch_sizes: ascending batch sizes.
      rows: one row for each subnet, if all inputs have one shape.
      device: the kind of device that was measured.
      rows_at: a mapping from each length bucket in tokens, ascending, to its rows. All length buckets have the same subnets.
      slicing: when weights were sliced during the measurement, "kept" or "in_call" (see `engines.device`).
      compute_dtype: the dtype in which accuracies and latencies were measured, "float32" or "bfloat16".
      parts: on a CPU, how many inputs each part of a batch had, by batch size (see `engines.device`).
      cpu_workers: how many workers divided the cores of the CPU during the measurement.

    >>> row = Row(Subnet((1,)), 0.7, (1.0, 1.5))
    >>> Profile((1, 2), (row,)).latency_ms(row.subnet, 2)
    1.5
    >>> text = Profile((1,), rows_at={n: (Row(Subnet((1,)), 0.7, (ms,)),) for n, ms in ((32, 1.0), (128, 3.0))})
    >>> text.lengths, text.rows[0].latency_ms, [text.at_length(n).rows[0].latency_ms for n in (9, 32, 33)]
    ((32, 128), (3.0,), [(1.0,), (1.0,), (3.0,)])
    """

    batch_sizes: tuple[int, ...]
    rows: tuple[Row, ...] = ()
    device: str = "unknown"
    rows_at: Mapping[int, tuple[Row, ...]] = dataclasses.field(default_factory=dict, hash=False)
    slicing: Literal["kept", "in_call"] = "kept"
    compute_dtype: ComputeDtype = "float32"
    parts: Mapping[int, int] = dataclasses.field(default_factory=dict, hash=False)
    cpu_workers: int = 1

    @errors.refusing(errors.ProfileError, "a profile needs a tuple of batch sizes and a tuple of `Row`")
    def __post_init__(self):
        check_batch_sizes(self.batch_sizes)
        if not isinstance(self.device, str):
            raise errors.ProfileError(f"device must be a name, got {self.device!r}; measure it again")
        if self.slicing not in ("kept", "in_call"):
            raise errors.ProfileError(f"slicing must be 'kept' or 'in_call', got {self.slicing!r}")
        dtypes.check(self.compute_dtype)
        fits = all(size in self.batch_sizes and 1 <= part <= size for size, part in self.parts.items())
        if not fits or self.cpu_workers < 1:
            raise errors.ProfileError(f"parts={self.parts} or cpu_workers={self.cpu_workers} is impossible; measure it again")
        rows_at = {n: self._checked(rows) for n, rows in self.rows_at.items()}
        rows = self._checked(self.rows) if self.rows or not rows_at else ()
        if rows_at:
            longest = rows_at[check_length_buckets(tuple(rows_at))[-1]]
            if rows not in ((), longest):
                raise errors.ProfileError("`rows` differs from the rows of the longest length in `rows_at`; give one of them")
            rows = longest
        subnets = [r.subnet for r in rows]
        for n, others in rows_at.items():
            if [r.subnet for r in others] != subnets:
                raise errors.ProfileError(f"length {n} has other subnets than the longest; measure the same subnets at each")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "rows_at", rows_at)

    def _checked(self, rows: Iterable[Row]) -> tuple[Row, ...]:
        """The rows of one length in ascending order of accuracy."""
        rows = tuple(sorted(rows, key=lambda r: r.accuracy))
        if not rows:
            raise errors.ProfileError("a profile needs at least one row; measure at least one subnet")
        for r in rows:
            if len(r.latency_ms) != len(self.batch_sizes) or len(r.p99_ms) != len(self.batch_sizes):
                raise errors.ProfileError(
                    f"a row has {len(r.latency_ms)} latencies for {len(self.batch_sizes)} batch sizes {self.batch_sizes}"
                )
        if len({r.subnet for r in rows}) != len(rows):
            raise errors.ProfileError("the profile has two rows of the same subnet; keep one row for each subnet")
        return rows

    @property
    def max_batch(self) -> int:
        """The largest batch size."""
        return self.batch_sizes[-1]

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The length buckets in tokens, ascending. `()` if all inputs have one shape."""
        return tuple(self.rows_at)

    @functools.cached_property
    def each_length(self) -> tuple["Profile", ...]:
        """One profile for each length bucket, in ascending order. `(self,)` if there are fewer than two length buckets."""
        if len(self.rows_at) < 2:
            return (self,)
        return tuple(dataclasses.replace(self, rows=rows, rows_at={n: rows}) for n, rows in self.rows_at.items())

    def at_length(self, length: float) -> "Profile":
        """The profile of the smallest length bucket that holds `length` tokens. If none does, the profile of the longest.

        All lengths in one bucket give the same object. Without length buckets, it is the profile itself.
        """
        tables = self.each_length
        return tables[min(bisect.bisect_left(self.lengths, length), len(tables) - 1)]

    @functools.cached_property
    def _row_of(self) -> dict[Subnet, Row]:
        return {r.subnet: r for r in self.rows}

    def row(self, subnet: Subnet) -> Row:
        """The row of a subnet. Raises ProfileError if the profile has none."""
        try:
            return self._row_of[subnet]
        except KeyError:
            count = len(self.rows)
            raise errors.ProfileError(
                f"subnet {subnet} is not in the profile of {count} subnets; take the subnet of one of its rows, or measure it"
            ) from None

    def fastest(self, floor: float = 0.0) -> Row:
        """The row with the lowest latency at the smallest batch size, among rows at least as accurate as `floor`.

        Raises ProfileError if no row is that accurate.
        """
        rows = [row for row in self.rows if row.accuracy >= floor]
        if not rows:
            best = self.rows[-1].accuracy
            raise errors.ProfileError(f"no subnet is as accurate as {floor}, the best reaches {best}; lower the floor")
        return min(rows, key=lambda row: row.latency_ms[0])

    def batch_index(self, batch: int) -> int:
        """Index of the smallest batch size that holds `batch` queries. If none does, the index of the largest."""
        return min(bisect.bisect_left(self.batch_sizes, batch), len(self.batch_sizes) - 1)

    def latency_ms(self, subnet: Subnet, batch: int) -> float:
        """Median latency of `batch` queries, padded up to a batch size.

        A batch above `max_batch` gives the latency of `max_batch`, because the server cuts a larger decision to it.
        """
        return self.row(subnet).latency_ms[self.batch_index(batch)]

    def pareto(self, *, min_accuracy_gap: float = 0.0, min_latency_ratio: float = 1.0) -> "Profile":
        """The profile without rows that another row beats.

        Row a beats row b if a is at least as accurate, at least as fast at every batch size, and not equal in all of these.
        With several length buckets, the latencies at the longest decide. The two arguments also drop rows that are close to
        the row kept before them, in ascending order of accuracy. The fastest and the most accurate row always stay.

        Args:
          min_accuracy_gap: smallest difference in accuracy from the row kept before.
          min_latency_ratio: smallest ratio of the latency to the latency of the row kept before, at the largest batch size.
        """

        def reaches(a: Row, b: Row) -> bool:
            return a.accuracy >= b.accuracy and all(map(operator.le, a.latency_ms, b.latency_ms))

        front = [r for r in self.rows if not any(reaches(o, r) and not reaches(r, o) for o in self.rows)]
        if min_accuracy_gap <= 0 and min_latency_ratio <= 1:
            return self.only(r.subnet for r in front)
        kept: list[Row] = []
        for row in front:
            if not kept or (
                row.accuracy - kept[-1].accuracy >= min_accuracy_gap
                and row.latency_ms[-1] >= min_latency_ratio * kept[-1].latency_ms[-1]
            ):
                kept.append(row)
        if kept[-1] is not front[-1]:
            kept[1 if len(kept) == 1 else -1 :] = [front[-1]]
        return self.only(r.subnet for r in kept)

    def monotone(self) -> "Profile":
        """Raise noisy latencies, so that none falls as batch size, accuracy (the paper's P1 and P2) or length grows.

        A median becomes the running maximum along these three axes. A 99th percentile is raised only to its own median.
        Otherwise a single disturbance in one percentile would raise all larger batches, subnets and lengths.
        """
        best_of: dict[Subnet, tuple[float, ...]] = {}  # each subnet's result at the next shorter length

        def repair(rows: tuple[Row, ...]) -> Iterable[Row]:
            best = (0.0,) * len(self.batch_sizes)
            for r in rows:
                least = map(max, best, best_of.get(r.subnet, best), r.latency_ms)
                best_of[r.subnet] = best = tuple(itertools.accumulate(least, max))
                yield dataclasses.replace(r, latency_ms=best, p99_ms=tuple(map(max, best, r.p99_ms)))

        return self._with_rows(repair)

    @property
    def envelopes(self) -> dict[Subnet, Subnet]:
        """A mapping from each subnet that runs in a subnet bucket to the bucket."""
        return {r.subnet: r.envelope for r in self.rows if r.envelope is not None}

    def with_envelopes(self, envelopes: Mapping[Subnet, Subnet]) -> "Profile":
        """The same latencies with these subnet buckets. A subnet that is missing, or mapped to itself, gets no bucket."""
        of = {s: envelope for s, envelope in envelopes.items() if envelope != s}
        return self._with_rows(lambda rows: (dataclasses.replace(r, envelope=of.get(r.subnet)) for r in rows))

    def scaled(self, factor: float) -> "Profile":
        """The profile of a device that is `factor` times slower."""
        return self._with_latencies(lambda ms: tuple(v * factor for v in ms))

    def only(self, subnets: Iterable[Subnet]) -> "Profile":
        """The profile of some of the subnets. Raises ProfileError for a subnet that the profile does not have."""
        kept = {self.row(s).subnet for s in subnets}
        return self._with_rows(lambda rows: (r for r in rows if r.subnet in kept))

    def at(self, batch_sizes: Sequence[int], lengths: Sequence[int] = ()) -> "Profile":
        """The profile at some of its batch sizes and lengths. `()` keeps all lengths.

        Raises ProfileError for a batch size or length that was not measured.
        """
        for what, wanted, measured in (("batch size", batch_sizes, self.batch_sizes), ("length", lengths, self.lengths)):
            if odd := set(wanted) - set(measured):
                raise errors.ProfileError(f"{what} {min(odd)} was not measured, only {list(measured)}; measure it")
        chosen = self
        if lengths:
            chosen = dataclasses.replace(self, rows=(), rows_at={n: r for n, r in self.rows_at.items() if n in lengths})
        places = [self.batch_sizes.index(b) for b in batch_sizes]
        parts = {size: part for size, part in self.parts.items() if size in batch_sizes}
        return chosen._with_latencies(lambda ms: tuple(ms[i] for i in places), batch_sizes=tuple(batch_sizes), parts=parts)

    def _with_latencies(self, change: Callable[[tuple[float, ...]], tuple[float, ...]], **fields: Any) -> "Profile":
        """Apply `change` to the latencies of every row at every length, and replace `fields` of the profile."""
        return self._with_rows(
            lambda rows: (dataclasses.replace(r, latency_ms=change(r.latency_ms), p99_ms=change(r.p99_ms)) for r in rows),
            **fields,
        )

    def _with_rows(self, change: Callable[[tuple[Row, ...]], Iterable[Row]], **fields: Any) -> "Profile":
        """Apply `change` to the rows of every length, shortest first, and replace `fields` of the profile."""
        rows_at = {n: tuple(change(rows)) for n, rows in self.rows_at.items()}
        return dataclasses.replace(self, rows=() if rows_at else tuple(change(self.rows)), rows_at=rows_at, **fields)

    def throughput_qps(self, subnet: Subnet, lengths: Iterable[int] = ()) -> float:
        """Queries per second of one worker that runs `subnet` at its best batch size.

        Args:
          lengths: the length in tokens of each query in a mix. Every query runs in a batch of its own length bucket. By
            default all queries have the longest length.
        """
        buckets = collections.Counter(bisect.bisect_left(self.lengths[:-1], length) for length in lengths)
        if len(self.lengths) > 1 and buckets:
            return buckets.total() / sum(n / self.each_length[i].throughput_qps(subnet) for i, n in buckets.items())
        return max(1e3 * b / ms for b, ms in zip(self.batch_sizes, self.row(subnet).latency_ms, strict=True))

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`. `rows` lists the rows of the longest length, `shorter` has one list per other length."""
        about = {"schema": SCHEMA, "device": self.device, "slicing": self.slicing}
        about |= {} if self.compute_dtype == "float32" else {"compute_dtype": self.compute_dtype}
        if self.parts or self.cpu_workers > 1:
            parts = {str(size): part for size, part in self.parts.items()}
            about |= {"schema": _SCHEMA_OF_CORES, "parts": parts, "cpu_workers": self.cpu_workers}
        about |= {"batch_sizes": list(self.batch_sizes), "rows": _rows_to_json(self.rows)}
        if not self.rows_at:
            return about
        shorter = [_rows_to_json(self.rows_at[n]) for n in self.lengths[:-1]]
        return {**about, "lengths": list(self.lengths), "shorter": shorter}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Profile":
        """The inverse of `to_json`. Raises ProfileError if `data` has another form."""
        try:
            with errors.refusing(errors.ProfileError, "not a latency profile; measure it again"):
                if data["schema"] not in (SCHEMA, _SCHEMA_OF_CORES):
                    raise errors.ProfileError(f"profile schema {data['schema']!r} is unknown; measure the profile again")
                lengths = check_length_buckets(data["lengths"]) if data.get("lengths") else (0,)
                tables = map(_rows_from_json, (*data.get("shorter", ()), data["rows"]))
                rows_at = dict(zip(lengths, tables, strict=True))
                rows, sizes, slicing = rows_at.pop(0, ()), tuple(data["batch_sizes"]), data.get("slicing", "kept")
                parts = {int(size): operator.index(part) for size, part in data.get("parts", {}).items()}
                how = slicing, data.get("compute_dtype", "float32"), parts, operator.index(data.get("cpu_workers", 1))
                return Profile(sizes, rows, data["device"], rows_at, *how)
        except (errors.ConfigError, errors.SubnetError, errors.UnknownNameError) as e:
            raise errors.ProfileError(f"not a latency profile; measure it again ({e})") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON with a SHA-256 of its content. An existing file is replaced completely or not at all."""
        values = self.to_json()
        files.write_json(path, {**values, "sha256": files.digest(values)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Profile":
        """Read a file written by `save`. Its SHA-256 may be missing. Raises ProfileError for a missing or malformed file."""
        try:
            data = json.loads(files.read_bytes(path, most=_MOST_BYTES).decode())
            if isinstance(data, dict) and "sha256" in data and data["sha256"] != files.digest(data):
                raise errors.ProfileError("the file is damaged or was edited: measure again, or remove its sha256")
            return Profile.from_json(data)
        except (OSError, RecursionError, TypeError, ValueError) as e:
            raise errors.ProfileError(f"cannot read a profile from {path}: {errors.one_line(e)}") from e


def profiles_of_workers(profile: Profile | Sequence[Profile], count: int) -> list[Profile]:
    """A list with one profile for each of `count` workers. Equal profiles become one object.

    Args:
      profile: one profile for all workers, or a sequence with one for each.
      count: the number of workers.

    Raises ConfigError for a wrong number of profiles, or if they differ in batch sizes, length buckets or dtype.

    >>> fast = Profile((1,), (Row(Subnet((1,)), 0.7, (1.0,)),))
    >>> [p.rows[0].latency_ms for p in profiles_of_workers([fast, fast.scaled(2.0)], 2)], len(profiles_of_workers(fast, 3))
    ([(1.0,), (2.0,)], 3)
    """
    if isinstance(profile, Profile):
        return [profile] * count
    profiles: list[Profile] = list(profile) if isinstance(profile, Iterable) else [profile]
    if not all(isinstance(p, Profile) for p in profiles):
        raise errors.ConfigError(f"profile must be a Profile, or a list of one Profile for each worker, got {profile!r}")
    if not profiles or len(profiles) != count:
        raise errors.ConfigError(f"{len(profiles)} profiles for {count} workers; give one for all, or one for each")
    if len(shapes := {(p.batch_sizes, p.lengths, p.compute_dtype) for p in profiles}) > 1:
        raise errors.ConfigError(f"profiles of workers need the same batch sizes, lengths and dtype, got {sorted(shapes)}")
    return [profiles[profiles.index(p)] for p in profiles]


def check_batch_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes as a tuple. Raises ConfigError unless they are ascending whole numbers from 1 up."""
    return check_ascending("batch_sizes", batch_sizes, "(1, 2, 4, 8, 16)")


def _rows_to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [
        {
            "subnet": r.subnet.to_json(),
            "accuracy": r.accuracy,
            "latency_ms": list(r.latency_ms),
            "p99_ms": list(r.p99_ms),
            **({} if r.envelope is None else {"envelope": r.envelope.to_json()}),
        }
        for r in rows
    ]


def _rows_from_json(data: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(
        Row(
            Subnet.from_json(r["subnet"]),
            float(r["accuracy"]),
            tuple(map(float, r["latency_ms"])),
            tuple(map(float, r["p99_ms"])),
            Subnet.from_json(r["envelope"]) if "envelope" in r else None,
        )
        for r in data
    )
