"""Profiles: what each served subnet costs and is worth on one kind of device. No jax.

A profile is the only thing that a policy knows about the SuperNet: for each subnet its accuracy and, for each batch size,
the latency of one batch. `serve/measure.py` measures one; the simulator and the policies read it.

A text server pads sequences to one of a few lengths, its **length buckets**, and latencies differ from one to the other. What
asks for a profile sees an ordinary one, that of a length bucket (`Profile.at_length`).
"""

import bisect
import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from superserve_jax import errors, files
from superserve_jax.lengths import check_ascending, check_length_buckets
from superserve_jax.subnet import Subnet

SCHEMA = 1

_LEAST_MS, _MOST_MS = 1e-9, 1e12  # of a latency that can be: outside of it, a policy's arithmetic would fail, not the profile


@dataclasses.dataclass(frozen=True)
class Row:
    """One subnet of a profile.

    Args:
      subnet: the subnet.
      accuracy: top-1 accuracy as a fraction of 1, measured on test data.
      latency_ms: median latency of one batch, for each of the profile's batch sizes.
      p99_ms: 99th percentile of the same; the medians where it was not measured.
      envelope: the subnet bucket in whose executables it ran; None where it had its own.
    """

    subnet: Subnet
    accuracy: float
    latency_ms: tuple[float, ...]
    p99_ms: tuple[float, ...] = ()
    envelope: Subnet | None = None

    @errors.refusing(errors.ProfileError, "a row is of a subnet, an accuracy and a tuple of latencies")
    def __post_init__(self):
        if not self.p99_ms:
            object.__setattr__(self, "p99_ms", self.latency_ms)
        if not isinstance(self.subnet, Subnet):
            raise errors.ProfileError(f"a row is of a Subnet, got {self.subnet!r}")
        if self.envelope is not None and not self.envelope.covers(self.subnet):
            raise errors.ProfileError(f"the envelope of {self.subnet} does not cover it: {self.envelope}")
        if not 0 <= self.accuracy <= 1:
            raise errors.ProfileError(f"accuracy must be a fraction from 0 to 1, got {self.accuracy}")
        for v in (*self.latency_ms, *self.p99_ms):
            if not _LEAST_MS <= v <= _MOST_MS:
                raise errors.ProfileError(f"latencies must be positive and finite milliseconds, got {list(self.latency_ms)}")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Rows in ascending order of accuracy, over common batch sizes.

    Args:
      batch_sizes: ascending.
      rows: the subnets; with several lengths, at the longest.
      device: the kind of device that it was measured on.
      lengths: length buckets in tokens, ascending; `()` where inputs have one shape.
      shorter: the profiles of the same subnets at the other lengths (see `join`).
      slicing: how weights were sliced, "kept" or "in_call" (see `engines.device`).

    >>> row = Row(Subnet((1,)), 0.7, (1.0, 1.5))
    >>> Profile((1, 2), (row,)).latency_ms(row.subnet, 2)
    1.5
    """

    batch_sizes: tuple[int, ...]
    rows: tuple[Row, ...]
    device: str = "unknown"
    lengths: tuple[int, ...] = ()
    shorter: tuple["Profile", ...] = ()
    slicing: Literal["kept", "in_call"] = "kept"

    @errors.refusing(errors.ProfileError, "a profile is of a tuple of batch sizes and one of `Row`")
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
        if self.slicing not in ("kept", "in_call"):
            raise errors.ProfileError(f"slicing is 'kept' or 'in_call', got {self.slicing!r}")
        if self.lengths:
            check_length_buckets(self.lengths)
        if tuple(t.lengths for t in self.shorter) != tuple((length,) for length in self.lengths[:-1]):
            raise errors.ProfileError(
                f"{len(self.shorter)} profiles of shorter inputs for the lengths {list(self.lengths)}; use `join`"
            )
        for t in self.shorter:
            if t.batch_sizes != self.batch_sizes or [r.subnet for r in t.rows] != [r.subnet for r in self.rows]:
                raise errors.ProfileError(f"at length {t.lengths[0]} other batch sizes or subnets; measure all lengths alike")

    @property
    def max_batch(self) -> int:
        """The largest batch size."""
        return self.batch_sizes[-1]

    @functools.cached_property
    def tables(self) -> tuple["Profile", ...]:
        """One profile for each length bucket, in ascending order; itself alone where there are no several."""
        return (*self.shorter, dataclasses.replace(self, lengths=self.lengths[-1:], shorter=())) if self.shorter else (self,)

    def at_length(self, length: float) -> "Profile":
        """The profile of the length bucket that holds `length` tokens, the longest where none does; itself without lengths."""
        return self.tables[min(bisect.bisect_left(self.lengths, length), len(self.tables) - 1)]

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
        """Only the rows that no other row beats: at least as accurate, and at most as slow at every batch size. With several
        lengths, the latencies at the longest decide.

        Args:
          min_accuracy_gap, min_latency_ratio: also drop rows that are nearer than this to the next faster row kept, the
            latencies taken at the largest batch. The fastest and the most accurate row stay in any case.
        """
        if self.shorter:
            longest = self.tables[-1].pareto(min_accuracy_gap=min_accuracy_gap, min_latency_ratio=min_latency_ratio)
            return self.only(r.subnet for r in longest.rows)
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
        """Repaired so that latency never falls as batch, accuracy (the paper's P1 and P2) or length rise: noise raised to the
        running maximum, never lowered. A 99th percentile is raised only where it would be below the median: one that stands
        out, as after a single disturbance, is no reason to raise all those behind it."""
        tables: list[Profile] = []
        best_of: dict[Subnet, list[float]] = {}  # at the length before
        for table in self.tables:
            best = [0.0] * len(self.batch_sizes)
            rows = []
            for r in table.rows:
                best = _running_max(map(max, best, best_of.get(r.subnet, best)), r.latency_ms)
                best_of[r.subnet] = best
                rows.append(dataclasses.replace(r, latency_ms=tuple(best), p99_ms=tuple(map(max, best, r.p99_ms))))
            tables.append(dataclasses.replace(table, rows=tuple(rows)))
        return join_lengths(tables)

    @property
    def envelopes(self) -> dict[Subnet, Subnet]:
        """The subnet buckets of the subnets that share one."""
        return {r.subnet: r.envelope for r in self.rows if r.envelope is not None}

    def with_envelopes(self, envelopes: Mapping[Subnet, Subnet]) -> "Profile":
        """The same, of subnets that ran in these subnet buckets; those that are not named, or are their own, had their own."""
        of = {s: envelope for s, envelope in envelopes.items() if envelope != s}
        return self._with_rows(lambda r: dataclasses.replace(r, envelope=of.get(r.subnet)))

    def scaled(self, factor: float) -> "Profile":
        """The profile of a device that is `factor` times slower."""
        return self._with_latencies(lambda ms: tuple(v * factor for v in ms))

    def only(self, subnets: Iterable[Subnet]) -> "Profile":
        """The profile of some of the subnets."""
        kept = list(subnets)
        return join_lengths([dataclasses.replace(t, rows=tuple(t.row(s) for s in kept)) for t in self.tables])

    def at(self, batch_sizes: Sequence[int], lengths: Sequence[int] = ()) -> "Profile":
        """The profile at some of its batch sizes and lengths; all lengths where none is given.

        Raises ProfileError for one that was not measured.
        """
        for what, wanted, measured in (("batch size", batch_sizes, self.batch_sizes), ("length", lengths, self.lengths)):
            if odd := set(wanted) - set(measured):
                raise errors.ProfileError(f"{what} {min(odd)} was not measured, only {list(measured)}; measure it")
        places = [self.batch_sizes.index(b) for b in batch_sizes]
        cut = self._with_latencies(lambda ms: tuple(ms[i] for i in places), batch_sizes)
        return join_lengths([t for t in cut.tables if not lengths or t.lengths[0] in lengths])

    def _with_latencies(
        self, change: Callable[[tuple[float, ...]], tuple[float, ...]], batch_sizes: Sequence[int] | None = None
    ) -> "Profile":
        """The latencies of every row changed, at every length."""
        return self._with_rows(
            lambda r: dataclasses.replace(r, latency_ms=change(r.latency_ms), p99_ms=change(r.p99_ms)), batch_sizes
        )

    def _with_rows(self, change: Callable[[Row], Row], batch_sizes: Sequence[int] | None = None) -> "Profile":
        """Every row changed, at every length."""
        sizes = self.batch_sizes if batch_sizes is None else tuple(batch_sizes)
        return join_lengths([dataclasses.replace(t, batch_sizes=sizes, rows=tuple(map(change, t.rows))) for t in self.tables])

    def throughput_qps(self, subnet: Subnet, lengths: Iterable[int] = ()) -> float:
        """Queries per second of one worker that runs `subnet` at its best batch size.

        Args:
          lengths: of the queries, in tokens: then of such a mix, each query in a batch of its own length bucket; without
            them all are of the longest.
        """
        tables = collections.Counter(bisect.bisect_left(self.lengths[:-1], length) for length in lengths)
        if self.shorter and tables:
            seconds = sum(n / self.tables[i].throughput_qps(subnet) for i, n in tables.items())
            return tables.total() / seconds
        row = self.row(subnet)
        return max(1e3 * b / ms for b, ms in zip(self.batch_sizes, row.latency_ms, strict=True))

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        tables = [
            [
                {
                    "subnet": r.subnet.to_json(),
                    "accuracy": r.accuracy,
                    "latency_ms": list(r.latency_ms),
                    "p99_ms": list(r.p99_ms),
                    **({} if r.envelope is None else {"envelope": r.envelope.to_json()}),
                }
                for r in table.rows
            ]
            for table in self.tables
        ]
        about = {"schema": SCHEMA, "device": self.device, "slicing": self.slicing}
        about |= {"batch_sizes": list(self.batch_sizes), "rows": tables[-1]}
        return {**about, "lengths": list(self.lengths), "shorter": tables[:-1]} if self.lengths else about

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Profile":
        """The inverse of `to_json`. Raises ProfileError where `data` has not that form."""
        try:
            with errors.refusing(errors.ProfileError, "not a latency profile; measure it again"):
                if data["schema"] != SCHEMA:
                    raise errors.ProfileError(f"profile schema {data['schema']} is not the {SCHEMA} that this version reads")
                sizes, device = tuple(data["batch_sizes"]), str(data["device"])
                lengths = [(length,) for length in data.get("lengths", ())] or [()]
                tables = [*data.get("shorter", ()), data["rows"]]
                slicing = data.get("slicing", "kept")
                made = [Profile(sizes, _rows(t), device, at, slicing=slicing) for t, at in zip(tables, lengths, strict=True)]
                return join_lengths(made)
        except (errors.ConfigError, errors.SubnetError, errors.UnknownNameError) as e:
            raise errors.ProfileError(f"not a latency profile; measure it again ({e})") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON with a SHA-256 of what it says; the file is replaced whole or not at all."""
        values = self.to_json()
        files.write_json(path, {**values, "sha256": files.digest(values)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Profile":
        """Reads what `save` wrote, or the same without a SHA-256. Raises ProfileError for a missing or malformed file."""
        try:
            data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            if isinstance(data, dict) and "sha256" in data and data["sha256"] != files.digest(data):
                raise errors.ProfileError("it is damaged or was edited: measure it again, or remove its sha256")
            return Profile.from_json(data)
        except (OSError, RecursionError, TypeError, ValueError) as e:
            raise errors.ProfileError(f"cannot read a profile from {path}: {e}") from e


def join_lengths(tables: Sequence[Profile]) -> Profile:
    """One profile out of one for each length bucket, in ascending order.

    >>> short, long = (Profile((1,), (Row(Subnet((1,)), 0.7, (ms,)),), lengths=(n,)) for n, ms in ((32, 1.0), (128, 3.0)))
    >>> both = join_lengths([short, long])
    >>> both.lengths, both.rows == long.rows, [both.at_length(n).rows[0].latency_ms for n in (9, 32, 33)]
    ((32, 128), True, [(1.0,), (1.0,), (3.0,)])
    """
    *shorter, longest = tables
    lengths = tuple(itertools.chain.from_iterable(t.lengths for t in tables))
    return dataclasses.replace(longest, lengths=lengths, shorter=tuple(shorter)) if shorter else longest


def profiles_of_workers(profile: Profile | Sequence[Profile], count: int) -> list[Profile]:
    """The profile of each of `count` workers: one for all, or one for each. Equal ones become one object.

    Raises ConfigError where they are not as many, or have not the same batch sizes and length buckets.

    >>> fast = Profile((1,), (Row(Subnet((1,)), 0.7, (1.0,)),))
    >>> [p.rows[0].latency_ms for p in profiles_of_workers([fast, fast.scaled(2.0)], 2)], len(profiles_of_workers(fast, 3))
    ([(1.0,), (2.0,)], 3)
    """
    if isinstance(profile, Profile):
        return [profile] * count
    with errors.refusing(errors.ConfigError, "profile must be a Profile, or one for each worker"):
        profiles = list(profile)
    if not all(isinstance(p, Profile) for p in profiles):
        raise errors.ConfigError(f"profile must be a Profile, or one for each worker, got {profile!r}")
    if not profiles or len(profiles) != count:
        raise errors.ConfigError(f"{len(profiles)} profiles for {count} workers; give one for all, or one for each")
    if len(shapes := {(p.batch_sizes, p.lengths) for p in profiles}) > 1:
        raise errors.ConfigError(f"profiles of workers need the same batch sizes and lengths, got {sorted(shapes)}")
    distinct: list[Profile] = []
    for p in profiles:
        if p not in distinct:
            distinct.append(p)
    return [distinct[distinct.index(p)] for p in profiles]


def check_batch_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes as a tuple. Raises ConfigError unless they are ascending whole numbers from 1 up."""
    return check_ascending("batch_sizes", batch_sizes, "(1, 2, 4, 8, 16)")


def _rows(data: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    """Rows out of their JSON form."""
    return tuple(
        Row(
            Subnet.from_json(r["subnet"]),
            float(r["accuracy"]),
            tuple(float(v) for v in r["latency_ms"]),
            tuple(float(v) for v in r["p99_ms"]),
            Subnet.from_json(r["envelope"]) if "envelope" in r else None,
        )
        for r in data
    )


def _running_max(floor: Iterable[float], values: Sequence[float]) -> list[float]:
    """`values` raised to `floor` and to the running maximum of what stands before."""
    result, best = [], 0.0
    for f, v in zip(floor, values, strict=True):
        best = max(best, f, v)
        result.append(best)
    return result
