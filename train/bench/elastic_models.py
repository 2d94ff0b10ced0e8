"""Makes models that other projects publish elastic, and checks what `superserve_jax.elastic` finds in them.

    python train/bench/elastic_models.py --bonsai ../bonsai --flax ../flax

The options take checkouts of https://github.com/jax-ml/bonsai and https://github.com/google/flax. Each model is built by its
own code with its published sizes. Only shapes are made, so this needs neither memory nor weights. The first table shows what
the analysis finds. Numbers of parameters and multiply-adds are compared with those that are stated for the model.

The second table is about small versions of these models with random weights. For the smallest subnet and for random ones, the
masked program must compute the same as the sliced one. The sliced program of the whole network must compute the same as the
model's own code. The code of some models also runs with the smaller parameters of a subnet, and is compared there, too.

The exit status is 1 if a number differs. See `published_models.py` for the sizes and their sources.
Library: superserve_jax.elastic, supernets.programs.
"""

import collections
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import published_models
from flax import nnx
from published_models import Model, Network

import superserve_jax as ss
from superserve_jax import cli, errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      bonsai: path of a checkout of bonsai.
      flax: path of a checkout of Flax, whose wheel lacks the examples.
      models: names of the models to check; all of these checkouts if left out.
      subnets: random subnets of each small model to compare, besides the smallest.
      json: write the numbers to this file.
    """

    bonsai: pathlib.Path | None = None
    flax: pathlib.Path | None = None
    models: tuple[str, ...] = ()
    subnets: int = 2
    json: pathlib.Path | None = None


def analysed(name: str, network: Network) -> dict[str, Any]:
    """What the analysis finds in a network of which there are only shapes."""
    module = nnx.eval_shape(network.build)
    start = time.monotonic()
    net = ss.elastic(module, network.inputs, call=network.call)
    seconds = time.monotonic() - start
    largest, smallest = net.space.largest(), net.space.smallest()
    kinds = collections.Counter(axis.kind for axis in net.found.axes if len(axis.sizes) > 1)
    depths = [len(stage.blocks) for stage in net.found.stages if len(stage.depths) > 1]
    return {
        "model": name,
        "parameters": net.config.num_params(largest),
        "macs": net.config.flops(largest),
        "smallest_parameters": net.config.num_params(smallest),
        "smallest_macs": net.config.flops(smallest),
        "subnets": net.space.size,
        "axes": dict(kinds) | ({"depth": depths} if depths else {}),
        "seconds": seconds,
    }


def compared(name: str, model: Model, subnets: int) -> dict[str, Any]:
    """How far results of a small model differ that should be equal. All differences are relative to the largest logit.

    - Of each subnet: the masked program and the sliced one.
    - Of the whole network, and of each subnet with all blocks: the sliced program and the model's own code.
    """
    network, rng = model.small, np.random.default_rng(0)
    module = network.build()
    nnx.update(module, jax.tree.map(lambda x: _disturbed(x, rng), nnx.state(module, nnx.Param)))
    net = ss.elastic(module, network.inputs, call=network.call)
    inputs, space = _random_inputs(network.inputs, rng), net.space
    random = dict.fromkeys(space.sample(0, step) for step in range(100 * subnets))
    chosen = [space.smallest(), *(s for s in random if s not in (space.smallest(), space.largest()))][: subnets + 1]
    masked = programs.masked(net.config)
    run = jax.jit(masked.infer)
    whole = _sliced(net, space.largest(), inputs)
    differences, effects, own = [], [], [_own_difference(network, net, space.largest(), inputs)]
    for subnet in chosen:
        expected, statistics = _sliced(net, subnet, inputs), _statistics(net, subnet)
        found = run(net.params, inputs, masked.pad_statistics(statistics, subnet), masked.active(subnet))
        differences.append(_difference(found, expected))
        effects.append(_difference(expected, whole))
        axes: dict[str, Any] = {axis.name: subnet[axis.name] for axis in space.axes}
        wide = space.subnet(**axes)  # with all blocks
        own.append(_own_difference(network, net, wide, inputs))
    ran = [difference for difference in own if difference is not None]
    return {
        "model": name,
        "parameters": net.config.num_params(space.largest()),
        "subnets": len(chosen),
        "masked": float(np.max(differences)),  # not a number if one is not
        "own_code": float(np.max(ran)),
        "own_code_ran": len(ran),
        "effect": float(np.min(effects)),
        "tolerance": model.tolerance,
    }


def _difference(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def _statistics(net: Any, subnet: Subnet) -> np.ndarray:
    """Means and variances of a subnet's norms, which are the same in each call."""
    size = programs.sliced(net.config, subnet).statistics_size
    mean, deviation = np.random.default_rng(1).normal(size=(2, size)) / 10
    return np.stack([mean, np.exp(deviation)]).astype(np.float32)


