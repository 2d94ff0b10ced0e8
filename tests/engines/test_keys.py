"""The keys of the executable cache: everything that a compiled program depends on changes them."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from cached import answer, smallest
from mlp_family import MLPConfig
from tiny import TINY, TINY_BERT, TINY_VIT

from superserve_jax.engines import cache, executables, keys
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.supernets import programs

pytestmark = pytest.mark.usefixtures("root")


def test_the_families_of_this_package_are_known():
    assert not any(
        map(keys.is_foreign, (TINY, TINY_BERT, TINY_VIT, SingleSubnetConfig(TINY_VIT, TINY_VIT.space().smallest())))
    )
    assert keys.is_foreign(MLPConfig())


def test_a_second_start_loads_what_the_first_compiled_and_traces_nothing(root, compilations):
    first = answer()
    [entry] = root.glob("*.bin")
    assert root.stat().st_mode & 0o077 == entry.stat().st_mode & 0o177 == 0
    programs.used_leaves.cache_clear()
    before = [e for e in compilations() if "backend_compile" in e or "trace" in e]
    np.testing.assert_array_equal(answer(), first)
    assert [e for e in compilations() if "backend_compile" in e or "trace" in e] == before
    assert list(root.glob("*")) == [entry]


def test_another_config_or_batch_has_an_entry_of_its_own(root):
    for entries, (num_classes, batch) in enumerate([(3, 1), (3, 2), (7, 1)], 1):
        config = dataclasses.replace(TINY, num_classes=num_classes)
        executables.build([smallest(config)], (batch,), jax.devices()[0])
        assert len(list(root.glob("*.bin"))) == entries


def test_threads_that_compile_keep_the_precision_of_the_caller_and_the_key_has_it(root, monkeypatch):
    texts, compile = [], cache.Traced.compile

    def record(traced, *options):
        texts.append(traced.traced.lower().as_text())
        return compile(traced, *options)

    monkeypatch.setattr(cache.Traced, "compile", record)
    for entries, precision in enumerate(["default", "highest"], 1):
        with jax.default_matmul_precision(precision):
            executables.build([smallest(TINY)], (1,), jax.devices()[0])
        assert ("HIGHEST" in texts[-1]) == (precision == "highest")
        assert len(list(root.glob("*.bin"))) == entries
    assert len(texts) == 2


@pytest.mark.parametrize("name", [name for name, manager in keys.SETTINGS.items() if manager is not None])
def test_settings_of_another_thread_can_be_applied(name):
    values = {bool: lambda v: not v, str: lambda v: "rbg", type(None): lambda _: "highest"}
    old = keys.settings()[name]
    new = values[type(old)](old) if type(old) in values else type(old)("strict")
    with keys.with_settings({name: new}), keys.with_settings(keys.settings()):
        assert keys.settings()[name] == new
    assert keys.settings()[name] == old


def test_the_key_of_a_gpu_has_the_versions_of_driver_and_libraries(monkeypatch, tmp_path):
    card = types.SimpleNamespace(platform="gpu", device_kind="H100", id=0, client=types.SimpleNamespace(platform_version="13"))
    library = types.SimpleNamespace(metadata={"Name": "nvidia-cudnn-cu13"}, version="9.12")
    monkeypatch.setattr(keys.importlib.metadata, "distributions", lambda: [library])
    monkeypatch.setattr(keys, "NVIDIA_DRIVER", tmp_path / "version")
    seen = [keys.common_key(TINY, card)]
    for file_text, version, number in [("580.1", "9.12", 0), ("590.2", "9.12", 0), ("590.2", "9.13", 0), ("590.2", "9.13", 1)]:
        keys.NVIDIA_DRIVER.write_text(file_text)
        library.version, card.id = version, number
        seen.append(keys.common_key(TINY, card))
    assert len({json.dumps(key) for key in seen}) == len(seen)


def test_every_file_that_is_loaded_to_trace_a_program_is_among_the_sources():
    code = """
