"""A window on an image: the image is resized, a rectangle is cut out of it, and that may be mirrored.

Only what is seen is ever computed. Pillow resizes a box of an image exactly as it resizes all of it, and masks pick, for each
pixel of the window, the nearest pixel of the source. Masks come as an array, or in a form that is decoded here, inside the
window alone: `MapMasks` (one map of segment numbers) and `CocoMasks` (polygons and run lengths). `numpy.asarray` gives the
array of each of them.

torchvision resizes a whole image, or a crop whose borders are whole pixels of the source, so it cannot give the same pixels.

Axes: n segments, H W the source, h w the window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from mpformer_hf.mask_encoding import expand_counts, occupied_box, rasterize_polygons

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Window:
    """What is seen of an image.

    Attributes:
        source_size: H and W.
        resized_size: height and width to which the whole source is resized.
        top: first row of the resized image that is seen.
        left: first column, before mirroring.
        size: h and w; the window lies inside the resized image.
        is_flipped: whether left and right are exchanged, after cutting.
    """

    source_size: Size
    resized_size: Size
    top: int
    left: int
    size: Size
    is_flipped: bool = False

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row of the source whose centre is nearest to that of each row of the window, (h,)."""
        return nearest_positions(self.source_size[0], self.resized_size[0], self.top, self.size[0])

    @property
    def columns(self) -> NDArray[np.int64]:
        """The same for columns, (w,); they fall where the window is mirrored."""
        columns = nearest_positions(self.source_size[1], self.resized_size[1], self.left, self.size[1])
        return columns[::-1] if self.is_flipped else columns

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the window in pixels of the source."""
        (height, width), (resized_height, resized_width) = self.source_size, self.resized_size
        return (
            self.left * width / resized_width,
            self.top * height / resized_height,
            min(width, (self.left + self.size[1]) * width / resized_width),
            min(height, (self.top + self.size[0]) * height / resized_height),
        )

    @classmethod
    def whole(cls, size: Size) -> "Window":
        """All of an image, as it is."""
        return cls(size, size, 0, 0, size)


def nearest_positions(source: int, resized: int, start: int, length: int) -> NDArray[np.int64]:
    """Compute floor((i + 1/2) * source / resized) for the positions i from `start` on, in integers; (length,)."""
    return (2 * np.arange(start, start + length, dtype=np.int64) + 1) * source // (2 * resized)


class MaskSource(Protocol):
    """Masks that are decoded inside a window."""

    shape: tuple[int, int, int]  # (n, H, W)

    def __len__(self) -> int: ...
    def cut(self, window: Window) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Masks that have a pixel in the window, bool (m, h, w), and their positions, int64 (m,), rising."""
        ...


def cut_image(image: Image.Image, window: Window) -> Image.Image:
    """Cut a window out of an image, bilinear with antialiasing; the result is RGB and w x h.

    At the borders of the window the pixels outside of it count, as if the whole image had been resized first.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    height, width = window.size
    cut = image.resize((width, height), Image.Resampling.BILINEAR, box=window.box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.is_flipped else cut


def cut_masks(masks: NDArray[np.bool_] | MaskSource, window: Window) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Cut a window out of masks, and leave out those that have no pixel in it.

    Args:
        masks: bool, (n, H, W), or masks that are decoded here.
        window: what is seen.

    Returns:
        bool, (m, h, w), and the position in `masks` of each, int64 (m,), rising.

    Raises:
        ValueError: the masks are not of the source's size.
    """
    if tuple(masks.shape[1:]) != window.source_size:
        raise ValueError(
            f"The masks are {' x '.join(map(str, masks.shape[1:]))}, but the image is "
            f"{window.source_size[0]} x {window.source_size[1]} (height x width). Pass masks of the size of their image."
        )
    if isinstance(masks, np.ndarray):
        return _cut_array(masks, window)
    return masks.cut(window)


