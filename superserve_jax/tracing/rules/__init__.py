"""What each of jax's primitives says about the sizes of axes, one module per group of primitives.

| to learn about | read |
|---|---|
| what a rule is, and the rule of unknown primitives | `base.py` |
| functions of single entries: add, exp, select | `elementwise.py` |
| broadcast, transpose, reshape, and new axes | `shapes.py` |
| concatenate, split, slice, pad | `parts.py` |
| matrix products and convolutions | `contractions.py` |
| kernels of several sizes | `selections.py` |
| sums, maxima, and others along an axis | `reductions.py` |
| look-ups, writing into places, counting and random numbers | `lookups.py` |
| scan, checkpoint, and functions with derivatives of their own | `calls.py` |

A primitive without a rule keeps all its axes at their sizes. The names are those of jax 0.10 to 0.12.
"""

from superserve_jax.tracing.rules import calls, contractions, elementwise, lookups, parts, reductions, selections, shapes
from superserve_jax.tracing.rules.base import UNKNOWN, Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **parts.RULES,
    **contractions.RULES,
    **selections.RULES,
    **reductions.RULES,
    **lookups.RULES,
    **calls.RULES,
}


def rule_of(name: str) -> Rule:
    """The rule of a primitive."""
    return RULES.get(name, UNKNOWN)
