"""listops: nested operations on lists of digits, as text. `grammar.py` generates the texts."""
