"""Evolutionary search for Pareto-optimal subnets: validation accuracy against FLOPs or latency.

NSGA-II (Deb et al., 2002). The first generation is spread over FLOPs. Later, the best Pareto fronts so far are the parents,
and crossover and mutation make their children. Each candidate gets its own SubnetNorm statistics before its accuracy is
measured. The masked program evaluates all candidates with one compilation.

Our own code and not a library's: the next proposal is a pure function of the seed and of the candidates so far. An interrupted
search therefore ends with the result of an undisturbed one. Subnets also have a canonical form that a library does not know.
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
import msgspec
import numpy as np

from superserve_jax import errors, files
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import calibration, evaluation, sampling

_log = logging.getLogger(__name__)

_POPULATION = 50  # number of parents, and of children in a generation
_MUTATION = 0.1  # probability that a position of a child is drawn again
_TRIES = 20  # number of children to make until one is new


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A subnet that was tried, with its cost (multiply-adds or milliseconds) and validation accuracy (a fraction)."""

    subnet: Subnet
    cost: float
    accuracy: float

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        return {"subnet": self.subnet.to_json(), "cost": self.cost, "accuracy": self.accuracy}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Candidate":
        """The inverse of `to_json`."""
        cost, accuracy = msgspec.convert([data["cost"], data["accuracy"]], list[int | float])
        return Candidate(Subnet.from_json(data["subnet"]), cost, accuracy)


def evolutionary_search(
    model: SuperNet,
    images: np.ndarray,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    candidates: int,
    seed: int,
    cost: Callable[[Subnet], float] | None = None,
    space: SearchSpace | None = None,
    tied: bool = False,
    known: Mapping[Subnet, Candidate] | None = None,
) -> Iterator[Candidate]:
    """Tries subnets, and yields each candidate as soon as its accuracy is measured.

    Args:
      model: the trained SuperNet.
      images: raw training inputs (N, ...) for the candidates' statistics.
      batches: the validation data, as `evaluation.accuracy` takes it. It is kept on the device.
      candidates: the number of subnets to try. A smaller space gives fewer.
      seed: seed of the random choices.
      cost: the cost of a subnet; its multiply-adds if left out.
      space: the space to search; the model's own if left out.
      tied: whether to try only subnets that a tied phase trains, see `SearchSpace.tied`.
      known: candidates of an interrupted search. Their accuracies are not measured again.
    """
    cost_of, within, known = cost or model.config.flops, space or model.space, known or {}
    measure = accuracy_of(model, images, batches)
    tried: dict[Subnet, Candidate] = {}  # by the subnet of `within`, whose canonical form can differ from the model's
    for subnet in _proposals(model.config, within, tried, min(candidates, within.size), seed, tied):
        whole = model.space.validate(subnet)
        candidate = known[whole] if whole in known else Candidate(whole, cost_of(whole), measure(whole))
        tried[subnet] = dataclasses.replace(candidate, subnet=subnet)
        yield candidate


def accuracy_of(model: SuperNet, images: np.ndarray, batches: Iterable[Mapping[str, np.ndarray]]) -> Callable[[Subnet], float]:
    """A function that measures the accuracy of a subnet with its own statistics. The arguments are those of the search."""
    inputs, on_device = jax.device_put(images), jax.device_put(list(batches))

    def measure(subnet: Subnet) -> float:
        calibrated = SuperNet(model.config, model.params, calibration.calibrate(model, [subnet], inputs))
        (accuracy,) = evaluation.accuracy(calibrated, [subnet], lambda: on_device)
        return accuracy

    return measure


# -- proposals ----------------------------------------------------------------------------------------------------------


