"""Reads a directory of a ViT, DeiT or DINOv2 that classifies images, which becomes a ViT.

config.json names the network, and preprocessor_config.json says how pixels are scaled and normalised. The SuperNet does the
same, so its inputs are raw pixels. The caller resizes and crops images as the original image processor does.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from superserve_jax import errors
from superserve_jax.convert import choices, folder, labels, settings, vision_transformer
from superserve_jax.convert.settings import Ratio, Size
from superserve_jax.families.vit import Pool, ViTConfig
from superserve_jax.supernets.supernet import SuperNet

ARCHITECTURES: dict[str, dict[str, Pool]] = {
    "vit": {"ViTForImageClassification": "token"},
    "deit": {"DeiTForImageClassification": "token", "DeiTForImageClassificationWithTeacher": "tokens"},
    "dinov2": {"Dinov2ForImageClassification": "token_mean"},
    "dinov2_with_registers": {"Dinov2WithRegistersForImageClassification": "token_mean"},
}
"""The supported networks of each model_type, and what their classifiers read."""

# Settings of config.json that change what the network computes, with the values that ViT computes, the default first.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "use_swiglu_ffn": (False,),
    "quantization_config": (None,),
    "problem_type": (None, "single_label_classification"),
}
_EXPLAINED = {
    "use_swiglu_ffn": "gated MLPs, as in the size giant, are not supported",
    "problem_type": "regression and several labels for one image are not supported",
}
_PIXEL = 1 / 255


class _Config(msgspec.Struct):
    """The sizes in config.json, with Hugging Face's defaults. A file may leave out fields with default values.

    None stands for a default that depends on the network.
    """

    id2label: dict[str, str] | None = None
    num_labels: int | None = None
    hidden_size: Size = 768
    num_hidden_layers: Size = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    mlp_ratio: Ratio = 4.0
    image_size: Size = 224
    patch_size: Size | None = None
    num_channels: Size = 3
    num_register_tokens: Size = 4
    layerscale_value: Ratio = 1.0
    layer_norm_eps: Ratio | None = None


class _Side(msgspec.Struct):
    """Height and width of images. Without them, `shortest_edge` may be given, and images are not square."""

    height: Size | None = None
    width: Size | None = None


class _Pixels(msgspec.Struct):
    """The settings in preprocessor_config.json, with Hugging Face's defaults."""

    image_mean: float | tuple[float, ...] | None = None
    image_std: float | tuple[float, ...] | None = None
    do_rescale: bool = True
    rescale_factor: float = _PIXEL
    do_normalize: bool = True
    size: _Side | Size | None = None
    crop_size: _Side | Size | None = None
    do_center_crop: bool = False


def read(
    path: pathlib.Path,
    fields: Mapping[str, Any],
    *,
    image_size: int | None,
    depths: Sequence[int] | None,
    heads: Sequence[int] | None,
    ffn: Sequence[int] | None,
) -> tuple[SuperNet, tuple[str, ...]]:
    """The SuperNet and class names of a directory. `fields` is the content of its config.json.

    The other arguments and the errors are those of `pretrained.from_pretrained`.
    """
    file, pixel_file = path / "config.json", path / "preprocessor_config.json"
    kind, architecture = _check_supported(file, fields)
    is_dino = kind.startswith("dinov2")
    with errors.refusing(errors.ConversionError, f"{file} is not the config of a {architecture}; save it again"):
        found = msgspec.convert(fields, _Config)
    with errors.refusing(errors.ConversionError, f"{pixel_file} is not the config of an image processor; save it again"):
        pixels = msgspec.convert(folder.read_json(pixel_file), _Pixels)
    class_names = labels.read(file, found.id2label, found.num_labels)
    mean, std = _normalisation(pixel_file, pixels, found.num_channels)
    neurons = int(found.hidden_size * found.mlp_ratio) if is_dino else found.intermediate_size
    if image_size is None:
        image_size = (_side(pixels) if is_dino else None) or found.image_size
    config = ViTConfig(
        num_classes=len(class_names),
        image_size=image_size,
        channels=found.num_channels,
        patch=found.patch_size or (14 if is_dino else 16),
        widths=(found.hidden_size,),
        depths=choices.checked("depths", depths, choices.upper_half(found.num_hidden_layers)),
        heads=choices.checked("heads", heads, choices.quarters(found.num_attention_heads)),
        mlp=choices.checked("ffn", ffn, choices.quarters(neurons)),
        tokens={"vit": 1, "deit": 2, "dinov2": 1}.get(kind, 1 + found.num_register_tokens),
        pool=ARCHITECTURES[kind][architecture],
        layer_scale=found.layerscale_value if is_dino else 0.0,
        eps=found.layer_norm_eps or (1e-6 if is_dino else 1e-12),
        mean=mean,
        std=std,
    )
    return vision_transformer.fill(config, folder.read_weights(path)), class_names


def _check_supported(path: pathlib.Path, fields: Mapping[str, Any]) -> tuple[str, str]:
    """(model_type, architecture). Raises ConversionError, with all that is not supported in one message."""
    kind = fields["model_type"]
    known = ARCHITECTURES[kind]
    names = fields.get("architectures") or list(known)
    architecture = str(names[0] if isinstance(names, list) and names else names)
    if architecture not in known:
        raise errors.ConversionError(
            f"{path}: {architecture} is not supported, because it is not a classifier of images; supported is "
            f"{' and '.join(known)}. Fine-tune the model as one, and save it again"
        )
    if wrong := settings.unsupported(fields, _SETTINGS, _EXPLAINED):
        raise errors.ConversionError(f"{path}: this {kind} is not supported, {'; '.join(wrong)}")
    return kind, architecture


def _normalisation(path: pathlib.Path, pixels: _Pixels, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel. Raises ConversionError for other steps than those of ViT."""
    if not (pixels.do_rescale and abs(pixels.rescale_factor - _PIXEL) <= 1e-6):
        raise errors.ConversionError(
            f"{path}: pixels must be scaled by 1 / 255, got do_rescale={pixels.do_rescale} and rescale_factor="
            f"{pixels.rescale_factor}; convert the weights alone, by convert.vit"
        )
    if not pixels.do_normalize:
        return (0.0,) * channels, (1.0,) * channels
    if pixels.image_mean is None or pixels.image_std is None:
        raise errors.ConversionError(f"{path} has no image_mean or no image_std; save the image processor again")
    mean, std = ((v,) * channels if isinstance(v, float | int) else v for v in (pixels.image_mean, pixels.image_std))
    return mean, std


def _side(pixels: _Pixels) -> int | None:
    """Height and width of the images that the image processor makes; None if it makes images of several sizes."""
    side = pixels.crop_size if pixels.do_center_crop else pixels.size
    if isinstance(side, _Side):
        return side.height if side.height == side.width else None
    return side if pixels.do_center_crop else None
