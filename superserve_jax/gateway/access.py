"""Who may use a gateway: a bearer token, and TLS. No sockets."""

import hmac
import os
import pathlib
import re
import ssl
from collections.abc import Container

from superserve_jax import errors
from superserve_jax.gateway import origins
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.messages import Request

TOKEN_VARIABLE = "SUPERSERVE_TOKEN"
"""The environment variable that may hold the token."""

_PROBES = re.compile(rb"/v2/health/(?:live|ready)|/v2/models/([^/?]+)(?:/versions/[^/?]+)?/ready")
_CHALLENGE = [(b"www-authenticate", b'Bearer realm="superserve"')]
_LEAST_TOKEN = 16
_READING = ("GET", "HEAD", "OPTIONS")


class Access:
    """Decides whether a request may be answered, before its body is read.

    Args:
      token: what clients must send as `Authorization: Bearer TOKEN`; None lets everybody in.
      host: the address that the gateway listens at, to refuse foreign names for it. None accepts all names, as is right with
        TLS, where browsers check the name.
      models: the names of the models. Their probes need no token. For other names they do, so that no error tells which
        models there are.
      public: the targets that anybody may read without the token.

    >>> access = Access("a-secret-of-many-letters")
    >>> access.is_right(b"Bearer a-secret-of-many-letters"), access.is_right(b"Bearer b"), access.is_right(None)
    (True, False, False)
    """

    def __init__(self, token: str | None, host: str | None = None, models: Container[str] = (), public: Container[bytes] = ()):
        if token is not None and (not isinstance(token, str) or len(token) < _LEAST_TOKEN or not _is_plain(token)):
            raise errors.ConfigError(
                f"a token needs {_LEAST_TOKEN} or more ASCII characters without blanks; choose another one"
            )
        self._token, self._host = None if token is None else token.encode(), host
        self._models, self._public = models, public

    def is_right(self, authorization: bytes | None) -> bool:
        """Whether the value of a header Authorization has the token. Wrong values take as long as right ones."""
        if self._token is None:
            return True
        scheme, _, token = (authorization or b"").partition(b" ")
        return hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer"

    def check(self, request: Request) -> RequestError | None:
        """The error for a request without the token (401), or for one that a page of another site sends (403)."""
        headers = request.headers
        has_token = self._token is not None and self.is_right(headers.get(b"authorization"))
        if self._token is not None and not has_token:
            target = request.target.partition(b"?")[0]
            probe = _PROBES.fullmatch(target)
            is_public = target in self._public and request.method in _READING
            if not is_public and (probe is None or (probe[1] is not None and probe[1].decode("latin-1") not in self._models)):
                return RequestError(
                    "the token is missing or wrong; send the header Authorization: Bearer TOKEN",
                    status=401,
                    headers=_CHALLENGE,
                )
        try:
            if self._host is not None and not has_token:
                origins.check_host(headers, host=self._host)
            if request.method not in _READING:
                origins.check_site(headers)
        except RequestError as error:
            return error
        return None


def read_token(file: str | None) -> str | None:
    """The token in a file or else in the environment variable SUPERSERVE_TOKEN. None without both.

    Raises ConfigError if the file cannot be read.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return pathlib.Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise errors.ConfigError(f"cannot read the token from {file}: {errors.one_line(e)}; give a file with one line") from e


def tls_context(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """What TLS needs, from the files of a certificate (with its chain) and its key in PEM. None without both.

    Raises ConfigError if one is missing or wrong.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise errors.ConfigError("TLS needs a certificate and its key; give both tls_cert and tls_key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # or it would ask at the terminal
    except (OSError, ValueError, TypeError) as e:
        raise errors.ConfigError(
            f"cannot use the certificate {cert} with the key {key}: {errors.one_line(e)}; give PEM files that belong "
            "together, and a key without a passphrase"
        ) from e
    return context


def _is_plain(token: str) -> bool:
    return token.isascii() and token.isprintable() and " " not in token
