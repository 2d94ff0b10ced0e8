"""Shows the cache of compiled executables, or clears it.

    superserve cache
    superserve cache --clear

Clearing is always safe: the next start of a server compiles again. $SUPERSERVE_CACHE chooses another directory, and
$SUPERSERVE_CACHE_MB another bound; the least recently used executables are deleted first.
Library: engines.cache.
"""

import dataclasses
import time

from superserve_jax import cli
from superserve_jax.engines import cache


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      clear: delete all executables.
    """

    clear: bool = False


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    root, limit_mb = cache.directory(), 1e-6 * cache.limit_bytes()
    if root is None:
        print("the cache is off (SUPERSERVE_CACHE is empty, or there is no home directory)")
        return
    found = cache.entries(root)
    used_mb = 1e-6 * sum(info.st_size for _, info in found)
    oldest = max((f"{(time.time() - info.st_mtime) / 86400:.1f} days ago" for _, info in found[:1]), default="-")
    cli.print_table(
        [
            ("directory", "executables", "MB", "at most", "oldest use"),
            (str(root), str(len(found)), f"{used_mb:.0f}", f"{limit_mb:.0f}", oldest),
        ]
    )
    if options.clear:
        print(f"deleted {cache.clear(root)} files")
