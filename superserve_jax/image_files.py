"""Image files as inputs of models: decoding, cropping and scaling, the same in training and in serving. No jax."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from superserve_jax import errors

MOST_PIXELS = 16_000_000
"""The largest image that a server decodes. A small file can hold a huge one."""

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")  # of PNG and JPEG


def decode(file: bytes, channels: int) -> np.ndarray:
    """A PNG, JPEG or other image file as uint8 (H, W, C). The file may have other channels.

    The image is turned as its EXIF data says. Transparent pixels become white. 16-bit grey values keep their upper 8 bits.
    """
    with PIL.Image.open(io.BytesIO(file)) as opened:
        image = PIL.ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = PIL.Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def reason(e: Exception) -> str:
    """Why a file cannot be read or decoded, in one line. Pillow's own text names a buffer in memory."""
    return "its content is no image" if isinstance(e, PIL.UnidentifiedImageError) else errors.one_line(e)


def centre_crop(image: np.ndarray, size: int, *, share: float = 1.0) -> np.ndarray:
    """The central square of an image (H, W, C), scaled to (size, size, C). Its side is `share` times the shorter side.

    >>> centre_crop(np.zeros((30, 40, 3), np.uint8), 16).shape
    (16, 16, 3)
    """
    h, w, _ = image.shape
    side = max(1, round(share * min(h, w)))
    top, left = (h - side) // 2, (w - side) // 2
    return resize(image[top : top + side, left : left + side], size)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """An image (H, W, C), scaled to (size, size, C)."""
    if image.shape[0] == image.shape[1] == size:
        return image
    picture = PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((size, size), PIL.Image.Resampling.BILINEAR))
    return resized.reshape(size, size, image.shape[2])


def check_file(file: bytes) -> bytes:
    """Returns the bytes of a PNG or JPEG file. Raises InputError if they do not begin as such a file.

    >>> check_file(b"GIF89a")
    Traceback (most recent call last):
      ...
    superserve_jax.errors.InputError: 6 bytes that begin with b'GIF89a' are no PNG or JPEG file; submit a file or an array
    """
    if not file.startswith(_SIGNATURES):
        raise errors.InputError(
            f"{len(file)} bytes that begin with {file[:8]!r} are no PNG or JPEG file; submit a file or an array"
        )
    return file


def pixels(file: bytes) -> int:
    """The number of pixels of a PNG or JPEG file, from its header. Raises InputError if it is no such file."""
    try:
        with PIL.Image.open(io.BytesIO(check_file(file))) as opened:  # reads the header only
            width, height = opened.size
    except errors.InputError:
        raise
    except Exception as e:  # any exception: Pillow raises many kinds for damaged files
        raise errors.InputError(f"{len(file)} bytes cannot be read as an image: {reason(e)}") from e
    return width * height


def from_file(file: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """A PNG or JPEG file as an input of a server: the central square, scaled.

    Args:
      file: the content of the file.
      shape: (size, size, channels).

    Raises InputError if the file is damaged, or has more than `MOST_PIXELS`.
    """
    if (count := pixels(file)) > MOST_PIXELS:
        raise errors.InputError(f"an image of {count:,} pixels; a server decodes at most {MOST_PIXELS:,} pixels")
    try:
        image = decode(file, shape[2])
    except Exception as e:  # as in `pixels`
        raise errors.InputError(f"{len(file)} bytes cannot be read as an image: {reason(e)}") from e
    return centre_crop(image, shape[0])
