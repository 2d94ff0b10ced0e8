"""Programs with folded norms give the same logits as programs without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import whole_space
from tiny import CONFIGS, TINY, TINY_BERT, assert_close, random_images, random_params, random_statistics, random_tokens

from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets import programs


def both(program):
    """The logits without and with folded norms, in one jitted function."""

    @jax.jit
    def run(params, inputs, statistics, active):
        folded = program.fold(params, statistics)
        return program.infer(params, inputs, statistics, active), program.infer_folded(folded, inputs, statistics, active)

    def logits(params, inputs, subnet):
        statistics = program.pad_statistics(random_statistics(program.config, subnet), subnet)
        return run(params, inputs, statistics, program.active(subnet))

    return logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_masked_program_agrees_over_the_whole_space(kind):
    config = CONFIGS[kind]
    params, images, logits = random_params(config), random_images(config, 3), both(programs.masked(config))
    for subnet in whole_space(config):
        plain, folded = logits(params, images, subnet)
        assert_close(folded, plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_sliced_and_bucketed_programs_agree(kind):
    config = CONFIGS[kind]
    params, images, space = random_params(config), random_images(config, 3), whole_space(config)
    for members in (space[:1], space[-1:], space[5::31], space[40::53]):
        program = programs.bucketed(config, members)
        logits = both(program)
        for subnet in members:
            plain, folded = logits(params, images, subnet)
            assert_close(folded, plain)


@pytest.mark.parametrize("config", [*CONFIGS.values(), OFAResNetConfig()], ids=[*CONFIGS, "published"])
def test_every_norm_of_an_ofa_resnet_folds_and_the_program_then_reads_no_scale(config):
    program = programs.sliced(config, config.space().largest())
    assert program.folds.keys() == program.offsets.keys()
    used, folded = programs.used_leaves(program), programs.used_leaves(program, folded=True)
    assert folded == {name: shape for name, shape in used.items() if not name.endswith("scale")}


def test_a_program_folds_only_the_norms_that_it_runs():
    smallest = programs.sliced(TINY, TINY.space().smallest())
    assert smallest.folds.keys() == smallest.offsets.keys() < programs.masked(TINY).folds.keys()


def test_a_family_without_such_norms_folds_nothing():
    program = programs.sliced(TINY_BERT, TINY_BERT.space().smallest())
    params, none = random_params(TINY_BERT), jnp.zeros((2, 0))
    folded = program.fold(params, none)
    assert {name: value.shape for name, value in folded.items()} == programs.used_leaves(program)
    arguments = random_tokens(TINY_BERT), none, program.active(program.envelope)
    np.testing.assert_array_equal(program.infer_folded(folded, *arguments), program.infer(params, *arguments))
