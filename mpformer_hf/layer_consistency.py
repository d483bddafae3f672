"""Do a query's predictions agree from one decoder layer to the next? The two diagnostics of MP-Former (section 3).

The paper names the quantities, mIoU-L^i and Util^i; its formulas are not available to us, so the definitions are ours.
Levels are numbered from 0 (in MPFormer and Mask2Former the prediction before the first decoder layer) to V - 1.

    mIoU-L^i  mean over queries of the IoU of a query's masks at the levels i and i + 1; for all queries, and for those
              that are matched at the last level alone. Two empty masks have IoU 1.
    Util^i    share of the queries matched at the last level that are matched to the same segment at level i. It is 1 at
              the last level, which is left out. An image without matched queries has none.

A mask is where the logits, 1/4 of the padded image, are above 0. Cells in the padding do not count; a cell that is
partly in the image does, as a whole. Queries are matched as in training (`mask_matching.py`), with one difference: the
mask costs are taken over all of these cells instead of random points, so that the same predictions always give the same
numbers. A segment's value in a cell is the share of the cell, as far as it lies in the image, that the segment covers:
exact for any ratio of the image's own size to that after the image processor, and nothing thin is missed. Crowd
segments are for the caller to leave out.

Axes: V levels, B images, Q queries, T segments of one image, K classes, h w mask logits (1/4 of the padded image), P
cells that count, H W the image's own size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .mask_matching import CostWeights, assign, compute_mask_costs
from .mask_post_processing import MASK_STRIDE
from .mask_resizing import LARGEST_LOGIT, Size, exact_float32

UNMATCHED = -1
BLOCK_PIXELS = 16 * 2**20  # of ground-truth masks that are floats at a time

Masks = Tensor | NDArray[Any]


@dataclass(frozen=True)
class LevelLogits:
    """Predictions of a batch at every level.

    Attributes:
        class_logits: for each of the V levels any float type, (B, Q, K + 1), last is "no object".
        mask_logits: for each of the V levels any float type, (B, Q, h, w).
    """

    class_logits: tuple[Tensor, ...]
    mask_logits: tuple[Tensor, ...]

    def of_image(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits (Q, K + 1) and mask logits (Q, h, w) of one image, level by level; views."""
        return [level[index] for level in self.class_logits], [level[index] for level in self.mask_logits]


@dataclass(frozen=True)
class LayerConsistency:
    """What the levels of one image have in common.

    Attributes:
        query_iou: float64, (V - 1, Q), IoU of each query's masks at level i and at level i + 1.
        matches: int64, (V, Q), segment that each query is matched to, -1 if to none.
    """

    query_iou: NDArray[np.float64]
    matches: NDArray[np.int64]

    @property
    def is_matched(self) -> NDArray[np.bool_]:
        """Queries that are matched at the last level, bool, (Q,)."""
        return self.matches[-1] != UNMATCHED

    @property
    def mean_iou(self) -> list[float]:
        """mIoU-L of the levels 0 to V - 2, over all queries."""
        return self.query_iou.mean(axis=1).tolist()

    @property
    def matched_mean_iou(self) -> list[float] | None:
        """mIoU-L of the levels 0 to V - 2, over the queries matched at the last level; `None` if there are none."""
        return self.query_iou[:, self.is_matched].mean(axis=1).tolist() if self.is_matched.any() else None

    @property
    def utilisation(self) -> list[float] | None:
        """Util of the levels 0 to V - 2; `None` if no query is matched at the last level."""
        if not self.is_matched.any():
            return None
        agrees = self.matches[:-1, self.is_matched] == self.matches[-1, self.is_matched]
        return agrees.mean(axis=1).tolist()

    def least_consistent_query(self) -> int:
        """Return the query whose masks change most; one matched at the last level if there is any."""
        among = np.flatnonzero(self.is_matched) if self.is_matched.any() else np.arange(self.matches.shape[1])
        return int(among[self.query_iou[:, among].mean(axis=0).argmin()])

    def query_of_segment(self, target: int) -> int | None:
        """Return the query that the last level matches to a segment; `None` if there is none, for lack of queries."""
        queries = np.flatnonzero(self.matches[-1] == target)
        return int(queries[0]) if len(queries) else None


