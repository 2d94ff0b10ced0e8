"""`held_here`: whether the calling thread holds a lock. No jax."""

from collections.abc import Callable
from typing import Any


def held_here(lock: Any) -> Callable[[], bool]:
    """Returns a function that returns whether the calling thread holds a `threading.RLock`. It runs no Python code.

    `threading.Condition` asks its lock in the same way. Python has no public name for this.

    >>> import threading
    >>> lock = threading.RLock()
    >>> is_held_here = held_here(lock)
    >>> with lock:
    ...     inside = is_held_here()
    >>> inside, is_held_here()
    (True, False)
    """
    return lock._is_owned
