"""A server of an engine whose answers are worked out by hand, and the application on it."""

import fakes
import gateways
import pytest


@pytest.fixture(scope="module")
def server():
    with fakes.serve(gateways.engine(), policy="fixed:2") as opened:
        yield opened


@pytest.fixture(scope="module")
def app(server):
    return gateways.app(server)
