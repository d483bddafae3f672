"""Instances and panoptic segments of images that are too large for the model: overlapping tiles, joined at their seams.

`tiled_instance_segmentation` and `tiled_panoptic_segmentation` cut the image into tiles, run model and post-processing on
each, and make one result of them. An image that fits into one tile gets exactly the result without tiles.

Which tile counts: a model sees too little near the edge of a tile. So every pixel belongs to the core of exactly one tile;
cores meet in the middle of the overlaps, and what a tile says about a pixel counts only in its core.

What becomes one object: of two neighbouring tiles (beside, above or diagonal), two objects of one class are the same when
the IoU of their masks within the overlap is at least `merge_iou`. Masks are compared whole, not cut to cores, so an object
that lies wholly in an overlap is found twice and listed once, and two objects that touch stay two. In a pair of tiles each
object has at most one partner, the best. Pairs join to chains over any number of tiles, best IoU first; but an object that
a tile shows whole (no edge of the tile cuts it) never joins another one of the same tile: there they have been told apart.
Stuff (`label_ids_to_fuse`) of panoptic results is one segment a class in the whole image.

What is left of an object: the union of its parts' core pixels, with the highest score among the parts that have any.
Without any it vanishes. Objects that no tile shows in a piece large enough to be recognised are not found: choose
`tile_size` by the largest objects, and `overlap` above the size of common ones.

Memory, beside the image as it came and the model's own: one batch of logits; the dense masks of one tile (instances: `top_k`
bytes for each pixel of a tile, a few times over while they are made); 4 bytes for each pixel of the image, the map; strips
along the seams, of one row of tiles at a time (for each of their pixels 4 bytes in a panoptic result, in an instance result
a bit for each object of the strip); and, of instances, a bit for each pixel of each object's box, which is at most
`top_k` / 8 bytes for each pixel of the image and usually less than one. In the end one object at a time is dense in its box.

Axes: n objects, H W image or tile, P pixels of the overlap of two tiles.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .image_processing_mpformer import MPFormerImageProcessor
from .image_tiles import AnyImage, Logits, Model, Region, SourceImage, Span, cover_axis, run_model
from .mask_encoding import encode_cropped_rle
from .mask_post_processing import (
    InstancePrediction,
    PanopticPrediction,
    instance_segmentation,
    mask_boxes,
    panoptic_segmentation,
)
from .mask_resizing import Size

Processor = Callable[..., Any]

COMPARED_BYTES = 32 * 2**20  # memory for the comparison of two strips of masks
BYTES_TO_COMPARE = 8 * (1 + 4)  # of a byte of packed masks: eight pixels, as bool and as float32
RELABELLED_ROWS = 256
VOID = 0
NO_INSTANCE = -1


def tiled_instance_segmentation(
    model: Model,
    processor: Processor,
    image: AnyImage,
    *,
    tile_size: Size = (1024, 1024),
    overlap: int = 256,
    merge_iou: float = 0.5,
    batch_size: int = 1,
    threshold: float | None = None,
    mask_threshold: float | None = None,
    top_k: int | None = None,
    label_ids_to_fuse: Collection[int] | None = None,
    progress: bool = True,
    **processor_kwargs: Any,
) -> dict[str, Any]:
    """Find the instances of a large image, tile by tile; the rules stand at the top of the module.

    Args:
        model: in evaluation mode; takes what `processor` returns as keywords, and returns `class_queries_logits`,
            `masks_queries_logits` and perhaps `image_sizes`: MP-Former, and transformers' Mask2Former, MaskFormer and EoMT.
        processor: an image processor; fields that it lacks have the defaults of `MPFormerImageProcessor`.
        image: one image; PIL, numpy or torch, as for the processor. EXIF rotation is not applied.
        tile_size: height and width of a tile, in pixels of the image (the processor resizes it for the model).
        overlap: pixels that neighbouring tiles share at least, from 1 to below the sides of a tile.
        merge_iou: least IoU within the overlap of two tiles that makes two objects one, in (0, 1].
        batch_size: tiles that go through the model together.
        threshold: least score of an instance in its tile, in [0, 1]. This and the next three: `None` takes the processor's
            field.
        mask_threshold: a pixel belongs to a mask where its probability is above this, in [0, 1].
        top_k: pairs of query and class that are taken in each tile, before any threshold.
        label_ids_to_fuse: stuff classes, which have no instances.
        progress: show a progress bar.
        **processor_kwargs: for the call of the processor, such as `do_resize=False`.

    Returns:
        Instances, highest score first:
        `segmentation`, int32 map (H, W) in which each pixel has the id of the highest score that covers it, -1 where
        there is none; `segments_info`, a dict with `id` (from 0), `label_id`, `was_fused` (False) and `score` for each;
        and in the same order `rles`, masks as compressed COCO run lengths, which may overlap, `scores` float32 (n,),
        `labels` int64 (n,) and `boxes` float32 (n, 4), x1, y1, x2, y2.

    Raises:
        ValueError: says what was expected, what came and what to do.
    """
    source = SourceImage.of(image, processor_kwargs.pop("input_data_format", None))
    tiles = make_tiles(source.size, tile_size, overlap)
    post_process = partial(
        instance_segmentation,
        score_threshold=or_field(processor, "score_threshold", threshold),
        mask_threshold=or_field(processor, "mask_threshold", mask_threshold),
        top_k=or_field(processor, "top_k", top_k),
        label_ids_to_drop=or_field(processor, "label_ids_to_fuse", label_ids_to_fuse),
    )
    collector = InstanceCollector(source.size, merge_iou)
    predictor = TilePredictor(model, processor, processor_kwargs, post_process)
    predictor.run(source, tiles, batch_size, progress, take=collector.add)
    return collector.result()


def tiled_panoptic_segmentation(
    model: Model,
    processor: Processor,
    image: AnyImage,
    *,
    tile_size: Size = (1024, 1024),
    overlap: int = 256,
    merge_iou: float = 0.5,
    batch_size: int = 1,
    threshold: float | None = None,
    mask_threshold: float | None = None,
    overlap_mask_area_threshold: float | None = None,
    label_ids_to_fuse: Collection[int] | None = None,
    progress: bool = True,
    **processor_kwargs: Any,
) -> dict[str, Any]:
    """Give each pixel of a large image to one segment, tile by tile; the rules stand at the top of the module.

    Args:
        model: as for `tiled_instance_segmentation`.
        processor: likewise.
        image: likewise.
        tile_size: likewise.
        overlap: likewise.
        merge_iou: likewise.
        batch_size: likewise.
        threshold: a query takes part when the probability of its best class is above this, in [0, 1]. This and the next
            three: `None` takes the processor's field.
        mask_threshold: a pixel stays void when the probability of its query's mask is below this, in [0, 1].
        overlap_mask_area_threshold: a segment is dropped when it wins less than this share of its own mask in its tile.
        label_ids_to_fuse: stuff classes, one segment each in the whole image.
        progress: show a progress bar.
        **processor_kwargs: for the call of the processor, such as `do_resize=False`.

    Returns:
        `segmentation`, int32 map (H, W) of segment ids, 0 = void; `segments_info`, a dict with `id` (from 1), `label_id`,
        `was_fused` (its class is in `label_ids_to_fuse`) and `score` for each segment of the map.

    Raises:
        ValueError: says what was expected, what came and what to do.
    """
    source = SourceImage.of(image, processor_kwargs.pop("input_data_format", None))
    tiles = make_tiles(source.size, tile_size, overlap)
    post_process = partial(
        panoptic_segmentation,
        score_threshold=or_field(processor, "score_threshold", threshold),
        mask_threshold=or_field(processor, "mask_threshold", mask_threshold),
        overlap_mask_area_threshold=or_field(processor, "overlap_mask_area_threshold", overlap_mask_area_threshold),
        label_ids_to_fuse=or_field(processor, "label_ids_to_fuse", label_ids_to_fuse),
    )
    collector = PanopticCollector(source.size, merge_iou)
    predictor = TilePredictor(model, processor, processor_kwargs, post_process)
    predictor.run(source, tiles, batch_size, progress, take=collector.add)
    return collector.result()


def or_field(processor: Processor, name: str, argument: Any) -> Any:  # noqa: ANN401
    """Take an argument, else the processor's field, else (processors of other models) the default of ours."""
    return getattr(processor, name, getattr(MPFormerImageProcessor, name)) if argument is None else argument


