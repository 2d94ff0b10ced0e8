"""Every flag of every program has a text of its own in --help, also the flags of configs."""

import dataclasses
import importlib.util
import re
import sys
import typing

import pytest
import tyro
from program import ROOT

from superserve_jax import shipped
from superserve_jax.training import data
from superserve_jax.training.config import load_config

PROGRAMS = [
    path
    for folder in ("superserve_jax/commands", "serve/bench", "train/bench")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "\nclass Options" in path.read_text()
]
CONFIGS = {name: load_config(name) for name in shipped.configs()}


def texts(options, **defaults):
    """{flag: its text, without types and defaults} of a class of options."""
    found = {}
    parser = tyro.extras.get_parser(options, **defaults)
    for group in parser._action_groups:  # noqa: SLF001 - argparse offers no other way
        for action in group._group_actions:  # noqa: SLF001
            name, text = action.option_strings[0] if action.option_strings else action.dest, str(action.help or "")
            if re.search(r"\.\d+$", name):  # an element of a tuple of tuples, which the text of its group explains
                text = group.description or ""
            found[name] = re.sub(
                r"\x1b\[[0-9;]*m|\((default|required|repeatable)[^()]*(\([^()]*\)[^()]*)*\)", "", text
            ).strip()
    return found


def check(found):
    assert found
    assert not [name for name, text in found.items() if len(text) < 10]
    phases = {name: text for name, text in found.items() if not re.search(r"phases\.[1-9]", name)}  # phases share their texts
    elements = {name: text for name, text in phases.items() if not re.search(r"\.\d+$", name)}
    assert len(set(elements.values())) == len(elements)


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_flag_of_a_program_has_a_text(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"help_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # tyro reads the source of its options
    spec.loader.exec_module(module)
    needed = {f.name: tyro.MISSING for f in dataclasses.fields(module.Options) if f.default is dataclasses.MISSING}
    configs = {"config": CONFIGS["debug"], "search": CONFIGS["debug"].search}
    configs = {name: config for name, config in configs.items() if name in needed}
    default = {"default": module.Options(**needed | configs)} if configs else {}
    check(texts(module.Options, **default))


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_field_of_a_config_has_a_text(config):
    check(texts(type(config), default=config))


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
@pytest.mark.parametrize("kind", typing.get_args(data.AnyDataConfig))
def test_every_field_of_a_dataset_has_a_text(kind):
    check(texts(kind))
