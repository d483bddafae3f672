"""The definition of post-processing, written plainly: all logits, two bilinear steps, float32, in one piece.

Results and benchmarks are compared with it. It is slow and takes memory for every query at the target size, but there is
little in it that could be wrong. Rules: Mask2Former's inference (arXiv 2112.01527) as its code has it.

Axes: Q queries, K classes, h w mask logits (1/4 of the padded image), H W target size.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class PlainInstances:
    """Instances of one image, highest score first: masks bool (N, H, W), scores (N,), labels (N,)."""

    masks: Tensor
    scores: Tensor
    labels: Tensor


def resize(values: Tensor, size: Size) -> Tensor:
    """Resize (channels, height, width) bilinearly."""
    return nn.functional.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]


def logits_at_target(mask_logits: Tensor, valid: Size, target: Size) -> Tensor:
    """Mask logits (Q, h, w) to (Q, H, W): to the padded size, cropped, to the target size."""
    return resize(logits_at_valid(mask_logits, valid), target)


def logits_at_valid(mask_logits: Tensor, valid: Size) -> Tensor:
    """Mask logits (Q, h, w) at the size of the image without its padding."""
    padded = (4 * mask_logits.shape[-2], 4 * mask_logits.shape[-1])
    return resize(mask_logits.float(), padded)[:, : valid[0], : valid[1]]


def semantic_scores(
    class_logits: Tensor, mask_logits: Tensor, valid: Size, target: Size, combine_before_resize: bool = False
) -> Tensor:
    """Sum over queries of class times mask probability, (K, H, W), for one image."""
    classes = class_logits.float().softmax(-1)[:, :-1]
    if combine_before_resize:
        combined = torch.einsum("qk,qhw->khw", classes, logits_at_valid(mask_logits, valid).sigmoid())
        return resize(combined, target)
    return torch.einsum("qk,qhw->khw", classes, logits_at_target(mask_logits, valid, target).sigmoid())


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    valid: Size,
    target: Size,
    top_k: int = 100,
    score_threshold: float | None = None,
    mask_threshold: float = 0.5,
) -> PlainInstances:
    """Best pairs of query and class of one image; with a threshold, without low scores and empty masks."""
    logits = logits_at_target(mask_logits, valid, target)
    classes = class_logits.float().softmax(-1)[:, :-1]
    scores, pair = classes.flatten().topk(min(top_k, classes.numel()))
    query, labels = pair // classes.shape[1], pair % classes.shape[1]
    probabilities = logits[query].sigmoid()
    masks = probabilities > mask_threshold
    mean = (probabilities * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores, order = (scores * mean).sort(descending=True, stable=True)
    if score_threshold is not None:
        keep = (scores >= score_threshold) & masks[order].flatten(1).any(1)
        scores, order = scores[keep], order[keep]
    return PlainInstances(masks[order], scores, labels[order])


def panoptic(
    class_logits: Tensor,
    mask_logits: Tensor,
    valid: Size,
    target: Size,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] = (),
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Panoptic map (H, W) of one image, 0 = void, and (id, label) of its segments; a query at a time, as Detectron2."""
    logits = logits_at_target(mask_logits, valid, target)
    scores, labels = class_logits.float().softmax(-1).max(-1)
    keep = (labels < class_logits.shape[-1] - 1) & (scores > score_threshold)
    scores, labels, probabilities = scores[keep], labels[keep], logits[keep].sigmoid()
    segmentation = torch.zeros(target, dtype=torch.int32, device=logits.device)
    segments: list[tuple[int, int]] = []
    if not len(scores):
        return segmentation, segments
    winner = (scores[:, None, None] * probabilities).argmax(0)
    fused: dict[int, int] = {}
    for position, label in enumerate(labels.tolist()):
        own = probabilities[position] >= mask_threshold
        won = winner == position
        painted = won & own
        if not painted.any() or won.sum() / own.sum() < overlap_mask_area_threshold:
            continue
        if label in label_ids_to_fuse and label in fused:
            segmentation[painted] = fused[label]
            continue
        segments.append((len(segments) + 1, label))
        fused[label] = len(segments)
        segmentation[painted] = len(segments)
    return segmentation, segments
