"""Models that other projects publish: how their code builds them, and the sizes that are stated for them.

The code is read from checkouts of these projects and not changed:

- bonsai: https://github.com/jax-ml/bonsai, commit 3628425 of 2026-03-27.
- Flax: https://github.com/google/flax, commit 18f8f31 of 2026-07-02. Its wheel has no examples.

Each model has its published sizes, and small ones with which it can run on any machine.
"""

import ast
import dataclasses
import functools
import importlib
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from superserve_jax import errors

TORCHVISION = "torchvision's table of weights"
GEMMA = "table 2 of its report"


@dataclasses.dataclass(frozen=True)
class Stated:
    """What is stated for a model.

    Args:
      parameters: the number of its parameters.
      source: who states it.
      rounded_to: the last digit of `parameters`, such as 1e6 for a whole number of millions.
      gmacs: billions of multiply-adds of one input, to two digits. None if nobody states them for this input.
    """

    parameters: float
    source: str
    rounded_to: float = 1.0
    gmacs: float | None = None

    def problems(self, name: str, parameters: int, macs: float) -> list[str]:
        """Sentences about numbers that were found and differ from those stated."""
        found = []
        if abs(parameters - self.parameters) > self.rounded_to / 2:
            found.append(f"{name} has {parameters:,} parameters; {self.source} states {self.parameters:,.0f}")
        if self.gmacs is not None and f"{macs / 1e9:.2f}" != f"{self.gmacs:.2f}":
            found.append(f"{name} has {macs / 1e9:.2f} G multiply-adds; {self.source} states {self.gmacs:.2f} G")
        return found


STATED = {
    "ViT-B/16": Stated(86_567_656, TORCHVISION, gmacs=17.56),
    "ResNet-50": Stated(25_557_032, TORCHVISION, gmacs=4.09),
    "ConvNeXt-T": Stated(28_589_128, TORCHVISION, gmacs=4.46),
    "EfficientNet-B0": Stated(5_288_548, TORCHVISION, gmacs=0.39),
    "DenseNet-121": Stated(7_978_856, TORCHVISION, gmacs=2.83),
    "VGG-19": Stated(143_667_240, TORCHVISION),  # bonsai's first dense layer is a convolution with more positions
    "DINOv3 ViT-S/16": Stated(
        21.5e6, "the README of facebookresearch/dinov3, which cuts the digits after 21 M,", rounded_to=1e6
    ),
    "Qwen3-0.6B": Stated(751_632_384, "its checkpoint, which holds the output matrix apart,"),
    "Mamba2-130M": Stated(130e6, "its name", rounded_to=10e6),
    "MNIST CNN": Stated(824_650, "the sum of its layers, by hand,"),
    "Gemma 2B": Stated(524_550_144 + 1_981_884_416, GEMMA),
    "Gemma 2 2B": Stated(590_118_912 + 2_024_517_888, GEMMA),
    "Gemma 3 270M": Stated(270e6, "its announcement", rounded_to=10e6),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model with certain sizes.

    Args:
      build: makes the module. Inside `nnx.eval_shape`, it makes shapes only.
      inputs: shape and dtype of one input, as a batch.
      call: how to call the module, see `superserve_jax.elastic`. A language model returns the logits of the last position.
    """

    build: Callable[[], nnx.Module]
    inputs: jax.ShapeDtypeStruct
    call: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model.

    Args:
      published: the network with the published sizes.
      small: the same network with small sizes.
      tolerance: how far two equivalent computations of the small one may differ, relative to the largest logit.
    """

    published: Network
    small: Network
    tolerance: float = 1e-5


def _images(size: int, channels: int = 3) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)


def _tokens(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length), jnp.int32)


# -- bonsai ---------------------------------------------------------------------------------------------------------------


def bonsai_code(checkout: pathlib.Path, name: str) -> types.ModuleType:
    """The module `bonsai.models.NAME.modeling` of a checkout.

    The packages around it are not run: they import every model, and libraries that only some models need.
    """
    for package, folder in {"bonsai": checkout / "bonsai", "bonsai.models": checkout / "bonsai" / "models"}.items():
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"bonsai.models.{name}.modeling")


