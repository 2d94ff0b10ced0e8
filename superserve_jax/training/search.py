"""The search for Pareto-optimal subnets: accuracy on validation images against FLOPs.

Half of the candidates are random subnets spread over FLOPs, half are mutations of the front found so far. Each candidate
gets SubnetNorm statistics of its own before it is judged; the masked program judges all of them with one compilation.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import subnet as subnets
from superserve_jax.supernets import supernet
from superserve_jax.training import calibration, evaluation, sampling

_MUTATION = 0.15  # chance of each position of a mutated subnet to be drawn anew


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A subnet that was tried, its multiply-adds and its validation accuracy (a fraction)."""

    subnet: subnets.Subnet
    flops: int
    accuracy: float

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        return {"subnet": self.subnet.to_json(), "flops": self.flops, "accuracy": self.accuracy}


def search(
    model: supernet.SuperNet,
    images: np.ndarray,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    candidates: int,
    seed: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Candidate]:
    """Tries subnets and returns them all.

    Args:
      model: the trained SuperNet.
      images: raw training images (N, ...) for the candidates' statistics.
      batches: makes a fresh pass over the validation data, as for `evaluation.accuracy`.
      candidates: how many to try; fewer where the space has fewer.
      seed: of the random choices.
      progress: wraps an iteration over candidates, for a progress bar.
    """
    tried: dict[subnets.Subnet, Candidate] = {}

    def judged(proposals: Iterable[subnets.Subnet]):
        for subnet in proposals:
            rows = calibration.calibrate(model, [subnet], images)
            judge = supernet.SuperNet(model.config, model.params, rows)
            (accuracy,) = evaluation.accuracy(judge, [subnet], batches)
            tried[subnet] = Candidate(subnet, model.config.flops(subnet), accuracy)
            yield tried[subnet]

    space = model.space
    total = min(candidates, space.size)
    for _ in progress(judged(_proposals(model.config, space, tried, total, seed))):
        pass
    return list(tried.values())


def _proposals(
    config: Any, space: subnets.SearchSpace, tried: Mapping[subnets.Subnet, Candidate], total: int, seed: int
) -> Iterable[subnets.Subnet]:
    """Smallest, largest, random ones over FLOPs, then mutations of the front of what was tried meanwhile."""
    first = [space.smallest(), space.largest(), *sampling.envelopes(config, max(total // 2 - 2, 0), seed=seed + 1)]
    yield from dict.fromkeys(first)
    rng = np.random.default_rng([seed, 1])
    while len(tried) < total:
        parents = front(tried.values())
        child = mutate(space, parents[int(rng.integers(len(parents)))].subnet, rng)
        if child not in tried:
            yield child


def mutate(space: subnets.SearchSpace, subnet: subnets.Subnet, rng: np.random.Generator) -> subnets.Subnet:
    """`subnet` with each depth and choice drawn anew with a chance of 15 %."""

    def draw(choices: Sequence[Any], now: Any) -> Any:
        return choices[int(rng.integers(len(choices)))] if rng.random() < _MUTATION else now

    return space.vary(subnet, draw)


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The Pareto front: ascending in FLOPs, each more accurate than all that are cheaper."""
    result: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.flops, -c.accuracy)):
        if not result or c.accuracy > result[-1].accuracy:
            result.append(c)
    return result


def choose(
    candidates: Sequence[Candidate], count: int, *, keep: Sequence[subnets.Subnet] = (), tolerance: float = 0.0
) -> list[Candidate]:
    """At most `count` candidates on or near the front, in ascending order of FLOPs.

    The range of FLOPs is cut into bands of equal ratio; of each band the most accurate candidate is chosen, unless a cheaper
    one is better by more than `tolerance`.

    Args:
      candidates: all that were tried.
      count: at least 2.
      keep: subnets to choose in any case, such as the smallest and the largest.
      tolerance: accuracies are uncertain by so much, such as their standard error; a front is blurred by it.
    """
    chosen = {c.subnet: c for c in candidates if c.subnet in keep}
    bands = count - len(chosen)
    low, high = (math.log(end(c.flops for c in candidates)) for end in (min, max))
    best: dict[int, Candidate] = {}
    for c in sorted(candidates, key=lambda c: c.flops):
        band = min(int(bands * (math.log(c.flops) - low) / max(high - low, 1e-9)), bands - 1)
        cheaper = max((o.accuracy for o in candidates if o.flops < c.flops), default=0.0)
        if cheaper <= c.accuracy + tolerance and (band not in best or c.accuracy > best[band].accuracy):
            best[band] = c
    chosen |= {c.subnet: c for c in best.values()}
    return sorted(chosen.values(), key=lambda c: c.flops)


def standard_error(accuracy: float, examples: int) -> float:
    """Of an accuracy measured on so many examples.

    >>> round(standard_error(0.9, 1000), 4)
    0.0095
    """
    return math.sqrt(accuracy * (1 - accuracy) / examples)
