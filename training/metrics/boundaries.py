"""The boundary of a mask, as Boundary IoU compares it (Cheng et al., "Boundary IoU", CVPR 2021, section 4).

The boundary region of a mask are its pixels within the distance d of its contour: those that an erosion by a square of
2d + 1 pixels takes away. Outside of the image is background, so a mask that ends at the image's border has its contour there.

Axes: H W mask size, h w size of the smallest box that holds the mask.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def boundary_distance(size: Sequence[int], dilation_ratio: float = 0.02) -> int:
    """Compute the distance d of an image: its diagonal times a ratio, rounded (halves to even), at least 1.

    Args:
        size: (height, width) of the image.
        dilation_ratio: share of the diagonal, above 0.

    Returns:
        Pixels.

    >>> boundary_distance((480, 640))
    16
    """
    if not (math.isfinite(dilation_ratio) and dilation_ratio > 0):
        raise ValueError(f"dilation_ratio must be above 0, got {dilation_ratio}. The paper's is 0.02.")
    height, width = size
    return max(1, round(dilation_ratio * math.sqrt(height**2 + width**2)))


def boundary_region(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """Keep the pixels of a mask whose square of 2 * distance + 1 pixels is not wholly inside the mask.

    Args:
        mask: bool, (H, W). True is foreground.
        distance: pixels, at least 1.

    Returns:
        bool, (H, W). A new array, in the memory order of `mask`.

    >>> boundary_region(np.ones((3, 4), dtype=bool), distance=1).astype(int)
    array([[1, 1, 1, 1],
           [1, 0, 0, 1],
           [1, 1, 1, 1]])
    """
    if mask.ndim != 2 or mask.dtype != np.bool_ or distance < 1:  # noqa: PLR2004 - (H, W)
        raise ValueError(
            f"Expected a bool mask (H, W) and a distance of at least 1, got {mask.dtype} {mask.shape} and {distance}. "
            "Take the distance from boundary_distance."
        )
    region = np.array(mask, order="K")
    rows = np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        return region
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    window = 2 * distance + 1
    if min(bottom - top, right - left) >= window:
        is_inner = _true_stretches(_true_stretches(mask[top:bottom, left:right], window).T, window).T
        region[top + distance : bottom - distance, left + distance : right - distance] &= ~is_inner
    return region


def _true_stretches(values: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """For each row of (n, m) but the last length - 1: whether it and those behind it, `length` in all, are True.

    Stretches are put together from two of half the length, so it takes as many steps as `length` has binary digits.
    """
    known = 1
    while known < length:
        step = min(known, length - known)
        values = values[:-step] & values[step:]
        known += step
    return values
