"""Draws the images of cluttered_digits: one digit in front of pieces of other digits, with noise.

Image number `index` of a split depends on (split, index) alone. Images show the scans in order, so the last images of a split
show scans that no earlier image shows. With these held out, the validation accuracy is the accuracy on new digits.

All randomness comes from the raw bits of PCG64, which numpy never changes between versions. Continuous functions in double
precision turn them into pixels, which are rounded only at the end. So a cosine that differs in its last bit on another machine
does not change the image. A test pins the SHA-256.
"""

from typing import Any

import numpy as np
import scipy.ndimage
import scipy.special

SIZE = 32
NUM_IMAGES = {"train": 20_000, "test": 4_000}
NUM_TRAIN_SCANS = 1_400  # the first scans; the other 397 belong to the test split
MIN_SCALE, MAX_SCALE = 1.5, 2.6
MAX_ANGLE_DEG = 25.0
NUM_PATCHES = 6
MIN_PATCH, MAX_PATCH = 5, 8
PATCH_STRENGTH = 0.7
NOISE = 0.08

_SCAN_SIZE = 8
_NUM_DRAWS = 4 + 6 * NUM_PATCHES  # numbers that decide the geometry, before the noise


def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The 8x8 scans of a split from scikit-learn, float64 (N, 8, 8) in 0..1, and their digits, int64 (N,).

    >>> scans, digits = load_scans("test")
    >>> scans.shape, float(scans.max()), digits[:3].tolist()
    ((397, 8, 8), 1.0, [2, 8, 2])
    """
    import sklearn.datasets  # takes over a second, and is needed only once per machine

    data: Any = sklearn.datasets.load_digits()
    own = {"train": slice(NUM_TRAIN_SCANS), "test": slice(NUM_TRAIN_SCANS, None)}[split]
    return data.images[own] / 16.0, data.target[own]


def render(scans: np.ndarray, split: str, index: int) -> tuple[np.ndarray, int]:
    """Image `index` of a split, uint8 (32, 32, 1), and the index of the scan that it shows.

    Args:
      scans: the scans from `load_scans(split)`.
      split: "train" or "test".
      index: the number of the image.
    """
    bits = np.random.PCG64([list(NUM_IMAGES).index(split), index]).random_raw(_NUM_DRAWS + SIZE * SIZE)
    uniform = ((bits >> 12) + 0.5) * 2.0**-52  # exact, and never 0 or 1
    chosen = index * len(scans) // NUM_IMAGES[split]
    canvas = np.zeros((SIZE, SIZE))
    for draws in uniform[4:_NUM_DRAWS].reshape(NUM_PATCHES, 6):
        other = (chosen + 1 + int(draws[0] * (len(scans) - 1))) % len(scans)
        paste_patch(canvas, scans[other], draws[1:])
    canvas = np.maximum(canvas, place_digit(scans[chosen], uniform[:4]))
    canvas += NOISE * scipy.special.ndtri(uniform[_NUM_DRAWS:]).reshape(SIZE, SIZE)
    pixels = np.floor(np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return pixels[:, :, None], chosen


def paste_patch(canvas: np.ndarray, scan: np.ndarray, draws: np.ndarray) -> None:
    """Draws a square piece of `scan` onto the canvas, unscaled and fainter. The brighter of two overlapping pixels stays."""
    side = MIN_PATCH + int(draws[0] * (MAX_PATCH - MIN_PATCH + 1))
    top, left = (int(u * (_SCAN_SIZE - side + 1)) for u in draws[1:3])
    y, x = (int(u * (SIZE - side + 1)) for u in draws[3:5])
    target = canvas[y : y + side, x : x + side]
    np.maximum(target, PATCH_STRENGTH * scan[top : top + side, left : left + side], out=target)


def place_digit(scan: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """`scan`, scaled, turned and moved by `draws`, wholly on the canvas: float64 (32, 32)."""
    scale = MIN_SCALE + draws[0] * (MAX_SCALE - MIN_SCALE)
    angle = np.deg2rad(MAX_ANGLE_DEG) * (2.0 * draws[1] - 1.0)
    cos, sin = np.cos(angle), np.sin(angle)
    # Interpolation spreads the ink half a scan pixel beyond the scan on each side.
    reach = (_SCAN_SIZE + 1) / 2 * scale * (cos + abs(sin))
    centre = reach + draws[2:4] * (SIZE - 2.0 * reach)
    to_scan = np.array([[cos, -sin], [sin, cos]]) / scale
    offset = (_SCAN_SIZE - 1) / 2 - to_scan @ (centre - 0.5)
    # mode="constant" would jump to 0 at the edge, and the last bit of the angle could change a pixel.
    return scipy.ndimage.affine_transform(scan, to_scan, offset, (SIZE, SIZE), order=1, mode="grid-constant")
