"""Refuses requests that a page of another site has made a browser send.

Two checks, since a browser sends what any page asks for:

- For what changes something, the header `Origin` names the page. It must be the address that the request was sent to, the
  header `Host`.
- A foreign name may lead to 127.0.0.1 (DNS rebinding). Then both headers have that name. So a gateway that listens at an
  address of this machine only refuses foreign names in `Host`.
"""

import functools
import ipaddress
import urllib.parse
from collections.abc import Mapping

from superserve_jax.gateway.failures import RequestError


def check_same_origin(headers: Mapping[bytes, bytes], *, host: str) -> None:
    """Raises RequestError (403) unless the request comes from a page of this gateway.

    Args:
      headers: the headers of the request, with names in lower case.
      host: the address that the gateway listens at.

    >>> check_same_origin({b"host": b"localhost:8000", b"origin": b"http://localhost:8000"}, host="127.0.0.1")
    >>> check_same_origin({b"host": b"localhost:8000", b"origin": b"http://evil.example"}, host="127.0.0.1")
    Traceback (most recent call last):
    superserve_jax.gateway.failures.RequestError: the header Origin is 'http://evil.example', but Host is 'localhost:8000'; ...
    """
    origin, asked = (headers.get(name, b"").decode("latin-1").lower()[:200] for name in (b"origin", b"host"))
    scheme, _, rest = origin.partition("://")
    if scheme not in ("http", "https") or not asked or rest != asked:
        raise RequestError(
            f"the header Origin is {origin!r}, but Host is {asked!r}; only the gateway's own page may do this", status=403
        )
    if is_local(host) and not is_local(_name_in(asked)):
        raise RequestError(
            f"the header Host is {asked!r}, but the gateway listens at {host!r}; open it under that address", status=403
        )


def check_host(headers: Mapping[bytes, bytes], *, host: str) -> None:
    """Raises RequestError (403) if a foreign name has led to a gateway that listens on this machine only.

    "localhost" and all addresses are no foreign names. Nor is a missing header, since browsers send it.

    Args:
      headers, host: see `check_same_origin`.

    >>> check_host({b"host": b"localhost:8000"}, host="127.0.0.1")
    >>> check_host({b"host": b"evil.example"}, host="127.0.0.1")
    Traceback (most recent call last):
    superserve_jax.gateway.failures.RequestError: the header Host is 'evil.example', but the gateway listens at ...
    """
    asked = headers.get(b"host")
    if asked and _is_foreign(asked[:200], host):
        raise RequestError(
            f"the header Host is {asked[:200].decode('latin-1')!r}, but the gateway listens at {host!r}; send the request to "
            "localhost or an address, use a token, or let the gateway listen at another address",
            status=403,
        )


@functools.lru_cache(256)
def _is_foreign(asked: bytes, host: str) -> bool:
    name = _name_in(asked.decode("latin-1").lower())
    return is_local(host) and not (is_local(name) or _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_local(name: str) -> bool:
    """Whether a name or an address means this machine.

    >>> [is_local(name) for name in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "gpu.example")]
    [True, True, True, False, False]
    """
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name_in(asked: str) -> str:
    """The name in a header Host. "" if it is none."""
    try:
        return urllib.parse.urlsplit(f"//{asked}").hostname or ""
    except ValueError:
        return ""