import json, sys, superserve_jax.engines.executables
print(json.dumps([m.__file__ for name, m in sys.modules.items() if name.startswith("superserve_jax")]))
"""
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert len(loaded) > 15
    assert {pathlib.Path(file) for file in loaded} <= set(keys.sources())


def test_an_edit_of_any_source_file_changes_the_key(tmp_path):
    copy = shutil.copytree(keys.PACKAGE, tmp_path / "superserve_jax", ignore=shutil.ignore_patterns("__pycache__"))
    digests = [keys.source_digest(copy)]
    assert digests == [keys.source_digest()]
    for path in keys.sources(copy):
        path.write_text(path.read_text() + "\n")
        digests.append(keys.source_digest(copy))
    assert len(set(digests)) == len(digests) > 20
    edited = copy / "serving" / "server.py"
    edited.write_text("")
    assert keys.source_digest(copy) == digests[-1]


def test_sources_that_changed_after_the_import_are_not_trusted(tmp_path):
    code = """
import sys, pathlib, jax, superserve_jax
from superserve_jax.engines import keys
from superserve_jax.families.ofa_resnet import OFAResNetConfig
path = pathlib.Path("superserve_jax/ops.py")
path.write_text(path.read_text() + "\\n")
print(superserve_jax.__file__, keys.common_key(OFAResNetConfig(), jax.devices()[0]))
"""
    shutil.copytree(keys.PACKAGE, tmp_path / "superserve_jax", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "superserve_jax" / "__init__.py"), "None"]
    assert "ops.py changed after it was imported; start Python again" in done.stderr


FAMILY = """
import dataclasses
from typing import ClassVar
import activation
import mlp_family

@dataclasses.dataclass(frozen=True)
class TwoFiles(mlp_family.MLPConfig):
    family: ClassVar[str] = "two_files"

    def create(self, rngs):
        return Net(self, rngs=rngs)

class Net(mlp_family.MLP):
    def __call__(self, images, sizes, stats):
        return activation.activation(super().__call__(images, sizes, stats))
"""


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """A function that returns the config of a family in two files. Its argument is the content of the second file."""

    def load(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def make(activation):
        (tmp_path / "family.py").write_text(FAMILY)
        (tmp_path / "activation.py").write_text(activation)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        monkeypatch.setitem(sys.modules, "activation", load(tmp_path / "activation.py"))
        return load(tmp_path / "family.py").TwoFiles()

    return make


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import jax\nactivation = jax.nn.relu", "import jax.numpy as jnp\nactivation = jnp.tanh"),
        *[
            tuple(f"import jax, numpy as np\ntable = np.full(10, {value}, np.float32)\n{code}" for value in (1, 2))
            for code in ("activation = lambda x: x + table", "activation = jax.jit(lambda x: x * table)")
        ],
    ],
    ids=["function", "constant", "constant in a function"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_edit_of_a_family_in_two_files_changes_its_answers(root, two_files, before, after, wrapped):
    def logits(source):
        config = two_files(source)
        return answer(SingleSubnetConfig(config, config.space().smallest()) if wrapped else config)

    first, second = logits(before), logits(after)
    assert np.abs(first - second).max() > 0.01
    assert len(list(root.glob("*.bin"))) == 2
    np.testing.assert_array_equal(logits(before), first)
    assert len(list(root.glob("*.bin"))) == 2  # the third start found the entry of the first


def test_a_program_that_contains_a_python_function_is_not_kept(root, two_files, caplog):
    code = "import jax\nactivation = lambda x: jax.pure_callback(lambda v: 2 * v, x, x)"
    first = answer(two_files(code))
    assert np.abs(first - 2 * answer(two_files("activation = lambda x: x"))).max() < 1e-5
    assert "contains a Python function" in caplog.text
    assert len(list(root.glob("*.bin"))) == 1


def test_a_family_from_a_notebook_is_kept(root):
    notebook = type("Notebook", (MLPConfig,), {"__module__": "__main__"})  # its source cannot be read
    np.testing.assert_array_equal(answer(notebook()), answer(notebook()))
    assert len(list(root.glob("*.bin"))) == 1
