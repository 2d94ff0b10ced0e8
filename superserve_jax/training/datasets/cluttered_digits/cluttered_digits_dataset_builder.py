"""The TFDS builder of cluttered_digits. It needs neither TensorFlow nor a network: images are given as encoded PNG."""

import io
from collections.abc import Iterator
from typing import Any

import PIL.Image
import tensorflow_datasets as tfds

from superserve_jax import progress
from superserve_jax.training.datasets.cluttered_digits import render
from superserve_jax.training.datasets.logged import Logged

_DESCRIPTION = """\
32x32 grey images made from the 8x8 scans of handwritten digits that scikit-learn carries. Each holds one digit, scaled 1.5 to
2.6 times, turned up to 25 degrees and put anywhere, over six patches of 5 to 8 pixels cut from other digits at 0.7 of their
strength, with Gaussian noise of 0.08. The 20,000 training images are made from the first 1,400 scans, the 4,000 test images
from the other 397. The pixels are the same on every machine.
"""

_CITATION = """\
@misc{alpaydin1998optdigits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


class ClutteredDigits(Logged, tfds.core.GeneratorBasedBuilder):
    """One handwritten digit among pieces of others; importing this module registers it as `cluttered_digits`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012, the form that TFDS asks for

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(render.SIZE, render.SIZE, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the order says which scan an image shows, see render.py; training shuffles
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            license="CC BY 4.0 (the scans: UCI Machine Learning Repository)",
            citation=_CITATION,
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
