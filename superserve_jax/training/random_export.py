"""Exports with random weights, to measure what depends on sizes only: bytes and milliseconds."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from superserve_jax import exports, files
from superserve_jax.exports import Served
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import sampling
from superserve_jax.training.config import load_config

_DRAWS = 100  # draws per wanted subnet; in a small space, the last missing subnets are rarely drawn


@contextlib.contextmanager
def export_of(path: str | os.PathLike[str], *, subnets: int) -> Iterator[pathlib.Path]:
    """Yields the export in a directory, or a temporary export of a config file's network with random weights.

    Args:
      path: an export's directory or a config file.
      subnets: number of served subnets for a config file, see `export`.
    """
    path = files.user_path(path)
    if path.suffix != ".py":
        yield path
        return
    model = load_config(path).model
    with tempfile.TemporaryDirectory() as folder:
        yield export(model, pathlib.Path(folder) / "export", subnets=subnets)


def export(config: FamilyConfig, path: str | os.PathLike[str], *, subnets: int) -> pathlib.Path:
    """Exports a network with random weights; returns the path.

    All statistics are 1. In place of an accuracy, a subnet has its FLOPs / the FLOPs of the largest subnet, so that policies
    have a choice. Only the sizes are realistic; the logits mean nothing.

    Args:
      config: the family's config.
      path: the export's directory.
      subnets: number of served subnets, see `subnet_list`.
    """
    chosen = subnet_list(config, subnets)
    model = SuperNet.create(config, seed=0)
    model.statistics = {s: np.ones((2, programs.sliced(config, s).statistics_size), np.float32) for s in chosen}
    most = config.flops(config.space().largest())
    served = [Served(s, config.flops(s) / most, None, config.flops(s), config.num_params(s)) for s in chosen]
    return exports.export(path, model, served, measured="not measured: fresh weights")


def subnet_list(config: FamilyConfig, count: int) -> list[Subnet]:
    """The smallest, the largest and random subnets (see `sampling.compound`), `count` in all. A small space has fewer."""
    space, rng = config.space(), np.random.default_rng(0)
    chosen = dict.fromkeys((space.smallest(), space.largest()))
    for _ in range(_DRAWS * count):
        if len(chosen) >= count:
            break
        chosen[sampling.compound(space, rng)] = None
    return list(chosen)
