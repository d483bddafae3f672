"""Logits to semantic maps, instances and panoptic segments, by the rules of Mask2Former's inference (arXiv 2112.01527).

`semantic_segmentation`, `instance_segmentation` and `panoptic_segmentation` take the class and mask logits of a batch,
the valid size of each padded image and the target sizes. They know no model, so they also serve transformers'
Mask2Former, MaskFormer and EoMT.

Every result is defined by one path: mask logits bilinear (align_corners False) to the padded image, cropped to the
valid size, bilinear to the target size, and only then a threshold. The path is walked in bands of rows (`bands`), so
that no float tensor of the target size exists for all queries or classes at once; the numbers are those of the whole.

Axes: B images, Q queries, K classes, N segments, h w mask logits (1/4 of the padded image), H W target size.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MASK_STRIDE = 4  # pixels of the padded image for one cell of the mask logits, along each side
BAND_BYTES = 32 * 2**20  # memory for the float tensors of one band
EPSILON = 1e-6  # the original's, in the mean mask probability of an instance
VOID = 0
NO_INSTANCE = -1

Size = tuple[int, int]  # height, width


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
    """

    masks: Tensor
    scores: Tensor
    labels: Tensor


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


@dataclass(frozen=True)
class ImageGeometry:
    """Sizes of one image on its way from mask logits to the result: padded, valid (top left of it), target."""

    padded: Size
    valid: Size
    target: Size


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
    """
    geometries = batch_geometries(class_logits, mask_logits, image_sizes, target_sizes)
    return [
        semantic_map(classes.float().softmax(-1)[:, :-1], masks, geometry, combine_before_resize, return_scores)
        for classes, masks, geometry in zip(class_logits, mask_logits, geometries, strict=True)
    ]


def semantic_map(
    class_probabilities: Tensor,
    mask_logits: Tensor,
    geometry: ImageGeometry,
    combine_before_resize: bool,
    return_scores: bool,
) -> SemanticPrediction:
    """Combine the queries of one image: (Q, K) class probabilities and (Q, h, w) mask logits."""
    num_classes = class_probabilities.shape[1]
    segmentation = mask_logits.new_empty(geometry.target, dtype=torch.int64)
    scores = mask_logits.new_empty((num_classes, *geometry.target), dtype=torch.float32) if return_scores else None

    def combine(logits: Tensor) -> Tensor:
        return torch.einsum("qk,qhw->khw", class_probabilities, logits.sigmoid())

    between = combine if combine_before_resize else None
    for rows, values in bands(mask_logits, geometry, between=between, other_channels=num_classes):
        class_scores = values if combine_before_resize else combine(values)
        segmentation[rows] = class_scores.argmax(0)
        if scores is not None:
            scores[:, rows] = class_scores
    return SemanticPrediction(segmentation, scores)


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
    """
    check_share("score_threshold", score_threshold)
    check_share("mask_threshold", mask_threshold)
    check_share("overlap_mask_area_threshold", overlap_mask_area_threshold)
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    geometries = batch_geometries(class_logits, mask_logits, image_sizes, target_sizes)
    predictions = []
    for classes, masks, geometry in zip(class_logits, mask_logits, geometries, strict=True):
        query, label, score = best_pairs(classes, top_k, score_threshold, label_ids_to_drop)
        binary, probability = binary_masks(masks, query, geometry, mask_threshold)
        prediction = sort_instances(binary, score * probability, label, score_threshold)
        predictions.append(drop_covered(prediction, overlap_mask_area_threshold))
    return predictions


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


def binary_masks(
    mask_logits: Tensor, query: Tensor, geometry: ImageGeometry, mask_threshold: float
) -> tuple[Tensor, Tensor]:
    """Resize and threshold the masks of some queries; a query that is named twice is resized once.

    Args:
        mask_logits: (Q, h, w).
        query: int64, (N,).
        geometry: sizes of the image.
        mask_threshold: in [0, 1].

    Returns:
        masks (bool, (N, H, W)) and the mean probability inside each (float32, (N,); 0 where a mask is empty).
    """
    used, position = query.unique(return_inverse=True)
    masks = mask_logits.new_empty((len(used), *geometry.target), dtype=torch.bool)
    area = mask_logits.new_zeros(len(used), dtype=torch.float32)
    total = mask_logits.new_zeros(len(used), dtype=torch.float32)
    threshold = logit_of(mask_threshold)
    for rows, logits in bands(mask_logits[used], geometry, other_channels=len(used)):
        inside = logits > threshold
        masks[:, rows] = inside
        area += inside.sum((-2, -1))
        total += (logits.sigmoid() * inside).sum((-2, -1))
    return masks[position], (total / (area + EPSILON))[position]


