"""Datasets by their TFDS name: those of tensorflow-datasets, and our own builders in the package folders here."""
