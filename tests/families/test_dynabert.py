"""DynaBERT: sliced == bucketed == masked == the plain network over the whole space, also for subnets that name their gates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from tiny import TINY_BERT, random_params, random_tokens

from superserve_jax import errors, exports, families
from superserve_jax.exports import Served
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets import checking, programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training.sampling import Sampler

NO_STATISTICS = np.zeros((2, 0), np.float32)  # LayerNorm needs no statistics


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(np.asarray(expected)).max())


def test_the_plain_network_with_small_weights_agrees_over_the_whole_space():
    config, params, inputs = TINY_BERT, random_params(TINY_BERT), random_tokens(TINY_BERT)
    masked = programs.masked(config)
    run = jax.jit(masked.infer)
    count = 0
    for subnet in plain.whole_space(config):
        expected = plain.dynabert(config, params, subnet, inputs)
        sliced = programs.sliced(config, subnet)
        assert_close(run(params, inputs, NO_STATISTICS, masked.active(subnet)), expected)
        assert_close(sliced.infer(params, inputs, NO_STATISTICS, sliced.active(subnet)), expected)
        count += 1
    assert count == 3 * 4 + 3 * 16 + 64


def test_a_subnet_bucket_runs_each_of_its_members_as_the_plain_network():
    config, params, inputs = TINY_BERT, random_params(TINY_BERT), random_tokens(TINY_BERT)
    everything = list(plain.whole_space(config))
    for k in range(4):
        members = everything[7 * k :: 31]
        program = programs.bucketed(config, members)
        run = jax.jit(program.infer)
        for subnet in members:
            assert_close(
                run(params, inputs, NO_STATISTICS, program.active(subnet)), plain.dynabert(config, params, subnet, inputs)
            )


def test_the_sampler_s_buckets_train_each_member_as_the_sliced_program_does():
    config, params, inputs = TINY_BERT, random_params(TINY_BERT), random_tokens(TINY_BERT)
    sampler = Sampler(config, buckets=3, random_subnets=1, seed=0)
    runs = {p: jax.jit(p.train) for p in sampler.buckets}
    for k in range(20):
        choice = sampler.step(k)[2]
        logits, statistics = runs[choice.program](params, inputs, choice.program.active(choice.subnet))
        sliced = programs.sliced(config, choice.subnet)
        assert_close(logits, sliced.train(params, inputs, sliced.active(choice.subnet))[0])
        assert statistics.shape == (2, 0)


def test_gradients_of_the_masked_program_equal_the_gradients_of_the_sliced_one():
    config, params, inputs = TINY_BERT, random_params(TINY_BERT), random_tokens(TINY_BERT)
    masked = programs.masked(config)

    def loss(program, params, active):
        return jnp.sum(jnp.square(program.train(params, inputs, active)[0]))

    run = jax.jit(jax.grad(lambda p, a: loss(masked, p, a)))
    for subnet in (config.space().subnet(gates=(1, 0, 1), heads=(2, 1, 1), ffn=(3, 3, 5)), config.space().smallest()):
        sliced = programs.sliced(config, subnet)
        expected = jax.jit(jax.grad(lambda p, s=sliced: loss(s, p, s.active(s.envelope))))(params)
        actual = run(params, masked.active(subnet))
        largest = max(np.abs(g).max() for g in expected.values())
        for name, gradient in expected.items():
            np.testing.assert_allclose(actual[name], gradient, rtol=0, atol=1e-4 * largest, err_msg=name)


def test_the_masked_program_is_traced_once_for_all_subnets():
    masked = programs.masked(TINY_BERT)
    traces = []

    def counted(*arguments):
        traces.append(1)
        return masked.infer(*arguments)

    run, params, inputs = jax.jit(counted), random_params(TINY_BERT), random_tokens(TINY_BERT)
    for subnet in list(plain.whole_space(TINY_BERT))[::5]:
        run(params, inputs, NO_STATISTICS, masked.active(subnet))
    assert len(traces) == 1


def test_masked_heads_and_neurons_contribute_exactly_nothing():
    config, params, inputs = TINY_BERT, random_params(TINY_BERT), random_tokens(TINY_BERT)
    masked = programs.masked(config)
    run, active = jax.jit(masked.infer), masked.active(config.space().subnet(heads=1, ffn=3))
    expected = run(params, inputs, NO_STATISTICS, active)
    changed = {k: v.copy() for k, v in params.items()}
    for name, value in changed.items():
        inner = name.split(".")[2:3]
        size = {"query": 4, "key": 4, "value": 4, "ffn_in": 3}.get(*inner) if inner else None
        if size:
            value[..., size:] = 1e3
        if inner in (["attention_out"], ["ffn_out"]) and value.ndim == 2:
            value[{"attention_out": 4, "ffn_out": 3}[inner[0]] :] = 1e3
    assert sum((changed[k] != params[k]).any() for k in params) == 3 * (4 * 2 + 2)
    np.testing.assert_array_equal(run(changed, inputs, NO_STATISTICS, active), expected)


@pytest.mark.parametrize("length", [3, 5])
def test_padding_changes_nothing(length):
    config, model = TINY_BERT, SuperNet(TINY_BERT, random_params(TINY_BERT))
    rng = np.random.default_rng(1)
    ids, types = rng.integers(1, 11, (4, length)), rng.integers(0, 2, (4, length))
    program = programs.sliced(config, model.space.largest())
    run = jax.jit(program.infer)
    short = run(model.params, config.pack(ids, types, length=length), NO_STATISTICS, program.active(program.envelope))
    padded = config.pack(ids, types)
    assert_close(model(padded, program.envelope), short)
    padded[:, length:, 1] = 1
    np.testing.assert_array_equal(model(padded, program.envelope), model(config.pack(ids, types), program.envelope))


def test_an_input_of_only_padding_gives_finite_logits():
    model = SuperNet(TINY_BERT, random_params(TINY_BERT))
    empty = np.zeros(TINY_BERT.input_spec(2).shape, np.int32)
    assert np.isfinite(model(empty, model.space.largest())).all()


@pytest.mark.parametrize(("place", "value"), [(0, 11), (0, -1), (1, 2), (1, -1)])
def test_an_unknown_token_or_type_gives_nan_for_its_own_sequence_only(place, value):
    model, inputs = SuperNet(TINY_BERT, random_params(TINY_BERT)), random_tokens(TINY_BERT)
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


def test_packing_pads_with_the_config_s_id():
    config = dataclasses.replace(TINY_BERT, pad_id=3)
    assert config.pack([[5, 3]], length=3)[..., 0].tolist() == [[5, 3, 3]]


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


def test_flops_count_every_product_of_the_traced_program():
    for subnet in list(plain.whole_space(TINY_BERT))[::9]:
        program = programs.sliced(TINY_BERT, subnet)
        jaxpr = jax.make_jaxpr(program.infer)(
            programs.param_spec(TINY_BERT), TINY_BERT.input_spec(1), NO_STATISTICS, jnp.zeros(0, int)
        )
        assert TINY_BERT.flops(subnet) == checking.multiply_adds(jaxpr.jaxpr)


def test_parameters_count_the_weights_that_the_subnet_needs_on_its_own():
    space = TINY_BERT.space()
    spec = programs.param_spec(TINY_BERT)
    assert TINY_BERT.num_params(space.largest()) == sum(int(np.prod(s.shape)) for s in spec.values())
    one_head = dataclasses.replace(TINY_BERT, depths=(1,), ffn=(3,))
    shapes = {k: list(s.shape) for k, s in programs.param_spec(one_head).items()}
    for name in ("query", "key", "value"):
        shapes[f"layers.0.{name}.kernel"][1] = shapes[f"layers.0.{name}.bias"][0] = 4
    shapes["layers.0.attention_out.kernel"][0] = 4
    assert TINY_BERT.num_params(space.smallest()) == sum(int(np.prod(s)) for s in shapes.values())


def test_the_default_config_is_bert_base():
    config = DynaBERTConfig(max_length=512)
    assert config.num_params(config.space().largest()) == 109_484_547  # BertForSequenceClassification, 3 labels
    spec = programs.param_spec(config)
    assert sum(int(np.prod(s.shape)) for s in spec.values()) == 109_484_547
    assert config.space().size == 16**6 + 16**9 + 16**12


def test_an_input_may_be_shorter_than_the_longest():
    assert TINY_BERT.input_spec(2).shape == (2, 6, 2)
    assert TINY_BERT.input_spec(2, length=4).shape == (2, 4, 2)
    with pytest.raises(errors.ConfigError, match="length must be from 1 to max_length=6"):
        TINY_BERT.input_spec(2, length=7)


def test_the_config_survives_json():
    assert families.config_from_json(families.config_to_json(TINY_BERT)) == TINY_BERT


def test_an_export_gives_the_same_logits(tmp_path):
    model = SuperNet(TINY_BERT, random_params(TINY_BERT))
    named = model.space.subnet(gates=(0, 1, 1), heads=(1, 2, 1), ffn=(3, 3, 5))
    served = Served(named, 0.5, None, TINY_BERT.flops(named), TINY_BERT.num_params(named))
    loaded = exports.load(exports.export(tmp_path / "export", model, [served], measured="made up"))
    assert loaded.subnets == (named,)
    inputs = random_tokens(TINY_BERT)
    for norm in ("own", "shared"):
        np.testing.assert_array_equal(loaded(inputs, named, norm=norm), model(inputs, named))


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
