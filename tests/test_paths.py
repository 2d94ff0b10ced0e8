"""A wrong path to an export or a run gives a hint, and `~` means the home folder wherever a user gives a path."""

import pathlib

import pytest
from tiny import TINY

import superserve_jax as ss
from superserve_jax import convert, errors, exports, files
from superserve_jax.manifest import read_manifest
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import policies
from superserve_jax.simulation import recorded
from superserve_jax.training import data
from superserve_jax.training.config import TrainConfig, load_config
from superserve_jax.training.data import FolderConfig, TextConfig, TextFileConfig
from superserve_jax.training.runs import Run
from superserve_jax.vocabulary import Vocabulary


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with the runs demo, which has an export, half, which has only a checkpoint, and begun without one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("demo", "half"):
        Run.create(TrainConfig(name=name, model=TINY), f"runs/{name}")
    Run.create(TrainConfig(name="new", model=TINY), "runs/begun")
    pathlib.Path("runs/half/checksums").mkdir()
    pathlib.Path("runs/half/checksums/40.json").touch()
    pathlib.Path("runs/demo/export").mkdir()
    pathlib.Path("runs/demo/export/manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("runs/demo", "did you mean runs/demo/export?"),
        ("runs/dmeo/export", "did you mean runs/demo/export?"),
        ("runs/dmeo", "did you mean runs/demo/export?"),
        ("runs/demo/exprot", "did you mean runs/demo/export?"),
        ("runs/demo/export/payload", "did you mean runs/demo/export?"),
        ("runs", "did you mean runs/demo/export?"),
        ("runs/half", "the run in runs/half is not exported yet, go on with `superserve search runs/half`"),
        ("runs/half/export", "the run in runs/half is not exported yet, go on with `superserve search runs/half`"),
        (
            "runs/begun",
            "the run in runs/begun has no checkpoint yet, go on with `superserve train CONFIG --workdir runs/begun`",
        ),
        ("elsewhere", "make one with `superserve export`, or take one that comes with the package: digits"),
    ],
)
def test_a_wrong_path_of_an_export_says_which_was_meant(place, path, hint):
    with pytest.raises(errors.ExportError) as caught:
        ss.load(path)
    assert str(caught.value).startswith(f"{path} is not an export: it ")
    assert str(caught.value).endswith(f"; {hint}")


@pytest.mark.parametrize(("made", "stage"), [(["search.json"], "calibrate"), (["search.json", "statistics.npz"], "evaluate")])
def test_an_unfinished_run_names_its_next_stage(place, made, stage):
    for name in made:
        (place / "runs/half" / name).touch()
    with pytest.raises(errors.ExportError, match=f"go on with `superserve {stage} runs/half`$"):
        ss.load("runs/half/export")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("runs/demo/export", "did you mean runs/demo?"),
        ("runs", "did you mean runs/begun or runs/demo or runs/half?"),
        ("runs/hlaf", "did you mean runs/half?"),
        ("configs/half.py", "did you mean runs/half?"),
        ("elsewhere", "train one first, for example with `superserve train digits_resnet`"),
    ],
)
def test_a_wrong_path_of_a_run_says_which_was_meant(place, path, hint):
    with pytest.raises(errors.ConfigError) as caught:
        Run.open(path)
    assert str(caught.value) == f"{path} is not the folder of a run: it has no config.json; {hint}"


def test_a_run_is_not_taken_for_a_config(place):
    with pytest.raises(errors.ConfigError, match="runs/half is the folder of a run; give a config file"):
        load_config("runs/half")


@pytest.mark.parametrize(
    "use",
    [
        lambda path: data.open(FolderConfig(path)),
        lambda path: data.open(TextFileConfig(path)),
        lambda path: data.open(TextConfig("glue/sst2", path, vocabulary=path)),
        lambda path: Vocabulary.read(path),
        lambda path: convert.from_pretrained(path),
        lambda path: policies.create(f"{path}/mine.py:mine", Profile((1,), (Row(TINY.space().largest(), 0.5, (1.0,)),))),
        lambda path: recorded.trace(path),
    ],
)
def test_the_home_folder_of_an_unknown_user_is_a_path_that_does_not_exist(place, use):
    with pytest.raises(errors.SuperServeError, match="~nobody_has_this_name"):
        use("~nobody_has_this_name")


def test_the_home_folder_is_found_by_every_function_that_takes_a_path(place, export):
    (place / "exports").symlink_to(export.path)
    (place / "config.py").write_text("def get_config(): raise SystemExit")
    (place / "arrivals.csv").write_text("arrival_s\n0.5\n")
    assert ss.load("~/exports").path == place / "exports"
    assert read_manifest("~/exports")["format"]
    assert exports.profile_path("~/exports", "cpu").parent == place / "exports" / "profiles"
    assert Run.open("~/runs/half").workdir == Run.create(TrainConfig(name="half", model=TINY), "~/runs/half").workdir
    assert len(recorded.trace("~/arrivals.csv")) == 1
    with pytest.raises(errors.ConfigError, match=r"config.py fails"):
        load_config("~/config.py")
    profile = Profile((1,), (Row(TINY.space().largest(), 0.5, (1.0,)),))
    profile.save("~/profiles/a.json")
    assert Profile.load("~/profiles/a.json") == profile
    files.write_json("~/results.json", [])
    assert (place / "results.json").exists()
