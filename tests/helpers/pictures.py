"""Files of images, as bytes."""

import io

import numpy as np
import PIL.Image


def file_of(image, kind="PNG"):
    """A file with the image of an array, uint8 (H, W) or (H, W, 3)."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, kind)
    return file.getvalue()


def png(value, size=12):
    """A PNG file with a square of one colour."""
    return file_of(np.full((size, size, 3), value, np.uint8))
