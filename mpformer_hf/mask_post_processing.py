"""Logits to semantic maps, instances and panoptic segments, by the rules of Mask2Former's inference (arXiv 2112.01527).

`semantic_segmentation`, `instance_segmentation` and `panoptic_segmentation` take the class and mask logits of a batch,
the valid size of each padded image and the target sizes. They know no model, so they also serve transformers'
Mask2Former, MaskFormer and EoMT.

Every result is defined by one path: mask logits bilinear (align_corners False) to the padded image, cropped to the
valid size, bilinear to the target size, and only then a threshold. The path is walked block by block
(`mask_resizing.py`), and for instances inside the box of each mask, so that no float tensor of the target size exists
for all queries or classes at once; the numbers are those of the whole, up to rounding.

Axes: B images, Q queries, K classes, N segments, h w mask logits (1/4 of the padded image), H W target size.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mask_resizing import (
    AxisResize,
    ImageGeometry,
    ResizedMasks,
    Size,
    blocks,
    exact_float32,
    resample,
)

MASK_STRIDE = 4  # pixels of the padded image for one cell of the mask logits, along each side
EPSILON = 1e-6  # the original's, in the mean mask probability of an instance
VOID = 0
NO_INSTANCE = -1


@dataclass(frozen=True)
class SemanticPrediction:
    """Semantic map of one image.

    Attributes:
        segmentation: int64, (H, W), class of each pixel.
        scores: float32, (K, H, W), sum over queries of class times mask probability; `None` unless asked for.
    """

    segmentation: Tensor
    scores: Tensor | None


@dataclass(frozen=True)
class InstancePrediction:
    """Instances of one image, highest score first.

    Attributes:
        masks: bool, (N, H, W). True is inside. They may overlap.
        scores: float32, (N,), class probability times mean mask probability inside the mask.
        labels: int64, (N,).
        boxes: float32, (N, 4), tight boxes x1, y1, x2, y2 as of `mask_boxes`.
    """

    masks: Tensor
    scores: Tensor
    labels: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class PanopticSegment:
    """One segment of a panoptic map: its id there, class, whether its class is fused to one segment, and score."""

    id: int
    label_id: int
    was_fused: bool
    score: float


@dataclass(frozen=True)
class PanopticPrediction:
    """Panoptic map of one image.

    Attributes:
        segmentation: int32, (H, W), segment ids from 1; 0 is void.
        segments: the segments of the map, each id once, in the order of their queries.
    """

    segmentation: Tensor
    segments: list[PanopticSegment]


def semantic_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_sizes: Tensor | Sequence[Size] | None = None,
    target_sizes: Tensor | Sequence[Size] | None = None,
    *,
    combine_before_resize: bool = False,
    return_scores: bool = False,
) -> list[SemanticPrediction]:
    """Give each pixel the class with the highest sum over queries of class probability times mask probability.

    Args:
        class_logits: any float type, (B, Q, K + 1), last is "no object".
        mask_logits: any float type, (B, Q, h, w).
        image_sizes: valid height and width of each padded image; `None`: all of it is valid.
        target_sizes: height and width of each result; `None`: the valid size.
        combine_before_resize: combine classes and masks at the padded size and resize the class scores, as the original
            does for semantic-only models (True), or resize the mask logits and combine then (False).
        return_scores: return the scores of all classes too.

    Returns:
        One prediction an image.

    Raises:
        ValueError: shapes, sizes or values cannot be; the message names the image.
    """
    geometries = batch_geometries(class_logits, mask_logits, image_sizes, target_sizes)
    with exact_float32(mask_logits.device):
        return [
            semantic_map(ClassScores(classes, masks, geometry, combine_before_resize), return_scores)
            for classes, masks, geometry in zip(class_logits, mask_logits, geometries, strict=True)
        ]


def semantic_map(scores: "ClassScores", return_scores: bool) -> SemanticPrediction:
    """Take the best class of each pixel of one image, block by block."""
    segmentation = torch.empty(scores.size, dtype=torch.int64, device=scores.device)
    all_scores = torch.empty((scores.num_classes, *scores.size), device=scores.device) if return_scores else None
    for rows, columns in blocks(scores.size, scores.num_queries + scores.num_classes, scores.device, scores.shrink):
        window = scores.window(rows, columns)
        segmentation[rows, columns] = window.max(1).indices
        if all_scores is not None:
            all_scores[:, rows, columns] = window.transpose(0, 1)
    return SemanticPrediction(segmentation, all_scores)


class ClassScores:
    """Sum over the queries of one image of class times mask probability, computed window by window.

    Attributes:
        size: height and width of the result.
        num_queries: Q.
        num_classes: K.
        device: of the logits.
        shrink: pixels, along a side, of what is combined for one of the result; at least 1. Blocks of a smaller result are
            made of larger ones.
    """

    def __init__(
        self, class_logits: Tensor, mask_logits: Tensor, geometry: ImageGeometry, combine_before_resize: bool
    ) -> None:
        """Prepare the sums of (Q, K + 1) class logits and (Q, h, w) mask logits."""
        self.classes = class_logits.float().softmax(-1)[:, :-1].T.contiguous()  # (K, Q)
        self.num_classes, self.num_queries = self.classes.shape
        self.device = self.classes.device
        self.size = geometry.target
        self.masks = ResizedMasks(mask_logits, geometry, to_valid_size=combine_before_resize)
        self.shrink = max(1.0, *(into / out for into, out in zip(self.masks.size, self.size, strict=True)))
        self.last_step: list[AxisResize] = []
        if combine_before_resize and geometry.target != geometry.valid:
            self.last_step = [
                AxisResize.bilinear(valid, target)
                for valid, target in zip(geometry.valid, geometry.target, strict=True)
            ]

    def window(self, rows: slice, columns: slice) -> Tensor:
        """Compute the scores of all classes in a window of the result: float32, (rows, K, columns)."""
        if not self.last_step:
            return self.combine(self.masks.window(rows, columns))
        along_rows, along_columns = self.last_step
        needed_rows, needed_columns = along_rows.sources(rows), along_columns.sources(columns)
        scores = self.combine(self.masks.window(needed_rows, needed_columns))
        origin = (needed_rows.start, needed_columns.start)
        return resample(scores, along_rows, along_columns, rows, columns, origin)

    def combine(self, logits: Tensor) -> Tensor:
        """Combine mask logits (rows, Q, columns), which are overwritten, to class scores (rows, K, columns)."""
        # In the precision that torch is set to (`torch.set_float32_matmul_precision`), as the original's einsum: here it
        # moves scores, not edges.
        return self.classes @ logits.sigmoid_()


def instance_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_sizes: Tensor | Sequence[Size] | None = None,
    target_sizes: Tensor | Sequence[Size] | None = None,
    *,
    score_threshold: float | None = None,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.0,
    top_k: int = 100,
    label_ids_to_drop: Collection[int] = (),
) -> list[InstancePrediction]:
    """Take the best pairs of query and class as instances.

    With the defaults these are the original's `top_k` instances, in order of their scores and with empty masks among
    them.

    Args:
        class_logits: any float type, (B, Q, K + 1), last is "no object".
        mask_logits: any float type, (B, Q, h, w).
        image_sizes: valid height and width of each padded image; `None`: all of it is valid.
        target_sizes: height and width of each result; `None`: the valid size.
        score_threshold: least score of an instance, in [0, 1]; instances without any pixel go too. `None` keeps all.
        mask_threshold: a pixel belongs to a mask where its probability is above this, in [0, 1].
        overlap_mask_area_threshold: least share of its own area that an instance must keep when higher scores take the
            pixels that they cover, in [0, 1]. Instances that keep less are dropped, as in a panoptic map. 0 keeps all.
        top_k: pairs of query and class to take, before any threshold.
        label_ids_to_drop: classes whose pairs are dropped after the top-k, as the original drops stuff.

    Returns:
        One prediction an image.

    Raises:
        ValueError: shapes, sizes or values cannot be, the message names the image; or a threshold is not in [0, 1].
    """
    check_share("score_threshold", score_threshold)
    check_share("mask_threshold", mask_threshold)
    check_share("overlap_mask_area_threshold", overlap_mask_area_threshold)
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    geometries = batch_geometries(class_logits, mask_logits, image_sizes, target_sizes)
    with exact_float32(mask_logits.device):
        return [
            image_instances(
                masks,
                best_pairs(classes, top_k, score_threshold, label_ids_to_drop),
                geometry,
                score_threshold,
                mask_threshold,
                overlap_mask_area_threshold,
            )
            for classes, masks, geometry in zip(class_logits, mask_logits, geometries, strict=True)
        ]


def image_instances(
    mask_logits: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    geometry: ImageGeometry,
    score_threshold: float | None,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
) -> InstancePrediction:
    """Make the instances of one image from its (Q, h, w) mask logits and the best pairs, see `best_pairs`."""
    query, labels, class_scores = pairs
    used, position = query.unique(return_inverse=True)
    crops, probability = crop_masks(mask_logits[used], geometry, mask_threshold)
    scores = class_scores * probability[position]
    prediction = sort_instances(crops, position, scores, labels, score_threshold, geometry.target)
    return drop_covered(prediction, overlap_mask_area_threshold)


def best_pairs(
    class_logits: Tensor, top_k: int, score_threshold: float | None, label_ids_to_drop: Collection[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the `top_k` pairs of query and class with the highest class probability.

    The final score is this probability times a mean of mask probabilities, so what is below the threshold here is
    dropped before its mask is resized.

    Returns:
        query (int64), label (int64) and class probability (float32) of each pair, (pairs,) each.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]  # (Q, K)
    num_classes = probabilities.shape[1]
    scores, index = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    query, label = index // num_classes, index % num_classes
    keep = torch.ones_like(scores, dtype=torch.bool)
    if score_threshold is not None:
        keep &= scores >= score_threshold
    if label_ids_to_drop:
        keep &= ~torch.isin(label, torch.tensor(sorted(label_ids_to_drop), device=label.device))
    return query[keep], label[keep], scores[keep]


@dataclass(frozen=True)
class MaskCrop:
    """The part of a mask that may hold foreground: bool (rows, columns), and where its first pixel lies."""

    mask: Tensor
    top: int
    left: int


def crop_masks(mask_logits: Tensor, geometry: ImageGeometry, mask_threshold: float) -> tuple[list[MaskCrop], Tensor]:
    """Resize and threshold masks, each in the box that its logits above the threshold reach.

    Args:
        mask_logits: (N, h, w).
        geometry: sizes of the image.
        mask_threshold: in [0, 1].

    Returns:
        N crops and the mean probability inside each mask (float32, (N,); 0 where a mask is empty).
    """
    if not len(mask_logits):
        return [], mask_logits.new_zeros(0, dtype=torch.float32)
    resized = ResizedMasks(mask_logits, geometry)
    threshold = logit_of(mask_threshold)
    occupied = resized.values > threshold
    vertical = first_and_behind_last(occupied.any(2).T)
    horizontal = first_and_behind_last(occupied.any(0))
    is_empty = ~occupied.any(2).any(0)
    reaches = torch.stack([*vertical, *horizontal, is_empty]).T.tolist()
    crops, probabilities = [], []
    for index, (top, bottom, left, right, empty) in enumerate(reaches):
        rows = slice(0, 0) if empty else resized.rows.outputs(slice(top, bottom))
        columns = slice(0, 0) if empty else resized.columns.outputs(slice(left, right))
        crop, probability = crop_mask(resized, index, (rows, columns), threshold)
        crops.append(crop)
        probabilities.append(probability)
    return crops, torch.stack(probabilities)


def crop_mask(resized: ResizedMasks, index: int, box: tuple[slice, slice], threshold: float) -> tuple[MaskCrop, Tensor]:
    """Threshold one mask inside its box (rows, columns), and average its probability inside (float32, scalar)."""
    rows, columns = box
    size = (rows.stop - rows.start, columns.stop - columns.start)
    mask = resized.values.new_empty(size, dtype=torch.bool)
    area = resized.values.new_zeros((), dtype=torch.float32)
    total = torch.zeros_like(area)
    for block_rows, block_columns in blocks(size, 1, area.device):
        logits = resized.window(shift(block_rows, rows), shift(block_columns, columns), slice(index, index + 1))[:, 0]
        inside = (logits > threshold).float()
        mask[block_rows, block_columns] = inside
        area += inside.sum()
        total += inside.mul_(logits.sigmoid_()).sum()
    return MaskCrop(mask, rows.start, columns.start), total / (area + EPSILON)


def shift(part: slice, outer: slice) -> slice:
    """Place a part of a part: positions counted from the start of `outer`."""
    return slice(outer.start + part.start, outer.start + part.stop)


def sort_instances(
    crops: list[MaskCrop],
    position: Tensor,
    scores: Tensor,
    labels: Tensor,
    score_threshold: float | None,
    size: Size,
) -> InstancePrediction:
    """Put the highest score first; with a threshold, drop what is below it or has no pixel.

    Args:
        crops: masks of the queries.
        position: int64, (N,), the crop of each instance; several may share one.
        scores: float32, (N,).
        labels: int64, (N,).
        score_threshold: least score, or `None`.
        size: height and width of the image.
    """
    boxes = crop_boxes(crops, scores.device)[position]
    scores, order = scores.sort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    if score_threshold is not None:
        keep = (scores >= score_threshold) & (boxes[:, 2] > boxes[:, 0])
        boxes, labels, scores, order = boxes[keep], labels[keep], scores[keep], order[keep]
    masks = scores.new_zeros((len(order), *size), dtype=torch.bool)
    for mask, index in zip(masks, position[order].tolist(), strict=True):
        crop = crops[index]
        height, width = crop.mask.shape
        mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
    return InstancePrediction(masks, scores, labels, boxes)


def crop_boxes(crops: list[MaskCrop], device: torch.device) -> Tensor:
    """Find the tight box around each cropped mask, as `mask_boxes`: float32, (N, 4)."""
    corners = torch.tensor([(crop.left, crop.top) * 2 for crop in crops], dtype=torch.float32, device=device)
    boxes = [mask_boxes(crop.mask[None])[0] for crop in crops]
    if not boxes:
        return corners.reshape(0, 4)
    inside = torch.stack(boxes)
    return (inside + corners) * (inside[:, 2:3] > 0)


def drop_covered(prediction: InstancePrediction, overlap_mask_area_threshold: float) -> InstancePrediction:
    """Drop instances of which higher scores leave too little. What is dropped covers nothing itself."""
    if overlap_mask_area_threshold <= 0 or not len(prediction.scores):
        return prediction
    free = torch.ones_like(prediction.masks[0])
    keep = []
    for index, (rows, columns) in enumerate(box_slices(prediction.boxes)):
        mask, free_here = prediction.masks[index, rows, columns], free[rows, columns]
        if (mask & free_here).sum() >= overlap_mask_area_threshold * mask.sum():
            keep.append(index)
            free_here &= ~mask
    return InstancePrediction(
        prediction.masks[keep], prediction.scores[keep], prediction.labels[keep], prediction.boxes[keep]
    )


def instance_map(masks: Tensor, boxes: Tensor | None = None) -> Tensor:
    """View overlapping masks as one map, in which each pixel belongs to the first mask that covers it.

    Args:
        masks: bool, (N, H, W), highest score first.
        boxes: (N, 4), their boxes as of `mask_boxes`, where they are known.

    Returns:
        int32, (H, W), index of the mask; -1 where there is none.
    """
    segmentation = masks.new_full(masks.shape[-2:], NO_INSTANCE, dtype=torch.int32)
    windows = box_slices(mask_boxes(masks) if boxes is None else boxes)
    for index in reversed(range(len(masks))):
        rows, columns = windows[index]
        segmentation[rows, columns].masked_fill_(masks[index, rows, columns], index)
    return segmentation


def mask_boxes(masks: Tensor) -> Tensor:
    """Find the tight box around each mask.

    Args:
        masks: bool, (N, H, W).

    Returns:
        float32, (N, 4), x1, y1, x2, y2 in pixels; x2 and y2 are the edge behind the last pixel. Zeros for an empty
        mask.
    """
    if not masks.numel():
        return masks.new_zeros((len(masks), 4), dtype=torch.float32)
    by_column, by_row = masks.any(-2), masks.any(-1)
    x1, x2 = first_and_behind_last(by_column)
    y1, y2 = first_and_behind_last(by_row)
    boxes = torch.stack([x1, y1, x2, y2], dim=-1)
    return (boxes * by_row.any(1)[:, None]).float()


def box_slices(boxes: Tensor) -> list[tuple[slice, slice]]:
    """Rows and columns of each box (N, 4) of `mask_boxes`."""
    return [(slice(y1, y2), slice(x1, x2)) for x1, y1, x2, y2 in boxes.long().tolist()]


def first_and_behind_last(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first True of each row and the place behind its last one; bool (N, length) to int64 (N,) twice."""
    length = occupied.shape[-1]
    # argmax takes the first of equal values.
    first = occupied.to(torch.uint8).argmax(-1)
    return first, length - occupied.flip(-1).to(torch.uint8).argmax(-1)


