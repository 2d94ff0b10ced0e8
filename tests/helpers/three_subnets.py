"""Exports of three subnets, smallest first, with random weights and statistics, and the logits that they should give."""

import dataclasses

import numpy as np
import plain
from tiny import CONFIGS, TINY_BERT, random_params, random_statistics, write_export

from superserve_jax import exports
from superserve_jax.extract import checking
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

WORDS = Vocabulary(("[PAD]", "[CLS]", *"abcdefghi"), scheme="words")
CLASSES = ("cat", "dog", "owl")
KINDS = {
    **CONFIGS,  # windows of the bottleneck network cross the edge of the image
    "float32": dataclasses.replace(CONFIGS["basic"], input_dtype="float32"),
    "bert": TINY_BERT,
    "one_type": dataclasses.replace(TINY_BERT, token_types=1, pad_id=4),
}
OPTIONS = {"bert": {"vocabulary": WORDS}, "basic": {"class_names": CLASSES}}


def middle(space):
    """A subnet between the smallest and the largest."""
    return (
        space.subnet(depth=2, heads=2, ffn=3) if space.rule == "every_other" else space.subnet(depth=1, expand=0.5, width=1.0)
    )


def write(folder, config, **options):
    """A loaded export with the smallest, a middle and the largest subnet of a config."""
    space = config.space()
    chosen = [space.smallest(), middle(space), space.largest()]
    model = SuperNet(config, random_params(config), {s: random_statistics(config, s) for s in chosen})
    return exports.load(write_export(folder, model, **options))


def cases(config):
    """Batches of 1 and of several inputs. For sequences, also batches that are padded to other lengths."""
    found = [checking.random_inputs(config, 1, seed=1), checking.random_inputs(config, 4, seed=2)]
    if config.family == "dynabert":
        found += [checking.random_inputs(config, 3, length=length, seed=3) for length in (1, 4)]
    return found


def expected(model, index, inputs):
    """The logits of a plain NumPy network."""
    config, subnet = model.config, model.subnets[index]
    params = {name: np.asarray(value) for name, value in model.params.items()}
    if config.family == "dynabert" and config.token_types == 1:
        inputs = np.stack([inputs, np.zeros_like(inputs)], axis=-1)
    if config.family == "ofa_resnet" and config.input_dtype == "float32":
        config = dataclasses.replace(config, mean=(0.0,), std=(1 / 255,))
    return plain.network(config, params, subnet, inputs, model.statistics_of(subnet))
