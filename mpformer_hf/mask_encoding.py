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
MOST_CHARACTERS = 10  # of one number, far above any mask's needs; more could overflow 64 bits
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
    encoded = []
    for mask in masks.bool():
        rows, columns = occupied_box(mask)
        encoded.append(encode_cropped_rle(mask[rows, columns], rows.start, columns.start, height, width))
    return encoded


def encode_cropped_rle(crop: Tensor, top: int, left: int, height: int, width: int) -> dict[str, Any]:
    """Write a mask of which only a part is at hand; no array of the mask's full size is made.

    Args:
        crop: bool, (h, w). True is foreground. Outside of it the mask is background.
        top: row of the mask in which the crop begins.
        left: column of the mask in which the crop begins.
        height: rows of the mask.
        width: columns of the mask.

    Returns:
        `{"size": [height, width], "counts": str}`, as `encode_rle` gives it for the full mask.

    Raises:
        ValueError: the crop is not a matrix, or does not lie inside the mask.

    >>> encode_cropped_rle(torch.tensor([[True], [True]]), top=0, left=1, height=2, width=2)
    {'size': [2, 2], 'counts': '22'}
    """
    if crop.ndim != 2 or not (0 <= top <= height - crop.shape[0] and 0 <= left <= width - crop.shape[1]):  # noqa: PLR2004 - (h, w)
        raise ValueError(
            f"Expected a crop (h, w) that lies inside a mask of {height} x {width}, got the shape {tuple(crop.shape)} "
            f"at row {top}, column {left}. Cut away what lies outside of the mask."
        )
    counts = run_lengths(crop.bool().cpu().numpy(), top, left, height, width)
    return {"size": [height, width], "counts": compress_counts(counts)}


def occupied_box(mask: Tensor) -> tuple[slice, slice]:
    """Find the smallest box that holds the foreground.

    Args:
        mask: bool, (H, W). True is foreground.

    Returns:
        Rows and columns of the box; both empty and beginning at 0 if there is no foreground.
    """
    nothing = slice(0, 0), slice(0, 0)
    if mask.numel() == 0:
        return nothing
    pixels = mask.view(torch.uint8)  # the largest byte is found several times faster than any true value
    rows = pixels.amax(dim=1).nonzero()
    if len(rows) == 0:
        return nothing
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = pixels[top:bottom].amax(dim=0).nonzero()
    return slice(top, bottom), slice(int(columns[0]), int(columns[-1]) + 1)


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


def run_lengths(crop: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Measure the alternating runs of a mask, column by column; the first is background and may be empty.

    Args:
        crop: bool, (h, w), the part of the mask outside of which there is background.
        top: row of the mask in which the crop begins.
        left: column of the mask in which the crop begins.
        height: rows of the mask.
        width: columns of the mask.

    Returns:
        int64, (runs,), adding up to `height * width`.
    """
    is_change = np.diff(crop, axis=0, prepend=False, append=False)  # (h + 1, w), downwards
    if len(crop) == height:
        # What leaves a column at the bottom and goes on at the top of the next one is a single run.
        goes_on = is_change[-1, :-1] & is_change[0, 1:]
        is_change[-1, :-1] ^= goes_on
        is_change[0, 1:] ^= goes_on
    rows, columns = np.divmod(np.flatnonzero(is_change), max(1, crop.shape[1]))
    changes = np.sort((left + columns) * height + top + rows)  # few, so cheaper than to transpose the pixels
    size = height * width
    return np.diff(np.concatenate([[0], changes[changes < size], [size]]))


def compress_counts(counts: np.ndarray) -> str:
    """Write run lengths as COCO's string: signed base-32 digits, lowest first; bit 6 says that another one follows."""
    numbers = counts.astype(np.int64)
    numbers[FIRST_DELTA:] -= counts[FIRST_DELTA - 2 : -2]
    # The highest bit of the last digit is the sign, so one digit holds -16 to 15, two hold -512 to 511.
    sizes, limit = np.where(numbers < 0, ~numbers, numbers), CONTINUED >> 1
    lengths = np.ones_like(numbers)
    while (is_longer := sizes >= limit).any():
        lengths += is_longer
        limit <<= BITS_PER_CHARACTER
    ends = lengths.cumsum()
    shifts = (np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)) * BITS_PER_CHARACTER
    digits = (np.repeat(numbers, lengths) >> shifts) & (CONTINUED - 1) | CONTINUED
    digits[ends - 1] ^= CONTINUED
    return (digits + FIRST_CHARACTER).astype(np.uint8).tobytes().decode("ascii")