def panoptic_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_sizes: Tensor | Sequence[Size] | None = None,
    target_sizes: Tensor | Sequence[Size] | None = None,
    *,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] = (),
) -> list[PanopticPrediction]:
    """Give each pixel to the query with the highest product of class and mask probability, or to none.

    Args:
        class_logits: any float type, (B, Q, K + 1), last is "no object".
        mask_logits: any float type, (B, Q, h, w).
        image_sizes: valid height and width of each padded image; `None`: all of it is valid.
        target_sizes: height and width of each result; `None`: the valid size.
        score_threshold: queries take part when their best class is an object with a probability above this, in [0, 1].
        mask_threshold: a pixel stays void when the probability of its query's mask is below this, in [0, 1].
        overlap_mask_area_threshold: a segment is dropped when it wins less than this share of its own mask, in [0, 1].
        label_ids_to_fuse: classes (stuff) whose segments become one.

    Returns:
        One prediction an image.

    Raises:
        ValueError: shapes, sizes or values cannot be, the message names the image; or a threshold is not in [0, 1].
    """
    check_share("score_threshold", score_threshold)
    check_share("mask_threshold", mask_threshold)
    check_share("overlap_mask_area_threshold", overlap_mask_area_threshold)
    geometries = batch_geometries(class_logits, mask_logits, image_sizes, target_sizes)
    predictions = []
    for classes, masks, geometry in zip(class_logits, mask_logits, geometries, strict=True):
        with exact_float32(mask_logits.device):
            scores, labels = classes.float().softmax(-1).max(-1)
            keep = (labels != classes.shape[-1] - 1) & (scores > score_threshold)
            scores, labels = scores[keep], labels[keep]
            contest = contest_pixels(masks[keep], scores, geometry, mask_threshold)
        predictions.append(
            panoptic_map(contest, scores.tolist(), labels.tolist(), overlap_mask_area_threshold, label_ids_to_fuse)
        )
    return predictions