def _model(
    make: Callable[..., nnx.Module],
    published: tuple[Any, jax.ShapeDtypeStruct],
    small: tuple[Any, jax.ShapeDtypeStruct],
    *,
    call: Callable[..., Any] | None = None,
    tolerance: float = 1e-5,
) -> Model:
    """A model whose class takes a config and random numbers. `published` and `small` are pairs of a config and an input."""

    def network(config: Any, inputs: jax.ShapeDtypeStruct) -> Network:
        return Network(lambda: make(config, rngs=nnx.Rngs(0)), inputs, call)

    return Model(network(*published), network(*small), tolerance)


def _vit(code: Any) -> Model:
    published, small = code.ModelConfig.vit_p16_224(), code.ModelConfig((16, 16), (4, 4), 3, 32, 0.0, 0.0, 4, 64, 1e-6, 3, 10)
    networks = (published, _images(224)), (small, _images(16))
    return _model(code.ViTClassificationModel, *networks, call=lambda module, x: module(x, rngs=None))


def _resnet(code: Any) -> Model:
    small = code.ModelConfig([2, 3, 2, 2], 10)
    return _model(code.ResNet, (code.ModelConfig.resnet50(), _images(224)), (small, _images(32)))


def _convnext(code: Any) -> Model:
    published, small = code.ModelConfig.convnext_tiny_224(), code.ModelConfig((2, 2, 3, 2), (8, 16, 24, 32), 0.0, 10)
    networks = (published, _images(224)), (small, _images(32))
    return _model(code.ConvNeXt, *networks, call=lambda module, x: module(x, rngs=None, train=False))


def _efficientnet(code: Any) -> Model:
    small = dataclasses.replace(code.ModelConfig.b0(10), width_coefficient=0.25)
    return _model(code.EfficientNet, (code.ModelConfig.b0(), _images(224)), (small, _images(32)))


def _densenet(code: Any) -> Model:
    small = code.ModelConfig(10, [2, 3, 2, 2], 8)
    return _model(code.DenseNet, (code.ModelConfig.densenet_121(), _images(224)), (small, _images(32)))


def _vgg(code: Any) -> Model:
    small = code.ModelConfig(10, [1, 1, 2, 2, 2], [8, 8, 16, 16, 16, 64])
    return _model(code.VGG, (code.ModelConfig.vgg_19(), _images(224)), (small, _images(32)))


def _unet(code: Any) -> Model:
    small = code.ModelConfig(1, 2, (8, 16, 32, 64, 128))
    networks = (code.ModelConfig(), _images(256, 1)), (small, _images(32, 1))
    return _model(code.UNet, *networks, call=lambda module, x: module(x).reshape(len(x), -1))


def _dinov3(code: Any) -> Model:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    published, small = code.ModelConfig.dinov3_vits16(), code.ModelConfig(patch_size=(8, 8), image_size=32, **sizes)
    first, second = ((c, jax.ShapeDtypeStruct((1, 3, c.image_size, c.image_size), jnp.float32)) for c in (published, small))
    call = lambda module, x: module(x)["pooler_output"]  # noqa: E731
    return _model(code.Dinov3ViTModel, first, second, call=call, tolerance=2e-2)  # it computes positions in bfloat16


