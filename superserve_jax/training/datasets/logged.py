"""`Logged`: a mixin of our own TFDS builders."""

import logging
from typing import Any

_log = logging.getLogger(__name__)


class Logged:
    """Logs the two lines that TFDS would print when it makes a dataset, because a library must not print."""

    name: Any
    data_dir: Any

    def _log_download_bytes(self) -> None:
        _log.info("making %s in %s (once, some seconds)", self.name, self.data_dir)

    def _log_download_done(self) -> None:
        _log.info("made %s in %s", self.name, self.data_dir)
