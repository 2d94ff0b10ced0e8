"""Users' code that may fail in any way: Python files, log handlers, `repr` of errors, tracebacks. No jax."""

import contextlib
import importlib
import importlib.util
import linecache
import logging
import os
import pathlib
import re
import sys
import threading
import traceback
import types
from typing import TypeGuard

from superserve_jax import errors

IMPORT = "SUPERSERVE_IMPORT"
"""The environment variable with modules of users, separated like the folders in PATH, to find families that are not known."""

_MAX_TEXT = 1_000  # characters of an error's repr; `health()` keeps it
_PACKAGE = str(pathlib.Path(__file__).parent)


def execute(path: pathlib.Path) -> types.ModuleType:
    """Executes a Python file as a module, and keeps the module in `sys.modules`.

    There, dataclasses find the types of postponed annotations. Python's own loader would write bytecode beside the file.
    """
    code = compile(path.read_bytes(), str(path), "exec")
    module = types.ModuleType(re.sub(r"\W", "_", str(path.absolute())))
    module.__file__ = str(path)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        exec(code, vars(module))
    except BaseException:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
        raise
    return module


def import_module(name: str) -> types.ModuleType:
    """Imports a module of a user.

    Args:
      name: a module's name, as in an import statement, or the path of a .py file. The working folder, or the folder of the
        file, becomes the first of `sys.path`. So the module may import its neighbours, and a config may import the module.

    Raises:
      ConfigError: there is no such module or file, or its code raises.
    """
    is_path = name.endswith(".py") or os.sep in name
    path = pathlib.Path(os.path.expanduser(name))
    if is_path and not (path.suffix == ".py" and path.is_file()):
        raise errors.ConfigError(f"no module file {name}; give the path of a .py file, or a module's name such as my_module")
    folder, module = (str(path.absolute().parent), path.stem) if is_path else (os.getcwd(), name)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        if is_path and not _is_file(module, path):  # another module has this name, such as one of the standard library
            return execute(path)
        return importlib.import_module(module)
    except errors.SuperServeError:
        raise
    except (Exception, SystemExit) as e:  # any exception: it is the user's code
        if is_missing(e, module):
            raise errors.ConfigError(
                f"no module named {name}: install its package, call the program from the folder that holds it, or give the "
                "path of a .py file"
            ) from e
        raise errors.ConfigError(f"{name} fails{place(e)}: {type(e).__name__}: {errors.one_line(e)}") from e


def is_missing(error: BaseException | None, module: str) -> TypeGuard[ModuleNotFoundError]:
    """Whether an import failed because there is no module of this name, or no package that would hold it.

    >>> [is_missing(ModuleNotFoundError(name=name), "torch_family.a") for name in ("torch_family", "torch")]
    [True, False]
    """
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


def _is_file(module: str, path: pathlib.Path) -> bool:
    """Whether an import of `module` would run the file `path`, or has run it."""
    found = sys.modules.get(module)
    origin = getattr(found, "__file__", None) if found else getattr(importlib.util.find_spec(module), "origin", None)
    return origin is not None and os.path.exists(origin) and os.path.samefile(origin, path)


def place(error: BaseException) -> str:
    """Where an error in a user's file arose, such as ", see configs/mine.py:7, `return TrainConfig(`".

    It names the innermost line outside of this package. "" if there is none.
    """
    if isinstance(error, SyntaxError):
        file, line, text = error.filename, error.lineno, error.text
    else:
        frames = (f for f in reversed(traceback.extract_tb(error.__traceback__)) if not f.filename.startswith(_PACKAGE))
        if (frame := next(frames, None)) is None:
            return ""
        file, line, text = frame.filename, frame.lineno, frame.line
    if file is None:  # for example a file with a null byte, in which there is no place
        return ""
    return _see(file, line, text)


def definition(function: object) -> str:
    """Where a user's function is defined, such as ", see mine.py:4, `def mine(profile, state):`"; "" if it is not known."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType) or code.co_filename.startswith(_PACKAGE):
        return ""
    linecache.checkcache(code.co_filename)
    return _see(code.co_filename, code.co_firstlineno, linecache.getline(code.co_filename, code.co_firstlineno))


def _see(file: str, line: int | None, text: str | None) -> str:
    return f", see {file}:{line}" + (f", `{text.strip()}`" if text else "")


def log(logger: logging.Logger, level: int, message: str, *values: object, error: BaseException | None = None) -> None:
    """Logs a message. If a log handler raises, prints its error, so that no worker ends because of it."""
    try:
        logger.log(level, message, *values, exc_info=error)
    except BaseException as raised:
        if is_interrupt(raised):
            raise
        with contextlib.suppress(Exception):  # nothing is left that could tell the user
            traceback.print_exc()


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is Ctrl-C. Python delivers it only to the main thread; elsewhere a callback must have raised it."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def text_of(value: object) -> str:
    """The `repr` of an error or another value, cut to 1,000 characters, even if its `repr` raises.

    >>> text_of(ValueError("no"))
    "ValueError('no')"
    """
    try:
        return "".join(repr(value)[:_MAX_TEXT])  # a str, even if `repr` returns a subclass
    except BaseException as raised:
        if is_interrupt(raised):
            raise
        return f"{type(value).__name__} (its repr fails)"


def forget_frames(error: BaseException) -> None:
    """Drops the tracebacks of an error and of its causes.

    Otherwise a client that keeps the error keeps their frames, and with them the engine and its device's memory.
    """
    cause, context = (getattr(BaseException, name).__get__ for name in ("__cause__", "__context__"))
    seen, found = set[int](), error  # an error may be its own cause
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        BaseException.with_traceback(found, None)  # works even if the class forbids to set attributes
        found = cause(found) or context(found)
