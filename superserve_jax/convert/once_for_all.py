"""Converts once-for-all's OFA-ResNet50 (mit-han-lab/once-for-all, `OFAResNets`): its state dict and subnet dictionaries.

once-for-all writes a subnet as a dictionary of three lists: "d" has 5 depths, "e" one expand ratio per block, and "w" 6
indices of width multipliers. d[0] is for the stem: it keeps its residual layer only if d[0] is the largest of `depth_list`.
Each other depth is added to the base depth of a stage.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.convert import once_for_all_state, state_dict
from superserve_jax.convert.once_for_all_state import CLASSIFIER, ascending, num_classes
from superserve_jax.convert.state_dict import Source
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.space import Axis, SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

_BASE_DEPTHS = (2, 2, 4, 2)
_IGNORED = ("image_size", "r")  # a subnet dictionary may name a resolution; here the config determines it


def ofa_resnet(
    state: Any,
    *,
    depth_list: Sequence[int] | int,
    expand_ratio_list: Sequence[float] | float,
    width_mult_list: Sequence[float] | float,
    image_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SuperNet:
    """The SuperNet of a state dict of once-for-all's `OFAResNets`, with the keys of the published file or of `state_dict()`.

    The running statistics become the statistics of the largest subnet, so it runs at once. Other subnets run with
    `norm="shared"`, or with their own statistics after calibration.

    Args:
      state: a mapping of arrays, or a file, see `state_dict.read`.
      depth_list, expand_ratio_list, width_mult_list: the arguments of the original network, lists or single numbers.
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
    depths = ascending(depth_list)
    if not depths or not all(isinstance(d, int) and d >= 0 for d in depths):
        raise errors.ConfigError(f"depth_list must hold whole numbers from 0 up, got {depth_list}")
    config = OFAResNetConfig(
        num_classes=num_classes(weights),
        image_size=image_size,
        stem_depths=(0, 1) if len(depths) > 1 else (1,),
        depths=tuple(tuple(base + d for d in depths) for base in _BASE_DEPTHS),
        expand_ratios=ascending(expand_ratio_list),
        width_mults=ascending(width_mult_list),
        **options,
    )
    return fill(config, weights)


def fill(config: OFAResNetConfig, weights: Mapping[str, np.ndarray]) -> SuperNet:
    """The SuperNet of `config` with weights from `state_dict.read`. Raises the errors of `ofa_resnet`."""
    for name, value in (("stem_stride", 2), ("stem_pool", True), ("strides", (1, 2, 2, 2)), ("block", "bottleneck")):
        if getattr(config, name) != value:  # the shapes of the weights would not reveal the difference
            raise errors.ConfigError(f"once-for-all's OFA-ResNet has {name}={value!r}, got {getattr(config, name)!r}")
    _check_sizes(config, weights)
    depth_list = sorted({d - base for depths, base in zip(config.depths, _BASE_DEPTHS, strict=False) for d in depths})
    found = state_dict.take(
        weights,
        _sources(config),
        what=f"an OFA-ResNet of depth_list={depth_list}, expand_ratio_list={list(config.expand_ratios)} and "
        f"width_mult_list={list(config.width_mults)}",
        hint="was the network made with these lists?",
    )
    return once_for_all_state.supernet(config, found)


def ofa_subnet(arch: Mapping[str, Any], space: SearchSpace) -> Subnet:
    """The subnet that one of once-for-all's dictionaries describes.

    Args:
      arch: the dictionary with "d", "e" and "w", each a list, tuple, range or array, or one number for all positions. In "e",
        values of blocks that do not run have no meaning, and once-for-all sometimes writes 0.
      space: the search space of a SuperNet from `ofa_resnet`.

    Raises:
      SubnetError: `arch` lacks an entry or has a value that the space does not offer, or the space is of another network.
      UnknownNameError: `arch` has an unknown entry.

    >>> space = OFAResNetConfig().space()
    >>> ofa_subnet({"d": [0, 2, 2, 2, 2], "e": 0.35, "w": [0, 2, 2, 2, 2, 2]}, space)["width"]
    (0.65, 1.0, 1.0, 1.0, 1.0, 1.0)
    """
    depth_list, expand, width = _axes(space)
    counts = {"d": len(_BASE_DEPTHS) + 1, "e": len(expand.choices), "w": len(width.choices)}
    d, e, w = once_for_all_state.lists_of(arch, counts, ignored=_IGNORED).values()
    once_for_all_state.check_values("d", d, depth_list)
    once_for_all_state.check_values("w", w, range(len(width.choices[0])))
    depth = [int(d[0] == depth_list[-1]), *(base + v for base, v in zip(_BASE_DEPTHS, d[1:], strict=True))]
    return space.subnet(depth=depth, expand=e, width=[c[int(i)] for c, i in zip(width.choices, w, strict=True)])


