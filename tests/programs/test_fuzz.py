"""serve/bench/fuzz.py: damaged files of each kind are refused or usable, and the program finds what a reader does wrong."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

BENCH = pathlib.Path(__file__).parents[2] / "serve" / "bench"


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        import fuzz

        yield fuzz


@pytest.fixture(scope="module")
def files(fuzz, tmp_path_factory):
    made = fuzz.DamagedFiles(tmp_path_factory.mktemp("damaged"))
    made.read_undamaged()
    return made


@pytest.mark.usefixtures("no_test_hangs")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops tasks after damaged weights
@pytest.mark.parametrize(
    ("kind", "count"), [("manifests", 500), ("profiles", 150), ("statistics", 500), ("traces", 300), ("exports", 40)]
)
def test_damaged_files_are_refused_with_a_documented_error_or_can_be_used(fuzz, files, kind, count):
    """The same files in every run. The program tries others."""
    outcomes = [fuzz.read_case(files, kind, case, fuzz.Options(limit_s=60.0)) for case in range(count)]
    assert not [outcome for outcome in outcomes if outcome.finding]
    refused = fuzz.damaged_files.DOCUMENTED[kind].__name__
    assert {outcome.result for outcome in outcomes} == ({refused} if kind == "manifests" else {"read", refused})


@pytest.mark.parametrize("kind", ["manifests", "profiles", "statistics", "traces"])
def test_a_number_gives_the_same_damage_again(files, kind):
    contents = []
    for case in (1, 2, 1):
        contents.append(files.make(kind, case)[0].read_bytes())
        files.mend()
    assert contents[0] == contents[2] != contents[1]


BROKEN = """
import os, time, warnings
import damaged_files, fuzz
import numpy as np
from superserve_jax import cli, errors


def refuse(message):
    raise errors.ExportError(message)


class Broken:
    def __init__(self, folder):
        self.folder = folder
        (folder / "file").write_bytes(b"")

    def read_undamaged(self):
        pass

    def mend(self):
        pass

    def make(self, kind, case):
        return self.folder / "file", [
            lambda: None,
            lambda: refuse(f"{self.folder} is damaged"),
            lambda: refuse("it is damaged"),
            lambda: refuse(f"{self.folder} is\\ndamaged"),
            lambda: {}[case],
            lambda: os.abort(),
            lambda: time.sleep(60),
            lambda: np.ones(30_000_000),
            lambda: np.ones(1 << 40),
            lambda: warnings.warn("careful"),
            lambda: 1 / 0,
        ][case]


fuzz.DamagedFiles, damaged_files.KINDS = Broken, ("manifests",)
if __name__ == "__main__":
    cli.run(fuzz.main)
"""


def run(tmp_path, *options):
    """Starts the program with readers that are broken. Each case does something else wrong."""
    (tmp_path / "broken.py").write_text(BROKEN)
    command = [sys.executable, str(tmp_path / "broken.py"), "--json", str(tmp_path / "found.json"), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parents[1])])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_program_finds_errors_crashes_hangs_and_memory_and_goes_on_behind_them(tmp_path):
    process = run(tmp_path, "--files", "11", "--limit-s", "2", "--jobs", "2")
    stdout, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["results"] == {"manifests": {"read": 1, "ExportError": 1, "finding": 9}}
    said = {finding["case"]: finding["finding"] for finding in found["findings"]}
    expected = ["not name the file", "one printable line", "KeyError: 4", "Aborted", "Timeout", "MB of memory", "MemoryError"]
    for case, text in enumerate([*expected, "careful", "ZeroDivisionError"], 2):
        assert text in said[case]
        assert f"manifests {case}: " in stdout


@pytest.mark.slow
def test_ctrl_c_prints_the_counts_so_far(tmp_path):
    process = run(tmp_path, "--files", "7", "--limit-s", "60")
    for line in process.stdout:
        if line.startswith("manifests 5: "):
            break
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "6 files in" in stdout
    assert "interrupted" in stdout
    assert json.loads((tmp_path / "found.json").read_text())["results"]["manifests"]["finding"] == 4


def test_one_case_is_repeated_by_its_number(run_program):
    done = run_program("serve/bench/fuzz.py", "--case", "traces", "3")
    assert "arrivals.csv: b" in done.stdout or "invocations.csv: b" in done.stdout
    assert (
        "unknown kind of file 'trace': did you mean 'traces'"
        in run_program("serve/bench/fuzz.py", "--case", "trace", "3", status=2).stderr
    )
