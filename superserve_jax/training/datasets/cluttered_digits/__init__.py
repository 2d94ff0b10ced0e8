"""cluttered_digits: images of handwritten digits in front of pieces of other digits. `render.py` draws them."""
