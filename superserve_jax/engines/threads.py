"""Runs functions in threads that have the caller's settings of jax.

Settings such as `jax.default_matmul_precision` hold for one thread. A new thread starts with those of the process. So a
program that it traces could compute in the wrong precision.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from superserve_jax import errors, progress
from superserve_jax.engines import keys

T = TypeVar("T")
R = TypeVar("R")
# In a thread of `each`: `stop` is the event that cancels the outermost call of `each`, and `share` divides nested `workers`.
_local = threading.local()


def each(function: Callable[[T], R], items: Iterable[T], *, workers: int, description: str = "") -> list[R]:
    """`[function(x) for x in items]`, computed in threads with the caller's settings of jax.

    Calls may be nested. After an error or Ctrl-C, the calls that have not begun are dropped, also in nested calls.

    Args:
      function: is called once for each item.
      items: the items.
      workers: the largest number of threads. Nested calls divide their number by that of the outer call.
      description: a few words for a progress bar; "" shows none.

    Raises the first error of `function`.

    >>> import jax
    >>> with jax.default_matmul_precision("highest"):
    ...     each(lambda name: keys.settings()[name], ["jax_default_matmul_precision"], workers=2)
    ['highest']
    """
    settings, items = keys.settings(), list(items)
    outer: threading.Event | None = getattr(_local, "stop", None)
    stop = outer or threading.Event()
    workers = max(1, min(workers // getattr(_local, "share", 1), len(items)))

    def call(item: T) -> R:
        _local.stop, _local.share = stop, workers
        if stop.is_set():
            raise concurrent.futures.CancelledError
        with keys.with_settings(settings):
            return function(item)

    with errors.StartingThreads(), concurrent.futures.ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            jobs = [pool.submit(call, item) for item in items]
            done = concurrent.futures.as_completed(jobs)
            if description:
                with contextlib.closing(progress.track(done, description, total=len(jobs))) as shown:
                    _wait(shown)
            else:
                _wait(done)
            return [job.result() for job in jobs]
        except BaseException:  # the results of the others are not needed
            if outer is None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _wait(done: Iterable[concurrent.futures.Future[R]]) -> None:
    """Waits for all jobs, or raises the error of the first one that fails."""
    for job in done:
        job.result()
