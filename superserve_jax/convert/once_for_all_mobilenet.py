"""Converts once-for-all's OFA-MobileNetV3 (mit-han-lab/once-for-all): its state dict and subnet dictionaries.

once-for-all writes a subnet as a dictionary of three lists: "ks" has a kernel size per block, "e" an expand ratio per block,
and "d" a depth per stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.convert import once_for_all_state, state_dict
from superserve_jax.convert.once_for_all_state import ascending, num_classes
from superserve_jax.convert.state_dict import Source
from superserve_jax.families.ofa_mobilenet import OFAMobileNetConfig
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

_IGNORED = ("image_size", "r", "wid")  # a subnet dictionary may name a resolution or a width; here the config determines both


def ofa_mobilenet(
    state: Any,
    *,
    ks_list: Sequence[int] | int,
    expand_ratio_list: Sequence[float] | float,
    depth_list: Sequence[int] | int,
    width_mult: float,
    image_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SuperNet:
    """The SuperNet of a state dict of once-for-all's `OFAMobileNetV3`, as in the published file or from `state_dict()`.

    The running statistics become the statistics of the largest subnet, so it runs at once. Other subnets run with
    `norm="shared"`, or with their own statistics after calibration.

    Args:
      state: a mapping of arrays, or a file, see `state_dict.read`.
      ks_list, expand_ratio_list, depth_list, width_mult: the arguments of the original network, lists or single numbers.
      image_size: height and width of the images, in pixels.
      mean, std: mean and standard deviation of pixels scaled to 0..1, for each of the 3 channels. With them the SuperNet
        takes raw uint8 pixels. Without them it takes float32 images that the caller has normalised, as the original does.

    Returns:
      A SuperNet that takes images (B, H, W, 3).

    Raises:
      ConversionError: weights are missing, surplus, not finite or of another shape. The message names them.
      ConfigError: an argument is impossible.
    """
    options = once_for_all_state.pixel_options(mean, std)
    weights = state_dict.read(state)
    config = OFAMobileNetConfig(
        num_classes=num_classes(weights),
        image_size=image_size,
        width_mult=float(width_mult),
        kernel_sizes=ascending(ks_list),
        expand_ratios=ascending(expand_ratio_list),
        depths=ascending(depth_list),
        **options,
    )
    return fill(config, weights)


def fill(config: OFAMobileNetConfig, weights: Mapping[str, np.ndarray]) -> SuperNet:
    """The SuperNet of `config` with weights from `state_dict.read`. Raises the errors of `ofa_mobilenet`."""
    for name in ("stem_stride", "strides"):  # the shapes of the weights would not reveal the difference
        expected = getattr(OFAMobileNetConfig, name)
        if getattr(config, name) != expected:
            raise errors.ConfigError(f"once-for-all's OFA-MobileNetV3 has {name}={expected!r}, got {getattr(config, name)!r}")
    weights = {name.replace(".mobile_inverted_conv.", ".conv."): value for name, value in weights.items()}
    found = state_dict.take(
        weights,
        _sources(config),
        what=f"an OFA-MobileNetV3 of ks_list={list(config.kernel_sizes)}, expand_ratio_list={list(config.expand_ratios)}, "
        f"depth_list={list(config.depths)} and width_mult={config.width_mult}",
        hint="was the network made with these arguments?",
    )
    return once_for_all_state.supernet(config, found)


def ofa_mobilenet_subnet(arch: Mapping[str, Any], config: OFAMobileNetConfig) -> Subnet:
    """The subnet that one of once-for-all's dictionaries describes.

    Args:
      arch: the dictionary with "ks", "e" and "d", each a list, tuple, range or array, or one number for all positions. In
        "ks" and "e", values of blocks that do not run have no meaning, and once-for-all sometimes writes 0.
      config: the config of a SuperNet from `ofa_mobilenet`.

    Raises:
      SubnetError: `arch` lacks an entry or has a value that the network does not offer.
      UnknownNameError: `arch` has an unknown entry.

    >>> config = OFAMobileNetConfig(image_size=32, width_mult=0.25)
    >>> ofa_mobilenet_subnet({"ks": 3, "e": 4, "d": [2, 3, 2, 2, 4]}, config).gates
    (1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1)
    """
    blocks, deepest = config.num_blocks, config.depths[-1]
    given = once_for_all_state.lists_of(arch, {"ks": blocks, "e": blocks, "d": blocks // deepest}, ignored=_IGNORED)
    once_for_all_state.check_values("d", given["d"], config.depths)
    chosen: dict[str, list[Any]] = {}
    for name, choices in (("ks", config.kernel_sizes), ("e", config.expand_ratios)):
        runs = (i % deepest < given["d"][i // deepest] for i in range(blocks))
        chosen[name] = [value if run else choices[0] for value, run in zip(given[name], runs, strict=True)]
        once_for_all_state.check_values(name, chosen[name], choices)
    return config.subnet(kernel_sizes=chosen["ks"], expand_ratios=chosen["e"], depths=[int(d) for d in given["d"]])


def _sources(config: OFAMobileNetConfig) -> dict[str, Source]:
    """The source of each parameter, and of each norm's statistics, which have the names `NORM.mean` and `NORM.var`."""
    shapes = {name: spec.shape for name, spec in programs.param_spec(config).items()}
    theirs = dict(_layers(config))
    sources = {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        if layer.endswith(".norm"):
            continue
        if layer.endswith(".to"):
            larger = config.kernel_sizes[config.kernel_sizes.index(int(part)) + 1]
            conv = theirs[layer.removesuffix(".to")]
            sources[name] = Source((f"{conv}.{larger}to{part}_matrix",), shape)
        elif part == "bias":
            sources[name] = Source(_names(theirs[layer], "bias"), shape)
        else:
            axes = (2, 3, 1, 0) if len(shape) > 2 else (1, 0)
            sources[name] = Source(_names(theirs[layer], "weight"), shape, axes)
    for norm, channels in config.norm_sizes(config.sizes(config.space().largest())).items():
        layer = norm.removesuffix(".norm")
        conv = theirs.get(f"{layer}.conv") or theirs[layer]
        for ours, part in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            sources[f"{norm}.{ours}"] = Source(_names(f"{conv.removesuffix('.conv')}.bn", part, "bn"), (channels,))
    return sources


def _names(layer: str, part: str, inner: str = "") -> tuple[str, ...]:
    """The possible names of a weight. Elastic layers hold the layer once more."""
    inner = inner or ("linear" if layer.endswith("linear") else "conv")
    return f"{layer}.{inner}.{part}", f"{layer}.{part}"


def _layers(config: OFAMobileNetConfig) -> Iterator[tuple[str, str]]:
    """(our layer, theirs) of all layers with weights. The norm of a convolution `X.conv` is `X.bn`."""
    yield "stem.conv", "first_conv.conv"
    yield "first.depthwise", "blocks.0.conv.depth_conv.conv"
    yield "first.project.conv", "blocks.0.conv.point_linear.conv"
    for i in range(config.num_blocks):
        ours, block = config.path(i), f"blocks.{i + 1}.conv"
        yield f"{ours}.expand.conv", f"{block}.inverted_bottleneck.conv"
        yield f"{ours}.depthwise", f"{block}.depth_conv.conv"
        for part in ("reduce", "expand"):
            yield f"{ours}.squeeze.{part}", f"{block}.depth_conv.se.fc.{part}"
        yield f"{ours}.project.conv", f"{block}.point_linear.conv"
    yield "final.conv", "final_expand_layer.conv"
    yield "mix", "feature_mix_layer.conv"
    yield "classifier", "classifier.linear"
