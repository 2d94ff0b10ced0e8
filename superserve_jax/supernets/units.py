"""Units: what an elastic width counts, such as attention heads, neurons or channels. A subnet runs the first units."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Units:
    """Units of one layer. If all their parameters move with them, reordering them does not change the whole network's output.

    Args:
      count: number of units.
      writers: (dotted path, axis) of each parameter that produces the units. The axis holds the units one after another,
        each with length / count consecutive entries.
      reader: (dotted path, axis) of the weight that their output is multiplied with next.
    """

    count: int
    writers: tuple[tuple[str, int], ...]
    reader: tuple[str, int]