def _sliced(net: Any, subnet: Subnet, inputs: jax.Array) -> jax.Array:
    sliced = programs.sliced(net.config, subnet)
    return jax.jit(sliced.infer)(net.params, inputs, _statistics(net, subnet), sliced.active(subnet))


def _own_difference(network: Network, net: Any, subnet: Subnet, inputs: jax.Array) -> float | None:
    """How far a subnet is from the model's own code with smaller parameters. None if the code insists on the whole sizes."""
    values, start, statistics = net.extract(subnet), 0, _statistics(net, subnet)
    for norm, n in net.config.norm_sizes(net.config.sizes(subnet)).items():
        values[f"{norm}.mean"], values[f"{norm}.var"] = jnp.asarray(statistics[:, start : start + n])
        start += n
    module = network.build()
    module.eval()
    graphdef, state = nnx.split(module)
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    given = [(path, v if values.get(name) is None else v.replace(values[name])) for name, (path, v) in flat.items()]
    call = network.call or (lambda module, x: module(x))
    try:
        found = call(nnx.merge(graphdef, nnx.from_flat_state(given)), inputs)
    except (TypeError, ValueError):
        return None
    return _difference(_sliced(net, subnet, inputs), found)


def _disturbed(x: jax.Array, rng: np.random.Generator) -> jax.Array:
    """A parameter as it was initialised, with noise. Many begin as zeros or ones, or so small that they change nothing."""
    fan_in = x.size // x.shape[-1] if x.ndim > 1 else 100
    return x + rng.normal(size=x.shape).astype(x.dtype) / fan_in**0.5


def _random_inputs(spec: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    """A batch of two: pixels, or tokens that every model of the table has."""
    shape = (2, *spec.shape[1:])
    is_text = jnp.issubdtype(spec.dtype, jnp.integer)
    return jnp.asarray(rng.integers(1, 50, shape) if is_text else rng.normal(size=shape), spec.dtype)


def _axes(axes: Mapping[str, Any]) -> str:
    """How many axes there are of each kind, and how many blocks of each list can be left out."""
    return ", ".join(f"{kind} {'+'.join(map(str, n)) if isinstance(n, list) else n}" for kind, n in sorted(axes.items()))


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f}" if number >= 1e8 else f"{number / 1e9:.4f}"


def _print_tables(found: list[dict[str, Any]], differences: list[dict[str, Any]]) -> None:
    columns = {
        "model": lambda f: f["model"],
        "elastic axes": lambda f: _axes(f["axes"]),
        "parameters": lambda f: f"{f['parameters']:,}",
        "G multiply-adds": lambda f: _billions(f["macs"]),
        "smallest: parameters": lambda f: f"{f['smallest_parameters']:,}",
        "G": lambda f: _billions(f["smallest_macs"]),
        "subnets": lambda f: f"{f['subnets']:.1e}",
        "seconds": lambda f: f"{f['seconds']:.1f}",
    }
    cli.print_columns(columns, found, left=2)
    print("\nsmall versions with random weights, differences relative to the largest logit:")
    columns = {
        "model": lambda d: d["model"],
        "parameters": lambda d: f"{d['parameters']:,}",
        "subnets": lambda d: str(d["subnets"]),
        "masked - sliced": lambda d: f"{d['masked']:.1e}",
        "sliced - own code": lambda d: f"{d['own_code']:.1e}",
        "own code ran": lambda d: f"{d['own_code_ran']} of {d['subnets'] + 1}",
        "subnet - whole network": lambda d: f"{d['effect']:.1e}",
    }
    cli.print_columns(columns, differences)


def _problems(found: list[dict[str, Any]], differences: list[dict[str, Any]]) -> Iterator[str]:
    for f in found:
        if f["model"] in published_models.STATED:
            yield from published_models.STATED[f["model"]].problems(f["model"], f["parameters"], f["macs"])
    for d in differences:
        for kind, what in {"masked": "masked and sliced", "own_code": "sliced and the model's own code"}.items():
            if not d[kind] <= d["tolerance"]:
                yield f"{d['model']}: {what} differ by {d[kind]:.1e}; at most {d['tolerance']} was expected"
        if not d["effect"] > d["tolerance"]:
            yield f"{d['model']}: a subnet computes the same as the whole network, so the comparison tells nothing"


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    models = published_models.models(options.bonsai, options.flax)
    if not models:
        raise errors.ConfigError("give --bonsai PATH or --flax PATH, a checkout of the project")
    for name in options.models:
        errors.check_name("model", name, models)
    chosen = {name: read() for name, read in models.items() if name in (options.models or models)}
    found = [analysed(name, model.published) for name, model in chosen.items()]
    with jax.default_matmul_precision("highest"):
        differences = [compared(name, model, options.subnets) for name, model in chosen.items()]
    _print_tables(found, differences)
    problems = list(_problems(found, differences))
    print("\n".join(problems) or "all numbers are as stated, and all results agree")
    cli.write_results(options.json, {"published": found, "small": differences, "problems": problems})
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    cli.run(main)
