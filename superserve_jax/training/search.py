"""Evolutionary search for Pareto-optimal subnets: accuracy on validation images against FLOPs or latency.

NSGA-II (Deb et al., 2002): the first generation is spread over FLOPs; then parents, the best Pareto fronts of all that was
tried, have children by crossover and mutation. Each candidate gets SubnetNorm statistics of its own before it is judged; the
masked program judges all of them with one compilation. What is proposed is a pure function of the seed and of what was found
before, so an interrupted search repeats an undisturbed one.
"""

import dataclasses
import itertools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from superserve_jax import errors, files
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import calibration, evaluation, sampling

_POPULATION = 50  # parents, and children of a generation
_MUTATION = 0.1  # chance of each position of a child to be drawn anew
_TRIES = 20  # children made in search of one that was not tried yet

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A subnet that was tried, its cost (multiply-adds, or milliseconds) and its validation accuracy (a fraction)."""

    subnet: Subnet
    cost: float
    accuracy: float

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        return {"subnet": self.subnet.to_json(), "cost": self.cost, "accuracy": self.accuracy}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Candidate":
        """The inverse of `to_json`."""
        return Candidate(Subnet.from_json(data["subnet"]), data["cost"], data["accuracy"])


def evolutionary_search(
    model: SuperNet,
    images: np.ndarray,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    candidates: int,
    seed: int,
    cost: Callable[[Subnet], float] | None = None,
    space: SearchSpace | None = None,
    tied: bool = False,
    known: Mapping[Subnet, Candidate] | None = None,
    record: Callable[[Candidate], None] = lambda _: None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Candidate]:
    """Tries subnets and returns them all.

    Args:
      model: the trained SuperNet.
      images: raw training inputs (N, ...) for the candidates' statistics.
      batches: makes a pass over the validation data, as for `evaluation.accuracy`; the batches are kept on the device.
      candidates: how many to try; fewer where the space has fewer.
      seed: of the random choices.
      cost: of a subnet; its multiply-adds if left out.
      space: that the subnets come from; the model's own, where it is None.
      tied: only subnets that were trained in a tied phase are tried, see `SearchSpace.tied`.
      known: candidates that an interrupted search judged; they are not judged again.
      record: is given each candidate that is judged, at once.
      progress: wraps an iteration over candidates, for a progress bar.
    """
    known = known or {}
    tried: dict[Subnet, Candidate] = {}  # as subnets of `space`, whose canonical form may be another
    found: dict[Subnet, Candidate] = {}
    on_device = jax.device_put(list(batches()))
    inputs = jax.device_put(images)

    def judge(subnet: Subnet) -> Candidate:
        rows = calibration.calibrate(model, [subnet], inputs)
        judged = SuperNet(model.config, model.params, rows)
        (accuracy,) = evaluation.accuracy(judged, [subnet], lambda: on_device)
        candidate = Candidate(subnet, (cost or model.config.flops)(subnet), accuracy)
        record(candidate)
        return candidate

    def judged():
        within = space or model.space
        for subnet in _proposals(model.config, within, tried, min(candidates, within.size), seed, tied):
            whole = model.space.validate(subnet)
            found[whole] = known[whole] if whole in known else judge(whole)
            tried[subnet] = dataclasses.replace(found[whole], subnet=subnet)
            yield found[whole]

    for _ in progress(judged()):
        pass
    return list(found.values())


# -- what to try --------------------------------------------------------------------------------------------------------


def _proposals(
    config: Any,
    space: SearchSpace,
    tried: Mapping[Subnet, Candidate],
    total: int,
    seed: int,
    tied: bool,
) -> Iterator[Subnet]:
    """Generation by generation, `total` subnets, or as many as can be found; each must be in `tried` before the next is asked
    for."""
    rng = np.random.default_rng([seed, 1])
    spread = sampling.envelopes(config, _POPULATION - 2, seed=seed + 1, space=space, tied=tied)
    first = [space.smallest(), space.largest(), *(spread[i] for i in rng.permutation(len(spread)))]
    yield from list(dict.fromkeys(first))[:total]
    while len(tried) < total:
        parents = survivors(tried.values(), _POPULATION)
        generation: dict[Subnet, None] = {}
        for _ in range(min(_POPULATION, total - len(tried))):
            if (child := _new_child(space, parents, {*tried, *generation}, rng, tied)) is not None:
                generation[child] = None
        if not generation:
            return
        yield from generation


def _new_child(
    space: SearchSpace,
    parents: Sequence[Candidate],
    taken: set[Subnet],
    rng: np.random.Generator,
    tied: bool,
) -> Subnet | None:
    """A child of two tournament winners that is not `taken`, or a random subnet where that is hard to find; None where a tied
    space, whose size is not known, seems to have no other."""
    for _ in range(_TRIES):
        mother, father = (parents[rng.integers(len(parents), size=2).min()].subnet for _ in range(2))
        child = mutate(space, crossover(space, mother, father, rng), rng)
        child = space.tied(child) if tied else child
        if child not in taken:
            return child
    for _ in itertools.repeat(None) if not tied else range(100 * _TRIES):
        child = space.vary(child, lambda choices, _: choices[int(rng.integers(len(choices)))])
        child = space.tied(child) if tied else child
        if child not in taken:
            return child
    return None


def crossover(space: SearchSpace, mother: Subnet, father: Subnet, rng: np.random.Generator) -> Subnet:
    """A subnet with each depth and choice of one parent or, as often, the other."""
    of_father = iter(
        [*(sum(father.gates[b] for b in stage) for stage in space.stages), *(v for _, values in father.axes for v in values)]
    )

    def draw(_: Sequence[Any], of_mother: Any) -> Any:
        other = next(of_father)
        return other if rng.integers(2) else of_mother

    return space.vary(mother, draw)


def mutate(space: SearchSpace, subnet: Subnet, rng: np.random.Generator) -> Subnet:
    """`subnet` with each depth and choice drawn anew with a chance of 10 %."""

    def draw(choices: Sequence[Any], now: Any) -> Any:
        return choices[int(rng.integers(len(choices)))] if rng.random() < _MUTATION else now

    return space.vary(subnet, draw)


def survivors(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """The best `count`, best first: by Pareto front, the first front first, then by the distance to the neighbours on it."""
    left = {c.subnet: c for c in candidates}
    result: list[Candidate] = []
    while left and len(result) < count:
        layer = pareto_front(left.values())
        distance = _crowding(layer)
        result += sorted(layer, key=lambda c, distance=distance: -distance[c.subnet])
        for c in layer:
            del left[c.subnet]
    return result[:count]


def _crowding(layer: Sequence[Candidate]) -> dict[Subnet, float]:
    """How far apart a front's candidates are: between the two neighbours, in log cost and accuracy as shares of the front."""
    points = np.array([(math.log(c.cost), c.accuracy) for c in layer])
    width = np.maximum(np.ptp(points, axis=0), 1e-9)
    inner = ((points[2:] - points[:-2]) / width).sum(1).tolist()
    return dict(zip([c.subnet for c in layer], [math.inf, *inner, math.inf], strict=False))


