"""Options of all programs: bad ones are refused, and --help explains the good ones."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = [
    path
    for folder in ("train", "serve")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent.name != "gateway_load"
]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train/supernet.py configs/debgu.py", "did you mean configs/debug.py"),
        ("train/supernet.py configs/debug.py --optim.lr nan", "optim.lr must be float"),
        ("train/supernet.py configs/debug.py --data.name cifr10", "did you mean 'cifar10'"),
        ("train/supernet.py configs/debug.py --model.image-size 0", "image_size must be"),
        ("train/evaluate.py nowhere", "is not the folder of a run"),
        ("serve/measure.py nowhere", "is not an export"),
        ("serve/measure.py nowhere --batch-sizes 0", "batch_sizes must be ascending"),
        ("serve/measure.py nowhere --batch-sizes 4 1", "batch_sizes must be ascending"),
        ("serve/measure.py nowhere --batch-sizes 2 2", "batch_sizes must be ascending"),
        ("serve/replay.py nowhere", "is not an export"),
        ("serve/compare.py --preset burtsy", "did you mean 'bursty'"),
        ("serve/compare.py --policies slakfit", "did you mean 'slackfit'"),
        ("serve/compare.py --preset maf", "--maf-trace"),
        ("serve/compare.py --preset maf --maf-trace missing.csv", "missing.csv"),
        ("serve/compare.py --profile missing.json", "missing.json"),
        ("serve/compare.py --policies nowhere.py:mine", "there is no file nowhere.py"),
        ("serve/compare.py --trace missing.csv", "missing.csv"),
        ("serve/compare.py --trace tests/data/maf2019_100fn.csv", "no column 'arrival_s', only ['"),
        (
            "serve/compare.py --trace tests/data/maf2019_100fn.csv --trace-column 7 --speed 0",
            "speed must be a positive number",
        ),
        ("serve/compare.py --trace missing.csv --seconds 3", "cut the file of --trace"),
        ("serve/compare.py --scale 0", "--scale"),
        ("serve/compare.py --seeds 0", "--seeds"),
        ("serve/bench/actuation.py nowhere --subnets 0", "subnets must be"),
        ("serve/bench/memory.py nowhere --extracted 0", "extracted must be"),
        ("serve/bench/router.py --rate 0", "rate must be above 0, got 0"),
        ("serve/bench/soak.py nowhere --minutes 1", "--minutes 1 leave less than 30 s after the 60 s of --warm-up-s"),
        ("serve/bench/storm.py --agents signal", "did you mean 'signals'"),
        ("serve/bench/storm.py --rate 0", "rate must be above 0, got 0"),
        ("serve/bench/worker_kills.py --policies slakfit", "did you mean 'slackfit'"),
        ("serve/bench/worker_kills.py --every 0", "every must be above 0, got 0"),
    ],
)
def test_a_bad_option_ends_a_program_before_anything_runs(run_program, tmp_path, command, message):
    workdir = ["--workdir", tmp_path / "run"] if "supernet" in command else []
    error = run_program(*command.split(), *workdir, status=2).stderr
    assert message in error
    # What a config refuses when it is constructed, tyro prints in a frame. Every other error is one line.
    assert "Value error" in error or (error.startswith("error: ") and error.count("\n") == 1)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_results_that_cannot_be_written_end_a_program_with_one_line(run_program, tmp_path, option):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "result"
    error = run_program("serve/bench/worker_kills.py", "--every", "0.02", option, path, status=2).stderr
    assert error.splitlines()[-1].startswith(f"error: {path} cannot be written: ")
    assert error.endswith("free space there, or choose a folder that can be written\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in PROGRAMS if "\nif __name__ ==" in path.read_text()])
def test_every_program_explains_itself(run_program, name):
    assert len(run_program(name, "--help").stdout) > 200
