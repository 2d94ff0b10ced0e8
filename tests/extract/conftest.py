"""Exports of three subnets each."""

import functools

import pytest
import three_subnets

from superserve_jax import extract


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The exports by the names of their configs, see `three_subnets`."""
    folder = tmp_path_factory.mktemp("exports")
    options = three_subnets.OPTIONS
    return {kind: three_subnets.write(folder / kind, c, **options.get(kind, {})) for kind, c in three_subnets.KINDS.items()}


@pytest.fixture(scope="session")
def take(models):
    """A function from the name of a config and an index to the extracted subnet."""
    return functools.cache(lambda kind, index: extract.take(models[kind], index))
