"""Polygons of COCO that follow a mask's pixels exactly. Nothing here loops over pixels or corners in Python.

A mask's outline consists of closed rings of edges that lie between foreground and background pixels. Each ring is walked
with the foreground on its right: outer rings clockwise, rings around holes counter-clockwise. Horizontal and vertical
edges take turns, so the corners on one row of the grid, taken in pairs from left to right, are its horizontal edges, and
those on one column, in pairs from top to bottom, its vertical ones. Pairs in both directions are all there is to follow.

COCO's polygons cannot say "hole". A ring around a hole is therefore joined to the ring to the left of it by a bridge of no
width, which is walked there and back.

Axes: C corners, E = C / 2 horizontal edges, H W mask size. A point of the grid is numbered `row * (W + 1) + column`.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .mask_encoding import occupied_box


def trace_polygons(mask: Tensor) -> list[list[float]]:
    """Trace a mask along the edges of its pixels.

    `rasterize_polygons` turns the polygons into the mask again, bit for bit. There is one polygon for each part of the
    mask; pixels that touch only at a corner are of different parts.

    Args:
        mask: bool, (H, W). True is foreground.

    Returns:
        COCO's form, each `[x0, y0, x1, y1, ...]` in pixels; (0, 0) is the corner of the first pixel, not its centre.
        Sorted by the first corner, the leftmost of the top row. No corners but those where the polygon turns.

    Raises:
        ValueError: the mask is not bool or not a matrix.

    >>> trace_polygons(torch.tensor([[False, True, True], [False, True, True]]))
    [[1.0, 0.0, 3.0, 0.0, 3.0, 2.0, 1.0, 2.0]]
    """
    if mask.dtype != torch.bool or mask.ndim != 2:  # noqa: PLR2004 - (H, W)
        raise ValueError(
            f"Expected one mask as bool (H, W), got {mask.dtype} {tuple(mask.shape)}. "
            "Compare scores with a threshold first, and pass masks one by one."
        )
    rows, columns = occupied_box(mask)
    pixels = np.pad(mask[rows, columns].cpu().numpy(), 1)  # each point of the grid then has four pixels around it
    corners = find_corners(pixels)
    outline = pair_corners(corners, pixels)
    holes = find_holes(outline)
    if len(holes):
        outline = bridge_holes(corners[outline.head[holes]], corners, pixels)
    return polygons_of_rings(outline, left=columns.start, top=rows.start)


@dataclass(frozen=True)
class Outline:
    """The directed horizontal edges of a mask's rings, sorted by row and column.

    Attributes:
        x: int64, (C,), column of each corner. Corners are sorted by row and column.
        y: int64, (C,), row of each corner.
        tail: int64, (E,), corner in which an edge begins.
        head: int64, (E,), corner in which it ends.
        vertical: int64, (C,), the corner at the other end of each corner's vertical edge.
    """

    x: np.ndarray
    y: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    vertical: np.ndarray


def find_corners(pixels: np.ndarray) -> np.ndarray:
    """Find the points of the grid where a ring turns; twice those where two pixels touch only there.

    Args:
        pixels: bool, (H + 2, W + 2), a mask with a border of background.

    Returns:
        int64, (C,), points, sorted.
    """
    is_upright = pixels[:, 1:] ^ pixels[:, :-1]  # a vertical edge is to the right of this pixel
    above, below = is_upright[:-1], is_upright[1:]
    is_diagonal = above & below & (pixels[:-1, :-1] ^ pixels[1:, :-1])
    points = np.flatnonzero((above ^ below) | is_diagonal)
    return np.repeat(points, 1 + is_diagonal.reshape(-1)[points])


def pair_corners(corners: np.ndarray, pixels: np.ndarray) -> Outline:
    """Join corners to edges.

    Args:
        corners: int64, (C,), points, sorted; an even number on each row and each column of the grid.
        pixels: bool, (H + 2, W + 2), a mask with a border of background.
    """
    y, x = np.divmod(corners, pixels.shape[1] - 1)
    left, right = np.arange(0, len(corners), 2), np.arange(1, len(corners), 2)
    goes_right = pixels[y[left] + 1, x[left] + 1]  # the pixel below; the foreground is on the right of who walks
    # Of two corners in one point, one ends a vertical edge from above and the other begins one to below. The first one has
    # the edge from above if the pixel above and left is foreground: so two pixels that touch in the point remain apart.
    is_first = np.diff(corners, prepend=-1) != 0
    is_lower = is_first != pixels[y, x]
    down = np.argsort(2 * (x * len(pixels) + y) + is_lower)  # corners by column, then row
    vertical = np.empty_like(corners)
    vertical[down[0::2]], vertical[down[1::2]] = down[1::2], down[0::2]
    return Outline(x, y, np.where(goes_right, left, right), np.where(goes_right, right, left), vertical)


def find_holes(outline: Outline) -> np.ndarray:
    """Find the first edge of each ring around a hole: the leftmost one at its top, which goes left.

    Returns:
        int64, (holes,), edges, sorted.
    """
    first, _ = follow_rings(outline)
    is_first = first == np.arange(len(first))
    return np.flatnonzero(is_first & (outline.head < outline.tail))


def bridge_holes(starts: np.ndarray, corners: np.ndarray, pixels: np.ndarray) -> Outline:
    """Join the ring around each hole to the next ring on its left, which is another one.

    From the hole's top left corner the bridge runs to the left until there is background above or below it. No pixel of
    the same hole is that far up and left, so rings join to a tree, with the outer ring as its root.

    Args:
        starts: int64, (holes,), points, sorted; the top left corner of each hole.
        corners: int64, (C,), points, sorted.
        pixels: bool, (H + 2, W + 2), a mask with a border of background.

    Returns:
        The outline with one ring for each part of the mask.
    """
    landings = find_landings(starts, pixels)
    # A bridge that lands amid a vertical edge splits it with two corners, which are a horizontal edge of no length.
    splits = np.setdiff1d(landings, corners)
    corners = np.sort(np.concatenate([corners, splits, splits]))
    outline = pair_corners(corners, pixels)
    # Edges of one row that exchange their ends still cover the same parts of it, apart from parts walked there and back.
    holes = np.searchsorted(corners, starts) // 2
    hit = np.searchsorted(corners, landings) // 2
    head = outline.head.tolist()
    for one, other in zip(holes.tolist(), hit.tolist(), strict=True):
        head[one], head[other] = head[other], head[one]
    return Outline(outline.x, outline.y, outline.tail, np.array(head), outline.vertical)


def find_landings(starts: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Find the first point to the left of each start that has background to its left, above or below.

    Args:
        starts: int64, (holes,), points with foreground to their left.
        pixels: bool, (H + 2, W + 2), a mask with a border of background.

    Returns:
        int64, (holes,), points.
    """
    y, x = np.divmod(starts, pixels.shape[1] - 1)
    rows, row = np.unique(y, return_inverse=True)
    walls = np.flatnonzero(~(pixels[rows] & pixels[rows + 1]))
    wall = walls[np.searchsorted(walls, row * pixels.shape[1] + x) - 1]
    return y * (pixels.shape[1] - 1) + wall % pixels.shape[1]


