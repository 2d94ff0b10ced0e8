"""Maps each error to a status of gRPC and its text."""

import grpc

from superserve_jax.gateway import failures

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MOST_BYTES = 2000  # of an error; grpc sends up to 3 bytes for each, and clients refuse metadata of more than 8 KiB


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status of gRPC for an error. It follows from the status of HTTP.

    >>> code_of(failures.RequestError("wrong")), code_of(ValueError("why"))
    (<StatusCode.INVALID_ARGUMENT: (3, 'invalid argument')>, <StatusCode.INTERNAL: (13, 'internal')>)
    """
    return _CODES.get(failures.status_of(error), grpc.StatusCode.INTERNAL)


def text_of(error: BaseException) -> str:
    """What the client reads about an error. A long text is cut.

    >>> len(text_of(failures.RequestError("\u20ac" * 1400)))  # three bytes each
    666
    """
    return failures.message_of(error).encode()[:_MOST_BYTES].decode(errors="ignore")
