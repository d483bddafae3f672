"""Masks in the forms of COCO: run lengths, their compressed strings, and polygons. All of it without pycocotools.

COCO walks a mask column by column (top to bottom, then left to right) and writes the lengths of alternating runs of
background and foreground, background first. Its compressed string holds those lengths as base-32 numbers of varying
length; from the fourth on, the difference to the length two places before.

Axes: N masks, H W mask size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

BITS_PER_CHARACTER = 5
CONTINUED = 1 << BITS_PER_CHARACTER
FIRST_CHARACTER = 48  # "0"
FIRST_DELTA = 3  # the first three counts are written as they are
MIN_POLYGON_NUMBERS = 6  # three corners


def encode_rle(masks: Tensor) -> list[dict[str, Any]]:
    """Write masks as compressed COCO run lengths.

    Args:
        masks: bool, (N, H, W). True is foreground.

    Returns:
        N dicts `{"size": [H, W], "counts": str}`, which `pycocotools.mask.decode` reads.

    >>> encode_rle(torch.tensor([[[False, True], [False, True]]]))
    [{'size': [2, 2], 'counts': '22'}]
    """
    height, width = masks.shape[-2:]
    columns = masks.transpose(-2, -1).flatten(1).cpu().numpy()  # (N, W * H), column by column
    return [{"size": [height, width], "counts": compress_counts(run_lengths(column))} for column in columns]


def decode_rle(rle: dict[str, Any]) -> Tensor:
    """Read one mask from COCO run lengths, compressed or not.

    Args:
        rle: `{"size": [H, W], "counts": str, bytes or list of int}`.

    Returns:
        bool, (H, W). True is foreground.

    Raises:
        ValueError: the dict has no `size` or `counts`, or the counts do not fill the mask.
    """
    if not {"size", "counts"} <= set(rle):
        raise ValueError(f"Expected run lengths as a dict with `size` and `counts`, got the keys {sorted(rle)}.")
    height, width = (int(length) for length in rle["size"])
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        counts = expand_counts(counts if isinstance(counts, bytes) else counts.encode())
    lengths = np.asarray(counts, dtype=np.int64)
    if lengths.sum() != height * width or (lengths < 0).any():
        raise ValueError(
            f"Run lengths of a mask of {height} x {width} must add up to {height * width}, but they add up to "
            f"{int(lengths.sum())}. Check that `size` is [height, width] and that `counts` is complete."
        )
    values = np.arange(len(lengths)) % 2 == 1
    return torch.from_numpy(np.repeat(values, lengths).reshape(width, height).T.copy())


def run_lengths(pixels: np.ndarray) -> np.ndarray:
    """Measure the alternating runs of a row of pixels; the first is background and may be empty.

    Args:
        pixels: bool, (length,).

    Returns:
        int64, (runs,), adding up to `length`.
    """
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts_with_foreground = pixels[:1].any()
    edges = np.concatenate([[0, 0] if starts_with_foreground else [0], changes, [len(pixels)]])
    return np.diff(edges)


def compress_counts(counts: np.ndarray) -> str:
    """Write run lengths as COCO's string: signed base-32 digits, lowest first; bit 6 says that another one follows."""
    numbers = counts.astype(np.int64)
    numbers[FIRST_DELTA:] -= counts[FIRST_DELTA - 2 : -2]
    digits, is_used = [], []
    pending = np.ones(len(numbers), dtype=bool)
    while pending.any():
        digit = numbers & (CONTINUED - 1)
        numbers = numbers >> BITS_PER_CHARACTER
        # The highest bit of the last digit is its sign, so a number ends when the rest repeats that bit.
        is_negative = (digit & (CONTINUED >> 1)) != 0
        more = pending & (numbers != np.where(is_negative, -1, 0))
        digits.append(digit + np.where(more, CONTINUED, 0) + FIRST_CHARACTER)
        is_used.append(pending)
        pending = more
    if not digits:
        return ""
    return np.stack(digits, axis=1)[np.stack(is_used, axis=1)].astype(np.uint8).tobytes().decode("ascii")


def expand_counts(text: bytes) -> np.ndarray:
    """Read COCO's string back into run lengths; the inverse of `compress_counts`."""
    counts: list[int] = []
    number, shift = 0, 0
    for character in text:
        digit = character - FIRST_CHARACTER
        number |= (digit & (CONTINUED - 1)) << shift
        shift += BITS_PER_CHARACTER
        if digit & CONTINUED:
            continue
        if digit & (CONTINUED >> 1):
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) >= FIRST_DELTA else 0))
        number, shift = 0, 0
    return np.array(counts, dtype=np.int64)


def rasterize_polygons(polygons: list[list[float]], height: int, width: int) -> Tensor:
    """Fill polygons: a pixel is foreground when its centre lies inside one of them (even-odd rule for each).

    Args:
        polygons: COCO's form, each `[x0, y0, x1, y1, ...]` in pixels; (0, 0) is the corner of the first pixel, not its
            centre.
        height: rows of the mask.
        width: columns of the mask.

    Returns:
        bool, (height, width).

    Raises:
        ValueError: a polygon has fewer than three corners, or an odd count of numbers.
    """
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        corners = np.asarray(polygon, dtype=np.float64).reshape(-1)
        if len(corners) < MIN_POLYGON_NUMBERS or len(corners) % 2:
            raise ValueError(
                f"A polygon needs at least three corners as [x0, y0, x1, y1, ...], got {len(corners)} numbers. "
                "Drop such polygons from the annotation."
            )
        mask |= fill_polygon(corners.reshape(-1, 2), height, width)
    return torch.from_numpy(mask)


def fill_polygon(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill one polygon: toggle every column at the rows where an edge crosses the column's centre, then accumulate.

    Args:
        corners: float64, (corners, 2), x and y.
        height: rows of the mask.
        width: columns of the mask.

    Returns:
        bool, (height, width).
    """
    toggles = np.zeros((height + 1, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        left, right = sorted((x0, x1))
        # Half open in x, so that a corner on a column's centre counts once for the two edges that meet there.
        first, last = max(0, int(np.ceil(left - 0.5))), min(width, int(np.ceil(right - 0.5)))
        if first >= last:
            continue
        columns = np.arange(first, last)
        crossings = y0 + (columns + 0.5 - x0) * (y1 - y0) / (x1 - x0)
        rows = np.clip(np.ceil(crossings - 0.5), 0, height).astype(np.int64)
        toggles[rows, columns] ^= True
    return np.logical_xor.accumulate(toggles[:height], axis=0)
