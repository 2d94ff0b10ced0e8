"""listops: nested list operations on digits, as text. Importing the builder's module registers it with TFDS."""
