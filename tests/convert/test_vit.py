"""Vision transformers of Hugging Face and timm: the logits that these libraries computed, directories, and every error.

One file because all tests read the same fixture, which `tests/data/make_vit_small.py` made.
"""

import dataclasses
import math

import numpy as np
import pytest
from tiny import assert_same_arrays
from vit_directory import META, NETWORKS, arrays, converted, state_of, write

import superserve_jax as ss
from superserve_jax import convert, errors
from superserve_jax.families.vit import ViTConfig

SIZES = {"num_heads": META["num_heads"], "mean": META["mean"], "std": META["std"]}
DIRECTORIES = [name for name, network in NETWORKS.items() if "config" in network]


# -- logits that the other libraries computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_of_a_network_and_of_its_subnets_agree(name):
    model = converted(name)
    images, logits = arrays()[f"{name}/images"], arrays()[f"{name}/logits"]
    assert images.dtype == np.uint8
    for subnet, expected in zip(META["subnets"], logits, strict=True):
        gates = [int(i in subnet["blocks"]) for i in range(len(subnet["heads"]))]
        heads = [n / model.config.heads[-1] for n in subnet["heads"]]
        expand = [n / model.config.mlp[-1] for n in subnet["mlp"]]
        found = model(images, model.space.subnet(gates=gates, heads=heads, expand=expand))
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_gives_the_same_supernet(name, tmp_path):
    image_size = NETWORKS[name]["image_size"] if name == "hf_deit" else None  # its processor makes other images
    found, expected = convert.from_pretrained(write(name, tmp_path / "vit"), image_size=image_size), converted(name)
    assert_same_arrays(found.model.params, expected.params)
    assert dataclasses.replace(found.config, layer_scale=expected.config.layer_scale) == expected.config
    assert found.class_names == tuple(META["class_names"])
    assert found.vocabulary is None


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_names_in_the_memory_of_transformers_are_known_too(name):
    names = NETWORKS[name]["names_in_memory"]
    assert any("q_proj" in there for there in names.values())
    state = {names[key]: value for key, value in state_of(name).items()}
    found = convert.vit(state, **SIZES, image_size=NETWORKS[name]["image_size"])
    assert_same_arrays(found.params, converted(name).params)


def test_a_converted_directory_is_served_as_it_is(tmp_path):
    found = convert.from_pretrained(write("hf_vit", tmp_path / "vit"))
    images, [expected, *_] = arrays()["hf_vit/images"], arrays()["hf_vit/logits"]
    model = ss.load(found.export(tmp_path / "export"))
    assert [served.accuracy for served in model.served] == [None]
    with ss.Server(model, slo_ms=10_000, batch_sizes=(2,)) as server:
        replies = [future.result(timeout=60) for future in server.submit_many(list(images))]
    np.testing.assert_allclose([r.output for r in replies], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert replies[0].label == META["class_names"][expected[0].argmax()]


def test_classes_can_have_another_order(tmp_path):
    found = convert.from_pretrained(write("hf_deit_with_teacher", tmp_path / "vit"))
    images, names = arrays()["hf_deit_with_teacher/images"], found.class_names
    moved = found.with_classes(names[::-1])
    np.testing.assert_array_equal(moved.model(images), np.asarray(found.model(images))[:, ::-1])
    with pytest.raises(errors.ConversionError, match="Missing in the data: cat; unknown to the classifier: cats"):
        found.with_classes([{"cat": "cats"}.get(name, name) for name in names])


def test_the_space_can_be_chosen():
    model = converted("timm_vit", depths=(1, 3), heads=(3,), mlp=(24, 48), widths=(12, 24))
    config = model.config
    assert (config.depths, config.heads, config.mlp, config.widths) == ((1, 3), (3,), (24, 48), (12, 24))
    assert [axis.name for axis in model.space.axes] == ["expand", "width"]
    default = converted("timm_vit").config
    assert (default.depths, default.heads, default.mlp, default.widths) == ((2, 3), (1, 2, 3), (12, 24, 36, 48), (24,))
    again = convert.weights(state_of("timm_vit"), config)
    assert again.config == config
    assert_same_arrays(again.params, model.params)


def test_a_network_of_timm_with_registers_and_no_class_token_has_the_mean():
    """As vit_so150m_patch16_reg4_gap_256. Its first token is a register, which classifies nothing."""
    state = state_of("timm_vit")
    state["reg_token"] = state.pop("cls_token")
    options = {"num_heads": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert convert.vit(state, **options).config.pool == "mean"
    with pytest.raises(errors.ConfigError, match="pool='mean', got 'token'"):
        convert.vit(state, **options, pool="token")


# -- errors -------------------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_with_the_weights_is_in_one_line():
    state = state_of("hf_vit")
    del state["vit.encoder.layer.1.attention.attention.key.bias"]
    state["vit.pooler.dense.bias"] = np.zeros(24, np.float32)
    state["vit.layernorm.bias"] = np.zeros(5, np.float32)
    state["classifier.bias"] = np.full(5, np.nan, np.float32)
    with pytest.raises(errors.ConversionError) as caught:
        convert.vit(state, **SIZES)
    assert str(caught.value) == (
        "4 of the weights do not fit Hugging Face's ViT of 3 blocks, width 24 and 48 neurons: "
        "1 missing (vit.encoder.layer.1.attention.attention.key.bias (24,)); "
        "1 of another shape (vit.layernorm.bias (5,) instead of (24,)); 1 not finite (classifier.bias); "
        "1 surplus (vit.pooler.dense.bias (24,)); are they from a classifier of images of these sizes?"
    )


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("hf_vit", "vit.embeddings.cls_token"),
        ("hf_vit", "vit.embeddings.position_embeddings"),
        ("hf_deit", "deit.embeddings.patch_embeddings.projection.weight"),
        ("hf_dinov2", "dinov2.encoder.layer.2.layer_scale1.lambda1"),
        ("timm_vit", "blocks.0.attn.qkv.weight"),
        ("timm_vit", "head.weight"),
        ("timm_vit", "pos_embed"),
    ],
)
def test_a_missing_weight_is_named(name, removed):
    state = state_of(name)
    del state[removed]
    with pytest.raises(errors.ConversionError, match=rf"missing \({removed.replace('.', '[.]')}|{removed}"):
        convert.vit(state, **SIZES)