def _cut_array(masks: NDArray[np.bool_], window: Window) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Copy each mask inside its own box alone: most segments are small, and memory that nobody writes costs nothing."""
    collector = _Collector(len(masks), window)
    rows, columns = window.rows, window.columns
    for number, mask in enumerate(masks):
        box = occupied_box(torch.from_numpy(mask))
        inside_rows, inside_columns = _inside(rows, box[0]), _inside(columns, box[1])
        pixels = mask.take(rows[inside_rows], axis=0).take(columns[inside_columns], axis=1)
        collector.add(number, pixels, inside_rows, inside_columns)
    return collector.result()


def _inside(positions: NDArray[np.int64], part: slice) -> slice:
    """Where positions, which rise or fall, lie in a part of the source."""
    if len(positions) > 1 and positions[0] > positions[-1]:
        mirrored = _inside(positions[::-1], part)
        return slice(len(positions) - mirrored.stop, len(positions) - mirrored.start)
    start, stop = np.searchsorted(positions, [part.start, part.stop])
    return slice(int(start), int(stop))


class _Collector:
    """Masks of a window, one after the other; those without a pixel leave no trace."""

    def __init__(self, most: int, window: Window) -> None:
        self.masks = np.zeros((most, *window.size), dtype=bool)
        self.kept: list[int] = []

    @property
    def place(self) -> NDArray[np.bool_]:
        """Where the next mask goes, (h, w)."""
        return self.masks[len(self.kept)]

    def add(self, number: int, pixels: NDArray[np.bool_], rows: slice, columns: slice) -> None:
        """Take the pixels of a mask in a part of the window; outside of it the mask has none."""
        if pixels.any():
            self.place[rows, columns] = pixels
            self.kept.append(number)

    def result(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        return self.masks[: len(self.kept)], np.asarray(self.kept, dtype=np.int64)


class MapMasks:
    """Segments that do not overlap, as one map of their numbers: a PNG file as it was read, not n masks.

    >>> masks = MapMasks(np.array([[7, 7, 300]]), [300, 7])
    >>> np.asarray(masks).astype(int).tolist()
    [[[0, 0, 1]], [[1, 1, 0]]]
    """

    def __init__(self, segment_map: NDArray[np.integer], ids: Sequence[int] | NDArray[np.integer]) -> None:
        """Describe masks; nothing is copied.

        Args:
            segment_map: integers of any width, (H, W). Pixels of other numbers than `ids` are in no segment.
            ids: number of each segment, (n,).
        """
        if segment_map.ndim != 2 or segment_map.dtype.kind not in "iu":  # noqa: PLR2004 - rows and columns
            raise ValueError(
                f"A map of segments must be integers (height, width), got {segment_map.dtype} of shape "
                f"{segment_map.shape}. Join the channels of a colour PNG into one number first."
            )
        self.segment_map = segment_map
        self.ids = [int(number) for number in ids]
        self.shape = (len(self.ids), *segment_map.shape)

    def __len__(self) -> int:
        return len(self.ids)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        masks = self.segment_map[None] == np.asarray(self.ids, dtype=np.int64)[:, None, None]
        return masks if dtype is None else masks.astype(dtype)

    def cut(self, window: Window) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """See `MaskSource`."""
        seen = self.segment_map.take(window.rows, axis=0).take(window.columns, axis=1)
        limits = np.iinfo(seen.dtype)
        collector = _Collector(len(self), window)
        for number, segment in enumerate(self.ids):
            if limits.min <= segment <= limits.max:
                np.equal(seen, seen.dtype.type(segment), out=collector.place)
                if collector.place.any():
                    collector.kept.append(number)
        return collector.result()


class CocoMasks:
    """Segments in COCO's forms, polygons or run lengths, each on its own; they may overlap.

    Polygons are filled at the size of the window, as the original does, so that the outline of an enlarged object is
    straight and has no steps. Run lengths are decoded in the columns of the source that are seen.
    """

    def __init__(self, segmentations: Sequence[Any], size: Size) -> None:
        """Describe masks; nothing is decoded.

        Args:
            segmentations: for each segment a list of polygons `[x0, y0, x1, y1, ...]`, or a dict `{"size": [H, W],
                "counts": str, bytes or list of int}`.
            size: H and W of the image.
        """
        for segmentation in segmentations:
            if isinstance(segmentation, Mapping) and tuple(segmentation["size"]) != tuple(size):
                raise ValueError(
                    f"Run lengths belong to an image of {' x '.join(map(str, segmentation['size']))}, but this one has "
                    f"{size[0]} x {size[1]} (height x width). Check that the annotation belongs to the image."
                )
        self.segmentations = list(segmentations)
        self.shape = (len(self.segmentations), *size)

    def __len__(self) -> int:
        return len(self.segmentations)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        masks = np.zeros(self.shape, dtype=bool)
        cut, kept = self.cut(Window.whole(self.shape[1:]))
        masks[kept] = cut
        return masks if dtype is None else masks.astype(dtype)

    def cut(self, window: Window) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """See `MaskSource`."""
        collector = _Collector(len(self), window)
        rows, columns = window.rows, window.columns
        everywhere = slice(0, window.size[0]), slice(0, window.size[1])
        for number, segmentation in enumerate(self.segmentations):
            if isinstance(segmentation, Mapping):
                pixels, part = _decode_columns(segmentation["counts"], window.source_size, columns)
                collector.add(number, pixels.take(rows, axis=1).T, everywhere[0], part)
            else:
                collector.add(number, _fill(segmentation, window), *everywhere)
        return collector.result()


def _decode_columns(
    counts: str | bytes | Sequence[int], size: Size, columns: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], slice]:
    """Decode the columns of run lengths that are asked for.

    Args:
        counts: COCO's run lengths, down the columns, background first.
        size: H and W.
        columns: those that are asked for; they rise or fall.

    Returns:
        bool, (k, H), one row a column, and where those columns stand in `columns`; the others have no foreground.
    """
    height, width = size
    if isinstance(counts, str | bytes):
        lengths = expand_counts(counts if isinstance(counts, bytes) else counts.encode())
    else:
        lengths = np.asarray(counts, dtype=np.int64)
    ends = np.cumsum(lengths)
    if len(ends) == 0 or ends[-1] != height * width or (lengths < 0).any():
        raise ValueError(
            f"Run lengths of a mask of {height} x {width} must add up to {height * width}, but they add up to "
            f"{int(ends[-1]) if len(ends) else 0}. Check that the annotation belongs to the image."
        )
    if len(ends) == 1:
        return np.zeros((0, height), dtype=bool), slice(0, 0)
    # From the first pixel of the foreground to the last, and of that what is seen.
    last = ends[-1] if len(ends) % 2 == 0 else ends[-2]
    seen = slice(int(columns.min()), int(columns.max()) + 1) if len(columns) else slice(0, 0)
    start = max(int(ends[0]) // height, seen.start)
    stop = max(start, min(-(-int(last) // height), seen.stop))
    part = _inside(columns, slice(start, stop))
    bounds = np.concatenate([[start * height], ends.clip(start * height, stop * height)])
    pixels = np.repeat(np.arange(len(ends)) % 2 == 1, np.diff(bounds)).reshape(stop - start, height)
    return pixels.take(columns[part] - start, axis=0), part


def _fill(polygons: Sequence[Sequence[float]], window: Window) -> NDArray[np.bool_]:
    """Fill polygons of the source as the window shows them; bool, (h, w)."""
    scale = (np.array(window.resized_size) / window.source_size)[::-1]  # x before y
    moved = []
    for polygon in polygons:
        corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * scale - (window.left, window.top)
        if window.is_flipped:
            corners[:, 0] = window.size[1] - corners[:, 0]
        moved.append(corners.ravel().tolist())
    return rasterize_polygons(moved, *window.size).numpy()
