"""Tables that programs print are plain text, and are never wrapped or cut, however narrow the terminal is."""

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