def ofa_arch(subnet: Subnet, space: SearchSpace) -> dict[str, list]:
    """The inverse of `ofa_subnet`. Blocks that do not run have the smallest expand ratio.

    >>> space = OFAResNetConfig().space()
    >>> ofa_arch(space.smallest(), space)["d"]
    [0, 0, 0, 0, 0]
    """
    depth_list, _, width = _axes(space)
    subnet = space.validate(subnet)
    stem, *depth = (sum(subnet.gates[b] for b in stage) for stage in space.stages)
    return {
        "d": [depth_list[-1 if stem else 0], *(d - base for d, base in zip(depth, _BASE_DEPTHS, strict=True))],
        "e": list(subnet["expand"]),
        "w": [c.index(v) for c, v in zip(width.choices, subnet["width"], strict=True)],
    }


def _axes(space: SearchSpace) -> tuple[list[int], Axis, Axis]:
    """(depth_list, expand axis, width axis) of a search space. Raises SubnetError for the space of another network."""
    lists = {tuple(d - base for d in depths) for depths, base in zip(space.depths[1:], _BASE_DEPTHS, strict=False)}
    axes = {a.name: a for a in space.axes}
    if len(space.depths) != 1 + len(_BASE_DEPTHS) or len(lists) != 1 or set(axes) != {"expand", "width"}:
        raise errors.SubnetError(
            f"once-for-all's subnet dictionaries need the space of an OFA-ResNet50, with base depths {_BASE_DEPTHS} and one "
            f"depth_list for all stages; this one has the depths {space.depths} and the axes {list(axes)}"
        )
    return list(lists.pop()), axes["expand"], axes["width"]


def _check_sizes(config: OFAResNetConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Raises ConversionError if the weights are of an OFA-ResNet with other sizes than the config.

    The last block shows the largest width and expand ratio. They are compared as channels, because channels are rounded.
    """
    numbers = {m[1] for m in (re.match(r"blocks\.(\d+)\.", name) for name in weights) if m}
    blocks = next(i for i in itertools.count() if str(i) not in numbers)
    sizes, last = config.sizes(config.space().largest()), sum(depths[-1] for depths in config.depths) - 1

    def channels(conv: str) -> int | None:
        """Output channels of a convolution in the last block of the weights."""
        names = (f"blocks.{blocks - 1}.{conv}.{layer}.weight" for layer in ("conv.conv", "conv"))
        return next((len(weights[name]) for name in names if name in weights and weights[name].ndim), None)

    inner, outer = channels("conv1"), channels("conv3")
    if outer != sizes["stage3.out"]:
        inner = None  # it depends on the width
    state_dict.check_sizes(
        "an OFA-ResNet50",
        {
            "model.num_classes": (num_classes(weights), config.num_classes),
            "the number of blocks (the sum of the largest of model.depths)": (blocks or None, last + 1),
            f"{config.stage_widths[-1]} x the largest of model.width_mults": (outer, sizes["stage3.out"]),
            f"{outer} x the largest of model.expand_ratios": (inner, sizes[f"block{last}.mid"]),
        },
    )


def _sources(config: OFAResNetConfig) -> dict[str, Source]:
    """The source of each parameter, and of each norm's statistics, which have the names `NORM.mean` and `NORM.var`."""
    shapes = {name: spec.shape for name, spec in programs.param_spec(config).items()}
    sources = {}
    for path, norm, theirs in _convolutions(shapes):
        kernel = f"{path}.conv.kernel"
        convs = (f"{theirs}.conv.conv.weight", f"{theirs}.conv.weight")
        sources[kernel] = Source(convs, shapes[kernel], (2, 3, 1, 0))
        for ours, name in (
            (f"{path}.norm.scale", "weight"),
            (f"{path}.norm.bias", "bias"),
            (f"{norm}.mean", "running_mean"),
            (f"{norm}.var", "running_var"),
        ):
            sources[ours] = Source((f"{theirs}.bn.bn.{name}", f"{theirs}.bn.{name}"), shapes[kernel][-1:])
    for ours, name, axes in (("classifier.kernel", "weight", (1, 0)), ("classifier.bias", "bias", None)):
        sources[ours] = Source(tuple(f"{p}.{name}" for p in CLASSIFIER), shapes[ours], axes)
    return sources


def _convolutions(params: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(path of our parameters, name of our norm, prefix of once-for-all's names) of every convolution."""
    for i, theirs in enumerate(("input_stem.0", "input_stem.1.conv", "input_stem.2")):
        yield f"stem.{i}", f"stem{i}.norm", theirs
    b = 0
    while f"blocks.{b}.convs.0.conv.kernel" in params:
        for i in range(3):
            yield f"blocks.{b}.convs.{i}", f"block{b}.conv{i}.norm", f"blocks.{b}.conv{i + 1}"
        if f"blocks.{b}.shortcut.conv.kernel" in params:
            yield f"blocks.{b}.shortcut", f"block{b}.shortcut.norm", f"blocks.{b}.downsample"
        b += 1
