"""The Python environment with NVIDIA's clients, which `make clients` creates. Their pins do not fit those of this project."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BIN = ROOT / ".venv-clients" / "bin"
LIMIT_S = 120

needed = pytest.mark.skipif(not (BIN / "perf_analyzer").exists(), reason="needs the environment of `make clients`")


def run(*command):
    """Runs a program of the environment, and returns what it printed."""
    done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
