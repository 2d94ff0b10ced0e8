"""Writes files atomically, and computes the SHA-256 of files and JSON objects."""

import hashlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Mapping
from typing import Any

IMPORTED_NS = time.time_ns()
"""When this process imported the library, in ns since the epoch. A source file that is newer may not be the loaded code."""


def write_bytes(path: str | os.PathLike[str], content: bytes, *, mode: int = 0o666) -> None:
    """Writes a file atomically, and creates its folder. After an error the old file is unchanged.

    Args:
      path: the file.
      content: its new content.
      mode: the permissions of the file, before the umask.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.unlink(missing_ok=True)  # a killed process with the same number may have left it
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(values: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object without its key `sha256`. Order of keys and white space do not matter."""
    content = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
