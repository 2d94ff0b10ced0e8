"""What malformed requests (see `malformed`) have led to: answers, findings, and the state of the gateway's process."""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway_load.children import Child
from superserve_jax import cli

_SHOWN = 20  # findings to print of each kind


class Outcome(NamedTuple):
    """What became of an attempt: its kind and number, the statuses of the answers, and the finding or ""."""

    kind: str
    number: int
    statuses: collections.Counter[str]
    finding: str


class Watch:
    """Looks at the gateway's process: whether it runs, what it logs, and how much memory it has."""

    def __init__(self, child: Child):
        self._child, self._seen = child, 0
        self.memory_mb = [child.memory_mb()]

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._child.process.poll() is not None

    def findings(self) -> list[str]:
        """What is wrong with the process since the last call."""
        if self.has_ended:
            return ["the process of the gateway has ended"]
        self.memory_mb.append(self._child.memory_mb())
        said = self._child.said()
        new, self._seen = said[self._seen :], len(said)
        return [f"the log has a traceback: {new[-3_000:]}"] if "Traceback" in new else []

    def grown_mb(self) -> float:
        """The memory that has come since a fifth of the looks."""
        return self.memory_mb[-1] - max(self.memory_mb[: max(len(self.memory_mb) // 5, 2)])


class Findings:
    """What was seen so far.

    Args:
      kinds: the kinds of attempts.

    Attributes:
      statuses: how often each status was the answer, by kind.
      found: the findings, as they are written to the file.
      count: the number of attempts.
    """

    def __init__(self, kinds: Iterable[str]):
        self.statuses = {kind: collections.Counter[str]() for kind in kinds}
        self.found = list[dict[str, object]]()
        self.count = 0

    def add(self, kind: str, number: int | None, finding: str) -> None:
        """Adds a finding, and prints the first ones of each kind."""
        self.found.append({"kind": kind, "number": number, "finding": finding})
        if self.of_kind(kind) <= _SHOWN:
            print(f"{kind}{'' if number is None else f' {number}'}: {finding}", flush=True)

    def add_all(self, outcomes: Sequence[Outcome]) -> None:
        """Adds the outcomes of attempts."""
        for outcome in outcomes:
            self.count += 1
            self.statuses[outcome.kind] += outcome.statuses or {"none": 1}
            if outcome.finding:
                self.add(outcome.kind, outcome.number, outcome.finding)

    def of_kind(self, kind: str) -> int:
        """The number of findings of a kind."""
        return sum(finding["kind"] == kind for finding in self.found)

    def print_table(self) -> None:
        """Prints a line for each kind."""
        lines = [("kind", "findings", "answers by status")]
        for kind, counted in self.statuses.items():
            shown = ", ".join(f"{status}: {count:,}" for status, count in sorted(counted.items()))
            lines.append((kind, f"{self.of_kind(kind)}", shown))
        cli.print_table(lines)