def follow_rings(outline: Outline) -> tuple[np.ndarray, np.ndarray]:
    """Follow all rings at once, backwards, with steps that double.

    Returns:
        int64, (E,), the first of all edges on the same ring, and int64, (E,), the number of edges from there to here.
    """
    edges = np.arange(len(outline.tail))
    previous, first, steps, span = np.empty_like(edges), edges, np.zeros_like(edges), 1
    previous[outline.vertical[outline.head] // 2] = edges
    while True:
        # Known so far: the first edge among the last `span` ones. Once that changes nowhere, it has come round the ring.
        is_earlier = first[previous] < first
        if not is_earlier.any():
            return first, steps
        steps = np.where(is_earlier, span + steps[previous], steps)
        first = np.where(is_earlier, first[previous], first)
        previous, span = previous[previous], 2 * span


def polygons_of_rings(outline: Outline, left: int, top: int) -> list[list[float]]:
    """Write rings as polygons.

    Args:
        outline: with a ring for each polygon.
        left: what to add to each x.
        top: what to add to each y.
    """
    first, steps = follow_rings(outline)
    lengths = np.bincount(first, minlength=len(first))  # (E,), edges of the ring that begins with an edge
    order = np.empty_like(first)
    order[(lengths.cumsum() - lengths)[first] + steps] = np.arange(len(first))
    ends = np.stack([outline.tail, outline.head], axis=1)[order].reshape(-1)  # (C,), corners in the order of the walk
    numbers = np.stack([outline.x[ends] + left, outline.y[ends] + top], axis=1).astype(float).reshape(-1).tolist()
    stops = [0, *(4 * lengths[lengths > 0]).cumsum().tolist()]
    return [numbers[start:stop] for start, stop in pairwise(stops)]