def test_weights_of_another_network_are_refused():
    with pytest.raises(errors.ConversionError, match=r"patch_embed[.]proj[.]weight"):
        convert.vit({"bert.embeddings.LayerNorm.weight": np.zeros(3)}, **SIZES)
    gated = {**state_of("hf_dinov2"), "dinov2.encoder.layer.0.mlp.weights_in.weight": np.zeros((4, 4))}
    with pytest.raises(errors.ConversionError, match=r"gated MLPs \(SwiGLU\), such as 'dinov2.*weights_in.weight'"):
        convert.vit(gated, **SIZES)
    state = state_of("timm_vit")
    state["pos_embed"] = state["pos_embed"][:, :8]
    with pytest.raises(errors.ConversionError, match=r"'pos_embed' has 8 positions, of which 1 or 0 belong to tokens.*square"):
        convert.vit(state, **SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be a whole number from 1 up"),
        ({"num_heads": 5}, "must be a multiple of the 5 heads"),
        ({"pool": "mean"}, "the classifier of Hugging Face's ViT has pool='token', got 'mean'"),
        ({"mean": (0.5,)}, "mean needs 3 values"),
        ({"image_size": 25}, "image_size must be a multiple of the patch of 8 pixels, got 25"),
        ({"depths": (2,)}, "the largest of depths must be the size of the weights, 3"),
        ({"heads": (4,)}, "the largest of heads must be the size of the weights, 3"),
        ({"mlp": (24,)}, "the largest of mlp must be the size of the weights, 48"),
        ({"widths": (12,)}, "the largest of widths must be the size of the weights, 24"),
    ],
)
def test_an_impossible_argument_is_refused(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        convert.vit(state_of("hf_vit"), **{**SIZES, **changes})


def test_sizes_that_are_not_the_config_s_are_named_in_one_line():
    config = converted("hf_dinov2").config
    other = dataclasses.replace(config, num_classes=7, depths=(1, 4), mlp=(96,), tokens=2)
    with pytest.raises(errors.ConversionError) as caught:
        convert.weights(state_of("hf_dinov2"), other)
    assert str(caught.value) == (
        "the weights are of Hugging Face's DINOv2 with other sizes than the config: model.num_classes must be 5, got 7, "
        "the largest of model.depths must be 3, got 4, the largest of model.mlp must be 48, got 96, "
        "model.tokens must be 1, got 2; change the config, or give other weights"
    )
    with pytest.raises(errors.ConversionError, match=r"the weights have LayerScale, so model\.layer_scale must be positive"):
        convert.weights(state_of("hf_dinov2"), dataclasses.replace(config, layer_scale=0.0))
    with pytest.raises(errors.ConversionError, match=r"have no LayerScale, so model\.layer_scale must be 0, got 1"):
        convert.weights(state_of("hf_vit"), dataclasses.replace(converted("hf_vit").config, layer_scale=1.0))
    with pytest.raises(errors.ConversionError, match=r"the largest of model\.widths must be 24, got 768"):
        convert.weights(state_of("hf_vit"), ViTConfig())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hf_vit", {"architectures": ["ViTModel"]}, "ViTModel is not supported, because it is not a classifier of images"),
        ("hf_vit", {"architectures": ["ViTForMaskedImageModeling"]}, "supported is ViTForImageClassification"),
        ("hf_vit", {"hidden_act": "gelu_new"}, "this vit is not supported, hidden_act is 'gelu_new' instead of 'gelu'"),
        ("hf_deit", {"qkv_bias": False}, "qkv_bias is False instead of True"),
        ("hf_dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True.*gated MLPs, as in the size giant"),
        ("hf_vit", {"problem_type": "multi_label_classification"}, "problem_type is .*several labels for one image"),
        ("hf_vit", {"image_size": [24, 32]}, "is not the config of a ViTForImageClassification.*image_size"),
        ("hf_vit", {"id2label": {"0": "a", "1": "b"}}, r"model\.num_classes must be 5, got 2"),
        ("hf_vit", {"num_hidden_layers": 2}, r"the largest of model\.depths must be 3, got 2"),
        ("hf_deit", {"architectures": ["DeiTForImageClassificationWithTeacher"]}, "DeiT has pool='token', got 'tokens'"),
        ("hf_vit", {"model_type": "swin"}, "of model_type 'swin' is not supported"),
    ],
)
def test_a_network_that_is_no_vit_is_refused_by_name(name, fields, message, tmp_path):
    with pytest.raises((errors.ConversionError, errors.ConfigError), match=message) as caught:
        convert.from_pretrained(write(name, tmp_path / "vit", config=fields))
    assert "\n" not in str(caught.value)


NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_channels")
OF_DINOV2 = ("mlp_ratio", "layerscale_value", "num_register_tokens", "layer_norm_eps")


@pytest.mark.parametrize("value", [-1, 0, 10**12, 10**400, math.nan, math.inf, -math.inf, 1.5e300, "3"])
@pytest.mark.parametrize("field", [*NUMBERS, *OF_DINOV2, "intermediate_size"])
def test_an_impossible_number_is_refused_with_its_name(field, value, tmp_path):
    name = "hf_dinov2_with_registers" if field in OF_DINOV2 else "hf_vit"
    with pytest.raises(errors.ConversionError, match=rf"config.json is not the config of a .*{field}"):
        convert.from_pretrained(write(name, tmp_path / "vit", config={field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": None, "num_labels": -3}, "a classifier needs two or more labels"),
        ({"id2label": None, "num_labels": 10**12}, "num_labels must be at most 100,000, got 1000000000000"),
        ({"id2label": None, "num_labels": math.nan}, "is not the config of a"),
        ({"architectures": [["ViTForImageClassification"]]}, "is not supported, because it is not a classifier of images"),
        ({"image_size": 2**19}, r"images of 524288x524288 pixels have 4,294,967,296 patches of 8x8, more than 65,536"),
    ],
)
def test_other_impossible_values_are_refused(fields, message, tmp_path):
    with pytest.raises((errors.ConversionError, errors.ConfigError), match=message):
        convert.from_pretrained(write("hf_vit", tmp_path / "vit", config=fields))


@pytest.mark.parametrize("image_size", [0, -8, 25, 8 * 10**6])
def test_an_impossible_size_of_images_is_refused(image_size, tmp_path):
    with pytest.raises(errors.ConfigError, match=f"image_size.* got {image_size}|images of {image_size}x.*smaller image_size"):
        convert.from_pretrained(write("hf_vit", tmp_path / "vit"), image_size=image_size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rescale_factor": math.nan}, "pixels must be scaled by 1 / 255, got .*rescale_factor=nan"),
        ({"image_mean": math.nan}, "mean must be finite"),
        ({"crop_size": {"height": -24, "width": -24}}, "is not the config of an image processor.*height"),
        ({"size": 10**12}, "is not the config of an image processor.*size"),
        ({"rescale_factor": 0.5}, "pixels must be scaled by 1 / 255, got .*rescale_factor=0.5"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"image_mean": None}, "has no image_mean or no image_std"),
        ({"image_std": "big"}, "is not the config of an image processor"),
        ({"image_std": [0.5]}, "std needs 3 values"),
    ],
)
def test_other_steps_before_the_network_are_refused(fields, message, tmp_path):
    with pytest.raises((errors.ConversionError, errors.ConfigError), match=message):
        convert.from_pretrained(write("hf_vit", tmp_path / "vit", processor=fields))


def test_a_processor_that_does_not_normalise_is_followed(tmp_path):
    config = convert.from_pretrained(write("hf_vit", tmp_path / "vit", processor={"do_normalize": False})).config
    assert (config.mean, config.std) == ((0.0,) * 3, (1.0,) * 3)


def test_a_directory_without_an_image_processor_and_an_option_of_texts_are_refused(tmp_path):
    path = write("hf_vit", tmp_path / "vit")
    with pytest.raises(errors.ConfigError, match="max_length is for networks that classify texts"):
        convert.from_pretrained(path, max_length=8)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(errors.ConversionError, match=r"has no preprocessor_config\.json"):
        convert.from_pretrained(path)
