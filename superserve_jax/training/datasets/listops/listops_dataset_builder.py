"""The TFDS builder of listops. It needs no TensorFlow and no network."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from superserve_jax import progress
from superserve_jax.training.datasets.listops import grammar
from superserve_jax.training.datasets.logged import Logged


class Listops(Logged, tfds.core.GeneratorBasedBuilder):
    """The builder. Importing this module registers it with TFDS as `listops`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012, the form that TFDS asks for

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=list(grammar.DIGITS))}
            ),
            supervised_keys=("text", "label"),
            disable_shuffling=True,  # they are in random order already
            homepage="https://github.com/nyu-mll/spinn/tree/listops-release",
            license="Apache-2.0 (made by superserve-jax)",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in grammar.NUM_EXAMPLES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        own = [(text, value) for found, text, value in grammar.generate() if found == split]
        for index, (text, value) in enumerate(progress.track(own, f"making {self.name}, {split}")):
            yield index, {"text": text, "label": value}
