"""Reads a directory that Hugging Face's `save_pretrained` wrote: config.json, the weights, and how inputs are made.

`model_type` in config.json says which network it is. A BERT sequence classifier becomes a DynaBERT (`pretrained_bert.py`). A
ViT, DeiT or DINOv2 that classifies images becomes a ViT (`pretrained_vit.py`). Nothing in the directory runs.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors, exports, files
from superserve_jax.convert import folder, pretrained_bert, pretrained_vit
from superserve_jax.exports import Served
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

_CLASSIFIERS = ("classifier.", "head.", "head2.")  # how the names of parameters begin whose last axis are the classes
_SHOWN = 4  # the names of classes that a message shows


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A converted classifier.

    Args:
      model: the SuperNet; its largest subnet is the original network.
      class_names: the name of each logit.
      vocabulary: how text becomes token ids. None for images, or if the directory has no tokenizer.
    """

    model: SuperNet
    class_names: tuple[str, ...]
    vocabulary: Vocabulary | None

    @property
    def config(self) -> FamilyConfig:
        """The sizes and the search space."""
        return self.model.config

    def with_classes(self, class_names: Sequence[str]) -> "Pretrained":
        """The same classifier with its classes in the order of `class_names`. Raises ConversionError for other classes."""
        if sorted(class_names) != sorted(self.class_names):
            ours, theirs = set(self.class_names), set(class_names)
            if len(ours) < len(self.class_names):
                raise errors.ConversionError(
                    "several classes of the classifier have the same name; give each its own name in id2label of config.json"
                )
            raise errors.ConversionError(
                f"the data has other classes than the classifier. Missing in the data: {_some(sorted(ours - theirs))}; "
                f"unknown to the classifier: {_some(sorted(theirs - ours))}. Rename the classes of the data"
            )
        order = np.array([self.class_names.index(name) for name in class_names])
        params = {n: p[..., order] if n.startswith(_CLASSIFIERS) else p for n, p in self.model.params.items()}
        return dataclasses.replace(self, model=SuperNet(self.config, params), class_names=tuple(class_names))

    def export(self, path: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None) -> pathlib.Path:
        """Exports the original network as the only served subnet, and returns the path.

        Its accuracy is unknown, and so are those of smaller subnets. So none of them is served: without labelled examples,
        nobody can tell which of them answer well enough. Arguments and errors are those of `exports.export`.
        """
        largest, config = self.model.space.largest(), self.config
        model = SuperNet(config, self.model.params, {largest: np.zeros((2, 0), np.float32)})  # LayerNorm has no statistics
        return exports.export(
            path,
            model,
            [Served(largest, None, None, config.flops(largest), config.num_params(largest))],
            measured="not measured: converted weights, without labelled examples",
            class_names=self.class_names,
            vocabulary=self.vocabulary,
            training=training,
        )


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    image_size: int | None = None,
    depths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ffn: Sequence[int] | None = None,
) -> Pretrained:
    """The SuperNet, class names and vocabulary of a directory that `save_pretrained` wrote.

    Args:
      path: the directory, with config.json, weights as model.safetensors or pytorch_model.bin (also in several parts, with an
        index), and a tokenizer as tokenizer.json or vocab.txt. For images, preprocessor_config.json.
      max_length: for texts: the longest sequence, in tokens; if left out, as many as model and tokenizer can take.
      image_size: for images: their height and width, in pixels; if left out, those that the directory's image processor makes.
      depths: allowed numbers of layers; if left out, from half of them to all.
      heads: allowed numbers of attention heads of a layer; if left out, quarters of all heads.
      ffn: allowed numbers of feed-forward neurons of a layer; if left out, quarters of all neurons.

    Raises:
      ConversionError: a file is missing or damaged, or the network, the tokenizer or the image processor is not supported.
      ConfigError: an argument is impossible, or does not fit the network.
    """
    with errors.refusing(errors.ConversionError, f"expected the path of a directory, got {path!r}"):
        path = files.user_path(path)
    fields, sizes = folder.read_json(path / "config.json"), {"depths": depths, "heads": heads, "ffn": ffn}
    if str(fields.get("model_type")) in pretrained_vit.ARCHITECTURES:
        _refuse("max_length", max_length, "texts")
        model, class_names = pretrained_vit.read(path, fields, image_size=image_size, **sizes)
        return Pretrained(model, class_names, None)
    _refuse("image_size", image_size, "images")
    return Pretrained(*pretrained_bert.read(path, fields, max_length=max_length, **sizes))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return (", ".join(names[:_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")


def _refuse(name: str, value: Any, what: str) -> None:
    if value is not None:
        raise errors.ConfigError(f"{name} is for networks that classify {what}, and this one does not; leave it out")