# ------------------------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Tile:
    """One tile of an image; tiles are numbered row by row.

    Attributes:
        index: its number.
        box: its pixels.
        core: those of them that count; cores share no pixel and cover the image.
        uncut: what lies in here is not cut by a seam.
        earlier: pixels that it shares with each neighbour of a lower number, by that number.
        later: likewise, of a higher number.
    """

    index: int
    box: Region
    core: Region
    uncut: Region
    earlier: dict[int, Region]
    later: dict[int, Region]


def make_tiles(image_size: Size, tile_size: Size, overlap: int) -> list[Tile]:
    """Cover an image with overlapping tiles, all of one size, spread evenly.

    Args:
        image_size: (H, W).
        tile_size: height and width; along an axis where the image is smaller, tiles are as long as the image.
        overlap: least pixels that neighbours share along an axis.
    """
    sides = tuple(tile_size) if isinstance(tile_size, Sequence) else ()
    if len(sides) != len(image_size) or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"`tile_size` must be (height, width), two positive integers, got {tile_size!r}.")
    if not 1 <= overlap < min(sides):
        raise ValueError(
            f"`overlap` must be at least 1, for objects to be compared, and below both sides of `tile_size` {sides}, got "
            f"{overlap}. A quarter of the tile is a good start."
        )
    rows, columns = (cover_axis(length, side, overlap) for length, side in zip(image_size, sides, strict=True))
    boxes = [Region(row.start, column.start, row.stop, column.stop) for row in rows for column in columns]
    return [make_tile(index, rows, columns, boxes) for index in range(len(boxes))]


