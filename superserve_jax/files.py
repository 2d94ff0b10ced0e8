"""Writes files atomically, locks folders, and computes the SHA-256 of files and JSON objects."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import pathlib
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from superserve_jax import errors

_log = logging.getLogger(__name__)
_CLEAN_UP_S = 10.0
# What a file system without locks answers, such as Lustre without its option flock, or NFS without its lock daemon.
_NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK


def user_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path that a user gave, with `~` and `~name` replaced by the home folder. Raises TypeError for anything else.

    >>> user_path("~/runs") == pathlib.Path.home() / "runs"
    True
    """
    return pathlib.Path(os.path.expanduser(path))


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> BinaryIO:
    """Opens a regular file to read. Raises OSError for anything else, and never waits for a pipe.

    Args:
      path: the file.
      flags: more flags for `os.open`, such as `os.O_NOFOLLOW`.
    """
    descriptor = os.open(user_path(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return open(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], *, most: float = math.inf) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError for anything else, and never waits for a pipe."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have")
        return file.read()


def write_bytes(path: str | os.PathLike[str], content: bytes, *, mode: int = 0o666) -> None:
    """Writes a file atomically, and creates its folder.

    After an error or a kill the old file is unchanged. The next write of the same file removes what a kill left.

    Args:
      path: the file.
      content: its new content.
      mode: the permissions of the file, before the umask.

    Raises:
      WriteError: the disk is full, or the folder cannot be written.
    """
    path = user_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        _write_and_rename(path, content, mode)
    except OSError as e:
        raise cannot_write(path, e) from e


def append(path: str | os.PathLike[str], content: bytes) -> None:
    """Appends to a file, which is created if necessary. After an error the file is unchanged. Raises WriteError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, content)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as e:
        raise cannot_write(path, e) from e


def remove_trees(find: Callable[[], Iterable[pathlib.Path]]) -> None:
    """Removes folders again and again, since native threads may still write to them and so create them again.

    Args:
      find: returns the folders that are there now. It is called until it finds none for 0.1 s, or for 10 s.
    """
    deadline_s, quiet = time.monotonic() + _CLEAN_UP_S, 0
    while quiet < 3 and time.monotonic() < deadline_s:
        left = [path for path in find() if path.exists()]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        quiet = 0 if left else quiet + 1
        time.sleep(0.05)


def cannot_write(path: str | os.PathLike[str], e: OSError) -> errors.WriteError:
    """The error to raise after the system refused to write a file or folder."""
    return errors.WriteError(
        f"{path} cannot be written: {e.strerror or e}; free space there, or choose a folder that can be written"
    )


def _write_and_rename(path: pathlib.Path, content: bytes, mode: int) -> None:
    descriptor, part = _create_locked(path, mode)
    try:
        _write_all(descriptor, content)
        os.fsync(descriptor)  # some file systems notice only now that the disk is full
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _create_locked(path: pathlib.Path, mode: int) -> tuple[int, pathlib.Path]:
    """Creates an unfinished file next to `path` and locks it, so that no other writer takes it for abandoned.

    No name is used twice. Otherwise a writer that removes an abandoned file could remove a new one with its name.

    Returns:
      descriptor: of the new file.
      part: its path.
    """
    while True:
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody removes abandoned files there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, part
        os.close(descriptor)  # another writer has removed the file before it was locked


def _remove_abandoned(path: pathlib.Path) -> None:
    """Removes the unfinished files that killed writers of `path` left. A file that is being written is locked."""
    unfinished = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.part")
    for name in filter(unfinished.fullmatch, os.listdir(path.parent)):
        part = path.with_name(name)
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # another process has removed it, or owns it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)


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


def set_aside(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves a file or folder into another folder, under a new name. Logs a warning with that name. Raises WriteError."""
    target = folder / f"{path.name}.{time.time_ns()}"
    try:
        folder.mkdir(exist_ok=True)
        path.rename(target)
    except OSError as e:
        raise cannot_write(target, e) from e
    _log.warning("%s is now %s", path, target)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a file or folder. Raises BlockingIOError at once if another process or thread holds it.

    A file system without locks gives a warning instead, since nothing protects the folder there.

    A file is created if it does not exist, and then names the process that held its lock last. The system releases the lock
    when the process ends, also after a kill. The message of the error has the content of the file.
    """
    is_folder = os.path.isdir(path)
    flags = os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        if not is_folder and not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = "" if is_folder else os.read(descriptor, 1000).decode(errors="replace")
            raise BlockingIOError(f"locked by {holder or 'another process'}") from None
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            _log.warning("%s cannot be locked (%s); let no other process write to its folder", path, e.strerror)
        if not is_folder:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)
