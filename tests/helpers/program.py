"""Runs the programs of train/ and serve/, in this process or in a new one."""

import contextlib
import gc
import importlib.util
import io
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import pytest

from superserve_jax import cli

ROOT = pathlib.Path(__file__).parents[2]


class Done(NamedTuple):
    """What a program printed, and what it wrote to the file of --json."""

    stdout: str
    stderr: str
    json: Any


def run_program(name, *arguments, status=0, json_file=False, fresh=False, patches=()):
    """Runs a program as its command line would, checks its exit status, and returns what it printed.

    Args:
      name: the program's path in the repository, such as "serve/measure.py".
      arguments: of the command line. Each is turned into text.
      status: the expected exit status.
      json_file: add `--json FILE`, and return what the file holds.
      fresh: run it in a new process. Otherwise it runs in this one, where it compiles less and sees what a test has patched.
      patches: {name: value}, new values for globals of the module with the program's `main`, which runs in this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "out.json"
        command = [name, *map(str, arguments), *(["--json", str(file)] if json_file else [])]
        found, stdout, stderr = _in_a_new_process(command) if fresh else _in_this_process(command, dict(patches))
        assert found == status, stdout + stderr
        assert "Traceback" not in stderr, stderr
        return Done(stdout, stderr, json.loads(file.read_text()) if file.exists() else None)


def _in_a_new_process(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    return done.returncode, done.stdout, done.stderr


def _in_this_process(command, patches):
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # a program replaces it
        gc.collect()  # what earlier tests left may report errors, which are not the program's
        patch.syspath_prepend(ROOT / pathlib.Path(command[0]).parent)  # the program may import a module beside it
        patch.chdir(ROOT)
        spec = importlib.util.spec_from_file_location(command[0].replace("/", ".").removesuffix(".py"), command[0])
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)  # tyro reads the source of its options
        spec.loader.exec_module(module)
        for name, value in patches.items():
            patch.setattr(sys.modules[module.main.__module__], name, value)
        with _logging_put_back():
            try:
                cli.run(module.main)
            except SystemExit as end:
                status = end.code or 0
    return status, stdout.getvalue(), stderr.getvalue()


@contextlib.contextmanager
def _logging_put_back():
    """Undoes what a program changes in the set-up of logging, also for loggers that the program creates."""
    before = {logger: (logger.level, list(logger.handlers)) for logger in _loggers()}
    try:
        yield
    finally:
        for logger in _loggers():
            level, logger.handlers[:] = before.get(logger, (logging.NOTSET, []))
            logger.setLevel(level)


def _loggers():
    return [logging.root, *(v for v in logging.root.manager.loggerDict.values() if isinstance(v, logging.Logger))]
