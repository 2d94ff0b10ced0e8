"""Refuses requests that a page of another site has made a browser send.

Two checks are needed, since a browser sends what any page asks for:

- Browsers say whether a request comes from a page of the same site: in the header `Sec-Fetch-Site`, and older ones by
  `Origin`, the address of the page. Pages cannot change these headers.
- A foreign name may lead to 127.0.0.1 (DNS rebinding). Then the page seems to be the gateway's own. So a gateway that listens
  at an address of this machine only refuses foreign names in `Host`.
"""

import functools
import ipaddress
import urllib.parse
from collections.abc import Mapping

from superserve_jax.gateway.failures import RequestError


def check_site(headers: Mapping[bytes, bytes]) -> None:
    """Raises RequestError (403) if a page of another site has sent a request. Ask it about requests that change something.

    Other programs than browsers send neither header. Behind a proxy, `Origin` and `Host` may differ. So `Sec-Fetch-Site`
    counts first. Browsers send it to addresses with https and to this machine.

    Args:
      headers: the headers of the request, with names in lower case.

    >>> check_site({b"host": b"gpu.example"})
    >>> check_site({b"host": b"127.0.0.1:8000", b"origin": b"https://gpu.example", b"sec-fetch-site": b"same-origin"})
    >>> check_site({b"host": b"localhost:8000", b"origin": b"http://evil.example"})
    Traceback (most recent call last):
    superserve_jax.gateway.failures.RequestError: a page of another site has sent this request; send it without a browser
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        is_own = site in (b"same-origin", b"none")  # none: the user has typed the address
    else:
        is_own = origin is None or origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()
    if not is_own:
        raise RequestError("a page of another site has sent this request; send it without a browser", status=403)


def check_host(headers: Mapping[bytes, bytes], *, host: str) -> None:
    """Raises RequestError (403) if a foreign name has led to a gateway that listens on this machine only.

    "localhost" and all addresses are no foreign names. Nor is a missing header, since browsers send it.

    Args:
      headers: the headers of the request, with names in lower case.
      host: the address that the gateway listens at.

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
