"""The texts of errors that clients read."""

import pytest

from superserve_jax.gateway import failures
from superserve_jax.gateway.failures import RequestError


@pytest.mark.parametrize("sent", ["a\nb", "\0", "\ud800", "\x1b[31m", "\u2028"])
def test_what_a_client_has_sent_is_shown_in_one_printable_line(sent):
    text = failures.message_of(RequestError(f"unknown model '{sent}': give the name of one"))
    assert text.isprintable()
    assert text.startswith("unknown model '")
