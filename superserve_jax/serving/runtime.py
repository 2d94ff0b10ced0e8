"""Settings of the Python process that decide its tail latency, changed on request and put back. No jax.

Measured on a router with 32 workers: a garbage collection over a million live objects stops every thread for 50 ms, and beside
one busy thread the default switch interval of 5 ms lowered attainment from 1.0 to 0.76. Python's own thresholds have 70,000
objects more looked through as a whole, which is what a burst brings, so that a backlog made itself worse: hundreds of
collections in 5 s, and none that found anything.

The price of a short switch interval is paid by many threads that all want to run: each wakes up once in an interval to ask for
its turn, so a thousand that block in `Future.result` cost a third more CPU per query than at 2 ms; `await` and `submit_many`
have no such threads.
"""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

SWITCH_INTERVAL_S = 1e-4
GC_THRESHOLDS = 20_000, 20, 100  # see `gc.set_threshold`

# The settings belong to the process, so the count of those who want them does too.
_lock = threading.Lock()
_users = 0
_unfreeze = False
_switch_interval_s = 0.0
_gc_thresholds = (0, 0, 0)


@contextlib.contextmanager
def low_latency() -> Iterator[None]:
    """While open, collections skip all objects that are alive now and come less often, and threads take turns every 0.1 ms.

    Entering collects garbage once, then freezes what is left (`gc.freeze`). Several may be open at once, in any order: each
    entry freezes anew, and the last exit puts back what the first entry found. Objects that somebody else had frozen before
    stay frozen, and whoever has turned collections off, or made them less frequent, keeps that. A server enters it for as
    long as it is open, unless told `tune_runtime=False`.

    >>> before = sys.getswitchinterval()
    >>> with low_latency():
    ...     gc.get_freeze_count() > 0, round(sys.getswitchinterval(), 6)
    (True, 0.0001)
    >>> sys.getswitchinterval() == before
    True
    """
    global _users, _unfreeze, _switch_interval_s, _gc_thresholds
    with _lock:
        if _users == 0:
            _unfreeze = gc.get_freeze_count() == 0
            _switch_interval_s = sys.getswitchinterval()
            _gc_thresholds = gc.get_threshold()
            if _gc_thresholds[0]:  # 0 turns collections off
                gc.set_threshold(*map(max, _gc_thresholds, GC_THRESHOLDS))
        _users += 1
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                sys.setswitchinterval(_switch_interval_s)
                gc.set_threshold(*_gc_thresholds)
                if _unfreeze:
                    gc.unfreeze()