# -- what to make of it -------------------------------------------------------------------------------------------------


def pareto_front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The Pareto front: ascending in cost, each more accurate than all that are cheaper."""
    result: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.cost, -c.accuracy)):
        if not result or c.accuracy > result[-1].accuracy:
            result.append(c)
    return result


def choose_served(
    candidates: Sequence[Candidate],
    count: int,
    *,
    keep: Sequence[Subnet] = (),
    tolerance: float = 0.0,
    network: Callable[[Subnet], Any] = lambda subnet: subnet,
) -> list[Candidate]:
    """At most `count` candidates on or near the front, in ascending order of cost.

    Near is what is less accurate than a cheaper candidate by `tolerance` at most. The range of costs is cut into `count`
    bands of equal ratio; the most accurate of each band are chosen first, then those nearest to the front.

    Args:
      candidates: all that were tried.
      count: at least 2.
      keep: subnets to choose in any case, such as the smallest and the largest.
      tolerance: a fraction. Accuracies are uncertain by their standard error; a front is blurred by it.
      network: what two subnets have in common if they are one network, because their choices are rounded to the same sizes; of
        such only one is chosen.
    """
    ordered = sorted(candidates, key=lambda c: c.cost)
    costs = [c.cost for c in ordered]
    best = np.maximum.accumulate([0.0, *(c.accuracy for c in ordered)])
    lacks = dict(zip(ordered, best[np.searchsorted(costs, costs)] - [c.accuracy for c in ordered], strict=True))
    near = [c for c in ordered if lacks[c] <= tolerance]
    chosen = {c: None for c in ordered if c.subnet in keep}
    bands = count - len(chosen)
    low, high = math.log(costs[0]), math.log(costs[-1])
    of_band = {c: min(int(bands * (math.log(c.cost) - low) / max(high - low, 1e-9)), bands - 1) for c in near}
    first = {of_band[c]: c for c in sorted(near, key=lambda c: c.accuracy)}
    taken = {network(c.subnet) for c in chosen}
    for c in (*first.values(), *sorted(near, key=lambda c: lacks[c])):
        if len(chosen) < count and network(c.subnet) not in taken:
            chosen[c] = None
            taken.add(network(c.subnet))
    return sorted(chosen, key=lambda c: c.cost)


def standard_error(accuracy: float, examples: int) -> float:
    """Of an accuracy measured on so many examples.

    >>> round(standard_error(0.9, 1000), 4)
    0.0095
    """
    return math.sqrt(accuracy * (1 - accuracy) / examples)


# -- what was tried, on disk --------------------------------------------------------------------------------------------


class Log:
    """What a search tried, as JSON lines that are only ever added to: an interrupted search goes on from there.

    The first line holds what the others depend on: settings, and latencies that were measured. Use as a context manager.

    Args:
      path: of the file. One of other settings is begun anew; a torn last line is dropped.
      settings: all that a candidate's cost and accuracy depend on, as plain values.
      measure: gives the latencies by subnet, where none are in the file.

    Attributes:
      latencies: as `measure` gave them.
      known: the candidates in the file.
    """

    def __init__(
        self,
        path: pathlib.Path,
        settings: Mapping[str, Any],
        *,
        measure: Callable[[], Mapping[Subnet, float]] = dict,
    ):
        head, *lines = _whole_lines(path) or [{}]
        if head.get("settings") != settings:
            if head:
                other = [name for name in settings if head.get("settings", {}).get(name) != settings[name]]
                _log.info("%s is of other %s; searching anew", path, ", ".join(other) or "settings")
            head = {"settings": settings, "latencies": [[s.to_json(), value] for s, value in measure().items()]}
            lines = []
        elif lines:
            _log.info("%s has %d candidates already; going on from there", path, len(lines))
        files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in (head, *lines)).encode())
        self.latencies = {Subnet.from_json(s): value for s, value in head["latencies"]}
        self.known = {c.subnet: c for c in map(Candidate.from_json, lines)}
        self._file = path.open("a")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, candidate: Candidate) -> None:
        """Writes a candidate."""
        self._file.write(json.dumps(candidate.to_json()) + "\n")
        self._file.flush()


def _whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file up to one that is torn, or none; a kill may tear the last."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as e:
        raise errors.ConfigError(f"{path} is damaged: {e}; remove it to search anew") from e
