"""What tracing found in a module: the axes that can change, the blocks that can be left out, and the reasons for the rest."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from superserve_jax.tracing import kinds, patterns
from superserve_jax.tracing.blocks import natural
from superserve_jax.tracing.groups import Fixed, Group, Place
from superserve_jax.tracing.listing import some, starred, without_shared_numbers
from superserve_jax.tracing.suspects import Suspect
from superserve_jax.tracing.traced import Traced

_PARTS = ("kernel", "bias", "scale", "embedding", "weight")
"""Names of parameters that only say which part of a layer they are."""


@dataclasses.dataclass(frozen=True)
class ElasticAxis:
    """Axes of parameters that change together.

    Args:
      name: the layer that makes the axis, such as "blocks.0.fc1". A number follows if it makes several.
      group: the name of `Traced.groups`.
      size: the size in the whole network.
      kind: "heads", "head_dim", "width", "kernel" or "expand", see `kinds.py`.
      block: the block that holds all of the axes. None if there is no such block that can be left out.
      places: the axes of parameters and statistics.
      sizes: the sizes that a subnet may have, ascending. One size if the axis is not elastic.
      steps: the only sizes that a kernel can have, ascending. `()` for all other axes.
      leader: the name of the axis that this one follows: `sizes` has a size for each of its sizes. None if it follows none.
    """

    name: str
    group: str
    size: int
    kind: str
    block: str | None
    places: tuple[Place, ...]
    sizes: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    leader: str | None = None

    @property
    def is_elastic(self) -> bool:
        """Whether subnets have several sizes."""
        return len(set(self.sizes)) > 1

    def matches(self, pattern: str) -> bool:
        """Whether a pattern names the axis: its kind, or a pattern such as "blocks.*.fc1", see `patterns.py`."""
        return pattern == self.kind or patterns.match(pattern, self.name) is not None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one class that follow each other, and that a subnet may leave out.

    Args:
      name: the list that holds them, such as "blocks", or a part of it, such as "blocks[1:4]".
      blocks: their paths.
      depths: how many of them a subnet may keep, ascending. One number if the depth is not elastic.
    """

    name: str
    blocks: tuple[str, ...]
    depths: tuple[int, ...] = ()

    def matches(self, pattern: str) -> bool:
        """Whether a pattern names the stage, or the whole list that it is a part of."""
        return any(patterns.match(pattern, name) is not None for name in (self.name, self.name.partition("[")[0]))


@dataclasses.dataclass(frozen=True)
class Found:
    """What can change in a module, and what cannot. `print(found)` shows a report.

    Args:
      axes: the axes that can change.
      stages: the blocks that can be left out.
      kept: blocks that cannot be left out, and why.
      fixed: axes of parameters that cannot change, and why.
      suspects: numbers in the code that may come from a size, and do not follow it.
      num_params: the number of parameters of the whole network.
    """

    axes: tuple[ElasticAxis, ...]
    stages: tuple[Stage, ...]
    kept: Mapping[str, str]
    fixed: tuple[Fixed, ...]
    suspects: tuple[Suspect, ...]
    num_params: int

    def __str__(self) -> str:
        return "\n".join([f"{self.num_params:,} parameters", *self._axes(), *self._depth(), *self._rest()])

    def _axes(self) -> Iterable[str]:
        yield "elastic axes:"
        every = {str(p) for p in (*(f.place for f in self.fixed), *(place for axis in self.axes for place in axis.places))}
        alike: dict[str, list[str]] = {}  # axes of blocks that differ only in the block's number share a line
        for axis in self.axes:
            names = [axis.name, axis.leader or axis.name, *starred(map(str, axis.places), every)]
            alike.setdefault(_line(axis, *without_shared_numbers(names)), []).append(_line(axis, *names))
        yield from (f"  {line} ({len(own)} times)" if len(own) > 1 else f"  {own[0]}" for line, own in alike.items())

    def _depth(self) -> Iterable[str]:
        yield "depth:"
        if not self.stages and not self.kept:
            yield "  no blocks were found"
        for stage in self.stages:
            depths = ", ".join(map(str, stage.depths)) if len(stage.depths) > 1 else f"{len(stage.blocks)} (not elastic)"
            yield f"  {stage.name}: {depths} of {len(stage.blocks)} blocks"
        for path, reason in self.kept.items():
            yield f"  {path} always runs: {reason}"

    def _rest(self) -> Iterable[str]:
        yield "axes that keep their sizes:"
        sizes = [(place, axis.size) for axis in self.axes for place in axis.places]
        every = {f"{place} ({size})" for place, size in (*sizes, *((f.place, f.size) for f in self.fixed))}
        by_reason: dict[str, dict[str, None]] = {}
        for fixed in self.fixed:
            by_reason.setdefault(fixed.reason, {})[f"{fixed.place} ({fixed.size})"] = None
        for reason, places in by_reason.items():
            yield f"  {some(starred(places, every))}: {reason}"
        if self.suspects:
            yield "numbers that may come from a size:"
            yield from (f"  {suspect}" for suspect in self.suspects)