def sort_instances(masks: Tensor, scores: Tensor, labels: Tensor, score_threshold: float | None) -> InstancePrediction:
    """Put the highest score first; with a threshold, drop what is below it or has no pixel."""
    scores, order = scores.sort(descending=True, stable=True)
    if score_threshold is not None:
        keep = (scores >= score_threshold) & masks.flatten(1).any(1)[order]
        scores, order = scores[keep], order[keep]
    return InstancePrediction(masks[order], scores, labels[order])


def drop_covered(prediction: InstancePrediction, overlap_mask_area_threshold: float) -> InstancePrediction:
    """Drop instances of which higher scores leave too little. What is dropped covers nothing itself."""
    if overlap_mask_area_threshold <= 0 or not len(prediction.scores):
        return prediction
    free = torch.ones_like(prediction.masks[0])
    keep = []
    for index, mask in enumerate(prediction.masks):
        if (mask & free).sum() >= overlap_mask_area_threshold * mask.sum():
            keep.append(index)
            free &= ~mask
    return InstancePrediction(prediction.masks[keep], prediction.scores[keep], prediction.labels[keep])


def instance_map(masks: Tensor) -> Tensor:
    """View overlapping masks as one map, in which each pixel belongs to the first mask that covers it.

    Args:
        masks: bool, (N, H, W), highest score first.

    Returns:
        int32, (H, W), index of the mask; -1 where there is none.
    """
    segmentation = masks.new_full(masks.shape[-2:], NO_INSTANCE, dtype=torch.int32)
    for index in reversed(range(len(masks))):
        segmentation[masks[index]] = index
    return segmentation