def level_logits(outputs: Any) -> LevelLogits:  # noqa: ANN401 - outputs of any model
    """Collect the predictions of all levels from a model's outputs.

    They are there when the model is called with `output_auxiliary_logits=True`: MPFormer, transformers' Mask2Former and
    OneFormer. transformers' MaskFormer also needs `output_hidden_states=True`, and `use_auxiliary_loss=True` in its
    config; its level 0 is the input of the decoder, which is the same for all queries.

    Args:
        outputs: with `class_queries_logits` and `masks_queries_logits` of the last level, and a list of such pairs, as
            dictionaries, in `auxiliary_logits` (`auxiliary_predictions` in OneFormer).

    Raises:
        ValueError: there is one level only, or the levels differ in their shapes.
    """
    auxiliary = getattr(outputs, "auxiliary_logits", None) or getattr(outputs, "auxiliary_predictions", None)
    if not auxiliary:
        raise ValueError(
            f"{type(outputs).__name__} holds one level of predictions, but comparing layers needs at least two. Call "
            "the model with `output_auxiliary_logits=True` and `return_dict=True`; transformers' MaskFormer also with "
            "`output_hidden_states=True` and `use_auxiliary_loss=True` in its config. A model that predicts only once, "
            "such as EoMT, has no layers to compare."
        )
    levels = LevelLogits(
        class_logits=(*(level["class_queries_logits"] for level in auxiliary), outputs.class_queries_logits),
        mask_logits=(*(level["masks_queries_logits"] for level in auxiliary), outputs.masks_queries_logits),
    )
    for name, tensors in (("class", levels.class_logits), ("mask", levels.mask_logits)):
        for number, tensor in enumerate(tensors):
            if tensor.shape != tensors[-1].shape:
                raise ValueError(
                    f"Level {number} has {name} logits of {tuple(tensor.shape)}, the last level of "
                    f"{tuple(tensors[-1].shape)}. Masks can be compared cell by cell only if all levels have one shape."
                )
    return levels


def image_layer_consistency(
    class_logits: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    mask_labels: Masks,
    class_labels: Masks | Sequence[int],
    valid_size: Sequence[int] | Tensor | None = None,
    *,
    weights: CostWeights,
) -> LayerConsistency:
    """Compare the predictions of one image level by level; two levels are looked at at a time.

    >>> logits = torch.tensor([[[5.0, -5.0]], [[5.0, 5.0]]])[:, None]  # two levels, one query, 1 x 2 cells
    >>> weights = CostWeights(label=2.0, mask=5.0, dice=5.0)
    >>> image_layer_consistency(torch.zeros(2, 1, 3), logits, torch.ones(1, 8, 16), [0], weights=weights).mean_iou
    [0.5]

    Args:
        class_logits: for each level (Q, K + 1), or one tensor (V, Q, K + 1); see `LevelLogits.of_image`.
        mask_logits: for each level (Q, h, w), or one tensor (V, Q, h, w).
        mask_labels: (T, H, W) at the image's own size, bool, integer (anything but 0 is inside) or float in [0, 1].
        class_labels: integer, (T,), in [0, K).
        valid_size: height and width of the image after the processor, without padding: `image_sizes[i]` of MPFormer's
            outputs, `valid_sizes(pixel_mask)[i]` for other models. `None`: there is no padding.
        weights: of the matching costs; those of the model's losses.

    Raises:
        ValueError: shapes, sizes, classes or logits cannot be.
    """
    check_levels(class_logits, mask_logits)
    valid = read_valid_size(mask_logits[0].shape, valid_size)
    rows, columns = (math.ceil(side / MASK_STRIDE) for side in valid)
    device = mask_logits[0].device
    segments, labels = read_targets(mask_labels, class_labels, class_logits[0].shape[-1] - 1)
    with exact_float32(device):
        shares = cell_shares(segments.to(device), valid)
        costs, ious, is_nan, previous = [], [], [], None
        for classes, masks in zip(class_logits, mask_logits, strict=True):
            logits = read_logits(masks[:, :rows, :columns].flatten(1))
            class_values = read_logits(classes)
            label_cost = -class_values.softmax(-1)[:, labels.to(device)]
            costs.append(weights.label * label_cost + compute_mask_costs(logits, shares, weights))
            is_nan.append(logits.isnan().any() | class_values.isnan().any())
            foreground = logits > 0
            if previous is not None:
                ious.append(count_overlap(previous, foreground))
            previous = foreground
    refuse_nan_levels(torch.stack(is_nan).tolist())
    return LayerConsistency(divide_overlaps(torch.stack(ious)), match_queries(torch.stack(costs)))


