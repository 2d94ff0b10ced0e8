"""What an expression of pytest's option -m selects."""

import itertools
import re


def needs(expression, marker):
    """Whether the expression selects some tests only because they have the marker, as "gpu and slow" does.

    Tries all combinations of the other markers in the expression. False for an invalid expression, which pytest reports.
    """
    others = sorted(set(re.findall(r"\w+", expression)) - {"and", "or", "not", marker})

    def selects(values):
        return bool(eval(expression, {"__builtins__": {}}, dict(zip([marker, *others], values, strict=True))))

    combinations = itertools.product([False, True], repeat=len(others))
    try:
        return bool(expression) and any(selects([True, *c]) and not selects([False, *c]) for c in combinations)
    except (SyntaxError, TypeError):
        return False
