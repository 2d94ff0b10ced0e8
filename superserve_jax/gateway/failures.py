"""Errors as clients see them: a status of HTTP, and one sentence that says what to do."""

import concurrent.futures
import logging

from superserve_jax import errors, foreign
from superserve_jax.gateway.tensors import RequestError

_log = logging.getLogger(__name__)

_STATUSES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.InputError, 400),
    (errors.DeadlineError, 400),
    (errors.AccuracyFloorError, 400),
    (errors.QueueFullError, 429),  # and AdmissionError
    (errors.ServerClosedError, 503),
    (errors.WorkersLostError, 503),
    (errors.DeadlineExpiredError, 504),
    (concurrent.futures.CancelledError, 503),
)
RETRY = (429, 503)
"""The statuses after which a client should try again."""
RETRY_AFTER = (b"retry-after", b"1")
"""The header that says so. Its unit is seconds, and it must be whole."""


def status_of(error: BaseException) -> int:
    """The status of HTTP for an error.

    >>> status_of(errors.AdmissionError("full")), status_of(RequestError("wrong")), status_of(ValueError("why"))
    (429, 400, 500)
    """
    if isinstance(error, RequestError):
        return error.status
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def message_of(error: BaseException) -> str:
    """What the client reads. An unexpected error is logged, and the client does not read its text."""
    if isinstance(error, errors.SuperServeError):
        return str(error).encode(errors="replace").decode()
    if isinstance(error, concurrent.futures.CancelledError):
        return "the query was cancelled before its answer; send it again"
    foreign.log(_log, logging.ERROR, "a request failed in the gateway", error=error)
    return "the gateway failed; its log has the reason"
