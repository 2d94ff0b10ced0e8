"""Puts something else in place of a file: a pipe, a socket, a device, a folder, a broken link."""

import os
import pathlib
import socket
import stat

import pytest


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("only root makes device files")


ODD = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": make_device,
    "folder": os.mkdir,
    "link to nothing": lambda path: os.symlink("nowhere", path),
}


def put(kind, path):
    """Replaces what is at a path. The path of a socket must be short."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    ODD[kind](path)
    return path