def make_tile(index: int, rows: list[Span], columns: list[Span], boxes: list[Region]) -> Tile:
    """Make one tile of the grid of rows and columns; `boxes` are those of all tiles."""
    row_index, column_index = divmod(index, len(columns))
    neighbours = [
        (row_index + row_step) * len(columns) + column_index + column_step
        for row_step in (-1, 0, 1)
        for column_step in (-1, 0, 1)
        if 0 <= row_index + row_step < len(rows) and 0 <= column_index + column_step < len(columns)
    ]
    row, column = rows[row_index], columns[column_index]
    return Tile(
        index=index,
        box=boxes[index],
        core=Region(row.core_start, column.core_start, row.core_stop, column.core_stop),
        uncut=Region(row.uncut_start, column.uncut_start, row.uncut_stop, column.uncut_stop),
        earlier={other: boxes[index] & boxes[other] for other in neighbours if other < index},
        later={other: boxes[index] & boxes[other] for other in neighbours if other > index},
    )


# ------------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class TilePredictor:
    """From tiles to predictions; `post_process` takes class logits, mask logits, valid sizes and target sizes."""

    model: Model
    processor: Processor
    processor_kwargs: dict[str, Any]
    post_process: Callable[..., list[Any]]

    def run(
        self, source: SourceImage, tiles: list[Tile], batch_size: int, progress: bool, take: Callable[[Tile, Any], None]
    ) -> None:
        """Hand each tile with its prediction to `take`; `batch_size` tiles go through the model together."""
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        with tqdm(total=len(tiles), desc="tiles", unit="tile", disable=not progress) as bar:
            for first in range(0, len(tiles), batch_size):
                batch = tiles[first : first + batch_size]
                # Neither logits nor predictions get a name here: they would live on beside those of the next batch.
                self.run_batch(source, batch, take)
                bar.update(len(batch))

    def run_batch(self, source: SourceImage, batch: list[Tile], take: Callable[[Tile, Any], None]) -> None:
        """Predict some tiles together."""
        logits = run_model(self.model, self.prepare(source, batch), len(batch))
        for number, tile in enumerate(batch):
            take(tile, self.finish(logits.one(number), tile.box.size))

    def prepare(self, source: SourceImage, batch: list[Tile]) -> Mapping[str, Any]:
        """Cut tiles out and make them the model's inputs."""
        formats = {} if source.data_format is None else {"input_data_format": source.data_format.value}
        crops = [source.crop(tile.box) for tile in batch]
        inputs: Mapping[str, Any] = self.processor(
            images=crops, return_tensors="pt", **formats, **self.processor_kwargs
        )
        return inputs

    @torch.inference_mode()
    def finish(self, logits: Logits, size: Size) -> Any:  # noqa: ANN401
        """Post-process one tile at its own size."""
        [prediction] = self.post_process(logits.classes, logits.masks, logits.sizes, [size])
        return prediction


# ------------------------------------------------------------------------------------------------------- parts and seams


@dataclass(frozen=True)
class Part:
    """What one tile shows of an object.

    Attributes:
        tile: number of the tile.
        label: class.
        score: in [0, 1].
        is_cut: it comes near a seam of its tile, so it may go on behind it.
        has_core: it has pixels in the core of its tile.
        is_fused: it is of a class of which the image has one segment only.
    """

    tile: int
    label: int
    score: float
    is_cut: bool
    has_core: bool
    is_fused: bool = False


