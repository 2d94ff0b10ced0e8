"""Tables that programs print are plain text, and are never wrapped or cut. Errors of native threads are not shown."""

import subprocess
import sys

import pytest

from superserve_jax import cli


@pytest.mark.parametrize("columns", ["20", "80", "400"])
def test_a_table_is_aligned_and_never_wrapped_or_cut(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    names = ["[bold]short[/]", "long " * 40]
    cli.print_columns({"name": str, "type": lambda name: type(name).__name__}, names)
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "type"]
    assert set(rule) == {"─"}
    assert [line.rsplit(maxsplit=1) for line in lines] == [[name.rstrip(), "str"] for name in names]
    assert len({len(line) for line in (header, rule, *lines)}) == 1


def test_native_threads_that_outlive_their_event_loop_print_nothing_and_other_errors_are_shown():
    code = """
from superserve_jax import cli

class Fails:
    def __init__(self, message): self.message = message
    def __del__(self): raise RuntimeError(self.message)

cli.run(lambda: [Fails("Event loop is closed"), Fails("something else")].clear())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "something else" in done.stderr
    assert "Event loop" not in done.stderr
