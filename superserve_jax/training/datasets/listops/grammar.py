"""The expressions of listops: how they are drawn, written and worked out.

    expression := digit | operator expression expression ... "]"
    operator   := "[MIN" | "[MAX" | "[MED" | "[SM"

MED is the median, rounded down; SM is the sum modulo 10; so every value is a digit. Tokens are parted by blanks. The grammar
is that of Nangia and Bowman (2018) and of Long Range Arena (Tay et al., 2021), whose sequences are longer and nest deeper.

What is random comes from the raw bits of PCG64, the part of numpy's random streams that never changes between versions; a test
pins the SHA-256.
"""

import statistics
from collections.abc import Callable, Iterator

import numpy as np

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
DIGITS = tuple("0123456789")
CLOSE = "]"
TOKENS = ("[PAD]", "[CLS]", *DIGITS, *OPERATORS, CLOSE)  # by id

NUM_EXAMPLES = {"train": 80_000, "test": 4_000}
MIN_ARGUMENTS, MAX_ARGUMENTS = 2, 4
MAX_DEPTH = 3  # of operators
NESTED = 0.35  # chance of an argument to be an operator where depth allows it
MIN_LENGTH, MAX_LENGTH = 6, 31  # tokens; with [CLS] before them at most 32

_EVALUATE: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def generate() -> Iterator[tuple[str, str, int]]:
    """All examples as (split, text, value), no text twice; the same on every machine.

    >>> next(generate())
    ('test', '[MED [MIN 6 5 8 [SM 7 1 ] ] 5 ]', 5)
    """
    draw = _uniform(np.random.PCG64(0))
    seen: set[str] = set()
    for split in sorted(NUM_EXAMPLES):  # test first: it stays the same whatever the number of training examples
        for _ in range(NUM_EXAMPLES[split]):
            tokens: list[str] = []
            value = 0
            while not MIN_LENGTH <= len(tokens) <= MAX_LENGTH or " ".join(tokens) in seen:
                tokens, value = _expression(draw, 1)
            seen.add(" ".join(tokens))
            yield split, " ".join(tokens), value


def _expression(draw: Callable[[], float], depth: int) -> tuple[list[str], int]:
    """Tokens and value of a random expression whose operator stands at `depth`, 1 outermost."""
    operator = OPERATORS[int(draw() * len(OPERATORS))]
    tokens, values = [operator], []
    for _ in range(MIN_ARGUMENTS + int(draw() * (MAX_ARGUMENTS - MIN_ARGUMENTS + 1))):
        if depth < MAX_DEPTH and draw() < NESTED:
            inner, value = _expression(draw, depth + 1)
        else:
            value = int(draw() * len(DIGITS))
            inner = [DIGITS[value]]
        tokens += inner
        values.append(value)
    return [*tokens, CLOSE], _EVALUATE[operator](values)


def _uniform(bits: np.random.PCG64) -> Callable[[], float]:
    """Numbers from 0 up to 1, below it."""
    return lambda: float(bits.random_raw() >> 11) * 2.0**-53
