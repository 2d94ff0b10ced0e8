"""cluttered_digits: handwritten digits among pieces of other digits. Importing the builder's module registers it with TFDS."""