def _qwen3(code: Any) -> Model:
    def call(module: Any, x: jax.Array) -> jax.Array:
        cache = [code.LayerCache(module.config, *x.shape, jnp.float32) for _ in module.layers]
        return module(x, cache=cache, segment_ids=jnp.ones_like(x))[:, -1]

    published = code.ModelConfig.qwen3_0_6b()
    sizes = {"num_layers": 3, "vocab_size": 50, "emb_dim": 32, "mlp_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
    small = dataclasses.replace(published, **sizes)
    return _model(code.Qwen3, (published, _tokens(128)), (small, _tokens(12)), call=call)


def _mamba2(code: Any) -> Model:
    networks = (code.ModelConfig(), _tokens(256)), (code.ModelConfig.tiny(), _tokens(32))
    return _model(code.Mamba2ForCausalLM, *networks, call=lambda module, x: module(x)["logits"][:, -1])


BONSAI: dict[str, tuple[str, Callable[[Any], Model]]] = {  # {name: (folder, function of the code in it)}
    "ViT-B/16": ("vit", _vit),
    "ResNet-50": ("resnet", _resnet),
    "ConvNeXt-T": ("convnext", _convnext),
    "EfficientNet-B0": ("efficientnet", _efficientnet),
    "DenseNet-121": ("densenet121", _densenet),
    "VGG-19": ("vgg19", _vgg),
    "U-Net": ("unet", _unet),
    "DINOv3 ViT-S/16": ("dinov3", _dinov3),
    "Qwen3-0.6B": ("qwen3", _qwen3),
    "Mamba2-130M": ("mamba2", _mamba2),
}


# -- Flax's examples ------------------------------------------------------------------------------------------------------


def _mnist(checkout: pathlib.Path) -> Model:
    """The class CNN of examples/mnist/train.py. Only this class is run, because the file imports TensorFlow for the data."""
    path = checkout / "examples" / "mnist" / "train.py"
    classes: list[ast.stmt] = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "CNN"
    ]
    names: dict[str, Any] = {"nnx": nnx, "partial": functools.partial, "jnp": jnp}
    exec(compile(ast.Module(classes, []), str(path), "exec"), names)
    network = Network(lambda: names["CNN"](rngs=nnx.Rngs(0)), _images(28, 1), lambda module, x: module(x, None))
    return Model(network, network)


def _gemma(version: str, checkout: pathlib.Path) -> Model:
    """The class Transformer of examples/gemma, which runs without a cache."""
    folder = str(checkout / "examples" / "gemma")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    code, sizes = importlib.import_module("transformer"), importlib.import_module("transformer_cfg")

    def call(module: Any, x: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)
        return module(x, positions, None, code.make_causal_attn_mask(x > 0))[0][:, -1]

    published = sizes.TransformerConfig.from_version_name(version)
    heads = {"num_heads": 4, "num_kv_heads": min(2, published.num_kv_heads), "head_dim": 8}
    others = {"num_layers": 3, "num_embed": 50, "embed_dim": 32, "hidden_dim": 64, "sliding_window_size": 4}
    small = dataclasses.replace(published, attention_types=published.attention_types[:3], **heads, **others)
    return _model(code.Transformer, (published, _tokens(128)), (small, _tokens(12)), call=call)


FLAX: dict[str, Callable[[pathlib.Path], Model]] = {
    "MNIST CNN": _mnist,
    "Gemma 2B": functools.partial(_gemma, "gemma_2b"),
    "Gemma 2 2B": functools.partial(_gemma, "gemma2_2b"),
    "Gemma 3 270M": functools.partial(_gemma, "gemma3_270m"),
}


def models(bonsai: pathlib.Path | None, flax: pathlib.Path | None) -> dict[str, Callable[[], Model]]:
    """Functions that read the code of the models of the given checkouts, by the models' names.

    Raises:
      ConfigError: a path is no checkout of its project.
    """
    found: dict[str, Callable[[], Model]] = {}
    if bonsai is not None:
        _check(bonsai, "bonsai", "bonsai/models", "https://github.com/jax-ml/bonsai")
        for name, (folder, read) in BONSAI.items():
            found[name] = functools.partial(lambda folder, read: read(bonsai_code(bonsai, folder)), folder, read)
    if flax is not None:
        _check(flax, "flax", "examples/gemma", "https://github.com/google/flax")
        found |= {name: functools.partial(read, flax) for name, read in FLAX.items()}
    return found


def _check(path: pathlib.Path, option: str, folder: str, repository: str) -> None:
    if not (path / folder).is_dir():
        raise errors.ConfigError(f"--{option} {path} has no folder {folder}; give the path of a checkout of {repository}")
