"""The three splits of the user's own files: their usual names, and what is held out for a split that has no files.

A validation or test split without files of its own is a tenth of the training examples, at most 5,000. The choice is random,
but always the same for the same files.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from superserve_jax.training.data import streams

E = TypeVar("E")

NAMES: dict[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split of each usual name, in lower case."""

_SHARE, _MOST = 10, 5_000


@dataclasses.dataclass(frozen=True)
class Divided(Generic[E]):
    """Examples by split.

    Args:
      splits: the examples of each split that has any.
      note: how the splits were made, for the user.
    """

    splits: dict[str, Sequence[E]]
    note: str


def find(names: Iterable[str], *, suffixes: bool = False) -> tuple[dict[str, str], list[str]]:
    """Which folder or file is which split.

    Args:
      names: the names of folders or files. Capital letters do not matter.
      suffixes: whether the names end in suffixes, such as ".csv", which do not matter either.

    Returns:
      The name of each split, and a list of problems: two names for the same split.

    >>> find(["Train", "val", "images"])
    ({'train': 'Train', 'validation': 'val'}, [])
    """
    found, problems = {}, []
    for name in sorted(names):
        split = NAMES.get((pathlib.PurePath(name).stem if suffixes else name).lower())
        if split in found:
            problems.append(f"{found[split]} and {name} both stand for the {split} split; remove one of them")
        elif split is not None:
            found[split] = name
    return found, problems


def divide(given: Mapping[str, Sequence[E]], *, validation: int | None, names: Mapping[str, str]) -> Divided[E]:
    """Holds out training examples for the splits that have no files.

    Args:
      given: the examples of "train" and of the other splits with files of their own.
      validation: the number of training examples to hold out for validation. None: the validation files, else a share.
      names: the name of each split's folder or file.

    Raises ConfigError if no training example is left.

    >>> divide({"train": range(50)}, validation=None, names={}).note
    '40 examples for training, 5 held out for validation, 5 held out for testing'
    """
    examples = given["train"]
    share = min(_MOST, max(1, len(examples) // _SHARE))
    use_files = validation is None and "validation" in given
    held = 0 if use_files else share if validation is None else validation
    held_test = 0 if "test" in given else max(2, share)  # one half is profiled, the other one replayed
    left = streams.num_kept(len(examples), held + held_test)
    order = streams.fixed_order(len(examples))
    chosen: dict[str, Sequence[E]] = {
        "train": [examples[i] for i in order[:left]],
        "validation": given["validation"] if use_files else [examples[i] for i in order[left : left + held]],
        "test": given["test"] if "test" in given else [examples[i] for i in order[left + held :]],
    }
    if use_files:  # the first examples of a split must be of every class, and files are sorted by class
        chosen["validation"] = [given["validation"][i] for i in streams.fixed_order(len(given["validation"]))]
    parts = [f"{left:,} examples for training"]
    for split, purpose, taken in (("validation", "validation", held), ("test", "testing", held_test)):
        source = "held out" if taken else f"from {names[split]}" if split in names else ""
        if chosen[split]:
            parts.append(f"{len(chosen[split]):,} {source} for {purpose}")
    return Divided({split: found for split, found in chosen.items() if found}, ", ".join(parts))
