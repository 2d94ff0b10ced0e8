"""Python in the README and in docs/ runs. Their commands name programs and files that exist."""

import pathlib
import re
import shlex

import pytest
from tiny import write_export

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXT = "".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def test_the_readme_shows_python_and_commands():
    assert PYTHON
    assert any(line.startswith("make demo") for line in COMMANDS)
    assert any(line.startswith("make test") for line in COMMANDS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for executables, so that only the first snippet with a server compiles."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_in_the_texts_is_short_and_runs(code, tiny, tmp_path, cache, monkeypatch, capsys):
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    write_export(tmp_path / "runs" / "demo" / "export", tiny, accuracy=0.7, class_names=("a", "b", "c"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUPERSERVE_CACHE", str(cache))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    exec(compile(code.replace("16, 32, 32, 1", "16, 9, 9, 1"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("python ")])
def test_commands_in_the_texts_name_files_that_exist(line):
    words = shlex.split(line.split("#")[0])
    assert (ROOT / words[1]).is_file()
    for word in words[2:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


def test_every_config_and_program_is_named_in_the_readme():
    for folder in ("train", "serve", "configs"):
        for path in (ROOT / folder).glob("*.py"):
            assert f"{folder}/{path.name}" in README, path