@dataclass(frozen=True)
class PixelContest:
    """Which query wins each pixel.

    Attributes:
        winner: int32, (H, W), index of the query with the highest product of score and mask probability.
        is_inside: bool, (H, W). True where the winner's own mask reaches the mask threshold.
        won: pixels that each query wins, inside its mask or not.
        won_inside: pixels that each query wins inside its mask.
        area: pixels of each query's mask.
    """

    winner: Tensor
    is_inside: Tensor
    won: list[int]
    won_inside: list[int]
    area: list[int]


def contest_pixels(mask_logits: Tensor, scores: Tensor, geometry: ImageGeometry, mask_threshold: float) -> PixelContest:
    """Let queries compete for the pixels: (N, h, w) mask logits and (N,) scores of one image."""
    num_queries = len(scores)
    winner = mask_logits.new_zeros(geometry.target, dtype=torch.int32)
    is_inside = mask_logits.new_zeros(geometry.target, dtype=torch.bool)
    if not num_queries:
        return PixelContest(winner, is_inside, [], [], [])
    area = mask_logits.new_zeros(num_queries, dtype=torch.int64)
    threshold = logit_of(mask_threshold)
    resized = ResizedMasks(mask_logits, geometry)
    for rows, columns in blocks(geometry.target, 2 * num_queries, scores.device):
        logits = resized.window(rows, columns)  # (rows, N, columns)
        inside = torch.ge(logits, threshold, out=torch.empty_like(logits))  # as floats: sums of bool are slow
        best = logits.sigmoid_().mul_(scores[:, None]).max(1).indices
        winner[rows, columns] = best.to(torch.int32)
        is_inside[rows, columns] = inside.gather(1, best[:, None])[:, 0] > 0
        area += inside.sum((0, 2)).long()
    won = winner.flatten().bincount(minlength=num_queries)
    won_inside = winner[is_inside].bincount(minlength=num_queries)
    return PixelContest(winner, is_inside, won.tolist(), won_inside.tolist(), area.tolist())


