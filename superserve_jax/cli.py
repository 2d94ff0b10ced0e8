"""Helpers of the programs in train/ and serve/: logging, errors in one line, checks of options, tables."""

import dataclasses
import logging
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from superserve_jax import errors, files, foreign

_IMPORT = """Every program also takes `--import MODULE`, a module's name or the path of a .py file, with a family of your own
(see docs/families.md).
"""
_NO_WRAP = 10_000  # characters in a line

T = TypeVar("T")


def run(main: Callable[[], None]) -> None:
    """Runs a program. An error of this library ends it with one line and status 2, Ctrl-C with status 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("superserve_jax").setLevel(logging.INFO)
    for name in ("absl", "asyncio"):  # Orbax reports every file, and every thread that fails; our error says what matters
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    try:
        sys.argv[1:] = map(_expanded, _import_modules(sys.argv[1:]))
        main()
    except errors.SuperServeError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(str(e) or "interrupted", file=sys.stderr)
        sys.exit(130)


def _import_modules(arguments: Sequence[str]) -> list[str]:
    """Imports the modules of every `--import`, here and in the processes that this one starts. Returns the other arguments."""
    left, names, each = [], [], iter(arguments)
    for argument in each:
        flag, is_one, name = argument.partition("=")
        if flag != "--import":
            left.append(argument)
            continue
        name = name if is_one else next(each, "")
        if not name or name.startswith("-"):
            raise errors.ConfigError("--import needs the name of a module, such as my_module, or the path of a .py file")
        names.append(os.path.abspath(os.path.expanduser(name)) if name.endswith(".py") else name)
    for name in names:
        foreign.import_module(name)
    if names:
        before = os.environ.get(foreign.IMPORT)
        os.environ[foreign.IMPORT] = os.pathsep.join([*([before] if before else []), *names])
    return left


def command(name: str, *arguments: object) -> str:
    """A command to type next, with the `--import` options of this one.

    >>> command("measure", pathlib.Path("runs/my run/export"))
    "superserve measure 'runs/my run/export'"
    """
    modules = filter(None, os.environ.get(foreign.IMPORT, "").split(os.pathsep))
    options = [word for module in dict.fromkeys(modules) for word in ("--import", module)]
    return shlex.join(["superserve", name, *map(str, arguments), *options])


def _expanded(argument: str) -> str:
    """An argument with `~` replaced. A shell does not replace it in `--json=~/a.json`.

    >>> _expanded("--json=~/a.json") == f"--json={os.path.expanduser('~')}/a.json"
    True
    """
    flag, is_option, value = argument.partition("=")
    if is_option and flag.startswith("--"):
        return f"{flag}={os.path.expanduser(value)}"
    return os.path.expanduser(argument)


def parse(options: type[T], explanation: str | None) -> T:
    """Parses the command line, and returns the options.

    Args:
      options: the class of the options, a dataclass.
      explanation: the program's docstring, which --help shows.
    """
    return tyro.cli(options, description=_described(explanation))


def _described(explanation: str | None) -> str:
    return f"{explanation}\n{_IMPORT}"


def _report_unraisable(unraisable: Any) -> None:
    """Reports an error that nobody can catch, but no error of Orbax' native threads.

    After a failed write, these threads call a closed event loop, hundreds of times on a full disk.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


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


def refuse_with(options: Any, other: str, *names: str) -> None:
    """Raises ConfigError if the option `other` was given, and one of `names`, which have no effect beside it.

    Args:
      options: the options, a dataclass. An option that equals its default counts as left out.
      other: the option that decides.
      names: options that have no effect beside `other`.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     trace: str | None = None
    ...     cv2: float = 4.0
    >>> refuse_with(Options("a.csv", cv2=1.0), "trace", "cv2")
    Traceback (most recent call last):
    superserve_jax.errors.ConfigError: --cv2 1.0 has no effect with --trace; leave out one of them
    """
    _refuse(options, names, _is_given(options, other), f"with {_flag(other)}; leave out one of them")


def refuse_without(options: Any, other: str, *names: str) -> None:
    """Raises ConfigError if the option `other` was left out, and one of `names` was given, which need it.

    See `refuse_with`. The error says, for example, "--speed 2.0 has no effect without --trace; give both or neither".
    """
    _refuse(options, names, not _is_given(options, other), f"without {_flag(other)}; give both or neither")


def _refuse(options: Any, names: Sequence[str], is_unused: bool, why: str) -> None:
    for name in names:
        if is_unused and _is_given(options, name):
            raise errors.ConfigError(f"{_flag(name)} {getattr(options, name)} has no effect {why}")


def _is_given(options: Any, name: str) -> bool:
    [field] = (f for f in dataclasses.fields(options) if f.name == name)
    return getattr(options, name) != field.default


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def options_after_path(defaults: Callable[[str], T], explanation: str | None, *, path: str | None = None) -> tuple[str, T]:
    """Parses the command line `PROGRAM PATH [OPTIONS]`, and returns the path and the options.

    Without any path, the program prints its explanation and ends.

    Args:
      defaults: returns the default options, a dataclass, for a path.
      explanation: the program's docstring.
      path: the path to use if the first argument is not one.
    """
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        path, *arguments = arguments
    elif path is None:
        print(_described(explanation))
        sys.exit(0 if arguments in (["-h"], ["--help"]) else 2)
    options = defaults(path)
    return path, tyro.cli(
        type(options), default=options, args=arguments, prog=f"{sys.argv[0]} {path}", description=_described(explanation)
    )


def duration(seconds: float) -> str:
    """A time for a person to read.

    >>> [duration(seconds) for seconds in (9.44, 200.0, 9000.0, 1e6)]
    ['9.4 s', '3.3 minutes', '2.5 hours', '11.6 days']
    """
    for unit, length_s in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.1f} {unit}"
    return f"{seconds:.1f} s"


def write_results(path: pathlib.Path | None, value: Any) -> None:
    """Writes results as JSON and prints where they are; `path` is the option --json, None if it was not given."""
    if path is not None:
        files.write_json(path, value)
        print(f"results: {path}")


def print_columns(columns: Mapping[str, Callable[[Any], str]], items: Iterable[Any], *, left: int = 1) -> None:
    """Prints a table with one line per item.

    Args:
      columns: each column's name, and a function from an item to its cell.
      items: the items to print, one per line.
      left: see `print_table`.
    """
    print_table([tuple(columns), *(tuple(cell(item) for cell in columns.values()) for item in items)], left=left)


def print_table(lines: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Prints a table. Lines are neither wrapped nor cut, whatever the width of the terminal.

    Args:
      lines: the header, then one line of cells per item.
      left: this many columns are aligned to the left. The others hold numbers and are aligned to the right.
    """
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(lines[0]):
        shown.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for line in lines[1:]:
        shown.add_row(*line)
    Console(width=_NO_WRAP, markup=False, emoji=False, highlight=False).print(shown)