def _proposals(
    config: FamilyConfig, space: SearchSpace, tried: Mapping[Subnet, Candidate], total: int, seed: int, tied: bool
) -> Iterator[Subnet]:
    """At most `total` subnets, generation by generation. The caller adds each one to `tried` before it asks for the next."""
    rng = np.random.default_rng([seed, 1])
    spread = sampling.envelopes(config, _POPULATION - 2, seed=seed + 1, space=space, tied=tied)
    first = [space.smallest(), space.largest(), *(spread[i] for i in rng.permutation(len(spread)))]
    yield from list(dict.fromkeys(first))[:total]
    while len(tried) < total:
        parents = survivors(tried.values(), _POPULATION)
        generation: dict[Subnet, None] = {}
        for _ in range(min(_POPULATION, total - len(tried))):
            children = _children(space, parents, rng, tied)
            if (child := next((c for c in children if c not in tried and c not in generation), None)) is not None:
                generation[child] = None
        if not generation:
            return
        yield from generation


def _children(space: SearchSpace, parents: Sequence[Candidate], rng: np.random.Generator, tied: bool) -> Iterator[Subnet]:
    """Children of two tournament winners, then random subnets.

    They end after many if `tied`: the size of a tied space is not known, so it may be exhausted.
    """
    for i in range(101 * _TRIES) if tied else itertools.count():
        if i < _TRIES:
            mother, father = (parents[rng.integers(len(parents), size=2).min()].subnet for _ in range(2))
            child = mutate(space, crossover(space, mother, father, rng), rng)
        else:
            child = space.vary(space.largest(), lambda choices, _: choices[int(rng.integers(len(choices)))])
        yield space.tied(child) if tied else child


def crossover(space: SearchSpace, mother: Subnet, father: Subnet, rng: np.random.Generator) -> Subnet:
    """A subnet that takes each depth and choice from either parent with probability 0.5."""
    of_father = iter(
        [*(sum(father.gates[b] for b in stage) for stage in space.stages), *(v for _, values in father.axes for v in values)]
    )

    def draw(_: Sequence[Any], of_mother: Any) -> Any:
        other = next(of_father)
        return other if rng.integers(2) else of_mother

    return space.vary(mother, draw)


def mutate(space: SearchSpace, subnet: Subnet, rng: np.random.Generator) -> Subnet:
    """`subnet`, with each depth and choice drawn again with probability 0.1."""

    def draw(choices: Sequence[Any], now: Any) -> Any:
        return choices[int(rng.integers(len(choices)))] if rng.random() < _MUTATION else now

    return space.vary(subnet, draw)