def _line(axis: ElasticAxis, name: str, leader: str, *places: str) -> str:
    """The line of an axis in the report. Names of the axis, of its leader and of its places may have "*" for numbers."""
    choices = ", ".join(map(str, axis.sizes)) if axis.is_elastic else f"{axis.size} (not elastic)"
    choices += f", with {leader}" if axis.leader and axis.is_elastic else ""
    return f"{axis.kind:<9} {name}: {choices}; cuts {some(places)}"


def axes_of(traced: Traced, stages: Sequence[Stage]) -> tuple[ElasticAxis, ...]:
    """The axes of a trace that can change, in the order of the parameters. An axis that no operation sums over is left out."""
    uses = kinds.uses(traced.graph, traced.parameters)
    blocks = [path for stage in stages for path in stage.blocks]
    found, names = [], set[str]()
    for group in sorted(traced.groups.values(), key=lambda g: natural(g.name)):
        leaf = traced.leaves[group.name]
        if leaf in uses.summed:
            name = _name(group, names)
            names.add(name)
            kind, block = uses.kind(leaf), _block(group, blocks)
            found.append(ElasticAxis(name, group.name, group.size, kind, block, group.places, steps=group.steps))
    return tuple(found)


def _name(group: Group, taken: set[str]) -> str:
    path = group.name.partition("[")[0]
    layer, _, part = path.rpartition(".")
    base = layer if layer and part in _PARTS and not group.steps else path  # a kernel's channels have the layer's name
    numbered = (f"{base}#{i}" for i in itertools.count(2))
    return base if base not in taken else next(name for name in numbered if name not in taken)


def _block(group: Group, blocks: Sequence[str]) -> str | None:
    """The innermost block that holds all places of a group."""
    around = [b for b in blocks if all(place.parameter.startswith(f"{b}.") for place in group.places)]
    return max(around, key=len, default=None)


def stages_of(
    lists: Mapping[str, Sequence[str]], reasons: Mapping[str, str | None]
) -> tuple[tuple[Stage, ...], dict[str, str]]:
    """The stages of blocks that can be left out, and the reasons of all other blocks.

    Args:
      lists: paths of submodules, by the name of their list.
      reasons: for each path that was found in the trace, why it cannot be left out, or None if it can.
    """
    stages, kept = [], {}
    for name, paths in lists.items():
        called = [path for path in paths if path in reasons]
        runs = [list(run) for can, run in itertools.groupby(called, lambda p: reasons[p] is None) if can]
        for run in runs:
            first = called.index(run[0])
            part = "" if len(run) == len(called) else f"[{first}:{first + len(run)}]"
            stages.append(Stage(f"{name}{part}", tuple(run)))
        kept |= {path: reason for path in called if (reason := reasons[path]) is not None}
    chosen: list[Stage] = []  # of nested lists, the one with more blocks
    for stage in sorted(stages, key=lambda s: (-len(s.blocks), len(s.name))):
        inner = (f"{a}." for s in chosen for a in s.blocks)
        outer = tuple(f"{a}." for a in stage.blocks)
        if not any(b.startswith(prefix) for prefix in inner for b in stage.blocks) and not any(
            b.startswith(outer) for s in chosen for b in s.blocks
        ):
            chosen.append(stage)
    kept = {
        path: reason for path, reason in kept.items() if not any(path.startswith(f"{b}.") for s in chosen for b in s.blocks)
    }
    return tuple(stage for stage in stages if stage in chosen), kept
