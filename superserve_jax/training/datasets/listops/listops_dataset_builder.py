"""The TFDS builder of listops. It needs neither TensorFlow nor a network."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from superserve_jax import progress
from superserve_jax.training.datasets.listops import grammar
from superserve_jax.training.datasets.logged import Logged

_DESCRIPTION = """\
Nested operations on lists of digits, such as "[MAX 2 9 [MIN 4 7 ] 0 ]", to be worked out: MIN, MAX, MED (median, rounded
down) and SM (sum modulo 10), of 2 to 4 arguments, nested up to 3 deep. The grammar is that of ListOps (Nangia and Bowman,
2018) and of Long Range Arena (Tay et al., 2021); the sequences are shorter, so that a small transformer learns them in
minutes. No text of the 80,000 for training and the 4,000 for testing is there twice. They are the same on every machine.
"""

_CITATION = """\
@inproceedings{nangia2018listops,
  author = {Nangia, Nikita and Bowman, Samuel},
  title = {{ListOps}: A Diagnostic Dataset for Latent Tree Learning},
  booktitle = {NAACL Student Research Workshop},
  year = {2018},
  url = {https://aclanthology.org/N18-4013},
}
"""


class Listops(Logged, tfds.core.GeneratorBasedBuilder):
    """Expressions and their values; importing this module registers it as `listops`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012, the form that TFDS asks for

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=list(grammar.DIGITS))}
            ),
            supervised_keys=("text", "label"),
            disable_shuffling=True,  # they are drawn at random
            homepage="https://github.com/nyu-mll/spinn/tree/listops-release",
            license="Apache-2.0 (made by superserve-jax)",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in grammar.NUM_EXAMPLES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        own = [(text, value) for found, text, value in grammar.generate() if found == split]
        for index, (text, value) in enumerate(progress.track(own, f"making {self.name}, {split}")):
            yield index, {"text": text, "label": value}
