"""Files that are written as a whole or not at all: full disks, kills, and several writers of one file."""

import errno
import fcntl
import itertools
import os
import threading

import pytest
from full_disk import disk_full_after

from superserve_jax import errors, files


@pytest.mark.parametrize("write", [files.write_bytes, files.append])
def test_a_full_disk_leaves_the_old_content_and_a_later_attempt_works(tmp_path, write):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    with disk_full_after(10), pytest.raises(errors.WriteError, match=r"file cannot be written: File too large; free space"):
        write(path, b"x" * 20)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write(path, b"new")
    assert path.read_bytes() == (b"new" if write is files.write_bytes else b"oldnew")


@pytest.mark.parametrize("write", [files.write_bytes, files.append])
def test_a_folder_that_cannot_be_made_is_a_write_error(tmp_path, write):
    (tmp_path / "a").touch()
    with pytest.raises(errors.WriteError, match=r"a/b cannot be written: .*; free space there, or choose a folder"):
        write(tmp_path / "a" / "b", b"x")


def test_what_killed_writers_left_is_removed_by_the_next_write_of_the_same_file(tmp_path):
    path = tmp_path / "a[1].json"
    killed, pipe, in_use = (f"a[1].json.{digit * 16}.part" for digit in "0af")
    others = ["a[1].json.x.part", f"a1.json.{'0' * 16}.part", f"b.json.{'0' * 16}.part", f"{killed}2"]
    for name in (killed, *others):
        (tmp_path / name).write_bytes(b"unfinished")
    os.mkfifo(tmp_path / pipe)
    with open(tmp_path / in_use, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        files.write_bytes(path, b"{}")
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, *others, pipe, in_use])


def test_folders_that_are_created_again_are_removed_for_good(tmp_path):
    looked = itertools.count()

    def create_again():
        if next(looked) in (0, 1, 4, 7):  # twice not, and then again
            (tmp_path / "a" / "b").mkdir(parents=True)
        return [tmp_path / "a"]

    files.remove_trees(create_again)
    assert next(looked) == 8 + 3
    assert not (tmp_path / "a").exists()


def test_a_writer_that_removes_an_abandoned_file_cannot_remove_a_new_one(tmp_path, monkeypatch):
    unfinished, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: (unfinished.append(part), replace(part, path)))
    for _ in range(3):
        files.write_bytes(tmp_path / "file", b"x")
    assert len(set(unfinished)) == 3  # no name is used twice


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path, failed = tmp_path / "file", []

    def write(i):
        try:
            for _ in range(50):
                files.write_bytes(path, b"%d" % i * 1000)
                assert len(set(path.read_bytes())) == 1
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path / "lock"), files.locked(tmp_path):
        files.write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "lock"]
    assert caplog.text.count("let no other process write to its folder") == 2
