"""The option -m decides whether the tests run on a GPU."""

import subprocess
import sys

import markers
import pytest


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        *dict.fromkeys(["gpu", "gpu and slow", "gpu and not slow", "slow or gpu", "(gpu)"], True).items(),
        *dict.fromkeys(
            ["", "slow", "not gpu", "not  gpu", "not (gpu)", "not (slow or gpu)", "slow and not gpu"], False
        ).items(),
        *dict.fromkeys(["gpu_aot", "not gpu_aot", "gpu and", "slow(x=1)"], False).items(),
    ],
)
def test_tests_run_on_a_gpu_only_if_the_expression_asks_for_it(expression, expected):
    assert markers.needs(expression, "gpu") is expected


@pytest.mark.slow
def test_several_processes_are_refused_on_a_gpu():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n2", "tests/test_markers.py"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 4
    assert "leave out -n" in done.stderr
