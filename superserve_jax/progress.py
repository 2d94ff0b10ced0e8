"""Shows the progress of long work on stderr: a bar on a terminal, else a plain line every 10 seconds."""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_LINE_EVERY_S = 10.0
_WARM_UP = 20  # items, or a tenth of all if that is less: the first ones may also compile programs, so their rate says little
_terminal = threading.Lock()


def track(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    completed: int = 0,
    note: Callable[[], str] = lambda: "",
) -> Generator[T, None, None]:
    """Yields `items`, and shows how many are done, their rate and the time left.

    The first items count as warm-up: the rate is the mean of the items after them, and before that, a plain line shows neither
    rate nor time left. A terminal shows one bar at a time. Other work that is tracked meanwhile shows nothing there.

    Args:
      items: the work.
      description: a few words.
      total: the number of items. By default it is `len(items)`, if `items` has a length.
      completed: the number of items that an earlier, interrupted run has done.
      note: returns a short text to show behind the bar, such as the current loss.

    >>> list(track([1, 2], "counting"))
    [1, 2]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    done, start_s = completed, time.monotonic()
    line_s = start_s  # when the last line was printed
    warm = completed + max(1, min(_WARM_UP, (total or 10 * _WARM_UP) // 10))
    since = None  # (items done, time) at the end of the warm-up
    with contextlib.ExitStack() as stack:
        is_shown = console.is_terminal and _terminal.acquire(blocking=False)  # a terminal has room for one bar at a time
        if is_shown:
            stack.callback(_terminal.release)
        bar = stack.enter_context(Progress(*columns, console=console, disable=not is_shown))
        task = bar.add_task(description, total=total, completed=completed, rate=0.0, note="")
        for done, item in enumerate(items, completed + 1):
            yield item
            now_s = time.monotonic()
            rate = (done - since[0]) / max(now_s - since[1], 1e-9) if since else 0.0
            if is_shown:
                bar.update(task, completed=done, rate=rate, note=note())
            elif not console.is_terminal and now_s - line_s >= _LINE_EVERY_S:
                line_s = now_s
                speed = f", {rate:.1f}/s" if rate else ""
                left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
                _print(console, f"{description}: {done}/{total or '?'}{speed}{left} {note()}")
            if done == warm:
                since = done, now_s
    took_s = time.monotonic() - start_s
    if not console.is_terminal and took_s >= 1.0:
        _print(console, f"{description}: {done} done in {took_s:.0f} s {note()}")


@contextlib.contextmanager
def clock(seconds: float, description: str) -> Iterator[None]:
    """While open, shows how much of a known time has passed: on a terminal every second, else every 10 seconds.

    A thread prints short plain lines. A bar would keep the interpreter busy for milliseconds, which shows in measurements.

    Args:
      seconds: how long the work takes.
      description: a few words.

    >>> with clock(0.1, "waiting"):
    ...     time.sleep(0.1)
    """
    console, over, start_s = Console(stderr=True), threading.Event(), time.monotonic()
    every_s = 1.0 if console.is_terminal else _LINE_EVERY_S

    def show() -> None:
        while not over.wait(every_s):
            line = f"{description}: {min(time.monotonic() - start_s, seconds):.0f} of {seconds:.0f} s"
            _print(console, line, end="\r" if console.is_terminal else "\n")

    thread = threading.Thread(target=show, name="superserve-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if console.is_terminal:
            _print(console, "\x1b[K", end="")  # erases the line


def _print(console: Console, line: str, *, end: str = "\n") -> None:
    with contextlib.suppress(OSError):  # the output may be a file on a full disk, which is no reason to stop the work
        print(line.rstrip(), file=console.file, flush=True, end=end)
