"""One message for all problems of a dataset, so that the user can repair them together."""

import functools
import logging
from collections.abc import Sequence

from superserve_jax import errors

_log = logging.getLogger(__name__)

MOVED = (
    ". If the data of a run has moved, repeat the command that trained it with the new path, `superserve train CONFIG "
    "--workdir RUN --data.path NEW`. A finished run is not trained again; it and its export get the new path"
)
"""What the message about missing data ends with."""

_SHOWN = 10  # problems in a message
_LOGGED = 100  # problems in the log after those in the message
_LEFT_OUT = 50  # of what is left out, in a warning


def refuse(
    where: str, problems: Sequence[str], *, remedy: str = "", kind: type[errors.SuperServeError] = errors.DataError
) -> None:
    """Raises `kind` with all problems in one message. Does nothing if there are none.

    Args:
      where: what has the problems, such as a path.
      problems: one sentence for each.
      remedy: what helps against several of them.
      kind: the error's class.

    >>> refuse("pets", ["test/emu is empty", "train/1.png is damaged"])
    Traceback (most recent call last):
    superserve_jax.errors.DataError: pets has 2 problems:
      - test/emu is empty
      - train/1.png is damaged
    """
    if not problems:
        return
    if len(problems) == 1 and not remedy:
        raise kind(f"{where}: {problems[0]}")
    for problem in problems[_SHOWN : _SHOWN + _LOGGED]:
        _log.warning("%s: %s", where, problem)
    shown = [f"  - {problem}" for problem in problems[:_SHOWN]]
    if more := problems[_SHOWN:]:
        listed = "which are listed above" if len(more) <= _LOGGED else f"of which the first {_LOGGED} are listed above"
        shown.append(f"  - {len(more):,} more, {listed}")
    count = "a problem" if len(problems) == 1 else f"{len(problems):,} problems"
    raise kind("\n".join([f"{where} has {count}:", *shown, *([remedy] if remedy else [])]))


def warn_left_out(what: str, problems: Sequence[str]) -> None:
    """Logs a warning with the first 50 of the images or lines that are left out. Does nothing if there are none.

    Args:
      what: what is left out, such as "pets: 2 images cannot be read and are left out".
      problems: one sentence for each.
    """
    if not problems:
        return
    more = [f"  - {len(problems) - _LEFT_OUT:,} more"] if len(problems) > _LEFT_OUT else []
    warn_once("\n".join([f"{what}:", *(f"  - {problem}" for problem in problems[:_LEFT_OUT]), *more]))


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, but the same one only once in a process: the stages of one program open the same data several times."""
    _log.warning("%s", message)
