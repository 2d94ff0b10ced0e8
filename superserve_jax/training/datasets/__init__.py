"""TFDS datasets: `prepared.py` finds and reads them by name. Our own builders are the packages here.

`cluttered_digits` (images) and `listops` (texts) are made on this machine at first use, without TensorFlow or a network. Each
has a builder in the layout of TFDS, with README.md and CITATIONS.bib, and a module that makes its examples.
"""
