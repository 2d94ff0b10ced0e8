"""A subnet of an elastic module computes what the same code computes when it is built small.

What these tests use of the library:
- `ss.elastic(module, input_spec, **options)` returns a SuperNet. Its parameters have the dotted paths of the module.
- `extract(subnet)` of that SuperNet returns {dotted path: array}. A parameter of a dropped block is None.
- A SuperNet of the same class, made of the same config, cuts other arrays of the same shapes, such as gradients.
- The names in `config.norm_sizes` are the dotted paths of the module's `nnx.BatchNorm` layers.
- All programs switch Dropout off, also `train`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import CASES
from models.case import dotted, params_of
from tiny import assert_close
from tracing_checks import FAST

import superserve_jax as ss
from superserve_jax.supernets import programs

BATCH = 3
jit = functools.partial(jax.jit, compiler_options=FAST)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=list(CASES))
def name(request):
    return request.param


@functools.cache
def elastic(name):
    case = CASES[name]
    return ss.elastic(case.network(case.sizes), case.input_spec(2), **case.options)


@functools.cache
def two_subnets(name):
    """The smallest subnet, and a random one without some block (if blocks can be dropped) and with mixed sizes."""
    space = elastic(name).space
    found = [space.sample(0, step) for step in range(50)]
    if space.rule == "every_other":  # without a block in the middle, a later block has another number in the small network
        found = [space.validate(dataclasses.replace(subnet, gates=(1, 0, 1))) for subnet in found]
    fewer = [subnet for subnet in found if sum(subnet.gates) < space.num_blocks] or found
    return space.smallest(), max(fewer, key=lambda subnet: sum(len(set(values)) for _, values in subnet.axes))


def inputs_of(name):
    return CASES[name].inputs(np.random.default_rng(1), BATCH)


def norms_of(net, subnet):
    return net.config.norm_sizes(net.config.sizes(subnet))


def random_statistics(net, subnet):
    rng, n = np.random.default_rng(2), sum(norms_of(net, subnet).values())
    return np.stack([rng.normal(0, 0.3, n), rng.uniform(0.5, 1.5, n)]).astype(np.float32)


def shapes_of(params):
    return {path: None if value is None else value.shape for path, value in params.items()}


def batch_norms(module):
    return {dotted(path): layer for path, layer in nnx.iter_modules(module) if isinstance(layer, nnx.BatchNorm)}


@functools.cache
def small_network(name, subnet):
    """The small network with the parameters and the running statistics of a subnet, and its norms in the subnet's order."""
    case, net = CASES[name], elastic(name)
    params = net.extract(subnet)
    module = case.network(case.shrink(shapes_of(params)))
    case.load(module, params)
    paths, layers, names, start = case.small_paths(params), batch_norms(module), [], 0
    statistics = random_statistics(net, subnet)
    for norm, n in norms_of(net, subnet).items():
        names.append(paths[f"{norm}.scale"].removesuffix(".scale"))
        mean, var = statistics[:, start : start + n]
        layers[names[-1]].mean.set_value(jnp.asarray(mean))
        layers[names[-1]].var.set_value(jnp.asarray(var))
        start += n
    assert sorted(names) == sorted(layers)
    return module, names


@functools.cache
def expected(name, subnet):
    """What the small network computes: logits of inference and of training, batch statistics, and gradients."""
    module, norms = small_network(name, subnet)
    graphdef, weights, rest = nnx.split(module, nnx.Param, ...)

    def train(weights, inputs):
        module = nnx.merge(graphdef, weights, rest, copy=True)
        train_mode = {"deterministic": True, "use_running_average": False, "momentum": 0.0}
        module.set_attributes(**train_mode, raise_if_not_found=False)  # running statistics become those of the batch
        logits, layers = module(inputs), batch_norms(module)
        statistics = [jnp.stack([layers[norm].mean[...], layers[norm].var[...]]) for norm in norms]
        return jnp.sum(jnp.square(logits)), (logits, jnp.concatenate([jnp.zeros((2, 0)), *statistics], axis=1))

    def run(weights, inputs):
        module = nnx.merge(graphdef, weights, rest, copy=True)
        module.eval()
        gradients, (logits, statistics) = jax.grad(train, has_aux=True)(weights, inputs)
        return {"infer": module(inputs), "train": logits, "statistics": statistics, "gradients": gradients}

    found = jit(run)(weights, inputs_of(name))
    assert np.isfinite(found["infer"]).all()
    assert np.isfinite(found["train"]).all()
    gradients = {dotted(path): value.get_value() for path, value in nnx.to_flat_state(found["gradients"])}
    paths = CASES[name].small_paths(elastic(name).extract(subnet))
    return found | {"gradients": {path: gradients[small] for path, small in paths.items()}}


