"""train/bench/converted_vits.py, on the small networks of the fixture instead of published ones."""

import sys
import types

import numpy as np
import pytest
from vit_directory import META, arrays, state_of

PROGRAM = "train/bench/converted_vits.py"


@pytest.fixture(scope="module")
def networks():
    """A network of transformers and one of timm, with the logits that these libraries computed."""

    def reference(name):
        return types.SimpleNamespace(
            state=state_of(name),
            num_heads=META["num_heads"],
            images=arrays()[f"{name}/images"],
            logits=arrays()[f"{name}/logits"][0],
        )

    return {name: reference(name) for name in ("hf_vit", "timm_vit")}


def patches(networks):
    return {"MEAN": META["mean"], "STD": META["std"], "NETWORKS": {name: lambda n=n: n for name, n in networks.items()}}


def test_the_largest_difference_is_printed(run_program, networks):
    done = run_program(PROGRAM, json_file=True, patches=patches(networks))
    assert [found["network"] for found in done.json["networks"]] == ["hf_vit", "timm_vit"]
    assert all(0 < found["difference"] < 1e-5 for found in done.json["networks"])
    assert f"{done.json['networks'][0]['difference']:.1e}" in done.stdout


def test_other_logits_end_it_with_status_1(run_program, networks):
    moved = types.SimpleNamespace(**{**vars(networks["hf_vit"]), "logits": np.roll(networks["hf_vit"].logits, 1, axis=-1)})
    assert "hf_vit" in run_program(PROGRAM, patches=patches({"hf_vit": moved}), status=1).stdout


def test_a_missing_library_is_named_with_the_command_that_installs_it(run_program, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = run_program(PROGRAM, status=2)
    assert "error: this program needs transformers: pip install torch transformers timm" in done.stderr
