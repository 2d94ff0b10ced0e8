"""The manifest of an export, and whether the files that it speaks of are there, whole and unchanged. No jax.

Nothing in a manifest is believed before it is checked: it may be damaged, or written by somebody with bad intent.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from superserve_jax import errors, files

MANIFEST_FORMAT = "superserve_jax export"
MANIFEST_SCHEMA = 1
MANIFEST_NAME = "manifest.json"

_MAX_MANIFEST_BYTES = 64 << 20
_MAX_BYTES = 1 << 40  # of one payload file; more than any device holds
_KINDS = {"files": dict, "served": list, "class_names": list, "config": dict, "training": dict, "payload": str}


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an export's directory.

    Raises:
      ExportError: the directory is missing, foreign or from a newer version, or the manifest was damaged or edited.
    """
    try:
        file = pathlib.Path(path) / MANIFEST_NAME
    except TypeError as e:
        raise errors.ExportError(f"an export is named by the path of its directory, got {path!r}") from e
    try:
        manifest = _parse(file)
        intact = isinstance(manifest, dict) and manifest.get("sha256") == files.digest(manifest)
    except (OSError, ValueError, RecursionError) as e:
        raise errors.ExportError(f"{file} is damaged or cannot be read: {e}; export again") from e
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise errors.ExportError(f"{file} is not the manifest of a {MANIFEST_FORMAT}; export again with train/export.py")
    schema = manifest.get("schema")
    if schema != MANIFEST_SCHEMA:
        newer = isinstance(schema, int) and schema > MANIFEST_SCHEMA
        remedy = "it is newer, upgrade superserve-jax" if newer else "it is damaged, export again"
        raise errors.ExportError(f"{file} has schema {schema!r} where this version reads {MANIFEST_SCHEMA}; {remedy}")
    if not intact:
        raise errors.ExportError(f"{file} is damaged or was edited: its SHA-256 does not match; export again")
    for key, kind in _KINDS.items():
        if not isinstance(manifest.get(key), kind):
            raise errors.ExportError(f"{file} is damaged: '{key}' is missing or no {kind.__name__}; export again")
    if not all(isinstance(name, str) for name in manifest["class_names"]):
        raise errors.ExportError(f"{file} is damaged: 'class_names' holds what is no text; export again")
    if not re.fullmatch(r"payload-[0-9a-f]{16}", manifest["payload"]):
        raise errors.ExportError(f"{file} names a payload folder that cannot be one: {manifest['payload']!r}")
    sizes = [f.get("bytes") if isinstance(f, dict) else None for f in manifest["files"].values()]
    if not all(isinstance(s, int) and 0 <= s <= _MAX_BYTES for s in sizes) or not "".join(manifest["files"]).isprintable():
        raise errors.ExportError(f"{file} gives impossible names or sizes of files; export again")
    return manifest


def verify_files(payload: pathlib.Path, contents: Mapping[str, Any]) -> None:
    """Raises ExportError unless the payload holds exactly these files, with these sizes and digests, and no links."""
    try:
        if not payload.is_dir() or payload.is_symlink():
            raise errors.ExportError(f"{payload} is missing; the export is not whole, copy or export it again")
        found = {str(f.relative_to(payload)): f for f in files_of(payload)}
        if odd := sorted(set(found) ^ set(contents)):
            state = "missing" if odd[0] in contents else "not in the manifest"
            raise errors.ExportError(f"{payload / odd[0]} is {state}; the export is not whole, copy or export it again")
        for name, expected in contents.items():
            check_file(found[name], expected)
    except OSError as e:
        raise errors.ExportError(f"{payload} cannot be read: {e}; copy or export it again") from e


def check_file(file: pathlib.Path, expected: Mapping[str, Any]) -> None:
    """Raises ExportError unless a file is one, with this size and digest."""
    if file.is_symlink() or not file.is_file():  # a link could leave the directory, a pipe keep its reader waiting
        raise errors.ExportError(f"{file} is not a plain file; copy or export it again")
    if (size := file.stat().st_size) != expected["bytes"]:
        raise errors.ExportError(f"{file} has {size} bytes instead of {expected['bytes']}; copy or export it again")
    if files.sha256(file) != expected.get("sha256"):
        raise errors.ExportError(f"{file} is damaged: its SHA-256 does not match; copy or export it again")


def files_of(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Everything in a folder and its folders that is no folder, links to folders included."""
    return (f for f in sorted(folder.rglob("*")) if f.is_symlink() or not f.is_dir())


def _parse(file: pathlib.Path) -> Any:
    if not file.is_file():
        path = file.parent
        what = f"has no {MANIFEST_NAME}" if path.is_dir() else "does not exist" if not path.exists() else "is not a directory"
        raise errors.ExportError(f"{path} is not an export: it {what}; make one with train/export.py")
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise errors.ExportError(f"{file} is larger than the {_MAX_MANIFEST_BYTES >> 20} MiB that a manifest may have")
    return json.loads(file.read_text(encoding="utf-8"))
