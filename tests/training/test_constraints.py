"""Constraints: their texts, and the costs that they limit."""

import math

import jax
import pytest
from mlp_family import MLPConfig
from tiny import TINY, TINY_BERT, TINY_VIT, random_statistics

from superserve_jax import errors
from superserve_jax.families.ofa_mobilenet import OFAMobileNetConfig
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.supernets import programs
from superserve_jax.training.constraints import Constraints, Costs, size_bytes

MOBILENET = OFAMobileNetConfig(image_size=32, width_mult=0.1, depths=(1, 2), expand_ratios=(3.0, 6.0), kernel_sizes=(3, 5))
CONFIGS = (TINY, TINY_BERT, TINY_VIT, MOBILENET, MLPConfig(), SingleSubnetConfig(TINY, TINY.space().smallest()))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["latency=5ms"], Constraints(latency_ms=5.0)),
        (["latency=250us", "size=20MB", "flops=1G"], Constraints(0.25, 20e6, 1e9)),
        (["latency=.5S"], Constraints(latency_ms=500.0)),
        (["size=1.5MiB"], Constraints(size_bytes=1.5 * 2**20)),
        (["size=900kb", "flops=2e6"], Constraints(size_bytes=9e5, flops=2e6)),
        (["flops=3 MFLOPs"], Constraints(flops=3e6)),
    ],
)
def test_constraints_are_read_from_texts_with_units(texts, expected):
    assert Constraints.parse(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["latency=5"], "latency must be a number above 0, with its unit, such as latency=5ms; got '5'"),
        (["size=20"], "with its unit, such as size=20MB; got '20'"),
        (["flops=fast"], "flops must be a number above 0, such as flops=1G; got 'fast'"),
        (["latency=-5ms"], "got '-5ms'"),
        (["latency=5MB"], "got '5MB'"),
        (["size"], "got ''"),
        (["flops=0"], "flops must be above 0 and finite, got 0"),
        (["flops=1e400"], "flops must be above 0 and finite, got inf"),
        (["latancy=5ms"], "unknown constraint 'latancy': did you mean 'latency'"),
        (["flops=1G", "flops=2G"], "'flops' is given twice"),
        ([], "at least one limit"),
    ],
)
def test_a_wrong_constraint_is_refused_with_an_example(texts, message):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError)) as caught:
        Constraints.parse(texts)
    assert message in str(caught.value)


def test_several_constraints_hold_together():
    under = Constraints(latency_ms=5.0, size_bytes=100.0, flops=10.0)
    assert under.hold_for(Costs(10, 100, 5.0))
    assert not any(under.hold_for(costs) for costs in (Costs(11, 100, 5.0), Costs(10, 101, 5.0), Costs(10, 100, 5.1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_the_size_is_the_bytes_of_what_a_subnet_reads_in_this_dtype(config, dtype):
    space = config.space()
    for subnet in {space.smallest(), space.sample(0, 0), space.largest()}:
        program = programs.sliced(config, subnet)
        shapes = programs.used_leaves(program)

        def weights(params, program=program, shapes=shapes):
            return programs.cast({name: program.cut(name, params, shape) for name, shape in shapes.items()}, dtype)

        arrays = jax.eval_shape(weights, programs.param_spec(config)).values()  # as an engine holds them
        weight_bytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        assert size_bytes(config, subnet, dtype) == weight_bytes + random_statistics(config, subnet).nbytes


def test_the_size_in_bfloat16_traces_no_program_of_a_family_that_counts_its_vectors(monkeypatch):
    monkeypatch.setattr(programs, "used_leaves", lambda *_: pytest.fail("traced"))
    for config in (TINY, TINY_BERT):
        assert size_bytes(config, config.space().largest(), "bfloat16") > 0