def mask_boxes(masks: Tensor) -> Tensor:
    """Find the tight box around each mask.

    Args:
        masks: bool, (N, H, W).

    Returns:
        float32, (N, 4), x1, y1, x2, y2 in pixels; x2 and y2 are the edge behind the last pixel. Zeros for an empty
        mask.
    """
    x1, x2 = first_and_behind_last(masks.any(-2))
    y1, y2 = first_and_behind_last(masks.any(-1))
    boxes = torch.stack([x1, y1, x2, y2], dim=-1)
    return (boxes * masks.flatten(1).any(1)[:, None]).float()


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
    """
    check_share("score_threshold", score_threshold)
    check_share("mask_threshold", mask_threshold)
    check_share("overlap_mask_area_threshold", overlap_mask_area_threshold)
    geometries = batch_geometries(class_logits, mask_logits, image_sizes, target_sizes)
    predictions = []
    for classes, masks, geometry in zip(class_logits, mask_logits, geometries, strict=True):
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
    for rows, logits in bands(mask_logits, geometry, other_channels=num_queries):
        best = (logits.sigmoid() * scores[:, None, None]).argmax(0)
        inside = logits >= threshold
        winner[rows] = best.to(torch.int32)
        is_inside[rows] = inside.gather(0, best[None])[0]
        area += inside.sum((-2, -1))
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


def bands(
    mask_logits: Tensor,
    geometry: ImageGeometry,
    between: Callable[[Tensor], Tensor] | None = None,
    other_channels: int = 0,
) -> Iterator[tuple[slice, Tensor]]:
    """Walk the mask logits of one image at the target size, a band of rows at a time.

    Bilinear resizing treats rows and columns separately, so a band is resized from the few rows that it needs.

    Args:
        mask_logits: any float type, (N, h, w).
        geometry: sizes of the image.
        between: applied to the values at the padded size, cropped, before they go to the target size; (N, rows,
            columns) to (channels, rows, columns).
        other_channels: float channels of the target size that the caller keeps while it works on a band.

    Yields:
        Rows of the target and their values: float32, (N or channels, rows, W).
    """
    channels = max(1, 2 * len(mask_logits) + other_channels)
    width = max(geometry.valid[1], geometry.target[1])
    band_height = max(1, BAND_BYTES // (4 * channels * width))
    to_padded = BilinearTaps.between(mask_logits.shape[-2], geometry.padded[0])
    to_target = BilinearTaps.between(geometry.valid[0], geometry.target[0])
    has_second_step = geometry.target != geometry.valid
    for start in range(0, geometry.target[0], band_height):
        rows = slice(start, min(start + band_height, geometry.target[0]))
        needed = to_target.needed(rows) if has_second_step else rows
        values = to_padded.resize_rows(mask_logits.float(), needed)
        values = resize_columns(values, geometry.padded[1])[..., : geometry.valid[1]]
        if between is not None:
            values = between(values)
        if has_second_step:
            values = to_target.resize_rows(values, rows, first_row=needed.start)
            values = resize_columns(values, geometry.target[1])
        yield rows, values


@dataclass(frozen=True)
class BilinearTaps:
    """Where the rows of a bilinear resize (align_corners False) come from.

    Attributes:
        low: int64, (size out,), the row above each output row; on the CPU.
        high: int64, (size out,), the row below.
        weight: float32, (size out,), weight of `high`, in [0, 1].
    """

    low: Tensor
    high: Tensor
    weight: Tensor

    @classmethod
    def between(cls, size_in: int, size_out: int) -> "BilinearTaps":
        """Compute the taps of a resize from `size_in` to `size_out` rows."""
        source = (torch.arange(size_out, dtype=torch.float64) + 0.5) * (size_in / size_out) - 0.5
        source = source.clamp(0, size_in - 1)
        low = source.floor().long()
        return cls(low, (low + 1).clamp(max=size_in - 1), (source - low).float())

    def needed(self, rows: slice) -> slice:
        """Rows of the input that some rows of the output are made of."""
        return slice(int(self.low[rows.start]), int(self.high[rows.stop - 1]) + 1)

    def resize_rows(self, values: Tensor, rows: slice, first_row: int = 0) -> Tensor:
        """Make some rows of the output.

        Args:
            values: float32, (channels, height, width), the input from `first_row` on.
            rows: the rows of the output to make.
            first_row: the row of the input that `values` begins with.

        Returns:
            float32, (channels, rows, width).
        """
        low = (self.low[rows] - first_row).to(values.device)
        high = (self.high[rows] - first_row).to(values.device)
        weight = self.weight[rows, None].to(values.device)
        return torch.lerp(values[:, low], values[:, high], weight)


def resize_columns(values: Tensor, width: int) -> Tensor:
    """Resize float32 (channels, height, width in) bilinearly along its last axis."""
    size = (values.shape[-2], width)
    if not values.numel() or values.shape[-1] == width:
        return values.new_empty((len(values), *size)) if not values.numel() else values
    return nn.functional.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]


def batch_geometries(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_sizes: Tensor | Sequence[Size] | None,
    target_sizes: Tensor | Sequence[Size] | None,
) -> list[ImageGeometry]:
    """Check the inputs of a batch and collect the sizes of each image.

    Raises:
        ValueError: ranks or counts do not fit, or a size is impossible; the message names the image.
    """
    ranks = (class_logits.dim(), mask_logits.dim())
    if ranks != (3, 4) or class_logits.shape[:2] != mask_logits.shape[:2]:
        raise ValueError(
            "Expected class logits (images, queries, classes + 1) and mask logits (images, queries, height, width) of "
            f"equal images and queries, got {tuple(class_logits.shape)} and {tuple(mask_logits.shape)}."
        )
    if class_logits.shape[-1] < 2:  # noqa: PLR2004
        raise ValueError(
            f"Expected class logits of at least one class and, last, of 'no object', got {class_logits.shape[-1]} in "
            "all."
        )
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
        if len(pair) != 2 or min(pair) < 1 or any(int(length) != length for length in pair):  # noqa: PLR2004
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
