"""The wheel holds only superserve_jax, and works in an empty environment."""

import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

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
    for name in ("cluttered_digits", "listops"):
        assert f"superserve_jax/training/datasets/{name}/{name}_dataset_builder.py" in names


@pytest.mark.slow
def test_the_installed_wheel_works_without_the_clone(wheel, tmp_path):
    # The dependencies come from this environment. The package itself comes only from the wheel.
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, capture_output=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    own = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(own + "\n")
    code = (
        "import superserve_jax as ss, sys\n"
        f"assert ss.__file__.startswith({str(site)!r}), ss.__file__\n"
        "ss.load, ss.Server, ss.train\n"
        "from superserve_jax.families.ofa_resnet import OFAResNetConfig\n"
        "print(OFAResNetConfig().space().size)\n"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10**12
