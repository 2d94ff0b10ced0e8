"""Commands in README, docs/ and docstrings of programs parse: program, options and values exist. Named files exist, too."""

import ast
import importlib
import importlib.util
import pathlib
import re
import shlex
import sys
import tomllib
import types

import pytest
import tyro
from pages import PAGES, ROOT

from superserve_jax import manifest
from superserve_jax.commands import COMMANDS
from superserve_jax.training.config import load_config
from superserve_jax.training.runs import Run

SHELL = ("bash", "sh", "console", "shell")
PROGRAM = re.compile(r"(superserve(?!\.)|python|make|pip install|(serve|train)/\S+\.py) ?\b")
OTHER_PROGRAMS = (
    "git",
    "cd",
    "cp",
    "source",
    "tensorboard",
    "mkdir",
    "chmod",
    "openssl",
    "curl",
    "head",
    "nvidia-smi",
    "docker",
    "kubectl",
    "opentelemetry-instrument",
    "serve",
)  # not ours
FOLDERS = ("configs", "docs", "serve", "superserve_jax", "tests", "train")
# files of the reader, and files that stand for them
EXAMPLES = {"my_config.py": "configs/debug.py", "my-classifier": "tests", "my-vit": "tests"}
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def commands(page):
    """Every command of a page: lines of code blocks, and code in the text that begins with the name of a program."""
    text = "\n".join(block.text.replace("\\\n", " ") for block in page.blocks if block.language in SHELL)
    lines = [shlex.split(line, comments=True) for line in re.split(r"\n|&&", text)]
    spans = [shlex.split(span) for span in page.spans if PROGRAM.match(span)]
    return [words for words in (*lines, *spans) if words]


def commands_of_docstring(path):
    """Every command in the docstring of a program or config: its indented lines."""
    lines = re.findall(r"^ {4}(\S.*)", ast.get_docstring(ast.parse(path.read_text())) or "", re.MULTILINE)
    return [shlex.split(re.split(r" {2,}", line)[0], comments=True) for line in lines if PROGRAM.match(line)]


DOCSTRINGS = [p for folder in ("configs", "serve", "train", "superserve_jax/commands") for p in (ROOT / folder).rglob("*.py")]
FOUND = sorted(
    {(page.name, *words) for page in PAGES for words in commands(page)}
    | {(str(path.relative_to(ROOT)), *words) for path in DOCSTRINGS for words in commands_of_docstring(path)}
)


class Parsed(Exception):
    """Raised in place of the program's work."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Runs a program's `main` up to the end of the parsing of its command line."""
    cli, seen = tyro.cli, []

    def parsed(*arguments, **options):
        seen.append(cli(*arguments, **options))
        raise Parsed

    run = types.SimpleNamespace(config=load_config(str(ROOT / "configs" / "debug.py")), workdir=pathlib.Path("runs/debug"))
    monkeypatch.setattr(tyro, "cli", parsed)
    monkeypatch.setattr(Run, "open", lambda path, **_: run)  # the defaults of some options are those of a run
    monkeypatch.setattr(manifest, "is_run", lambda path: path.parts[:1] == ("runs",))
    monkeypatch.chdir(tmp_path)  # what a command writes does not go into the repository
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)

    def parse(module, *words):
        words = list(words)
        if "--import" in words:  # `cli.run` takes it and its value before `main`
            place = words.index("--import")
            del words[place : place + 2]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Parsed):
            module.main()

    return parse


def program(name):
    """The module of a program in serve/ or train/."""
    key = name.replace("/", ".").removesuffix(".py")
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / name)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend((ROOT / name).parent)
            spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


@pytest.mark.parametrize("command", FOUND, ids=lambda command: " ".join(command)[:90])
def test_a_command_in_the_texts_parses(command, parse, capsys):
    _, name, *words = (EXAMPLES.get(word, word) for word in command)
    if name == "make":
        assert {word for word in words if "=" not in word} <= MAKE_TARGETS
    elif name == "pip":
        ours = re.findall(r"(?:superserve-jax|\.)\[(.*?)\]", " ".join(words))
        assert set(re.findall(r"\w+", ",".join(ours))) <= set(EXTRAS)
    elif name == "superserve":
        assert not words or words[0] in COMMANDS or words[0].startswith("-")
        if _is_whole(words[1:]):
            parse(importlib.import_module(f"superserve_jax.commands.{words[0]}"), f"superserve {words[0]}", *words[1:])
    elif name == "python" and words[0] == "-m":
        assert words[1] in ("pytest", "sphinx", "venv", "pip")
        assert all((ROOT / word).exists() for word in words if word.startswith(FOLDERS))
    elif name == "python" or name.endswith(".py"):
        path, *options = words if name == "python" else (name, *words)
        if path.startswith(("serve/", "train/")):
            assert (ROOT / path).is_file()
            if _is_whole(options) or path.startswith("serve/bench/"):
                parse(program(path), path, *options)
    else:
        assert name in OTHER_PROGRAMS, name


def _is_whole(words):
    """Whether a command has its arguments. The texts also name commands alone."""
    return bool(words) and "--help" not in words and "-h" not in words


def test_an_unknown_option_or_value_is_noticed(parse, capsys):
    module = importlib.import_module("superserve_jax.commands.search")
    for wrong in (["--candidats", "3"], ["--candidates", "many"]):
        with pytest.raises(SystemExit):
            parse(module, "superserve search", "runs/demo", *wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_text_names_exist(page):
    named = [
        span for span in page.spans if re.fullmatch(r"[\w./-]+", span) and span.startswith(tuple(f"{f}/" for f in FOLDERS))
    ]
    words = [word for _, *command in FOUND for word in command if re.match(r"configs/\w+\.py$", word)]
    assert not [name for name in (*named, *words) if "_build" not in name and not (ROOT / name).exists()]


def test_every_program_command_and_config_is_named_in_a_text():
    text = "\n".join(page.text for page in PAGES)
    programs = [path for folder in ("serve/bench", "train/bench") for path in (ROOT / folder).glob("*.py")]
    programs = [path for path in programs if "\nif __name__ ==" in path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in programs]
    assert not [name for name in names if name not in text]
    assert not [name for name in COMMANDS if f"superserve {name}" not in text]
    assert not [path.stem for path in pathlib.Path(ROOT / "configs").glob("*.py") if path.stem not in text]
