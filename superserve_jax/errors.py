"""The errors that superserve_jax raises, all under `SuperServeError`.

Each also derives from the builtin that a caller would expect (`ValueError` for a bad value, `TimeoutError` for a missed
deadline, ...), and each message names the value, what was expected and the remedy.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

import msgspec

_SHOWN = 100  # characters of a name; a file may name a megabyte


class SuperServeError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(SuperServeError, ValueError):
    """A value in a config or an argument is not one that can work."""


class UnknownNameError(SuperServeError, ValueError):
    """A name (family, dataset, policy, axis, ...) is not one of those known."""


class SubnetError(SuperServeError, ValueError):
    """A subnet does not belong to the search space, or is not served."""


class SpaceTooLargeError(SuperServeError, ValueError):
    """The search space has too many subnets to list them all."""


class NotCalibratedError(SuperServeError, LookupError):
    """A subnet has no SubnetNorm statistics of its own."""


class DataError(SuperServeError, ValueError):
    """A dataset is missing, not prepared, or does not hold what was asked."""


class ExportError(SuperServeError, ValueError):
    """An export directory is missing, damaged, foreign or from a newer version."""


class ConversionError(SuperServeError, ValueError):
    """A weight file cannot be read, or its weights are not those of the network that was asked for."""


class ProfileError(SuperServeError, ValueError):
    """A latency profile is malformed, or made for other subnets or batch sizes."""


class InputError(SuperServeError, ValueError):
    """An input has the wrong shape or dtype."""


class DeadlineError(SuperServeError, ValueError):
    """An SLO is not a positive, finite number of milliseconds."""


class AccuracyFloorError(SuperServeError, ValueError):
    """No served subnet is as accurate as the query demands."""


class QueueFullError(SuperServeError, RuntimeError):
    """The server's queue holds as many queries, or bytes, as it may."""


class AdmissionError(QueueFullError):
    """With what waits already, the query's deadline cannot be met, and the server refuses such queries."""


class ServerClosedError(SuperServeError, RuntimeError):
    """The server was closed before the query could be taken or answered."""


class WorkersLostError(SuperServeError, RuntimeError):
    """Every worker has left; nothing can be answered any more."""


class InferenceError(SuperServeError, RuntimeError):
    """The engine failed on this query's batch."""


class DeadlineExpiredError(SuperServeError, TimeoutError):
    """The deadline had passed, or could not be met, and the server drops such queries."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """An error for a name that is not known, with the nearest known one suggested.

    >>> print(unknown_name("policy", "slakfit", ["slackfit", "fixed"]))
    unknown policy 'slakfit': did you mean 'slackfit'? Known: fixed, slackfit
    """
    names, name = sorted(known), str(name)
    name = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    name = name if name.isprintable() else ascii(name)[1:-1]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return UnknownNameError(f"unknown {kind} '{name}': {hint}Known: {', '.join(names) or '(none)'}")


@contextlib.contextmanager
def refusing(error: type[SuperServeError], about: str) -> Iterator[None]:
    """What goes wrong inside because a value is of another type or form becomes an `error` about it, in one line.

    It stands around code that reads what somebody else wrote, after the checks that can say more, and may decorate a function.
    Errors of this library pass.

    >>> with refusing(DataError, "not a pair of numbers; give two"):
    ...     first, second = map(int, "1 x".split())
    Traceback (most recent call last):
    superserve_jax.errors.DataError: not a pair of numbers; give two (ValueError: invalid literal for int() with base 10: 'x')
    """
    try:
        yield
    except SuperServeError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, msgspec.ValidationError) as e:
        reason = " ".join(str(e).split())
        raise error(f"{about} ({type(e).__name__}: {reason[:300]})") from e
