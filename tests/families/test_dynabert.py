"""DynaBERT's inputs and config. `supernets/test_programs.py` compares its subnets with plain networks."""

import dataclasses

import jax
import numpy as np
import plain
import pytest
from tiny import TINY_BERT, assert_close, random_params, random_tokens

from superserve_jax import errors
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

NO_STATISTICS = np.zeros((2, 0), np.float32)  # LayerNorm needs no statistics


@pytest.fixture(scope="module")
def model():
    return SuperNet(TINY_BERT, random_params(TINY_BERT))


@pytest.mark.parametrize("length", [3, 5])
def test_padding_changes_nothing(model, length):
    config, rng = TINY_BERT, np.random.default_rng(1)
    ids, types = rng.integers(1, 11, (4, length)), rng.integers(0, 2, (4, length))
    program = programs.sliced(config, model.space.largest())
    run = jax.jit(program.infer)
    short = run(model.params, config.pack(ids, types, length=length), NO_STATISTICS, program.active(program.envelope))
    padded = config.pack(ids, types)
    assert_close(model(padded, program.envelope), short)
    padded[:, length:, 1] = 1
    np.testing.assert_array_equal(model(padded, program.envelope), model(config.pack(ids, types), program.envelope))


def test_an_input_of_only_padding_gives_finite_logits(model):
    empty = np.zeros(TINY_BERT.input_spec(2).shape, np.int32)
    assert np.isfinite(model(empty, model.space.largest())).all()


@pytest.mark.parametrize(("place", "value"), [(0, 11), (0, -1), (1, 2), (1, -1)])
def test_an_unknown_token_or_type_gives_nan_for_its_own_sequence_only(model, place, value):
    inputs = random_tokens(TINY_BERT)
    expected = np.asarray(model(inputs, model.space.largest()))
    inputs[0, 2, place] = value
    logits = np.asarray(model(inputs, model.space.largest()))
    assert np.isnan(logits[0]).all()
    np.testing.assert_array_equal(logits[1:], expected[1:])


def test_a_network_of_one_token_type_takes_ids_alone():
    config = dataclasses.replace(TINY_BERT, token_types=1)
    params, inputs = random_params(config), random_tokens(config)
    assert inputs.shape == config.input_spec(3).shape == (3, 6)
    both = np.stack([inputs, np.zeros_like(inputs)], axis=-1)
    subnet = config.space().smallest()
    assert_close(SuperNet(config, params)(inputs, subnet), plain.dynabert(config, params, subnet, both))


# -- packing ------------------------------------------------------------------------------------------------------------


def test_packing_pads_and_overwrites_what_the_mask_drops():
    packed = TINY_BERT.pack([[5, 7, 6], [4, 9, 9]], [[0, 1, 1], [0, 1, 1]], mask=[[1, 1, 1], [1, 0, 0]], length=4)
    assert packed.dtype == np.int32
    assert packed[..., 0].tolist() == [[5, 7, 6, 0], [4, 0, 0, 0]]
    assert packed[..., 1].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert dataclasses.replace(TINY_BERT, pad_id=3).pack([[5, 3]], length=3)[..., 0].tolist() == [[5, 3, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": [1, 2]}, "one shape"),
        ({"ids": [[1] * 7]}, "at most 6 tokens"),
        ({"ids": [[1, 2]], "types": [[0]]}, "one shape"),
        ({"ids": [[1, 11]]}, "token ids must be whole numbers from 0 to 10, got 11"),
        ({"ids": [[1, -1]]}, "token ids"),
        ({"ids": [[1.5]]}, "token ids must be whole numbers"),
        ({"ids": [[1]], "types": [[2]]}, "token types must be whole numbers from 0 to 1, got 2"),
        ({"ids": [[1, 0]], "mask": [[1, 1]]}, "the mask keeps a token of id 0"),
    ],
)
def test_impossible_arguments_of_pack_are_refused(arguments, message):
    with pytest.raises(errors.InputError, match=message):
        TINY_BERT.pack(**arguments)


# -- the family's config ------------------------------------------------------------------------------------------------


def test_the_default_config_is_bert_base():
    config = DynaBERTConfig(max_length=512)
    assert config.num_params(config.space().largest()) == 109_484_547  # BertForSequenceClassification, 3 labels
    assert config.space().size == 16**6 + 16**9 + 16**12


def test_an_input_may_be_shorter_than_the_longest():
    assert TINY_BERT.input_spec(2).shape == (2, 6, 2)
    assert TINY_BERT.input_spec(2, length=4).shape == (2, 4, 2)
    with pytest.raises(errors.ConfigError, match="length must be from 1 to max_length=6"):
        TINY_BERT.input_spec(2, length=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number from 1 up"),
        ({"vocab_size": True}, "vocab_size"),
        ({"depths": ()}, "depths must be ascending whole numbers"),
        ({"depths": (0, 1)}, "depths"),
        ({"heads": (2, 1)}, "heads must be ascending"),
        ({"ffn": (1.5,)}, "ffn"),
        ({"heads": (1, 3)}, "hidden_size must be a multiple of the 3 heads, got 8"),
        ({"pad_id": 11}, "pad_id must be an id from 0 to 10"),
        ({"eps": 0.0}, "eps must be positive"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        dataclasses.replace(TINY_BERT, **changes)
