"""Writes files atomically, locks folders, and computes the SHA-256 of files and JSON objects."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import stat
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> BinaryIO:
    """Opens a regular file to read. Raises OSError for anything else, and never waits for a pipe.

    Args:
      path: the file.
      flags: more flags for `os.open`, such as `os.O_NOFOLLOW`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return open(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], *, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError for anything else, and never waits for a pipe."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have")
        return file.read()


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


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a file or folder. Raises BlockingIOError at once if another process or thread holds it.

    A file is created if it does not exist, and then names the process that held its lock last. The system releases the lock
    when the process ends, also after a kill. The message of the error has the content of the file.
    """
    is_folder = os.path.isdir(path)
    flags = os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = "" if is_folder else os.read(descriptor, 1000).decode(errors="replace")
            raise BlockingIOError(f"locked by {holder or 'another process'}") from None
        if not is_folder:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)