@dataclass(frozen=True)
class Link:
    """Two parts, by their numbers, that may be one object, and the IoU that says so."""

    iou: float
    first: int
    second: int


@dataclass(frozen=True)
class Strip:
    """The parts of one tile in its overlap with another one.

    Attributes:
        parts: int64, (n,), their numbers.
        labels: int64, (n,), their classes.
        areas: int64, (n,), their pixels in the overlap.
        pixels: masks that may overlap: uint8, (n, ceil(P / 8)), eight pixels a byte. A map: int32, (P,), 0 is void and 1
            the first part.
    """

    parts: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    pixels: np.ndarray


CommonPixels = Callable[[Strip, Strip], np.ndarray]


class Seams:
    """Finds the links between tiles; keeps strips no longer than until both tiles of a pair have come.

    Args:
        merge_iou: in (0, 1].
        common_pixels: counts the pixels that each part of one strip shares with each of another, int64 (n, n there).
    """

    def __init__(self, merge_iou: float, common_pixels: CommonPixels) -> None:
        if not 0 < merge_iou <= 1:
            raise ValueError(f"`merge_iou` must be above 0 and at most 1, got {merge_iou}.")
        self.merge_iou = merge_iou
        self.common_pixels = common_pixels
        self.links: list[Link] = []
        self.waiting: dict[tuple[int, int], Strip] = {}

    def add(self, tile: Tile, cut: Callable[[Region], Strip]) -> None:
        """Compare a tile with its neighbours that have come, and keep what the others will need.

        Args:
            tile: the next tile; they come in the order of their numbers.
            cut: makes the strip of this tile in a region of the image.
        """
        for other, region in tile.earlier.items():
            strip, mine = self.waiting.pop((other, tile.index)), cut(region)
            self.links += find_links(strip, mine, self.common_pixels(strip, mine), self.merge_iou)
        for other, region in tile.later.items():
            self.waiting[tile.index, other] = cut(region)


def find_links(first: Strip, second: Strip, common: np.ndarray, merge_iou: float) -> list[Link]:
    """Pair the parts of two tiles that are of one class and overlap enough; best first, each part at most once."""
    union = first.areas[:, None] + second.areas[None] - common
    iou = common / np.maximum(union, 1)
    iou[first.labels[:, None] != second.labels[None]] = 0
    rows, columns = np.nonzero(iou >= merge_iou)
    order = np.argsort(-iou[rows, columns], kind="stable")
    links: list[Link] = []
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in taken_rows and column not in taken_columns:
            taken_rows.add(row)
            taken_columns.add(column)
            links.append(Link(float(iou[row, column]), int(first.parts[row]), int(second.parts[column])))
    return links


class Groups:
    """Sets of parts that are one object (union-find); the lowest number leads a set."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.leaders = list(range(len(parts)))
        # Of each set: its tiles, and whether one of them shows a part of it whole.
        self.shown_whole = [{part.tile: not part.is_cut} for part in parts]

    def leader(self, number: int) -> int:
        """The lowest number of a part's set."""
        while self.leaders[number] != number:
            self.leaders[number] = self.leaders[self.leaders[number]]
            number = self.leaders[number]
        return number

    def may_join(self, first: int, second: int) -> bool:
        """False where a tile has told the two apart: it shows parts of both, and one of those whole."""
        mine, theirs = self.shown_whole[self.leader(first)], self.shown_whole[self.leader(second)]
        return not any(mine[tile] or theirs[tile] for tile in mine.keys() & theirs.keys())

    def join(self, first: int, second: int) -> None:
        """Make one set of the sets of two parts."""
        low, high = sorted((self.leader(first), self.leader(second)))
        if low == high:
            return
        self.leaders[high] = low
        for tile, is_whole in self.shown_whole[high].items():
            self.shown_whole[low][tile] = is_whole or self.shown_whole[low].get(tile, False)


def group_parts(parts: Sequence[Part], links: Sequence[Link]) -> list[list[int]]:
    """Collect the numbers of the parts of each object; parts without core pixels help to join, but are left out.

    Returns:
        Parts of each object that has core pixels, in the order of the objects' first parts.
    """
    groups = Groups(parts)
    fused: dict[int, int] = {}
    for number, part in enumerate(parts):
        if part.is_fused:
            groups.join(fused.setdefault(part.label, number), number)
    for link in sorted(links, key=lambda link: (-link.iou, link.first, link.second)):
        if groups.may_join(link.first, link.second):
            groups.join(link.first, link.second)
    members: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        if part.has_core:
            members.setdefault(groups.leader(number), []).append(number)
    return list(members.values())


