"""Compares a traced network with the module's own code, run on smaller parameters."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from superserve_jax import errors
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.tracing.family import ElasticConfig

_TOLERANCE = 1e-3  # relative to the largest logit
_FRESH = {"mean": np.zeros, "var": np.ones}


def check(net: SuperNet, subnets: int) -> int:
    """See `Elastic.check`."""
    compared = 0
    if not isinstance(net.config, ElasticConfig):
        raise errors.ConfigError(
            f"expected a SuperNet that ss.elastic made, got {net!r}; use supernets.check for other families"
        )
    network = net.config.network
    spec = network.input_spec(2)
    inputs = np.random.default_rng(0).integers(0, 2, spec.shape).astype(spec.dtype)
    for step in range(subnets):
        subnet = net.space.sample(0, step)
        sizes = net.config.sizes(subnet)
        if any(size == 0 for size in sizes.values()):
            subnet = net.space.subnet(**dict[str, Any](subnet.axes))
            sizes = net.config.sizes(subnet)
        params = {name: network.cut(name, net.params, sizes) for name in net.params}
        program = programs.sliced(net.config, subnet)
        statistics = np.stack([np.zeros(program.statistics_size, np.float32), np.ones(program.statistics_size, np.float32)])
        active = jnp.asarray(program.active(subnet))
        expected = np.asarray(program.infer(net.params, inputs, jnp.asarray(statistics), active))
        lengths = {norm: shape[0] for norm, shape in network.source.norms.items()} | net.config.norm_sizes(sizes)
        rows = {f"{norm}.{kind}": fill(n, np.float32) for norm, n in lengths.items() for kind, fill in _FRESH.items()}
        try:
            found = np.asarray(network.source.run(network.source.module({**params, **rows}), inputs))
        except (TypeError, ValueError):
            continue  # the code expects the whole sizes
        compared += 1
        most = _TOLERANCE * np.abs(expected).max(initial=0)
        difference = np.abs(found - expected).max(initial=0)
        if found.shape != expected.shape or not difference <= most:
            reasons = "\n".join(map(str, network.found.suspects)) or "none was found; please report the module"
            raise errors.ConfigError(
                f"with the parameters of {subnet.to_json()}, the module's own code returns other logits (difference "
                f"{difference:.3g}, expected at most {most:.3g}). Numbers that may come from a size:\n{reasons}"
            )
    return compared