def panoptic_map(
    contest: PixelContest,
    scores: list[float],
    labels: list[int],
    overlap_mask_area_threshold: float,
    label_ids_to_fuse: Collection[int],
) -> PanopticPrediction:
    """Number the queries that win enough of their mask; a fused class gets one number and the best score of its parts."""
    segments: dict[int, PanopticSegment] = {}
    fused_ids: dict[int, int] = {}
    segment_of_query = [VOID] * (len(scores) + 1)
    for query, (score, label) in enumerate(zip(scores, labels, strict=True)):
        # The original compares all won pixels, not only those inside the mask, with the mask's area.
        is_too_covered = contest.won[query] < overlap_mask_area_threshold * contest.area[query]
        if not contest.won_inside[query] or is_too_covered:
            continue
        is_fused = label in label_ids_to_fuse
        segment_id = fused_ids.get(label, len(segments) + 1)
        if is_fused:
            fused_ids[label] = segment_id
        known_score = segments[segment_id].score if segment_id in segments else 0.0
        segments[segment_id] = PanopticSegment(segment_id, label, is_fused, max(score, known_score))
        segment_of_query[query] = segment_id
    table = torch.tensor(segment_of_query, dtype=torch.int32, device=contest.winner.device)
    segmentation = table[contest.winner] * contest.is_inside
    return PanopticPrediction(segmentation.to(torch.int32), list(segments.values()))


