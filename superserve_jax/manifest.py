"""Reads the manifest of an export, and verifies that the listed files exist and are unchanged. Works without jax.

A manifest may be damaged, or forged by an attacker. So every value is checked before it is used.
"""

import difflib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec

from superserve_jax import errors, files, shipped

MANIFEST_FORMAT = "superserve_jax export"
MANIFEST_SCHEMA = 1
MANIFEST_NAME = "manifest.json"
RUN_CONFIG = "config.json"
VOCABULARY = "vocabulary.txt"  # in the payload of an export of a text model

_MAX_MANIFEST_BYTES = 64 << 20
_MAX_BYTES = 1 << 40  # of one file; more than any device holds


class _File(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=0, le=_MAX_BYTES)]
    sha256: str


class _Manifest(msgspec.Struct):
    """The fields that every manifest has."""

    files: dict[str, _File]
    served: list[Any]
    class_names: list[str]
    config: dict[str, Any]
    training: dict[str, Any]
    payload: str


def is_run(path: pathlib.Path) -> bool:
    """Whether a folder is the folder of a run. Its config may be damaged."""
    return os.path.lexists(path / RUN_CONFIG)


def hint(path: pathlib.Path, kind: Literal["export", "run"]) -> str:
    """What a user probably meant by a path that is not an export, or not a run, in words; "" if nothing is near."""
    run = next((p for p in (path, path.parent) if is_run(p)), None)
    if kind == "export" and run is not None and not (run / "export" / MANIFEST_NAME).is_file():
        if not any(run.glob("checksums/*.json")):
            return f"the run in {run} has no checkpoint yet, go on with `superserve train CONFIG --workdir {run}`"
        return f"the run in {run} is not exported yet, go on with `superserve {_next_stage(run)} {run}`"
    name = MANIFEST_NAME if kind == "export" else RUN_CONFIG
    near = [path / "export", path.parent, path.parent.parent, pathlib.Path("runs") / path.stem]  # the last one for a config
    for place in _similar(path):
        near += [place, place / "export"]
    near += [file.parent for pattern in (f"*/{name}", f"*/export/{name}") for file in sorted(path.glob(pattern))]
    found = [str(p) for p in dict.fromkeys(near) if (p / name).is_file()]
    return f"did you mean {' or '.join(found[:3])}?" if found else ""


