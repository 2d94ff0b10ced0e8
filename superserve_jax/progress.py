"""Progress of long work on stderr: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

import rich.console
import rich.progress

T = TypeVar("T")

_LINE_EVERY_S = 10.0


def track(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    completed: int = 0,
    note: Callable[[], str] = lambda: "",
) -> Iterator[T]:
    """Yields `items` while showing how far it is.

    Args:
      items: the work.
      description: a few words.
      total: number of items; their length where they have one.
      completed: items done before, by an interrupted run.
      note: gives a short text, such as the current loss, shown behind the bar.

    >>> list(track([1, 2], "counting"))
    [1, 2]
    """
    total = total if total is not None else (len(items) if isinstance(items, Sized) else None)
    console = rich.console.Console(stderr=True)
    show = _bar if console.is_terminal else _lines
    return show(console, items, description, total, completed, note)


def _bar(console, items, description, total, completed, note):
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=completed, rate="", note="")
        start = time.monotonic()
        for done, item in enumerate(items, completed + 1):
            yield item
            rate = (done - completed) / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, rate=f"{rate:.1f}/s", note=note())


def _lines(console, items, description, total, completed, note):
    start = last = time.monotonic()
    done = completed
    for done, item in enumerate(items, completed + 1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            rate = (done - completed) / (now - start)
            left = f", {(total - done) / rate:.0f} s left" if total else ""
            print(f"{description}: {done}/{total or '?'}, {rate:.1f}/s{left} {note()}".rstrip(), file=sys.stderr, flush=True)
    if time.monotonic() - start >= 1.0:
        print(f"{description}: {done} done in {time.monotonic() - start:.0f} s {note()}".rstrip(), file=sys.stderr, flush=True)