def expand_counts(text: bytes) -> np.ndarray:
    """Read COCO's string back into run lengths; the inverse of `compress_counts`.

    Args:
        text: ASCII.

    Returns:
        int64, (runs,).

    Raises:
        ValueError: a character is none of COCO's, or the last number is not complete.
    """
    digits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - FIRST_CHARACTER
    check_digits(digits, text)
    ends = np.flatnonzero(digits < CONTINUED)  # (runs,), the last digit of each number
    lengths = np.diff(ends, prepend=-1)
    if len(ends) == 0:
        return ends
    if lengths.max() > MOST_CHARACTERS:
        raise ValueError(
            f"A run length takes at most {MOST_CHARACTERS} characters, got one of {lengths.max()}. Check `counts`."
        )
    first_of_number = np.repeat(ends - lengths + 1, lengths)
    shifts = (np.arange(len(digits)) - first_of_number) * BITS_PER_CHARACTER
    numbers = np.add.reduceat((digits & (CONTINUED - 1)) << shifts, ends - lengths + 1)
    is_negative = (digits[ends] & (CONTINUED >> 1)) != 0
    numbers -= np.where(is_negative, 1 << (lengths * BITS_PER_CHARACTER), 0)
    # Every second number adds to the one before it; the very first stands alone.
    for first in range(FIRST_DELTA - 2, FIRST_DELTA):
        numbers[first::2] = numbers[first::2].cumsum()
    return numbers


def check_digits(digits: np.ndarray, text: bytes) -> None:
    """Refuse digits outside COCO's alphabet, and a last digit that announces another one."""
    foreign = np.flatnonzero((digits < 0) | (digits >= 2 * CONTINUED))
    if len(foreign):
        raise ValueError(
            f"Compressed run lengths consist of the characters {chr(FIRST_CHARACTER)!r} to "
            f"{chr(FIRST_CHARACTER + 2 * CONTINUED - 1)!r}, got {chr(text[foreign[0]])!r} at position {foreign[0]}. "
            "Check that `counts` is a string of COCO, without line breaks or further encoding."
        )
    if len(digits) and digits[-1] >= CONTINUED:
        raise ValueError(
            f"Compressed run lengths end in the middle of a number, after {len(digits)} characters. "
            "Check that `counts` has not been cut short."
        )


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
        ValueError: a polygon has fewer than three corners, an odd count of numbers, or one that is not finite.
    """
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        corners = read_corners(polygon)
        (left, top), (right, bottom) = np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0))
        rows = slice(*np.clip([top, bottom], 0, height).astype(int))
        columns = slice(*np.clip([left, right], 0, width).astype(int))
        mask[rows, columns] |= fill_polygon(corners, rows, columns)
    return torch.from_numpy(mask)


def read_corners(polygon: list[float]) -> np.ndarray:
    """Read `[x0, y0, x1, y1, ...]` as float64, (corners, 2)."""
    numbers = np.asarray(polygon, dtype=np.float64).reshape(-1)
    if len(numbers) < MIN_POLYGON_NUMBERS or len(numbers) % 2:
        raise ValueError(
            f"A polygon needs at least three corners as [x0, y0, x1, y1, ...], got {len(numbers)} numbers. "
            "Drop such polygons from the annotation."
        )
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"A polygon needs finite numbers, got {numbers[~np.isfinite(numbers)][0]} among its {len(numbers)}. "
            "Drop such polygons from the annotation."
        )
    return numbers.reshape(-1, 2)


def fill_polygon(corners: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """Fill one polygon: toggle every column at the rows where an edge crosses the column's centre, then accumulate.

    Args:
        corners: float64, (corners, 2), x and y.
        rows: those of the image to fill; the polygon has none above them that lie in the image.
        columns: those of the image to fill.

    Returns:
        bool, (rows, columns).
    """
    next_corners = np.roll(corners, -1, axis=0)
    lefts, rights = np.minimum(corners[:, 0], next_corners[:, 0]), np.maximum(corners[:, 0], next_corners[:, 0])
    # Half open in x, so that a corner on a column's centre counts once for the two edges that meet there.
    first, last = (np.clip(np.ceil(x - 0.5), columns.start, columns.stop).astype(int) for x in (lefts, rights))
    counts = last - first  # (corners,), columns that an edge crosses
    edge = np.repeat(np.arange(len(corners)), counts)
    column = np.arange(len(edge)) - np.repeat(counts.cumsum() - counts - first, counts)
    (x0, y0), (x1, y1) = corners[edge].T, next_corners[edge].T
    crossings = y0 + (column + 0.5 - x0) * (y1 - y0) / (x1 - x0)
    row = np.clip(np.ceil(crossings - 0.5), rows.start, rows.stop).astype(int)
    toggles = np.zeros((rows.stop - rows.start + 1, columns.stop - columns.start), dtype=bool)
    places, times = np.unique((row - rows.start) * toggles.shape[1] + column - columns.start, return_counts=True)
    toggles.reshape(-1)[places[times % 2 == 1]] = True
    return np.logical_xor.accumulate(toggles[:-1], axis=0)