def _similar(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Paths that exist up to the first folder of `path` that does not, which has a similar name in them."""
    missing, rest = path, list[str]()
    while missing != missing.parent and not missing.parent.is_dir():
        rest.insert(0, missing.name)
        missing = missing.parent
    if not missing.exists():
        for name in difflib.get_close_matches(missing.name, [p.name for p in missing.parent.glob("*")]):
            yield missing.parent.joinpath(name, *rest)


def _next_stage(run: pathlib.Path) -> str:
    """The command that makes the first missing file of a run."""
    made_by = {"search.json": "search", "statistics.npz": "calibrate", "evaluation.json": "evaluate"}
    return next((command for file, command in made_by.items() if not (run / file).exists()), "export")


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """The directory of an export. If `path` does not exist, it may be the name of an export that comes with the package.

    >>> find("digits").name
    'digits'
    """
    try:
        path = files.user_path(path)
    except TypeError as e:
        raise errors.ExportError(f"expected the path of an export's directory, got {path!r}") from e
    return path if os.path.lexists(path) else shipped.exports().get(str(path), path)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the manifest of an export's directory.

    Raises:
      ExportError: the directory is missing, is not an export or is from a newer version, or the manifest is damaged or edited.
    """
    file = find(path) / MANIFEST_NAME
    try:
        manifest = _parse(file)
        intact = isinstance(manifest, dict) and manifest.get("sha256") == files.digest(manifest)
    except errors.ExportError:  # it is a ValueError, too; its message is complete
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise errors.ExportError(f"{file} is damaged or cannot be read: {errors.one_line(e)}; export again") from e
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise errors.ExportError(f"{file} is not the manifest of a {MANIFEST_FORMAT}; export again with `superserve export`")
    schema = manifest.get("schema")
    if schema != MANIFEST_SCHEMA:
        newer = isinstance(schema, int) and schema > MANIFEST_SCHEMA
        remedy = "it is newer, upgrade superserve-jax" if newer else "it is damaged, export again"
        raise errors.ExportError(f"{file} has schema {schema!r}, but this version reads schema {MANIFEST_SCHEMA}; {remedy}")
    if not intact:
        raise errors.ExportError(f"{file} is damaged or was edited: its SHA-256 does not match; export again")
    try:
        msgspec.convert(manifest, _Manifest)
    except (msgspec.ValidationError, UnicodeError) as e:  # JSON may hold half of a surrogate pair
        raise errors.ExportError(f"{file} is damaged: {errors.one_line(e)}; export again") from e
    if not re.fullmatch(r"payload-[0-9a-f]{16}", manifest["payload"]):
        raise errors.ExportError(f"{file} names an impossible payload folder {manifest['payload']!r}; export again")
    if not "".join(manifest["files"]).isprintable():
        raise errors.ExportError(f"{file} lists impossible names of files; export again")
    return manifest


def other_vocabulary(new: os.PathLike[str] | str, old: os.PathLike[str] | str) -> errors.ConfigError:
    """The error for an export whose vocabulary is not that of a server's export."""
    return errors.ConfigError(
        f"{new} has another vocabulary than {old}, so it would read the same token ids as other texts; "
        "open another server for it"
    )


def is_manifest(file: pathlib.Path) -> bool:
    """Whether a file is the manifest of an export, of any version."""
    try:
        found = _parse(file)
    except (errors.ExportError, OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == MANIFEST_FORMAT


def verify_files(payload: pathlib.Path, contents: Mapping[str, Any]) -> None:
    """Raises ExportError unless the payload holds exactly the files in `contents`, with their sizes and digests, and no links.

    Args:
      payload: the folder of the payload.
      contents: for each file's path in the payload, its size in "bytes" and its "sha256".
    """
    try:
        if not payload.is_dir() or payload.is_symlink():
            raise errors.ExportError(f"{payload} is missing or is not a folder; copy or export it again")
        found = {str(f.relative_to(payload)): f for f in files_of(payload)}
        if odd := sorted(set(found) ^ set(contents)):
            state = "missing" if odd[0] in contents else "not in the manifest"
            raise errors.ExportError(f"{payload / odd[0]} is {state}; copy or export it again")
        for name, expected in contents.items():
            check_file(found[name], expected)
    except OSError as e:
        raise errors.ExportError(f"{payload} cannot be read: {e}; copy or export it again") from e


def check_file(file: pathlib.Path, expected: Mapping[str, Any]) -> None:
    """Raises ExportError unless `file` is a plain file with the expected "bytes" and "sha256"."""
    if file.is_symlink() or not file.is_file():  # a link could lead out of the directory, a pipe could block
        raise errors.ExportError(f"{file} is not a plain file; copy or export it again")
    if (size := file.stat().st_size) != expected["bytes"]:
        raise errors.ExportError(f"{file} has {size} bytes instead of {expected['bytes']}; copy or export it again")
    if files.sha256(file) != expected["sha256"]:
        raise errors.ExportError(f"{file} is damaged: its SHA-256 does not match; copy or export it again")


def files_of(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files in a folder and its subfolders, and all links."""
    return (f for f in sorted(folder.rglob("*")) if f.is_symlink() or not f.is_dir())


def _parse(file: pathlib.Path) -> Any:
    if not file.is_file():
        path = file.parent
        what = f"has no {MANIFEST_NAME}" if path.is_dir() else "does not exist" if not path.exists() else "is not a directory"
        names = ", ".join(shipped.exports())
        remedy = f"make one with `superserve export`, or take one that comes with the package: {names}"
        raise errors.ExportError(f"{path} is not an export: it {what}; {hint(path, 'export') or remedy}")
    return json.loads(files.read_bytes(file, most=_MAX_MANIFEST_BYTES).decode())
