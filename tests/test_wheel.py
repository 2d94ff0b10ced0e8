"""The wheel holds only superserve_jax, and works in an empty environment."""

import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

import superserve_jax as ss
from superserve_jax import shipped

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    [path] = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"superserve_jax", *[n.split("/")[0] for n in names if ".dist-info/" in n]}
    assert {"superserve_jax/py.typed", "superserve_jax/__init__.pyi"} <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(".dist-info/licenses/" in n and n.endswith("/uplot-1.6.32/LICENSE") for n in names)
    assert {f"superserve_jax/gateway/page/{name}" for name in ("index.html", "live.js", "live.css", "icon.svg")} <= set(names)
    for name in ("cluttered_digits", "listops"):
        assert f"superserve_jax/training/datasets/{name}/{name}_dataset_builder.py" in names
    assert "superserve_jax/gateway/grpc/protos/descriptors.binpb" in names
    configs = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {n.split("/")[-1] for n in names if n.startswith("superserve_jax/shipped/configs/")} == configs
    assert not [n for n in names if "/profiles/" in n]  # they belong to a machine


def test_the_shipped_export_is_small():
    assert sum(f.stat().st_size for f in (shipped.exports()["digits"]).rglob("*") if f.is_file()) < 2 * 2**20


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The folder of programs of an environment that holds only the wheel. The dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    [site] = folder.glob("lib/python*/site-packages")
    own = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(own + "\n")
    return folder / "bin"


@pytest.mark.slow
def test_the_installed_wheel_serves_a_first_query_without_the_clone(environment, tmp_path):
    code = (
        "import numpy as np\n"
        "import superserve_jax as ss\n"
        f"assert ss.__file__.startswith({str(environment.parent)!r}), ss.__file__\n"
        "model = ss.load('digits')\n"
        "with ss.Server(model, batch_sizes=(1,), slo_ms=1000) as server:\n"
        "    print(server.submit(np.zeros((32, 32, 1), np.uint8)).result().output.shape)\n"
    )
    done = subprocess.run([environment / "python", "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(10,)\n"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_installed_command_trains_a_config_by_its_name(environment, tmp_path):
    command = [environment / "superserve", "train", "debug", "--workdir", "run", "--data.data-dir", "data"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ss.load(tmp_path / "run" / "export").subnets


@pytest.mark.slow
def test_an_unknown_name_is_refused_with_those_that_the_wheel_has(environment, tmp_path):
    command = [environment / "superserve", "train", "debgu"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no config file debgu; did you mean debug?" in done.stderr
    assert "ofa_resnet50" in done.stderr
