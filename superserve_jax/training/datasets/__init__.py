"""TFDS datasets: `prepared.py` finds, makes and reads them by name. `making.py` writes them, without TensorFlow.

`cluttered_digits` (images) and `listops` (texts) are made on this machine at first use, without a network. Each has a builder
in the layout of TFDS, with README.md and CITATIONS.bib, and a module that makes its examples. `mnist.py` makes MNIST and
Fashion-MNIST with TFDS's own builders, from files that `idx.py` reads.
"""