def enlarge_masks(mask_logits: Tensor, size: Size, valid_size: Sequence[int] | Tensor | None = None) -> Tensor:
    """Show the masks that are compared at the image's own size: each pixel takes the cell that its centre lies in.

    Args:
        mask_logits: any float type, (N, h, w), for example one query at every level.
        size: height and width of the image.
        valid_size: as in `image_layer_consistency`.

    Returns:
        bool, (N, *size), on the CPU. True where the logit is above 0.
    """
    valid = read_valid_size(mask_logits.shape, valid_size)
    rows, columns = (
        torch.arange(length).add(0.5).mul(inside / length / MASK_STRIDE).long()
        for length, inside in zip(size, valid, strict=True)
    )
    return (mask_logits.detach().cpu() > 0)[:, rows[:, None], columns]


# ---------------------------------------------------------------------------------------------------------------- input


def check_levels(class_logits: Sequence[Tensor], mask_logits: Sequence[Tensor]) -> None:
    """Refuse fewer than two levels, levels of different queries, and tensors of a batch."""
    if len(class_logits) != len(mask_logits) or len(mask_logits) < 2:  # noqa: PLR2004 - a level and the next
        raise ValueError(
            f"Expected class and mask logits of the same two or more levels, got {len(class_logits)} and "
            f"{len(mask_logits)} levels. `level_logits` collects them."
        )
    for number, (classes, masks) in enumerate(zip(class_logits, mask_logits, strict=True)):
        ranks = (classes.dim(), masks.dim())
        is_like_the_first = classes.shape == class_logits[0].shape and masks.shape == mask_logits[0].shape
        if ranks != (2, 3) or len(classes) != len(masks) or not len(masks) or not is_like_the_first:
            raise ValueError(
                "Expected class logits (queries, classes + 1) and mask logits (queries, height, width) of one image, "
                f"of one shape at all levels; level {number} has {tuple(classes.shape)} and {tuple(masks.shape)}, "
                f"level 0 {tuple(class_logits[0].shape)} and {tuple(mask_logits[0].shape)}. `LevelLogits.of_image` "
                "takes one image out of a batch."
            )


def read_valid_size(mask_shape: Sequence[int], valid_size: Sequence[int] | Tensor | None) -> Size:
    """Return the valid height and width for mask logits (..., h, w); `None` is the whole padded image."""
    padded = (MASK_STRIDE * mask_shape[-2], MASK_STRIDE * mask_shape[-1])
    if valid_size is None:
        return padded
    height, width = (int(length) for length in valid_size)
    if not (1 <= height <= padded[0] and 1 <= width <= padded[1]):
        raise ValueError(
            f"Expected a valid size within the padded image of {padded[0]} x {padded[1]} that mask logits of "
            f"{mask_shape[-2]} x {mask_shape[-1]} belong to, got {height} x {width}. It is the size after the image "
            "processor, not the image's own."
        )
    return height, width


