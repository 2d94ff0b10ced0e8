"""The TFDS builder of cluttered_digits. It yields encoded PNG files, so that TFDS needs no TensorFlow."""

import io
from collections.abc import Iterator
from typing import Any

import PIL.Image
import tensorflow_datasets as tfds

from superserve_jax import progress
from superserve_jax.training.datasets.cluttered_digits import render
from superserve_jax.training.datasets.logged import Logged


class ClutteredDigits(Logged, tfds.core.GeneratorBasedBuilder):
    """The builder. Importing this module registers it with TFDS as `cluttered_digits`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012, the form that TFDS asks for

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(render.SIZE, render.SIZE, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # validation needs this order, see render.py; training shuffles
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            license="CC BY 4.0 (the scans: UCI Machine Learning Repository)",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in render.NUM_IMAGES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        scans, digits = render.load_scans(split)
        for index in progress.track(range(render.NUM_IMAGES[split]), f"making {self.name}, {split}"):
            pixels, chosen = render.render(scans, split, index)
            png = io.BytesIO()
            PIL.Image.fromarray(pixels[:, :, 0]).save(png, format="png", compress_level=1)  # noise does not compress
            yield index, {"image": png.getvalue(), "label": int(digits[chosen])}
