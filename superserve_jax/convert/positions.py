"""Learnt positions of a grid of patches, resized to another grid with PyTorch's bicubic interpolation."""

import numpy as np


def resize(grid: np.ndarray, side: int, *, antialias: bool) -> np.ndarray:
    """A grid of positions (1, n * n, D) for side * side patches, as `torch.nn.functional.interpolate` computes it.

    Args:
      grid: the positions, row by row.
      side: the number of rows and columns of the result.
      antialias: as in PyTorch. If the grid gets smaller, the filter gets wider. The cubic filter is also another one.

    >>> resize(np.arange(4.0).reshape(1, 4, 1), 1, antialias=True).item()
    1.5
    """
    old = round(grid.shape[1] ** 0.5)
    rows = weights(old, side, antialias=antialias)
    found = np.einsum("ai,bj,ijd->abd", rows, rows, grid[0].reshape(old, old, -1).astype(np.float64))
    return found.reshape(1, side * side, -1).astype(np.float32)


def weights(old: int, new: int, *, antialias: bool) -> np.ndarray:
    """A matrix (new, old) that resizes a line of points.

    Without `antialias`, points outside of the line equal the nearest point inside. With it, they are left out.
    """
    scale = old / new
    wide = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    near = np.floor(centres) + np.arange(-int(2 * wide) - 1, int(2 * wide) + 2)  # more than the filter's support
    values = _cubic((near - centres) / wide, -0.5 if antialias else -0.75)
    is_inside = (near >= 0) & (near < old)
    if antialias:
        values = np.where(is_inside, values, 0.0)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(near, 0, old - 1).astype(int)), values)
    return matrix / matrix.sum(1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution filter (Keys, 1981), which is zero from a distance of 2 on."""
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * a * x - 4 * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
