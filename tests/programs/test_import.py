"""`--import` makes every program work with a family that lives in a module of the user."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from program import ROOT, run_program

from superserve_jax import cli, families

HELPERS = pathlib.Path(__file__).parents[1] / "helpers"
PROGRAMS = [
    path
    for folder in ("train", "serve")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent.name != "gateway_load"
]
EXAMPLE = "docs/examples/my_family.py"
ELASTIC = "docs/examples/my_elastic.py"
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def call(monkeypatch):
    """Runs a program that prints its arguments, and returns (status, the arguments that it saw)."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("SUPERSERVE_IMPORT", "")

    def call(*arguments):
        seen, status = [], 0
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        try:
            cli.run(lambda: seen.extend(sys.argv[1:]))
        except SystemExit as end:
            status = end.code
        return status, seen

    return call


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Writes a module with a family of a name, and works in its folder."""
    monkeypatch.chdir(tmp_path)

    def write(name):
        (tmp_path / f"{name}.py").write_text((HELPERS / "mlp_family.py").read_text().replace('"mlp"', f'"{name}"'))

    return write


def test_a_module_is_imported_by_its_name_or_its_path(family, call):
    for name in ("by_name", "by_path", "by_equals"):
        family(name)
    assert call("run", "--import", "by_name", "--json", "a", "--import", "./by_path.py", "--import=by_equals") == (
        *(0, ["run", "--json", "a"]),
    )
    for name in ("by_name", "by_path", "by_equals"):
        assert families.config_from_json({"family": name}).family == name
        assert name in sys.modules  # so a config may import it, too, without a second class
    inherited = os.environ["SUPERSERVE_IMPORT"].split(os.pathsep)
    assert inherited == ["by_name", str(pathlib.Path("by_path.py").absolute()), "by_equals"]


def test_a_file_with_the_name_of_another_module_is_executed_as_itself(family, call):
    family("json")
    assert call("--import", "json.py") == (0, [])
    assert families.config_from_json({"family": "json"}).family == "json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--import"], "--import needs the name of a module, such as my_module, or the path of a .py file"),
        (["--import", "--json"], "--import needs the name of a module"),
        (["--import", "no_such_module"], "no module named no_such_module: install its package, call the program from"),
        (["--import", "none/no_such.py"], r"no module file .*none/no_such.py; give the path of a .py file"),
        (["--import", "folder/module"], "no module file folder/module; give the path of a .py file, or a module's name"),
        (["--import", "wrong.py"], r"wrong.py fails, see .*wrong.py:2, `1 / 0`: ZeroDivisionError: division by zero"),
        (
            ["--import", "needs.py"],
            r"needs.py fails, see .*needs.py:1, .*: ModuleNotFoundError: No module named 'not_installed'",
        ),
        (["--import", "needs_more"], r"needs_more fails, see .*needs_more.py:1, .*No module named 'needs'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, call, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / "needs.py").write_text("import not_installed\n")
    (tmp_path / "needs_more.py").write_text("raise ModuleNotFoundError(\"No module named 'needs'\", name='needs')\n")
    assert call(*arguments)[0] == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_home_folder_is_replaced_in_every_argument(call, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert call("~/runs/demo", "--json=~/a.json", "--lr=0.1", "--x", "~/b", "a~b") == (
        *(0, ["/home/me/runs/demo", "--json=/home/me/a.json", "--lr=0.1", "--x", "/home/me/b", "a~b"]),
    )


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_goes_through_the_function_that_imports(path):
    text = path.read_text()
    assert ("\nif __name__ ==" in text) == ("\n    cli.run(main)\n" in text)


@pytest.mark.slow
def test_the_example_of_the_docs_goes_from_training_to_a_profile(digits_dir, tmp_path):
    """Each program runs in a process of its own, in which the family is not known before."""
    data = ("--data.data-dir", digits_dir, "--data.validation", 60, "--epochs", 0.5, "--calibration-examples", 60)
    search = ("--search.candidates", 3, "--search.examples", 60, "--search.calibration-examples", 60, "--search.served", 2)
    workdir = tmp_path / "run"
    run_program("train/supernet.py", EXAMPLE, *data, *search, "--workdir", workdir, "--import", EXAMPLE, fresh=True)
    error = run_program("serve/measure.py", workdir / "export", status=2, fresh=True).stderr
    assert "unknown family 'my_mlp'" in error
    assert "--import my_file.py" in error
    measure = ("--repeats", 2, "--no-load", "--batch-sizes", 1)
    run_program("serve/measure.py", workdir / "export", *measure, "--import", EXAMPLE, fresh=True)


LOADS = """
import sys
import numpy as np
import superserve_jax as ss
from superserve_jax.foreign import import_module

images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
try:
    ss.load(sys.argv[2])
except ss.ExportError as e:
    print(e)
import_module(sys.argv[1])
model, run = ss.load(sys.argv[2]), ss.Run.open(sys.argv[3]).model()
for subnet in model.subnets:
    np.testing.assert_array_equal(model(images, subnet), run(images, subnet))
with ss.Server(model, slo_ms=1000, batch_sizes=(1,)) as server:
    answers = [server.submit(image).result(timeout=60) for image in images]
for image, answer in zip(images, answers):
    np.testing.assert_allclose(answer.output, model(image[None], answer.subnet)[0], rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
def test_a_plain_module_goes_from_training_to_a_server(digits_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSERVE_IMPORT", "")
    export, workdir = tmp_path / "run" / "export", tmp_path / "run"
    small = ("--data.data-dir", digits_dir, "--data.validation", 60, "--model.width", 4, "--batch-size", 32, "--epochs", 0.7)
    fast = ("--buckets", 1, "--eval-every", 0, "--calibration-examples", 60, "--search.candidates", 2, "--search.examples", 60)
    done = run_program("train/supernet.py", ELASTIC, *small, *fast, "--workdir", workdir, "--import", ELASTIC)
    assert "training: 5 done" in done.stderr  # the rewiring is before the third
    assert f"`superserve measure {workdir / 'export'} --import {ROOT / ELASTIC}`" in done.stdout
    monkeypatch.setenv("SUPERSERVE_IMPORT", "")  # the program has set it, for programs that it starts
    command = [sys.executable, "-c", LOADS, ELASTIC, str(export), str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "unknown family 'my_elastic'" in done.stdout
    assert "--import my_file.py" in done.stdout
