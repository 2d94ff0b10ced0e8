"""search.jsonl: the candidates of a search, one JSON line each, so that an interrupted search can go on."""

import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from superserve_jax import errors, files
from superserve_jax.subnet import Subnet
from superserve_jax.training.search import Candidate

_log = logging.getLogger(__name__)


class SearchLog:
    """The file of the candidates that a search tried. Use it as a context manager.

    The first line holds the settings and the measured latencies, on which all other lines depend. If the file has other
    settings, it is started again from empty. An incomplete last line is dropped.

    Args:
      path: path of the file.
      settings: everything that a candidate's cost and accuracy depend on, as plain values.
      measure: measures the latencies by subnet. It is called if the file has none.

    Attributes:
      latencies: the latencies, measured or from the file.
      known: the candidates in the file.
    """

    def __init__(
        self, path: pathlib.Path, settings: Mapping[str, Any], *, measure: Callable[[], Mapping[Subnet, float]] = dict
    ):
        head, *lines = _whole_lines(path) or [{}]
        if head.get("settings") != settings:
            if head:
                other = [name for name in settings if head.get("settings", {}).get(name) != settings[name]]
                _log.info("%s was written with other %s; searching anew", path, ", ".join(other) or "settings")
            head = {"settings": settings, "latencies": [[s.to_json(), value] for s, value in measure().items()]}
            lines = []
        elif lines:
            _log.info("%s has %d candidates already; going on from there", path, len(lines))
        files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in (head, *lines)).encode())
        self.latencies = {Subnet.from_json(s): value for s, value in head["latencies"]}
        self.known = {c.subnet: c for c in map(Candidate.from_json, lines)}
        self._file = path.open("a")

    def __enter__(self) -> "SearchLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, candidate: Candidate) -> None:
        """Appends a candidate that is not known yet."""
        if candidate.subnet not in self.known:
            self._file.write(json.dumps(candidate.to_json()) + "\n")
            self._file.flush()


def _whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a file. A kill may leave the last line incomplete."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as e:
        raise errors.ConfigError(f"{path} is damaged: {e}; remove it to search anew") from e