def valid_sizes(pixel_mask: Tensor) -> Tensor:
    """Measure the valid part of padded images, for `image_sizes` of the outputs of models that do not return them.

    Args:
        pixel_mask: (B, H, W), 1 (or True) on the image, which lies at the top left, 0 in the padding.

    Returns:
        int64, (B, 2), height and width.
    """
    valid = pixel_mask != 0
    return torch.stack([valid.any(dim=2).sum(dim=1), valid.any(dim=1).sum(dim=1)], dim=1)


def batch_geometries(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_sizes: Tensor | Sequence[Size] | None,
    target_sizes: Tensor | Sequence[Size] | None,
) -> list[ImageGeometry]:
    """Check the inputs of a batch and collect the sizes of each image.

    Raises:
        ValueError: ranks or counts do not fit, a size is impossible, or a logit is NaN; the message names the image.
    """
    ranks = (class_logits.dim(), mask_logits.dim())
    if ranks != (3, 4) or class_logits.shape[:2] != mask_logits.shape[:2]:
        raise ValueError(
            "Expected class logits (images, queries, classes + 1) and mask logits (images, queries, height, width) of "
            f"equal images and queries, got {tuple(class_logits.shape)} and {tuple(mask_logits.shape)}."
        )
    if class_logits.shape[-1] < 2:  # noqa: PLR2004 - a class, and "no object"
        raise ValueError(
            f"Expected class logits of at least one class and, last, of 'no object', got {class_logits.shape[-1]} in "
            "all."
        )
    refuse_nan("class logits", class_logits)
    refuse_nan("mask logits", mask_logits)
    padded = (MASK_STRIDE * mask_logits.shape[-2], MASK_STRIDE * mask_logits.shape[-1])
    num_images = len(class_logits)
    valid_sizes = sizes_as_tuples("image_sizes", image_sizes, num_images) or [padded] * num_images
    for index, valid in enumerate(valid_sizes):
        if valid[0] > padded[0] or valid[1] > padded[1]:
            raise ValueError(
                f"Image {index} has a valid size of {valid[0]} x {valid[1]}, but its mask logits of "
                f"{mask_logits.shape[-2]} x {mask_logits.shape[-1]} belong to a padded image of {padded[0]} x "
                f"{padded[1]}. `image_sizes` are sizes after the image processor; sizes of the original images go to "
                "`target_sizes`."
            )
    targets = sizes_as_tuples("target_sizes", target_sizes, num_images) or valid_sizes
    return [ImageGeometry(padded, valid, target) for valid, target in zip(valid_sizes, targets, strict=True)]


