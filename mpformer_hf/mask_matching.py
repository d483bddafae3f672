"""Which query answers for which segment: matching costs at points and Hungarian assignment (Mask2Former, section 3.3).

Axes: V levels, B images, Q matched queries, T segments of one image, K classes, D channels of the per-pixel embedding, P points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_scipy_available

from .point_sampling import IgnoredPixels, sample_maps, sample_masks

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment

# Stands in for costs that are not finite, so that the assignment exists.
LARGEST_COST = 1e10
UNMATCHED = -1


@dataclass(frozen=True)
class CostWeights:
    """Weights of the three matching costs; the same as of the losses."""

    label: float
    mask: float
    dice: float


@dataclass(frozen=True)
class Assignment:
    """Matched pairs of one image, all levels; three int64 arrays of the same length.

    Every level pairs min(Q, T) segments, each with a query of its own. `nonfinite_levels` names the levels whose costs were not
    finite; their pairs are arbitrary.
    """

    level: np.ndarray
    query: np.ndarray
    target: np.ndarray
    nonfinite_levels: tuple[int, ...]


@torch.no_grad()
def compute_matching_costs(
    class_logits: Tensor,
    mask_embeddings: Tensor,
    pixel_embedding: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    padded_size: tuple[int, int],
    *,
    weights: CostWeights,
    num_points: int,
    ignore_masks: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Cost of pairing each query with each segment.

    Masks are never made: the per-pixel embedding is read at the points once an image, and a query's logits there are its product
    with the mask embedding (reading is linear). All levels share the points.

    Args:
        class_logits: float32, (V, B, Q, K + 1).
        mask_embeddings: float32, (V, B, Q, D).
        pixel_embedding: float32, (B, D, h, w).
        mask_labels: per image, (T, ., .), see `sample_masks`.
        class_labels: per image, int64 (T,), in [0, K).
        padded_size: height and width of the padded images.
        weights: of the three costs.
        num_points: P.
        ignore_masks: per image, bool (., .), see `IgnoredPixels`; points there do not count. `None` where all count.

    Returns:
        Per image, float32, (V, Q, T).
    """
    points = torch.rand(len(mask_labels), num_points, 2, device=pixel_embedding.device, dtype=pixel_embedding.dtype)
    costs = []
    for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if len(labels) == 0:
            costs.append(class_logits.new_zeros(*class_logits.shape[0:1], class_logits.shape[2], 0))
            continue
        image_points = points[image : image + 1]
        targets = sample_masks(masks, torch.arange(len(masks), device=masks.device), image_points, padded_size)
        embedding = sample_maps(pixel_embedding[image : image + 1], image_points)[0]  # (D, P)
        ignore_mask = None if ignore_masks is None else ignore_masks[image]
        counted = None if ignore_mask is None else ~IgnoredPixels(ignore_mask, padded_size).at(image_points)[0]
        label_cost = -class_logits[:, image].softmax(-1)[:, :, labels]
        mask_cost = torch.stack(
            [compute_mask_costs(level @ embedding, targets, weights, counted) for level in mask_embeddings[:, image]]
        )
        costs.append(weights.label * label_cost + mask_cost)
    return costs


def compute_mask_costs(logits: Tensor, targets: Tensor, weights: CostWeights, counted: Tensor | None = None) -> Tensor:
    """Weighted cross entropy and dice costs of all pairs: logits (Q, P) and targets (T, P) in [0, 1] to (Q, T).

    Where `counted`, bool (P,), is given, only points that are True there count; if none is, both costs are 0.
    """
    num_points: int | Tensor = logits.shape[1]
    # softplus(x) - x y is the binary cross entropy of logit x and target y.
    softplus, probabilities = nn.functional.softplus(logits), logits.sigmoid()
    if counted is not None:
        num_points = counted.sum().clamp(min=1)
        softplus, probabilities, targets = softplus * counted, probabilities * counted, targets * counted
    cross_entropy = (softplus.sum(1)[:, None] - logits @ targets.T) / num_points
    overlap = 2 * probabilities @ targets.T
    total = probabilities.sum(1)[:, None] + targets.sum(1)[None, :]
    return weights.mask * cross_entropy + weights.dice * (1 - (overlap + 1) / (total + 1))


def assign(costs: np.ndarray) -> Assignment:
    """Pair queries with segments at least total cost, level by level.

    Args:
        costs: (V, Q, T). Costs that are not finite count as very large.
    """
    if not is_scipy_available():
        raise ImportError(
            "Matching needs scipy, which is not installed. Run `pip install scipy`; inference works without."
        )
    finite = np.isfinite(costs).all(axis=(1, 2))
    costs = np.nan_to_num(costs, nan=LARGEST_COST, posinf=LARGEST_COST, neginf=-LARGEST_COST)
    pairs = [linear_sum_assignment(level) for level in costs]
    sizes = [len(query) for query, _ in pairs]
    return Assignment(
        level=np.repeat(np.arange(len(costs)), sizes),
        query=np.concatenate([query for query, _ in pairs]).astype(np.int64),
        target=np.concatenate([target for _, target in pairs]).astype(np.int64),
        nonfinite_levels=tuple(int(level) for level in np.flatnonzero(~finite)),
    )


def measure_stability(
    assignments: Sequence[Assignment], num_segments: Sequence[int], num_levels: int
) -> list[float] | None:
    """How much the matching of each level agrees with that of the level before.

    Args:
        assignments: per image.
        num_segments: T of each image.
        num_levels: V.

    Returns:
        For the levels 1 to V - 1: of the segments of an image that are matched, the share whose query is the one of the level before;
        mean over images with segments. `None` if there is none.
    """
    shares = []
    for found, num_targets in zip(assignments, num_segments, strict=True):
        if num_targets == 0:
            continue
        queries = np.full((num_levels, num_targets), UNMATCHED)
        queries[found.level, found.target] = found.query
        is_matched = queries[1:] != UNMATCHED
        is_same = is_matched & (queries[1:] == queries[:-1])
        shares.append(is_same.sum(axis=1) / is_matched.sum(axis=1))
    return np.mean(shares, axis=0).tolist() if shares else None
