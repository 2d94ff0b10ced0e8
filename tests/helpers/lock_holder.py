"""Another process that holds a lock of `files.locked`."""

import contextlib
import subprocess
import sys

CODE = """
import sys
from superserve_jax import files
with files.locked(sys.argv[1]):
    print("locked", flush=True)
    input()
"""


@contextlib.contextmanager
def locked_elsewhere(path):
    """Another process holds the lock of `path` inside the block, and is killed at its end. Yields its number."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        yield other.pid
        other.kill()
