"""Families that are not part of the library: entry points of installed packages, and errors for those that are not known."""

import dataclasses
import pathlib
import textwrap

import pytest
from mlp_family import MLPConfig

from superserve_jax import errors, families
from superserve_jax.families.ofa_resnet import OFAResNetConfig

HELPERS = pathlib.Path(__file__).parents[1] / "helpers"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with a module and an entry point of the group of families."""

    def add(module, text, entry):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(text))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[superserve_jax.families]\n{entry}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return add


def test_an_entry_point_finds_the_family_of_an_installed_package(install):
    text = (HELPERS / "mlp_family.py").read_text().replace('"mlp"', '"installed"').replace("@families.register\n", "")
    install("installed_family", text, "installed = installed_family:MLPConfig")
    config = families.config_from_json({"family": "installed", "image_size": 4})
    assert (config.family, config.image_size, type(config).__module__) == ("installed", 4, "installed_family")


@pytest.mark.parametrize(
    ("module", "text", "entry", "message"),
    [
        ("raises", "1 / 0", "raising = raises", "'raising = raises' .* cannot be loaded: ZeroDivisionError: division by zero"),
        ("misnamed", "x = 1", "other = misnamed", "'other = misnamed' .* registers no family of the name 'other'"),
    ],
)
def test_an_entry_point_that_gives_no_family_is_an_error(install, module, text, entry, message):
    install(module, text, entry)
    with pytest.raises(errors.ConfigError, match=message):
        families.config_from_json({"family": entry.split(" ")[0]})


def test_a_module_in_the_environment_is_imported_for_an_unknown_family(tmp_path, monkeypatch):
    """As in a process that a program with `--import` has started."""
    file = tmp_path / "inherited.py"
    file.write_text((HELPERS / "mlp_family.py").read_text().replace('"mlp"', '"inherited"'))
    monkeypatch.setenv("SUPERSERVE_IMPORT", str(file))
    monkeypatch.syspath_prepend(tmp_path)
    assert families.config_from_json({"family": "inherited"}).family == "inherited"


def test_an_unknown_family_says_how_to_make_it_known():
    with pytest.raises(
        errors.UnknownNameError, match=r"'mpl': did you mean 'mlp'\?.*--import my_file.py.*entry point.*jax.fam"
    ):
        families.config_from_json({"family": "mpl"})


def test_a_family_needs_a_name_of_its_own():
    with pytest.raises(errors.ConfigError, match=r"has no name: give the class a line such as `family: ClassVar\[str\]"):
        families.register(type("Nameless", (), {}))
    copied = dataclasses.make_dataclass("Copied", [], namespace={"family": "ofa_resnet"})
    with pytest.raises(errors.ConfigError, match="family 'ofa_resnet' is built in; give Copied another name"):
        families.register(copied)
    assert type(families.config_from_json(families.config_to_json(OFAResNetConfig()))) is OFAResNetConfig
    families.register(MLPConfig)  # again, as in a notebook
