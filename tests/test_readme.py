"""Python in the README and in docs/ runs."""

import bert_directory
import jax
import numpy as np
import pytest
import vit_directory
from pages import PAGES, ROOT
from tiny import write_export

from superserve_jax import exports, machine
from superserve_jax.profile import Profile, Row

PYTHON = [block.text for page in PAGES for block in page.blocks if block.language == "python"]

SMALLER = {
    "16, 32, 32, 1": "16, 9, 9, 1",
    '"digits"': '"runs/demo/export"',
    "num_heads=12, depths=(6, 9, 12)": "num_heads=3, depths=(2, 3)",
    '"ofa_mbv3_d234_e346_k357_w1.0.pth", width_mult=1.0': '"ofa_mobilenet.npz", width_mult=0.1',
    '"depth_list": [2, 3, 4]': '"depth_list": [2, 3]',
    '"d": [2, 3, 4, 2, 3]': '"d": [2, 3, 2, 2, 3]',
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for executables, so that only the first snippet with a server compiles."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_in_the_texts_is_short_and_runs(code, tiny, tmp_path, cache, monkeypatch, capsys):
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    export = write_export(tmp_path / "runs" / "demo" / "export", tiny, accuracy=0.7, class_names=("a", "b", "c"))
    rows = [Row(s.subnet, s.accuracy, (1.0, 1.2, 1.5, 2.0, 3.0)) for s in exports.load(export).served[-1:]]
    kind = machine.device_kind(jax.devices()[0])
    Profile((1, 2, 4, 8, 16), tuple(rows), kind).save(exports.profile_path(export, kind))  # or a server measures one
    bert_directory.write(tmp_path / "my-classifier")
    vit_directory.save("timm_vit", tmp_path / "vit_base_patch16_224.safetensors")
    with np.load(ROOT / "tests" / "data" / "ofa_mobilenet_small.npz") as file:
        state = {name.removeprefix("state/"): value for name, value in file.items() if name.startswith("state/")}
    np.savez(tmp_path / "ofa_mobilenet.npz", **state)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUPERSERVE_CACHE", str(cache))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for trained, small in SMALLER.items():
        code = code.replace(trained, small)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
