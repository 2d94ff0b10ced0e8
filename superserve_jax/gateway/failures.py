"""Maps each error to an HTTP status and the message that the client reads."""

import asyncio
import concurrent.futures
import logging
from collections.abc import Sequence

from superserve_jax import errors, foreign

_log = logging.getLogger(__name__)


class RequestError(errors.SuperServeError, ValueError):
    """A request does not follow the protocol, or does not fit the model.

    Args:
      message: the value, what was expected, and the remedy.
      status: the status of HTTP.
      headers: headers of the HTTP response, such as "allow".
    """

    def __init__(self, message: str, *, status: int = 400, headers: Sequence[tuple[bytes, bytes]] = ()):
        super().__init__(message)
        self.status, self.headers = status, tuple(headers)


_STATUSES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.InputError, 400),
    (errors.DeadlineError, 400),
    (errors.AccuracyFloorError, 400),
    (errors.QueueFullError, 429),  # and AdmissionError
    (errors.ServerClosedError, 503),
    (errors.WorkersLostError, 503),
    (errors.DeadlineExpiredError, 504),
    (asyncio.CancelledError, 503),
    (concurrent.futures.CancelledError, 503),
)
CLIENT_LEFT = 499
"""Stands in logs and spans for the status of a request whose client has gone away. No client gets it."""
RETRY = (429, 503)
"""The statuses after which a client should try again."""
RETRY_AFTER = (b"retry-after", b"1")
"""The header that says so. Its unit is seconds, and it must be whole."""


_CLOSING = "the gateway is shutting down; send the request to another replica"


class ClosingError(errors.ServerClosedError):
    """The gateway is closing."""

    def __init__(self, message: str = _CLOSING):
        super().__init__(message)


# Errors whose text is meant for the client.
_FOR_CLIENTS = (
    *(RequestError, ClosingError),
    *(errors.InputError, errors.DeadlineError, errors.AccuracyFloorError, errors.NotFiniteError),
)
# The text of other errors tells the operator what to do. The client reads this.
_INSTEAD: tuple[tuple[type[BaseException], str], ...] = (
    (errors.AdmissionError, "the waiting queries leave no time for this deadline; allow a longer slo_ms, or try again later"),
    (errors.QueueFullError, "the queue is full; try again later"),
    (errors.ServerClosedError, "the model's server is closed; try again later, or at another replica"),
    (errors.WorkersLostError, "the model has no workers; try again later, or at another replica"),
    (errors.DeadlineExpiredError, "dropped, since its deadline could no longer be met; allow a longer slo_ms"),
    (asyncio.CancelledError, _CLOSING),
    (concurrent.futures.CancelledError, "the query was cancelled before its answer; send it again"),
)


def status_of(error: BaseException) -> int:
    """The status of HTTP for an error.

    >>> status_of(errors.AdmissionError("full")), status_of(RequestError("wrong")), status_of(ValueError("why"))
    (429, 400, 500)
    """
    if isinstance(error, RequestError):
        return error.status
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def message_of(error: BaseException) -> str:
    """What the client reads. Unexpected errors are logged; the client gets a general message."""
    if isinstance(error, _FOR_CLIENTS):
        return errors.one_line(error)  # it may show what the client has sent
    for kind, message in _INSTEAD:
        if isinstance(error, kind):
            return message
    if isinstance(error, errors.SuperServeError):  # the server logs what its engine or policy raised
        _log.error("a request failed: %s", errors.one_line(error))
        return "the model failed on this request; the log of the gateway has the reason"
    foreign.log(_log, logging.ERROR, "a request failed in the gateway", error=error)
    return "the gateway failed; its log has the reason"
