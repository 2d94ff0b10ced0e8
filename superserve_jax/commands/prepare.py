"""Prepares the dataset mnist or fashion_mnist for training, without TensorFlow.

    superserve prepare fashion_mnist
    superserve prepare fashion_mnist --files ~/downloads/fashion --data-dir ~/tensorflow_datasets

The first command downloads the dataset from the addresses that TFDS knows. --files needs no network: the folder holds
train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz. The files are
checked, and any other order of their images is allowed.

TFDS's own builder writes the dataset, so `tfds.data_source` finds it, too. If it is there already, nothing changes. After
Ctrl-C no file is left. The datasets cluttered_digits and listops are made at first use, or by this command.
Library: training.datasets.prepared.prepare (training.datasets.mnist).
"""

import dataclasses
from typing import Annotated

import tyro

from superserve_jax import cli
from superserve_jax.training import data  # noqa: F401 - `prepared` cannot be imported before it
from superserve_jax.training.datasets import prepared


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      name: the dataset: mnist or fashion_mnist.
      files: the folder with the four files of the dataset; downloaded if left out.
      data_dir: where TFDS keeps its datasets; ~/tensorflow_datasets if left out.
    """

    name: Annotated[str, tyro.conf.Positional]
    files: str | None = None
    data_dir: str | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    builder, was_there = prepared.prepare(options.name, options.files, options.data_dir)
    splits = sorted(builder.info.splits.items(), reverse=True)
    counts = ", ".join(f"{split.num_examples:,} in {name}" for name, split in splits)
    print(f"{options.name} {'was prepared before' if was_there else 'is prepared'}: {counts}; {builder.data_dir}")
    if was_there:
        print("nothing was changed; to make it again, remove that folder")
