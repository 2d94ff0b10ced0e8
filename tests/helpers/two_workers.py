"""Exports of tiny networks that were profiled with two workers on the cores of a CPU."""

import jax
from tiny import TINY, random_params, random_statistics, write_export

import superserve_jax as ss
from superserve_jax import machine
from superserve_jax.exports import profile_path
from superserve_jax.profile import Profile, Row
from superserve_jax.supernets.supernet import SuperNet

SIZES = (1, 2)
SUBNETS = [TINY.space().smallest(), TINY.space().largest()]


def write(folder, seed, **changes):
    """Writes an export of random weights, and a latency profile of two workers whose batches of two run in parts."""
    model = SuperNet(TINY, random_params(TINY, seed), {s: random_statistics(TINY, s, seed) for s in SUBNETS})
    write_export(folder, model, SUBNETS, accuracy=0.5 + seed / 100)
    store(folder, **{"parts": {2: 1}, "cpu_workers": 2, **changes})
    return folder


def store(folder, **changes):
    kind, model = machine.device_kind(jax.devices()[0]), ss.load(folder)
    rows = (Row(s.subnet, s.accuracy, (1.0 + i, 2.0 + i)) for i, s in enumerate(model.served))
    Profile(SIZES, tuple(rows), kind, **changes).save(profile_path(folder, kind))