def program_and_subnets(name, kind):
    net, (low, middle) = elastic(name), two_subnets(name)
    if kind == "sliced":
        return programs.sliced(net.config, middle), [middle]
    if kind == "bucketed":
        return programs.bucketed(net.config, [low, middle]), [low, middle]
    return programs.masked(net.config), [low, middle, net.space.largest()]


@pytest.mark.parametrize("kind", ["masked", "sliced", "bucketed"])
def test_a_subnet_infers_what_the_small_network_infers(name, kind):
    net = elastic(name)
    program, subnets = program_and_subnets(name, kind)
    run = jit(program.infer)
    for subnet in subnets:
        statistics = program.pad_statistics(random_statistics(net, subnet), subnet)
        logits = run(net.params, inputs_of(name), statistics, program.active(subnet))
        assert_close(logits, expected(name, subnet)["infer"])


@pytest.mark.parametrize("kind", ["masked", "sliced", "bucketed"])
def test_a_subnet_trains_as_the_small_network_trains(name, kind):
    """Logits, batch statistics and gradients agree. Outside of the subnet, gradients are exactly zero."""
    net = elastic(name)
    program, subnets = program_and_subnets(name, kind)

    def train(params, inputs, active):
        logits, statistics = program.train(params, inputs, active)
        return jnp.sum(jnp.square(logits)), (logits, statistics)

    run = jit(jax.grad(train, has_aux=True))
    for subnet in subnets:
        small = expected(name, subnet)
        gradients, (logits, statistics) = run(net.params, inputs_of(name), program.active(subnet))
        assert_close(logits, small["train"])
        assert_close(program.cut_statistics(np.asarray(statistics), subnet), small["statistics"])
        assert_gradients_close(gradients, small["gradients"], type(net)(net.config, gradients).extract(subnet))


def assert_gradients_close(gradients, small_gradients, extracted):
    """Gradients agree inside the subnet, and are exactly zero outside of it."""
    largest = max(np.abs(value).max() for value in small_gradients.values())
    for path, whole in gradients.items():
        inside = extracted[path]
        outside = np.count_nonzero(whole) - (0 if inside is None else np.count_nonzero(inside))
        assert outside == 0, f"{path} has {outside} gradients outside of the subnet"
        if inside is not None:
            np.testing.assert_allclose(inside, small_gradients[path], rtol=0, atol=1e-4 * largest, err_msg=path)


def test_a_subnet_has_the_parameters_of_the_small_network(name):
    net = elastic(name)
    for subnet in (*two_subnets(name), net.space.sample(1, 0)):
        small = params_of(small_network(name, subnet)[0])  # `load` has compared paths and shapes
        assert net.config.num_params(subnet) == sum(value.size for value in small.values())


def test_the_largest_subnet_is_the_whole_network(name):
    case, net = CASES[name], elastic(name)
    params = net.extract(net.space.largest())
    assert case.shrink(shapes_of(params)) == case.sizes
    assert params.keys() == net.params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(value, net.params[path], err_msg=path)


def test_the_smallest_subnet_is_smaller(name):
    net = elastic(name)
    assert net.config.num_params(net.space.smallest()) < 0.7 * net.config.num_params(net.space.largest())
