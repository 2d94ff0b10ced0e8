"""The folder with the exports that clients may load by name. No sockets. All of it may wait for a slow disk."""

import pathlib

from superserve_jax import errors
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.model import may_be_name
from superserve_jax.manifest import MANIFEST_NAME, read_manifest


class Folder:
    """A folder. The exports in it are the folders right below it that have a manifest, and whose names may be names of models.

    Args:
      path: its path.

    Raises ConfigError if there is no such folder.

    >>> Folder("/no/such/folder")
    Traceback (most recent call last):
    superserve_jax.errors.ConfigError: there is no folder '/no/such/folder'; give one with the exports that clients may load
    """

    def __init__(self, path: str):
        try:
            self._path = pathlib.Path(path).expanduser().resolve(strict=True)
            is_folder = self._path.is_dir()
        except (OSError, RuntimeError, TypeError, ValueError):
            is_folder = False
        if not is_folder:
            raise errors.ConfigError(f"there is no folder {path!r}; give one with the exports that clients may load")

    def exports(self) -> set[str]:
        """The names of the exports."""
        return {path.name for path in self._path.iterdir() if may_be_name(path.name) and self._is_export(path)}

    def find(self, name: str) -> pathlib.Path:
        """The directory of an export, without links.

        Args:
          name: the name of a folder. It has no separators, and is not "..".

        Raises RequestError: there is no such folder (404), or it is not an export (400).
        """
        path = self._path / name
        if not self._is_below(path):
            known = self.exports() - {name}  # a link to elsewhere is not among the exports
            raise RequestError(str(errors.unknown_name("model", name, known)), status=404)
        try:
            read_manifest(path)
        except errors.ExportError as e:
            raise RequestError(errors.one_line(e)) from e
        return path.resolve()

    def _is_export(self, path: pathlib.Path) -> bool:
        try:
            return self._is_below(path) and (path / MANIFEST_NAME).is_file()
        except OSError:  # it may not be read, such as the folder lost+found of a disk
            return False

    def _is_below(self, path: pathlib.Path) -> bool:
        """Whether this is a folder right below, or a link to one. Links to other places do not count."""
        try:
            return path.resolve(strict=True).parent == self._path and path.is_dir()
        except (OSError, RuntimeError):  # it is missing, or a link to itself
            return False
