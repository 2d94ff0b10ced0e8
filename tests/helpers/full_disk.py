"""A limit on the size of files. It makes writes fail as on a full disk, also in native code."""

import contextlib
import resource


@contextlib.contextmanager
def disk_full_after(size):
    """No file of this process may have more bytes than `size` inside the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
