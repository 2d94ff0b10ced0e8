"""An empty cache of executables for tests that need one."""

import pytest


@pytest.fixture
def root(monkeypatch, tmp_path):
    """The folder of an empty cache."""
    monkeypatch.setenv("SUPERSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
