"""What the programs in train/ and serve/ share: logging, errors as one line, tables."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from superserve_jax import errors


def run(main: Callable[[], None]) -> None:
    """Runs a program: an error of this library ends it with one line and status 2, Ctrl-C with status 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("superserve_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file
    try:
        main()
    except errors.SuperServeError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(e or "interrupted", file=sys.stderr)
        sys.exit(130)


def check_above_zero(options: Any, *names: str) -> None:
    """Raises ConfigError unless all these options are above 0.

    >>> import types
    >>> check_above_zero(types.SimpleNamespace(seconds=0.0), "seconds")
    Traceback (most recent call last):
    superserve_jax.errors.ConfigError: seconds must be above 0, got 0.0
    """
    for name in names:
        if not getattr(options, name) > 0:
            raise errors.ConfigError(f"{name} must be above 0, got {getattr(options, name)}")


def config_argument(arguments: list[str], explanation: str | None) -> tuple[str, list[str]]:
    """The config file that is a program's first argument, and the arguments after it; without one the program ends with its
    explanation.

    >>> config_argument(["configs/debug.py", "--epochs", "2"], "how to use it")
    ('configs/debug.py', ['--epochs', '2'])
    """
    if not arguments or arguments[0].startswith("-"):
        print(explanation)
        sys.exit(0 if arguments in (["-h"], ["--help"]) else 2)
    return arguments[0], arguments[1:]


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Prints a header and rows in aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for n, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
        if n == 0:
            print("  ".join("-" * width for width in widths))