def refuse_nan(name: str, logits: Tensor) -> None:
    """Refuse logits that are not numbers: they would come out as void, or as any class."""
    # A sum is quick; it is NaN also for infinities of both signs, which are no harm.
    if not logits.detach().sum(dtype=torch.float32).isnan():
        return
    for index, values in enumerate(logits):
        if count := int(values.isnan().sum()):
            raise ValueError(
                f"Image {index} has {count} NaN among its {values.numel()} {name}. The model's weights or its input hold "
                "NaN, or half precision overflowed: check them, or run the model in bfloat16 or float32."
            )


def sizes_as_tuples(name: str, sizes: Tensor | Sequence[Size] | None, num_images: int) -> list[Size] | None:
    """Read (height, width) pairs from a tensor (B, 2) or a sequence; `None` stays `None`."""
    if sizes is None:
        return None
    pairs = [size.tolist() if isinstance(size, Tensor) else list(size) for size in sizes]
    if len(pairs) != num_images:
        raise ValueError(
            f"`{name}` must hold one (height, width) for each of the {num_images} images, got {len(pairs)} entries."
        )
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or min(pair) < 1 or any(int(length) != length for length in pair):  # noqa: PLR2004 - (h, w)
            raise ValueError(f"`{name}` of image {index} must be (height, width), two positive integers, got {pair}.")
    return [(int(height), int(width)) for height, width in pairs]


def check_share(name: str, value: float | None) -> None:
    """Refuse a threshold outside [0, 1]."""
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")


def logit_of(probability: float) -> float:
    """Turn a probability threshold into one of logits, so that 0.5 is exactly 0."""
    if probability in (0, 1):
        return -math.inf if probability == 0 else math.inf
    return math.log(probability / (1 - probability))
