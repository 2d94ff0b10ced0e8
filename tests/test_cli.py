"""Tables that programs print are plain text, and are never wrapped or cut. Errors of native threads are not shown."""

import dataclasses
import subprocess
import sys

import pytest

from superserve_jax import cli, errors


@dataclasses.dataclass
class Options:
    trace: str | None = None
    seconds: float = 12.0
    slow_after: float = 0.5
    slow_factor: float = 1.0


def test_options_that_would_have_no_effect_are_refused_and_their_defaults_are_not():
    for options in Options(), Options(seconds=3.0), Options("a.csv"), Options(slow_after=0.2, slow_factor=2.0):
        cli.refuse_with(options, "trace", "seconds")
        cli.refuse_without(options, "slow_factor", "slow_after")
    with pytest.raises(errors.ConfigError, match=r"--seconds 3.0 has no effect with --trace; leave out one of them"):
        cli.refuse_with(Options("a.csv", seconds=3.0), "trace", "slow_after", "seconds")
    with pytest.raises(errors.ConfigError, match=r"--slow-after 0.2 .* without --slow-factor; give both or neither"):
        cli.refuse_without(Options(slow_after=0.2), "slow_factor", "slow_after")


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert "something else" in done.stderr
    assert "Event loop" not in done.stderr
