"""Guarantees that a long run checks: soak.py and storm.py print them, and end with status 1 if one is broken."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from superserve_jax import cli


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What is guaranteed, what was observed, and whether the guarantee holds."""

    what: str
    observed: str
    holds: bool


def end(guarantees: Sequence[Guarantee], figures: Mapping[str, Any], json: pathlib.Path | None) -> None:
    """Prints the guarantees, writes them and the figures to `json`, and ends the program."""
    print()
    for guarantee in guarantees:
        print(f"{'holds' if guarantee.holds else 'BROKEN'}: {guarantee.what}: {guarantee.observed}")
    cli.write_results(json, {**figures, "guarantees": [dataclasses.asdict(g) for g in guarantees]})
    sys.exit(0 if all(g.holds for g in guarantees) else 1)


def in_words(counts: Mapping[str, int]) -> str:
    """Counts by name, in one line."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
