"""Units: what an elastic width counts, such as attention heads, neurons or channels. A subnet runs the first ones."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Units:
    """Units that may change places without changing the whole network, if all their parameters move with them.

    Args:
      count: how many there are.
      writers: (parameter's dotted path, axis) of what makes them. An axis holds the units one after another, each with
        length / count consecutive entries.
      reader: (path, axis) of the weights that their output meets next.
    """

    count: int
    writers: tuple[tuple[str, int], ...]
    reader: tuple[str, int]
