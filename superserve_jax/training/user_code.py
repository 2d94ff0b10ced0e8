"""Executes a Python file of a user, such as a config, and says where it failed."""

import pathlib
import re
import sys
import traceback
import types


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


def place(error: BaseException) -> str:
    """Where an error in a user's file arose, such as ", see configs/mine.py:7, `return TrainConfig(`"."""
    if isinstance(error, SyntaxError):
        file, line, text = error.filename, error.lineno, error.text
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        file, line, text = frame.filename, frame.lineno, frame.line
    if file is None or file == __file__:  # for example a file with a null byte, in which there is no place
        return ""
    return f", see {file}:{line}" + (f", `{text.strip()}`" if text else "")