# --------------------------------------------------------------------------------------------------------------- instances


@dataclass(frozen=True)
class PackedMask:
    """A mask in its box, eight pixels a byte."""

    box: Region
    bits: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray, box: Region) -> Self:
        """Pack a bool mask that has the size of its box."""
        return cls(box, np.packbits(mask))

    def unpack(self) -> np.ndarray:
        """The bool mask."""
        height, width = self.box.size
        return np.unpackbits(self.bits, count=height * width).view(bool).reshape(height, width)


def strip_of_masks(masks: np.ndarray, labels: np.ndarray, first_part: int) -> Strip:
    """Keep what one tile's masks have in an overlap, bool (n, rows, columns); `first_part` is the number of the first."""
    used = np.flatnonzero(masks.any((1, 2)))
    occupied = masks[used]
    bits = np.packbits(occupied.reshape(len(used), masks[0].size if len(masks) else 0), axis=1)
    return Strip(first_part + used, labels[used], occupied.sum((1, 2)), bits)


def common_pixels_of_masks(first: Strip, second: Strip) -> np.ndarray:
    """See `Seams`. Matrix products of a band of pixels at a time; float32 counts exactly below 2**24."""
    common = np.zeros((len(first.parts), len(second.parts)), dtype=np.int64)
    if not common.size:
        return common
    band = max(1, COMPARED_BYTES // (BYTES_TO_COMPARE * sum(common.shape)))
    for start in range(0, first.pixels.shape[1], band):
        mine, theirs = (
            np.unpackbits(strip.pixels[:, start : start + band], axis=1).astype(np.float32) for strip in (first, second)
        )
        common += (mine @ theirs.T).astype(np.int64)
    return common


class InstanceCollector:
    """Makes the instances of an image of those of its tiles."""

    def __init__(self, image_size: Size, merge_iou: float) -> None:
        self.image_size = image_size
        self.seams = Seams(merge_iou, common_pixels_of_masks)
        self.parts: list[Part] = []
        self.core_masks: list[PackedMask] = []  # of each part; of no pixels, where it has none in the core

    def add(self, tile: Tile, prediction: InstancePrediction) -> None:
        """Take the instances of the next tile."""
        masks = prediction.masks.cpu()
        array, labels = masks.numpy(), prediction.labels.cpu().numpy()
        first_part = len(self.parts)
        self.seams.add(
            tile, lambda region: strip_of_masks(array[(slice(None), *region.within(tile.box))], labels, first_part)
        )
        boxes = to_regions(mask_boxes(masks), tile.box)
        core_boxes = to_regions(mask_boxes(masks[(slice(None), *tile.core.within(tile.box))]), tile.core)
        scores = prediction.scores.tolist()
        for mask, box, core_box, label, score in zip(array, boxes, core_boxes, labels.tolist(), scores, strict=True):
            self.parts.append(
                Part(
                    tile=tile.index,
                    label=label,
                    score=score,
                    is_cut=box & tile.uncut != box,
                    has_core=min(core_box.size) > 0,
                )
            )
            self.core_masks.append(PackedMask.of(mask[core_box.within(tile.box)], core_box))

    def result(self) -> dict[str, Any]:
        """Join the parts; the form is that of `tiled_instance_segmentation`."""
        instances = group_parts(self.parts, self.seams.links)
        scores = [max(self.parts[number].score for number in numbers) for numbers in instances]
        order = sorted(range(len(instances)), key=lambda index: -scores[index])
        segmentation = np.full(self.image_size, NO_INSTANCE, dtype=np.int32)
        image = Region(0, 0, *self.image_size)
        rles, boxes = [], []
        for rank in reversed(range(len(order))):  # what is painted later lies on top
            mask, box = self.dense_mask(instances[order[rank]])
            segmentation[box.within(image)][mask] = rank
            rles.append(encode_cropped_rle(torch.from_numpy(mask), box.top, box.left, *self.image_size))
            boxes.append([box.left, box.top, box.right, box.bottom])
        labels = [self.parts[instances[index][0]].label for index in order]
        scores = [scores[index] for index in order]
        return {
            "segmentation": torch.from_numpy(segmentation),
            "segments_info": [
                {"id": rank, "label_id": label, "was_fused": False, "score": score}
                for rank, (label, score) in enumerate(zip(labels, scores, strict=True))
            ],
            "rles": rles[::-1],
            "scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": torch.tensor(boxes[::-1], dtype=torch.float32).reshape(-1, 4),
        }

    def dense_mask(self, numbers: Sequence[int]) -> tuple[np.ndarray, Region]:
        """Join the core masks of some parts in the box around them."""
        packed = [self.core_masks[number] for number in numbers]
        around = packed[0].box
        for one in packed[1:]:
            around |= one.box
        mask = np.zeros(around.size, dtype=bool)
        for one in packed:
            mask[one.box.within(around)] |= one.unpack()
        return mask, around


def to_regions(boxes: Tensor, origin: Region) -> list[Region]:
    """Turn boxes (n, 4), x1, y1, x2, y2 in an array that holds `origin`, to regions of the image."""
    return [
        Region(origin.top + top, origin.left + left, origin.top + bottom, origin.left + right)
        for left, top, right, bottom in boxes.long().tolist()
    ]


# ---------------------------------------------------------------------------------------------------------------- panoptic


def strip_of_map(ids: np.ndarray, labels: np.ndarray, first_part: int) -> Strip:
    """Keep what one tile's map has in an overlap, int32 (rows, columns); `labels` are those of its segments."""
    areas = np.bincount(ids.ravel(), minlength=len(labels) + 1)[1:]
    return Strip(first_part + np.arange(len(labels)), labels, areas, ids.flatten())


def common_pixels_of_maps(first: Strip, second: Strip) -> np.ndarray:
    """See `Seams`. Pixels are counted by their pair of ids."""
    num_first, num_second = len(first.parts) + 1, len(second.parts) + 1
    pairs = first.pixels.astype(np.int64) * num_second + second.pixels
    return np.bincount(pairs, minlength=num_first * num_second).reshape(num_first, num_second)[1:, 1:]


class PanopticCollector:
    """Makes the panoptic map of an image of those of its tiles."""

    def __init__(self, image_size: Size, merge_iou: float) -> None:
        self.seams = Seams(merge_iou, common_pixels_of_maps)
        self.parts: list[Part] = []
        self.part_map = np.zeros(image_size, dtype=np.int32)  # number of each pixel's part, plus 1; 0 is void

    def add(self, tile: Tile, prediction: PanopticPrediction) -> None:
        """Take the segments of the next tile."""
        ids, segments = prediction.segmentation.cpu().numpy(), prediction.segments
        labels = np.array([segment.label_id for segment in segments], dtype=np.int64)
        first_part = len(self.parts)
        self.seams.add(tile, lambda region: strip_of_map(ids[region.within(tile.box)], labels, first_part))
        core = ids[tile.core.within(tile.box)]
        near_seam = np.ones(ids.shape, dtype=bool)
        near_seam[tile.uncut.within(tile.box)] = False
        in_core = np.bincount(core.ravel(), minlength=len(segments) + 1) > 0
        is_cut = np.bincount(ids[near_seam], minlength=len(segments) + 1) > 0
        self.parts += [
            Part(
                tile=tile.index,
                label=segment.label_id,
                score=segment.score,
                is_cut=bool(is_cut[segment.id]),
                has_core=bool(in_core[segment.id]),
                is_fused=segment.was_fused,
            )
            for segment in segments
        ]
        image = Region(0, 0, *self.part_map.shape)
        self.part_map[tile.core.within(image)] = np.where(core == VOID, VOID, core + first_part)

    def result(self) -> dict[str, Any]:
        """Join the parts; the form is that of `tiled_panoptic_segmentation`. The collector is used up."""
        ids = np.full(len(self.parts) + 1, VOID, dtype=np.int32)
        segments_info = []
        for segment_id, numbers in enumerate(group_parts(self.parts, self.seams.links), start=1):
            ids[np.array(numbers) + 1] = segment_id
            first = self.parts[numbers[0]]
            segments_info.append(
                {
                    "id": segment_id,
                    "label_id": first.label,
                    "was_fused": first.is_fused,
                    "score": max(self.parts[number].score for number in numbers),
                }
            )
        for start in range(0, len(self.part_map), RELABELLED_ROWS):
            rows = self.part_map[start : start + RELABELLED_ROWS]
            rows[:] = ids[rows]
        return {"segmentation": torch.from_numpy(self.part_map), "segments_info": segments_info}


__all__ = ["tiled_instance_segmentation", "tiled_panoptic_segmentation"]
