"""serve/bench/gpu.py in quick mode on the CPU: all stages, and how a run ends and continues."""

import json
import pathlib
import re

import gpu
import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = """
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.training.config import TrainConfig
from superserve_jax.training.data import DataConfig

def get_config():
    one_block = {"block": "basic", "stem_pool": False, "stem_depths": (1,), "strides": (1,), "depths": ((1,),)}
    small = {"num_classes": 3, "image_size": 8, "channels": 1, "stem_width": 8, "stage_widths": (8,), "divisor": 4}
    elastic = {"expand_ratios": (0.5, 1.0), "width_mults": (0.5, 1.0)}
    model = OFAResNetConfig(**one_block, **small, **elastic, mean=(0.4,), std=(0.3,))
    return TrainConfig(name="small", model=model, data=DataConfig(name="cluttered_digits", image_size=8, channels=1))
"""


@pytest.fixture
def command(tmp_path):
    """The command line, without the stages."""
    (tmp_path / "small.py").write_text(CONFIG)
    return ("serve/bench/gpu.py", tmp_path / "small.py", "--quick", "--out", tmp_path / "out", "--work", tmp_path / "work")


@pytest.fixture
def results(tmp_path):
    """Reads the file of results."""
    return lambda: json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.slow
def test_a_run_writes_what_each_stage_finds_and_the_next_one_continues(run_program, tmp_path, command, results):
    printed = run_program(*command).stdout
    stages = results()["stages"]
    assert {stage: entry["state"] for stage, entry in stages.items()} == dict.fromkeys(gpu.STAGES, "done"), printed
    found = {stage: entry["found"] for stage, entry in stages.items()}
    assert found["device"]["empty_call_ms"] > 0
    assert any("SKIPPED" in line for line in found["tests"])
    assert len(found["variants"]) == 14  # seven variants of two subnets
    assert all(entry["alone_ms"] > 0 and entry["back_to_back_ms"] > 0 for entry in found["variants"])
    assert len(found["actuation"]["subnets"]) == 2
    assert len(found["memory"]["variants"]) == 5
    assert found["overlap"][0]["on"]["qps"] > 0
    for mode in ("overlap", "no overlap"):
        of = found["serving"][mode]
        assert [at["qps"] / of["closed_loop_qps"] for at in of["loads"]] == pytest.approx([0.3, 0.6, 0.9])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "log.txt"}

    stages["device"] |= {"state": "out of time", "found": [1.0]}
    (tmp_path / "out" / "results.json").write_text(json.dumps(results() | {"stages": stages}))
    printed = run_program(*command, "--only", "device", "overlap").stdout
    assert "device: at most" in printed
    assert "overlap: at most" not in printed
    assert results()["stages"]["device"]["state"] == "done"
    assert results()["stages"]["overlap"]["found"] == found["overlap"]


def test_a_stage_that_takes_too_long_or_fails_does_not_end_the_run_and_more_results_stay(
    run_program, tmp_path, command, results
):
    earlier = {"state": "out of time", "device": "a card", "found": [1.0, 2.0]}
    about = {"config": str(tmp_path / "no.py"), "quick": True, "stages": {"device": earlier}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(json.dumps(about))
    shares = {"device": (1, None), "overlap": (1000, None)}
    replaced = (command[0], tmp_path / "no.py", *command[2:], "--minutes", 5)
    printed = run_program(*replaced, patches={"STAGES": shares, "_LEAST_S": 0.0}).stdout
    assert "no config file" in printed
    assert "out of time" in printed
    assert results()["stages"]["device"] == earlier
    assert (results()["stages"]["overlap"]["state"], results()["stages"]["overlap"]["found"]) == ("failed", None)


def test_the_program_runs_all_tests_that_need_a_gpu():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"pytest\.mark\.gpu\b", path.read_text())]
    assert sorted(str(path.relative_to(ROOT)) for path in marked) == sorted(gpu.GPU_TESTS)


def test_without_time_left_no_stage_begins(run_program, tmp_path, command):
    printed = run_program(*command, "--minutes", 0.01).stdout
    assert printed.count("no time left") == len(gpu.STAGES)
    assert not (tmp_path / "out" / "results.json").exists()
