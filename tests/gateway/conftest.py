"""A server of an engine whose answers are worked out by hand, the application on it, and a folder with exports."""

import fakes
import gateways
import pytest
import repositories


@pytest.fixture(scope="module")
def server():
    with fakes.serve(gateways.engine(), policy="fixed:2") as opened:
        yield opened


@pytest.fixture(scope="module")
def app(server):
    return gateways.app(server)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with exports, as `repositories.write` makes it."""
    return repositories.write(tmp_path_factory.mktemp("repository"))
