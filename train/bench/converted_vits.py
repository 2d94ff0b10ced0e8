"""Compares converted vision transformers of published size with the libraries that they come from.

    pip install torch transformers timm
    python train/bench/converted_vits.py

Each library makes ViT-B/16 and DINOv2-S/14 with random weights. They are converted with `convert.vit`. Both sides compute the
logits of two random images of 224x224 pixels, in float32 on the CPU. The table shows the largest difference of a logit,
relative to the largest logit. The exit status is 1 if it is above 1e-4.
Library: convert.vit, supernets.programs.
"""

import dataclasses
import importlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from superserve_jax import cli, convert, errors
from superserve_jax.supernets import programs

LIBRARIES = ("torch", "transformers", "timm")
MOST = 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)


class Reference(NamedTuple):
    """A network of another library.

    Args:
      state: its state dict.
      num_heads: its number of attention heads.
      images: raw images.
      logits: what the library computes for them.
    """

    state: Mapping[str, np.ndarray]
    num_heads: int
    images: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      json: write the numbers to this file.
    """

    json: pathlib.Path | None = None


def imported(name: str) -> Any:
    """A library. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise errors.ConfigError(f"this program needs {name}: pip install {' '.join(LIBRARIES)}") from e


def run(network: Any, num_heads: int) -> Reference:
    """A network with random weights, and its logits."""
    torch = imported("torch")
    torch.manual_seed(0)
    for name, value in network.named_parameters():
        is_scale = value.dim() == 1 and name.endswith(("weight", "gamma", "lambda1"))
        spread = 0.3 if value.dim() == 1 else value[0].numel() ** -0.5
        value.data.normal_(1.0 if is_scale else 0.0, spread)
    pixels = ((IMAGES / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        output = network.eval()(torch.tensor(pixels, dtype=torch.float32))
    logits = output if isinstance(output, torch.Tensor) else output.logits
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    return Reference(state, num_heads, IMAGES, logits.numpy())


def hf_vit() -> Reference:
    """ViT-B/16 of transformers."""
    transformers = imported("transformers")
    return run(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)), 12)


def hf_dinov2() -> Reference:
    """DINOv2-S/14 of transformers. Its positions are those of 518x518 pixels."""
    transformers = imported("transformers")
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, num_labels=1000)
    return run(transformers.Dinov2ForImageClassification(config), 6)


def timm_vit() -> Reference:
    """ViT-B/16 of timm."""
    return run(imported("timm").create_model("vit_base_patch16_224"), 12)


def timm_dinov2() -> Reference:
    """DINOv2-S/14 of timm, for images of 224x224 pixels."""
    return run(imported("timm").create_model("vit_small_patch14_dinov2", num_classes=1000, img_size=224), 6)


NETWORKS: Mapping[str, Callable[[], Reference]] = {
    "ViT-B/16, transformers": hf_vit,
    "ViT-B/16, timm": timm_vit,
    "DINOv2-S/14, transformers": hf_dinov2,
    "DINOv2-S/14, timm": timm_dinov2,
}


def compared(name: str, reference: Reference) -> dict[str, Any]:
    """The largest difference of the converted network's logits from the library's, relative to the largest logit."""
    side = reference.images.shape[1]
    model = convert.vit(reference.state, num_heads=reference.num_heads, mean=MEAN, std=STD, image_size=side)
    program = programs.sliced(model.config, model.largest)
    statistics, active = np.zeros((2, 0), np.float32), np.zeros(0, np.int32)
    logits = np.asarray(jax.jit(program.infer)(model.params, reference.images, statistics, active))
    largest = float(np.abs(reference.logits).max())
    return {
        "network": name,
        "parameters": model.config.num_params(model.largest),
        "largest_logit": largest,
        "difference": float(np.abs(logits - reference.logits).max()) / largest,
    }


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    found = [compared(name, make()) for name, make in NETWORKS.items()]
    columns = {
        "network": lambda f: f["network"],
        "parameters": lambda f: f"{f['parameters']:,}",
        "largest logit": lambda f: f"{f['largest_logit']:.2f}",
        "difference": lambda f: f"{f['difference']:.1e}",
    }
    cli.print_columns(columns, found)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if name in sys.modules}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    cli.write_results(options.json, {"networks": found, "versions": versions})
    sys.exit(0 if all(f["difference"] <= MOST for f in found) else 1)


if __name__ == "__main__":
    cli.run(main)
