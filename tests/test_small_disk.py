"""Every writer of the library on a disk that is full, has no place for another file, or is read-only."""

import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parent / "helpers" / "small_disk.py"
NEW_NAMESPACE = ["unshare", "-Urm"]
WRITERS = {
    *("results", "profile", "plot", "search", "statistics", "evaluation", "replaced export", "new export", "converted run"),
    *("training", "dataset"),
}
READERS = {"load", "model of a run", "export of a run", "cached executable", "new executable"}
REMEDIES = ("free space there, or choose", "Free space there", "choose another directory", "make room on the disk")


@pytest.fixture(scope="module")
def attempts(quick_compilation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "disk"
    folder.mkdir()
    mount = [*NEW_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"this system lets no user mount a tmpfs in a namespace: {e}")
    done = subprocess.run(
        [*NEW_NAMESPACE, sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["full", "no more files", "read-only"])
def test_writers_on_a_bad_disk_give_documented_errors_with_a_remedy_and_readers_work(attempts, disk):
    found = {a["name"]: a for a in attempts if a["disk"] == disk}
    assert found.keys() == WRITERS | READERS
    for name in WRITERS:
        error, _, message = found[name]["result"].partition(": ")
        assert error in ("WriteError", "ExportError", "DataError") or (name, disk) == ("training", "read-only"), found[name]
        assert any(remedy in message for remedy in REMEDIES) or "permission to write" in message, found[name]
    assert all(found[name]["result"] == "done" for name in READERS)
    assert found["cached executable"]["log"] == []
    assert "cannot store an executable" in found["new executable"]["log"][0]


@pytest.mark.slow
def test_no_partial_files_are_left_and_every_writer_works_when_the_disk_is_good_again(attempts):
    assert not [a for a in attempts if a["left"]]
    again = [a for a in attempts if a["disk"] == "good again"]
    assert len(again) == 3 * len(WRITERS)
    assert all(a["result"] == "done" for a in again)