def survivors(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """The best `count` candidates, best first: by Pareto front, then by the distance to the neighbours on the front."""
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
    """The crowding distance of NSGA-II: between a candidate's neighbours, in log cost and accuracy relative to the front."""
    points = np.array([(math.log(c.cost), c.accuracy) for c in layer])
    width = np.maximum(np.ptp(points, axis=0), 1e-9)
    inner = ((points[2:] - points[:-2]) / width).sum(1).tolist()
    return dict(zip([c.subnet for c in layer], [math.inf, *inner, math.inf], strict=False))


# -- choosing -----------------------------------------------------------------------------------------------------------


def pareto_front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The Pareto front, in ascending order of cost. Each candidate is more accurate than all cheaper ones."""
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
    tolerance: float | None = None,
) -> list[Candidate]:
    """At most `count` candidates on or near the front, in ascending order of cost.

    The range of costs is cut into `count - len(keep)` bands of equal ratio. The subnets of `keep` are chosen first, then the
    most accurate candidate in each band, then the others, the nearest to the front first. No two candidates with equal cost
    and equal accuracy are chosen: they are the same network, or serving both has no use.

    Args:
      candidates: all candidates that were tried.
      count: the largest number to choose, at least 2.
      keep: subnets to choose in any case, such as the smallest and the largest.
      tolerance: None chooses from the Pareto front only. A fraction also allows a candidate if no other one of at most its
        cost is more accurate by more than this. Measured accuracies have a standard error, which blurs the front.
    """
    ordered = sorted(candidates, key=lambda c: (c.cost, -c.accuracy))
    best = np.maximum.accumulate([c.accuracy for c in ordered])
    lacks = dict(zip(ordered, best - [c.accuracy for c in ordered], strict=True))
    near = pareto_front(ordered) if tolerance is None else [c for c in ordered if lacks[c] <= tolerance]
    chosen = [c for c in ordered if c.subnet in keep]
    taken = {(c.cost, c.accuracy) for c in chosen}
    bands = count - len(chosen)
    low, high = math.log(ordered[0].cost), math.log(ordered[-1].cost)
    of_band = {c: min(int(bands * (math.log(c.cost) - low) / max(high - low, 1e-9)), bands - 1) for c in near}
    first = {of_band[c]: c for c in sorted(near, key=lambda c: c.accuracy)}
    for c in (*first.values(), *sorted(near, key=lambda c: lacks[c])):
        if len(chosen) < count and (c.cost, c.accuracy) not in taken:
            chosen.append(c)
            taken.add((c.cost, c.accuracy))
    return sorted(chosen, key=lambda c: c.cost)


# -- the file of the candidates -------------------------------------------------------------------------------------------


class SearchLog:
    """search.jsonl: the candidates of a search, one JSON line each, so that an interrupted search can go on.

    The first line holds the settings and the measured latencies, on which all other lines depend. If the file has other
    settings, it is started again from empty. An incomplete last line is dropped.

    Args:
      path: path of the file.
      settings: everything that a candidate's cost and accuracy depend on, as plain values.
      measure: measures the latencies by subnet. It is called if the file has none.

    Attributes:
      latencies: the latencies, measured or from the file.
      known: the candidates in the file.
    """

    def __init__(
        self, path: pathlib.Path, settings: Mapping[str, Any], *, measure: Callable[[], Mapping[Subnet, float]] = dict
    ):
        try:
            found, latencies, known = _parse(path)
        except (OSError, *errors.MALFORMED) as e:
            raise errors.ConfigError(f"{path} is damaged ({type(e).__name__}: {e}); remove it to search anew") from e
        if found != settings:
            if found:
                other = [name for name in settings if found.get(name) != settings[name]]
                _log.info("%s was written with other %s; searching anew", path, ", ".join(other) or "settings")
            latencies, known = dict(measure()), []
        elif known:
            _log.info("%s has %d candidates already; going on from there", path, len(known))
        head = {"settings": settings, "latencies": [[s.to_json(), value] for s, value in latencies.items()]}
        lines = (head, *(candidate.to_json() for candidate in known))
        files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.latencies, self.known, self._path = latencies, {c.subnet: c for c in known}, path

    def add(self, candidate: Candidate) -> None:
        """Appends a candidate that is not known yet."""
        if candidate.subnet not in self.known:
            files.append(self._path, (json.dumps(candidate.to_json()) + "\n").encode())


def evaluated(path: pathlib.Path, settings: Mapping[str, Any]) -> dict[Subnet, float]:
    """The accuracies in a search.jsonl that has the given settings; other settings may differ. Empty without such a file."""
    with errors.refusing(errors.ConfigError, f"{path} is damaged; remove it"):
        found, _, known = _parse(path)
    same = bool(found) and all(found.get(name) == value for name, value in settings.items())
    return {c.subnet: c.accuracy for c in known} if same else {}


def _parse(path: pathlib.Path) -> tuple[dict[str, Any], dict[Subnet, float], list[Candidate]]:
    """Settings, latencies and candidates in search.jsonl. A last line that a kill left incomplete is skipped."""
    try:
        *whole, _ = files.read_bytes(path).split(b"\n")
    except FileNotFoundError:
        whole = []
    if not whole:
        return {}, {}, []
    head, *lines = map(json.loads, whole)
    latencies = {Subnet.from_json(s): float(value) for s, value in head["latencies"]}
    return dict(head["settings"]), latencies, [Candidate.from_json(line) for line in lines]