def read_targets(mask_labels: Masks, class_labels: Masks | Sequence[int], num_classes: int) -> tuple[Tensor, Tensor]:
    """Check the ground truth and return it as tensors."""
    # A copy of an array: torch warns of those that cannot be written to.
    masks = mask_labels if isinstance(mask_labels, Tensor) else torch.tensor(np.asarray(mask_labels))
    labels = (
        class_labels if isinstance(class_labels, Tensor) else torch.tensor(np.asarray(class_labels, dtype=np.int64))
    )
    if masks.dim() != 3 or labels.dim() != 1 or len(masks) != len(labels):  # noqa: PLR2004 - (T, H, W)
        raise ValueError(
            "Expected masks (segments, height, width) and one class label for each, got masks of "
            f"{tuple(masks.shape)} and labels of {tuple(labels.shape)}."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"Class labels must be in [0, {num_classes}), the classes of the logits, got {int(labels.min())} to "
            f"{int(labels.max())}. Map the data set's category ids to the model's labels."
        )
    return masks, labels.long()


def read_logits(logits: Tensor) -> Tensor:
    """Return logits as float32; infinities become large numbers, NaN stays."""
    return logits.float().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


def refuse_nan_levels(is_nan: list[bool]) -> None:
    """Refuse logits that are not numbers: they would count as empty masks."""
    if any(is_nan):
        levels = [number for number, found in enumerate(is_nan) if found]
        raise ValueError(
            f"The logits of level {', '.join(map(str, levels))} hold NaN. The model's weights or its input hold NaN, "
            "or half precision overflowed: check them, or run the model in bfloat16 or float32."
        )


# ---------------------------------------------------------------------------------------------------------------- parts


def cell_shares(masks: Tensor, valid: Size) -> Tensor:
    """Average segments over the cells of the mask logits.

    Args:
        masks: (T, H, W), see `image_layer_consistency`.
        valid: size that the image has after the processor, without padding.

    Returns:
        float32, (T, P), in [0, 1], cells row by row: share of each cell's valid part that the segment covers.
    """
    height, width = masks.shape[1:]
    along_rows = average_matrix(height, valid[0]).to(masks.device)
    along_columns = average_matrix(width, valid[1]).to(masks.device)
    blocks = masks.split(max(1, BLOCK_PIXELS // max(1, height * width)))
    foreground = ((block if block.is_floating_point() else block != 0).float() for block in blocks)
    return torch.cat([along_rows @ (block @ along_columns.T) for block in foreground]).flatten(1)


def average_matrix(length: int, valid: int) -> Tensor:
    """Write the mean over each cell as a matrix.

    Args:
        length: pixels of the image along one side.
        valid: pixels that these become in the processor. A cell is the next `MASK_STRIDE` of them; the last has what
            is left.

    Returns:
        float32, (ceil(valid / MASK_STRIDE), length). Each row adds up to one.
    """
    edges = torch.arange(0, valid + MASK_STRIDE, MASK_STRIDE, dtype=torch.float64).clamp(max=valid)
    edges = edges[: math.ceil(valid / MASK_STRIDE) + 1] * (length / valid)
    first, last = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(length, dtype=torch.float64)
    overlap = (torch.minimum(last, pixel + 1) - torch.maximum(first, pixel)).clamp(min=0)
    return (overlap / (last - first)).float()


def count_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Count the cells of intersection and union, int64 (2, Q), of the masks (Q, P) of every query."""
    return torch.stack([(one & other).sum(1), (one | other).sum(1)])


def divide_overlaps(overlaps: Tensor) -> NDArray[np.float64]:
    """IoU, (V - 1, Q), of `count_overlap` for all levels, (V - 1, 2, Q); where both masks are empty it is 1."""
    intersection, union = overlaps.cpu().numpy().astype(np.float64).transpose(1, 0, 2)
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def match_queries(costs: Tensor) -> NDArray[np.int64]:
    """Match queries and segments level by level: costs (V, Q, T) to the segment of each query, (V, Q), -1 for none."""
    pairs = assign(costs.cpu().numpy())
    matches = np.full(costs.shape[:2], UNMATCHED, dtype=np.int64)
    matches[pairs.level, pairs.query] = pairs.target
    return matches
