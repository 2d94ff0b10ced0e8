"""The expressions of listops: how they are drawn at random, written as text and evaluated.

    expression := digit | operator expression expression ... "]"
    operator   := "[MIN" | "[MAX" | "[MED" | "[SM"

MED is the median, rounded down, and SM is the sum modulo 10, so every value is a digit. Tokens are separated by blanks. The
grammar is from Nangia and Bowman (2018) and Long Range Arena (Tay et al., 2021), where sequences are longer and nest deeper.

All randomness comes from the raw bits of PCG64, which numpy never changes between versions. A test pins the SHA-256.
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
NESTED = 0.35  # probability that an argument is an operator, if the depth allows it
MIN_LENGTH, MAX_LENGTH = 6, 31  # tokens; with [CLS] at most 32

_EVALUATE: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def generate() -> Iterator[tuple[str, str, int]]:
    """All examples as (split, text, value). No text occurs twice. They are the same on every machine.

    >>> next(generate())
    ('test', '[MED [MIN 6 5 8 [SM 7 1 ] ] 5 ]', 5)
    """
    draw = _uniform(np.random.PCG64(0))
    seen: set[str] = set()
    for split in sorted(NUM_EXAMPLES):  # test first, so that it does not depend on the number of training examples
        for _ in range(NUM_EXAMPLES[split]):
            tokens: list[str] = []
            value = 0
            while not MIN_LENGTH <= len(tokens) <= MAX_LENGTH or " ".join(tokens) in seen:
                tokens, value = _expression(draw, 1)
            seen.add(" ".join(tokens))
            yield split, " ".join(tokens), value


def _expression(draw: Callable[[], float], depth: int) -> tuple[list[str], int]:
    """Tokens and value of a random expression whose operator is at `depth`; 1 is the outermost."""
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
    """A function that draws uniform numbers in [0, 1)."""
    return lambda: float(bits.random_raw() >> 11) * 2.0**-53
