"""The console script `superserve`: its subcommands are the programs of train/ and serve/."""

import ast
import pathlib
import sys

import pytest

from superserve_jax import __version__, commands

ROOT = pathlib.Path(__file__).parents[1]
HELPERS = {"__init__", "convert_data", "replay_setup"}
MODULES = {path.stem for path in (ROOT / "superserve_jax" / "commands").glob("*.py")} - HELPERS
# ray_app.py is a deployment of Ray Serve, and has no command.
PROGRAMS = sorted({*ROOT.glob("train/*.py"), *ROOT.glob("serve/*.py")} - {ROOT / "serve" / "ray_app.py"})


@pytest.fixture
def superserve(monkeypatch, capsys):
    """Runs the console script, and returns its exit status and what it printed."""

    def run(*arguments):
        status = 0
        monkeypatch.setattr(sys, "argv", ["superserve", *arguments])
        try:
            commands.main()
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_every_module_is_a_command_with_a_program():
    assert set(commands.COMMANDS) == MODULES
    names = set()
    for path in PROGRAMS:
        [module] = (
            n.module
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.ImportFrom) and n.names[0].name == "main"
        )
        names.add(module.removeprefix("superserve_jax.commands."))
    assert names == MODULES


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(superserve, arguments):
    status, printed = superserve(*arguments)
    assert status == 0
    assert all(name in printed for name in MODULES)


def test_the_version_is_printed(superserve):
    assert superserve("--version") == (0, f"superserve-jax {__version__}\n")


def test_an_unknown_command_is_refused_with_the_nearest_one(superserve):
    status, printed = superserve("trian")
    assert status == 2
    assert "did you mean 'train'" in printed


def test_a_command_gets_its_arguments(superserve):
    status, printed = superserve("compare", "--preset", "burtsy")
    assert status == 2
    assert "did you mean 'bursty'" in printed


def test_the_help_of_a_command_names_the_command(superserve):
    status, printed = superserve("cache", "--help")
    assert status == 0
    assert "usage: superserve cache" in printed
