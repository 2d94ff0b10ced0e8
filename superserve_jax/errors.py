"""The errors that superserve_jax raises, all under `SuperServeError`.

Each class also derives from the builtin that a caller would expect, such as `ValueError` for a bad value. Each message names
the value, what was expected and the remedy.
"""

import contextlib
import difflib
import math
import threading
from collections.abc import Collection, Iterable, Iterator

import msgspec

_SHOWN = 100  # characters of a name that a message shows; a name in a file may be very long
_START, _END = 1_000, 500  # characters of a longer message that are shown; the remedy is at the end


class SuperServeError(Exception):
    """Base of every error that this library raises on purpose. A message with a very long value is cut in the middle."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _START + _END else f"{text[:_START]} ... {text[-_END:]}"


class ConfigError(SuperServeError, ValueError):
    """A value in a config or an argument is not allowed."""


class UnknownNameError(SuperServeError, ValueError):
    """A name (of a family, dataset, policy, axis, ...) is unknown."""


class SubnetError(SuperServeError, ValueError):
    """A subnet does not belong to the search space, or is not served."""


class SpaceTooLargeError(SuperServeError, ValueError):
    """The search space has too many subnets to list them all."""


class NotCalibratedError(SuperServeError, LookupError):
    """A subnet has no SubnetNorm statistics of its own."""


class DataError(SuperServeError, ValueError):
    """A dataset is missing, is not prepared, or lacks the requested data."""


class ExportError(SuperServeError, ValueError):
    """An export directory is missing or damaged, is not an export, or was written by a newer version."""


class WriteError(SuperServeError, OSError):
    """A file cannot be written: the disk is full, or the folder is read-only."""


class ConversionError(SuperServeError, ValueError):
    """A weight file cannot be read, or its weights do not fit the network."""


class ProfileError(SuperServeError, ValueError):
    """A latency profile is malformed, or was measured for other subnets or batch sizes."""


class InputError(SuperServeError, ValueError):
    """An input has the wrong shape or dtype."""


class DeadlineError(SuperServeError, ValueError):
    """An SLO is not a positive, finite number of milliseconds."""


class AccuracyFloorError(SuperServeError, ValueError):
    """No served subnet reaches the accuracy that a query requires."""


class QueueFullError(SuperServeError, RuntimeError):
    """The server's queue holds the maximum number of queries or bytes."""


class AdmissionError(QueueFullError):
    """The waiting queries leave no time to meet this query's deadline, so the server refused it (option `admission`)."""


class ServerClosedError(SuperServeError, RuntimeError):
    """The server was closed before the query could be taken or answered."""


class WorkersLostError(SuperServeError, RuntimeError):
    """No worker is left, so no query can be answered."""


class ThreadStartError(SuperServeError, RuntimeError):
    """The system could not start a thread."""


class InferenceError(SuperServeError, RuntimeError):
    """The engine failed on this query's batch."""


class NotFiniteError(InferenceError):
    """The engine's outputs are NaN or infinite. A server then finds out whether input, subnet or device is at fault."""


class EngineLostError(SuperServeError, ConnectionError):
    """The engine's process or host is gone or silent. Its batches say nothing about their inputs."""


class PolicyError(InferenceError):
    """A policy raised, hung, or returned something that is no decision for the profile."""


class DeadlineExpiredError(SuperServeError, TimeoutError):
    """The query could no longer meet its deadline, so the server dropped it (option `expire`)."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """An error for an unknown name, which suggests the nearest known name if there is one.

    >>> print(unknown_name("policy", "slakfit", ["slackfit", "fixed"]))
    unknown policy 'slakfit': did you mean 'slackfit'? Known: fixed, slackfit
    >>> print(unknown_name("policy", "best", ["slackfit", "fixed"]))
    unknown policy 'best'; known: fixed, slackfit
    """
    names, name = sorted(known), str(name)
    name = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    name = name if name.isprintable() else ascii(name)[1:-1]
    close = difflib.get_close_matches(name, names, n=1)
    end = f": did you mean '{close[0]}'? Known" if close else "; known"
    return UnknownNameError(f"unknown {kind} '{name}'{end}: {', '.join(names) or '(none)'}")


def check_name(kind: str, name: object, known: Collection[str]) -> None:
    """Raises the error of `unknown_name` unless `name` is one of the known names."""
    if name not in known:
        raise unknown_name(kind, name, known)


def check_from_zero(options: object, *names: str) -> None:
    """Raises ConfigError unless all these attributes are finite numbers from 0 up.

    >>> import types
    >>> check_from_zero(types.SimpleNamespace(wait_ms=-3.0), "wait_ms")
    Traceback (most recent call last):
    superserve_jax.errors.ConfigError: wait_ms must be a finite number from 0 up, got -3.0
    """
    for name in names:
        if not 0 <= (value := getattr(options, name)) < math.inf:
            raise ConfigError(f"{name} must be a finite number from 0 up, got {value!r}")


class StartingThreads(contextlib.AbstractContextManager[None]):
    """Turns Python's error for a thread that cannot be started into a ThreadStartError.

    A class, because `contextlib.contextmanager` would keep the error, and so the engine of the thread, in a reference cycle.
    """

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and str(error).startswith("can't start new thread"):
            raise ThreadStartError(
                f"the system cannot start another thread, and this process has {threading.active_count()}; end some of them, "
                "or raise the limit of the user or container (ulimit -u, pids.max)"
            ) from error


MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, msgspec.ValidationError)
"""What Python and msgspec raise for a malformed value."""


@contextlib.contextmanager
def refusing(error: type[SuperServeError], about: str) -> Iterator[None]:
    """Turns an exception caused by a malformed value into an `error` with a message of one line.

    Use it as a context manager or a decorator, around code that reads values from users or files. Errors of this library pass
    unchanged, so a check inside can give a better message.

    >>> with refusing(DataError, "not a pair of numbers; give two"):
    ...     first, second = map(int, "1 x".split())
    Traceback (most recent call last):
    superserve_jax.errors.DataError: not a pair of numbers; give two (ValueError: invalid literal for int() with base 10: 'x')
    """
    try:
        yield
    except SuperServeError:
        raise
    except MALFORMED as e:
        raise error(f"{about} ({type(e).__name__}: {one_line(e)[:300]})") from e


def one_line(message: object) -> str:
    """A message in one line, without control characters. A file may hold some that change what a terminal shows."""
    line = " ".join(str(message).split())
    return line if line.isprintable() else ascii(line)[1:-1]
