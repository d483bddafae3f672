"""Losses of the matched and the piloted queries (Mask2Former, section 3.3; MP-Former, section 3).

Matched queries are paired with segments by Hungarian matching, anew at every level; pilot slots belong to their segments from the
start. Both have the same three losses with the same weights.

Axes: V supervised levels, B images, P pilot slots, Q matched queries, N = P + Q, K classes, D channels of the per-pixel embedding,
R rows: pairs of a prediction and a segment, over all levels and images.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from .global_batch import GlobalBatch
from .mask_matching import Assignment, CostWeights, assign, compute_matching_costs, measure_stability
from .mask_piloting import SlotLayout
from .point_sampling import IgnoredPixels, MaskReader, choose_points, sample_maps
from .target_checks import Targets, raise_for_values

logger = logging.get_logger(__name__)

# Mask logits and candidate points of as many rows as fit in this many numbers are alive at a time.
NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class LevelPredictions:
    """Predictions of all supervised levels, the last one last; pilot slots before matched queries.

    Attributes:
        class_logits: per level, (B, N, K + 1); the last class is "no object".
        mask_embeddings: per level, (B, N, D).
        pixel_embedding: (B, D, h, w).
    """

    class_logits: Sequence[Tensor]
    mask_embeddings: Sequence[Tensor]
    pixel_embedding: Tensor


@dataclass(frozen=True)
class PointSettings:
    """How points are drawn for the mask losses; see `choose_points`."""

    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float


@dataclass(frozen=True)
class Rows:
    """Pairs of a prediction and a segment, image by image. All arrays have length R.

    Attributes:
        level: int64.
        image: int64, ascending.
        position: int64, in [0, N).
        target: int64, segment within its image.
        piloted: int64, 1 for pilot slots, 0 for matched queries.
    """

    level: np.ndarray
    image: np.ndarray
    position: np.ndarray
    target: np.ndarray
    piloted: np.ndarray


class UniversalSegmentationCriterion(nn.Module):
    """Weighted sum of cross entropy, binary cross entropy and dice losses over all supervised levels.

    Attributes:
        empty_weight: float32, (K + 1,), class weights of the cross entropy; saved with the model. Of the last, that of "no
            object", the configured value counts.
        nonfinite_steps: consecutive training steps (forward passes) with non-finite matching costs so far; not saved.
        surplus_segments: segments so far that no query was left for; not saved.
        last_match_stability: of the last training step, for the supervised levels from the second on: share of the segments
            whose query is the one of the level before, mean over images (see `measure_stability`); `None` before the first
            step and after one without a segment; not saved.
        has_warned_of_nonfinite: such a step has been reported; later ones are only counted.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_labels: int,
        *,
        no_object_weight: float,
        weights: CostWeights,
        points: PointSettings,
        max_nonfinite_steps: int,
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.no_object_weight = no_object_weight
        self.weights = weights
        self.points = points
        self.max_nonfinite_steps = max_nonfinite_steps
        self.register_buffer("empty_weight", torch.empty(num_labels + 1))
        self.initialise_weights()
        self.training_steps = 0
        self.nonfinite_steps = 0
        self.surplus_segments = 0
        self.last_match_stability: list[float] | None = None
        self.has_warned_of_nonfinite = False

    @torch.no_grad()
    def initialise_weights(self, gain: float = 1.0) -> None:
        """Weight 1 for every class, `no_object_weight` for "no object"."""
        del gain
        if getattr(self.empty_weight, "_is_hf_initialized", False):  # transformers' mark of a loaded weight
            return
        self.empty_weight.fill_(1.0)
        self.empty_weight[-1] = self.no_object_weight

    def forward(
        self,
        predictions: LevelPredictions,
        targets: Targets,
        layout: SlotLayout | None,
        *,
        pilot_label_loss: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Match and compute the losses; one transfer to the host.

        In training every process of a distributed run must call this in every step: normalisers are summed over processes, so
        that the average of all processes' losses (which DDP takes) is the loss of the global batch. With `targets.global_batch`,
        in training and evaluation, they are those of the whole optimiser step, and no process waits for another here.

        Args:
            predictions: of all levels.
            targets: checked ground truth.
            layout: of the pilot slots; `None` without piloting.
            pilot_label_loss: include the classification loss of the pilot slots.

        Returns:
            The loss, and its weighted terms, detached: `loss_cross_entropy`, `loss_mask`, `loss_dice`, and the same with
            `loss_pilot_` where there are pilot slots; the last level has no suffix, level i has `_i`.

        Raises:
            ValueError: values of images or targets that are out of range.
            FloatingPointError: matching costs were not finite in `max_nonfinite_steps` consecutive training steps.
        """
        with torch.autocast(predictions.pixel_embedding.device.type, enabled=False):
            class_logits = torch.stack([level.float() for level in predictions.class_logits])  # (V, B, N, K + 1)
            mask_embeddings = torch.stack([level.float() for level in predictions.mask_embeddings])  # (V, B, N, D)
            pixel_embedding = predictions.pixel_embedding.float()
            assignments = self._match(class_logits, mask_embeddings, pixel_embedding, targets, layout)
            rows = list_rows(assignments, targets.num_segments, layout, num_levels=len(class_logits))
            label_terms = self._label_losses(class_logits, targets, rows, layout)
            if not pilot_label_loss:
                label_terms.pop("loss_pilot_cross_entropy", None)
            mask_total, mask_terms = self._mask_losses(mask_embeddings, pixel_embedding, targets, rows, layout)
            loss = mask_total + torch.stack(list(label_terms.values())).sum()
        terms = {**label_terms, **mask_terms}
        return loss, name_terms({name: levels.detach() for name, levels in terms.items()})

    # ------------------------------------------------------------------------------------------------------------ matching

    def _match(
        self,
        class_logits: Tensor,
        mask_embeddings: Tensor,
        pixel_embedding: Tensor,
        targets: Targets,
        layout: SlotLayout | None,
    ) -> list[Assignment]:
        """Costs of all levels and images, the checks of values, one transfer, assignments."""
        num_slots = 0 if layout is None else layout.num_slots
        costs = compute_matching_costs(
            class_logits[:, :, num_slots:],
            mask_embeddings[:, :, num_slots:],
            pixel_embedding,
            targets.mask_labels,
            targets.class_labels,
            targets.padded_size,
            weights=self.weights,
            num_points=self.points.num_points,
            ignore_masks=targets.ignore_masks,
        )
        parts = [targets.values.detach(), *costs]
        fetched = torch.cat([part.flatten() for part in parts]).cpu().numpy()
        ends = np.cumsum([part.numel() for part in parts])
        values, *host_costs = (
            piece.reshape(part.shape) for piece, part in zip(np.split(fetched, ends[:-1]), parts, strict=True)
        )
        raise_for_values(values, targets, self.num_labels)
        assignments = [assign(cost) for cost in host_costs]
        if self.training:
            self.last_match_stability = measure_stability(assignments, targets.num_segments, len(class_logits))
        self._count_nonfinite(assignments)
        self._count_surplus(targets, num_queries=class_logits.shape[2] - num_slots)
        return assignments

    def _count_nonfinite(self, assignments: Sequence[Assignment]) -> None:
        """Survive single bad steps, say so once, and stop a training that has diverged."""
        if not self.training:
            return
        self.training_steps += 1
        bad = [(image, level) for image, found in enumerate(assignments) for level in found.nonfinite_levels]
        if not bad:
            self.nonfinite_steps = 0
            return
        self.nonfinite_steps += 1
        image, level = bad[0]
        where = f"in step {self.training_steps}, level {level}, image {image} of the batch"
        advice = "Lower the learning rate, check the inputs, or train in bfloat16 instead of float16."
        if self.nonfinite_steps >= self.max_nonfinite_steps:
            raise FloatingPointError(
                f"Matching costs were not finite in {self.nonfinite_steps} consecutive training steps, last {where}. The training "
                f"has diverged. {advice}"
            )
        if self.has_warned_of_nonfinite:
            return
        self.has_warned_of_nonfinite = True
        logger.warning(
            "Matching costs are not finite %s; such pairs are arbitrary. Training goes on, and stops after %d such steps in a "
            "row. %s",
            where,
            self.max_nonfinite_steps,
            advice,
        )

    def _count_surplus(self, targets: Targets, num_queries: int) -> None:
        surplus = [max(count - num_queries, 0) for count in targets.num_segments]
        if not any(surplus):
            return
        is_first = self.surplus_segments == 0
        self.surplus_segments += sum(surplus)
        if not is_first:
            return
        image = int(np.argmax(surplus))
        logger.warning(
            "Image %d of a batch has %d segments but the model only %d queries; %d segments stay unmatched. Raise "
            "`num_queries`. (Later cases are counted in `criterion.surplus_segments`, not reported.)",
            image,
            targets.num_segments[image],
            num_queries,
            surplus[image],
        )

    # -------------------------------------------------------------------------------------------------------------- labels

    def _label_losses(
        self, class_logits: Tensor, targets: Targets, rows: Rows, layout: SlotLayout | None
    ) -> dict[str, Tensor]:
        """Weighted mean cross entropy of matched queries and of pilot slots, per level: each (V,)."""
        num_slots = 0 if layout is None else layout.num_slots
        labels = torch.full(class_logits.shape[:3], self.num_labels, dtype=torch.int64, device=class_logits.device)
        first_segment = np.cumsum([0, *targets.num_segments])[rows.image] if len(rows.image) else rows.target
        index = _to_device((rows.level, rows.image, rows.position, first_segment + rows.target), labels.device)
        labels[index[0], index[1], index[2]] = torch.cat(targets.class_labels)[index[3]]

        empty_weight = self._class_weights()
        terms = nn.functional.cross_entropy(
            class_logits.flatten(0, 2), labels.flatten(), weight=empty_weight, reduction="none"
        ).view_as(labels)
        names = {"loss_cross_entropy": slice(num_slots, None)}
        if layout is not None:
            names["loss_pilot_cross_entropy"] = slice(0, num_slots)
        if targets.global_batch is None:
            weights = empty_weight[labels]
            totals = torch.stack([weights[:, :, part].sum(dim=(1, 2)) for part in names.values()])
            num_parts = _sum_over_processes(totals) if self.training else 1
        else:
            totals = self._weigh_global_batch(targets.global_batch, labels.shape[2] - num_slots, layout)
            num_parts = targets.global_batch.num_parts
        return {
            name: self.weights.label * num_parts * terms[:, :, part].sum(dim=(1, 2)) / total.clamp(min=1e-12)
            for (name, part), total in zip(names.items(), totals, strict=True)
        }

    def _class_weights(self) -> Tensor:
        """Of the cross entropy: float32, (K + 1,)."""
        weights = self.empty_weight.float().clone()
        weights[-1] = self.no_object_weight  # the configuration's, also when the file was trained with another
        return weights

    def _weigh_global_batch(self, counts: GlobalBatch, num_queries: int, layout: SlotLayout | None) -> Tensor:
        """Sums of class weights of the whole step, of matched queries and, with a layout, pilot slots: (1 or 2, 1)."""
        class_weights = self._class_weights()
        totals = [counts.weigh_matched_labels(class_weights, num_queries)]
        if layout is not None:
            totals.append(counts.weigh_pilot_labels(class_weights, layout.num_groups))
        return torch.stack(totals)[:, None]

    # --------------------------------------------------------------------------------------------------------------- masks

    def _mask_losses(
        self, mask_embeddings: Tensor, pixel_embedding: Tensor, targets: Targets, rows: Rows, layout: SlotLayout | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of all mask and dice losses, and the same per level: each (V,)."""
        num_levels, device = len(mask_embeddings), mask_embeddings.device
        num_masks = self._count_masks(targets, device)
        piloted = _to_device((rows.piloted,), device)[0]
        per_row = 1 / num_masks * torch.where(piloted == 0, 1.0, 1.0 / (1 if layout is None else layout.num_groups))
        level, image, position = _to_device((rows.level, rows.image, rows.position), device)
        total, cross_entropy, dice = _PointMaskLoss.apply(
            mask_embeddings[level, image, position],
            pixel_embedding,
            RowTargets(rows, targets, self.points),
            self.weights.mask * per_row,
            self.weights.dice * per_row,
            torch.is_grad_enabled(),
        )
        terms = {}
        for name, values, weight in (("mask", cross_entropy, self.weights.mask), ("dice", dice, self.weights.dice)):
            sums = torch.zeros(2, num_levels, device=device)
            sums.index_put_((piloted, level), values * per_row * weight, accumulate=True)
            terms[f"loss_{name}"] = sums[0]
            if layout is not None:
                terms[f"loss_pilot_{name}"] = sums[1]
        return total, terms

    def _count_masks(self, targets: Targets, device: torch.device) -> Tensor:
        """Segments of the global batch, divided by the number of its parts (once), at least 1."""
        if targets.global_batch is not None:
            return torch.full((), targets.global_batch.divide_masks(), device=device)
        count = torch.full((), float(sum(targets.num_segments)), device=device)
        num_processes = _sum_over_processes(count) if self.training else 1
        return (count / num_processes).clamp(min=1)


def list_rows(
    assignments: Sequence[Assignment], num_segments: Sequence[int], layout: SlotLayout | None, num_levels: int
) -> Rows:
    """Put matched pairs and pilot slots of all levels into one list, image by image."""
    num_slots = 0 if layout is None else layout.num_slots
    pieces = []
    for image, (found, num_targets) in enumerate(zip(assignments, num_segments, strict=True)):
        pieces.append((found.level, np.full_like(found.level, image), num_slots + found.query, found.target, 0))
        if layout is None:
            continue
        slots = (np.arange(layout.num_groups)[:, None] * layout.max_targets + np.arange(num_targets)).reshape(-1)
        target = np.tile(np.arange(num_targets), layout.num_groups)
        level = np.repeat(np.arange(num_levels), len(slots))
        pieces.append((level, np.full_like(level, image), np.tile(slots, num_levels), np.tile(target, num_levels), 1))
    columns = {
        name: np.concatenate([piece[column] for piece in pieces]).astype(np.int64)
        for column, name in enumerate(("level", "image", "position", "target"))
    }
    piloted = np.concatenate([np.full(len(piece[0]), piece[4], dtype=np.int64) for piece in pieces])
    return Rows(**columns, piloted=piloted)


def name_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split terms (V,) into scalars: the last level without suffix, level i with `_i`."""
    num_levels = len(next(iter(terms.values())))
    suffixes = ["", *(f"_{level}" for level in range(num_levels - 1))]
    levels = [num_levels - 1, *range(num_levels - 1)]
    return {
        f"{name}{suffix}": terms[name][level] for suffix, level in zip(suffixes, levels, strict=True) for name in terms
    }


# ----------------------------------------------------------------------------------------------------- mask losses of rows


@dataclass(frozen=True)
class RowTargets:
    """What the rows are compared with, and how points are drawn."""

    rows: Rows
    targets: Targets
    points: PointSettings


class _PointMaskLoss(torch.autograd.Function):
    """Mask and dice losses of all rows, with their gradient computed on the way forward.

    The masks of a few rows at a time are made (mask embedding times per-pixel embedding), read at points, compared,
    differentiated and forgotten: memory does not grow with the number of rows, levels or queries. That is possible because the
    result is one weighted sum, so an incoming gradient can only scale what is already known. There is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        embeddings: Tensor,
        pixel_embedding: Tensor,
        row_targets: RowTargets,
        mask_scale: Tensor,
        dice_scale: Tensor,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the weighted sum, and both losses of each row, (R,), unweighted and without gradient."""
        cross_entropy = embeddings.new_zeros(len(embeddings))
        dice = embeddings.new_zeros(len(embeddings))
        grad_embeddings = torch.zeros_like(embeddings) if needs_gradient else None
        # Rows of one image are written through a flat view, which only contiguous memory has.
        grad_pixels = pixel_embedding.new_zeros(pixel_embedding.shape) if needs_gradient else None
        (target_index,) = _to_device((row_targets.rows.target,), embeddings.device)
        targets = row_targets.targets
        for image, chunks in enumerate(_chunk_rows(row_targets, pixel_embedding.shape)):
            pixels = pixel_embedding[image].flatten(1)  # (D, h * w)
            if not chunks:
                continue
            reader = MaskReader(targets.mask_labels[image], targets.padded_size)
            ignore_mask = None if targets.ignore_masks is None else targets.ignore_masks[image]
            ignored = None if ignore_mask is None else IgnoredPixels(ignore_mask, targets.padded_size)
            for chunk in chunks:
                masks = (embeddings[chunk] @ pixels).view(-1, 1, *pixel_embedding.shape[2:])
                points = _choose_points(masks, row_targets.points, ignored)
                labels = reader.read(target_index[chunk], points)
                counted = None if ignored is None else ~ignored.at(points)
                scales = mask_scale[chunk], dice_scale[chunk]
                losses, gradient = _compare_at_points(masks, points, labels, counted, scales, needs_gradient)
                cross_entropy[chunk], dice[chunk] = losses
                if grad_embeddings is not None and grad_pixels is not None:
                    torch.mm(gradient, pixels.T, out=grad_embeddings[chunk])
                    grad_pixels[image].flatten(1).addmm_(embeddings[chunk].T, gradient)
        if needs_gradient:
            ctx.save_for_backward(grad_embeddings, grad_pixels)
        ctx.mark_non_differentiable(cross_entropy, dice)
        ctx.set_materialize_grads(False)
        return (cross_entropy * mask_scale + dice * dice_scale).sum(), cross_entropy, dice

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad_embeddings, grad_pixels = ctx.saved_tensors
        return grad_total * grad_embeddings, grad_total * grad_pixels, None, None, None, None


def _chunk_rows(row_targets: RowTargets, embedding_shape: torch.Size) -> list[list[slice]]:
    """For each image, slices of its rows whose intermediate results fit in `NUMBERS_AT_ONCE`."""
    num_images, _, height, width = embedding_shape
    candidates = 2 * int(row_targets.points.num_points * row_targets.points.oversample_ratio)
    size = max(1, NUMBERS_AT_ONCE // max(height * width, candidates))
    bounds = np.searchsorted(row_targets.rows.image, np.arange(num_images + 1)).tolist()
    return [
        [slice(start, min(start + size, end)) for start in range(begin, end, size)]
        for begin, end in itertools.pairwise(bounds)
    ]


def _choose_points(masks: Tensor, settings: PointSettings, ignored: IgnoredPixels | None) -> Tensor:
    return choose_points(
        masks,
        settings.num_points,
        settings.oversample_ratio,
        settings.importance_sample_ratio,
        None if ignored is None else ignored.at,
    )


def _compare_at_points(
    masks: Tensor,
    points: Tensor,
    labels: Tensor,
    counted: Tensor | None,
    scales: tuple[Tensor, Tensor],
    needs_gradient: bool,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Losses of some rows of one image, and the gradient of their scaled sum with respect to the mask logits.

    Args:
        masks: (rows, 1, h, w), logits.
        points: (rows, P, 2).
        labels: (rows, P), in [0, 1].
        counted: bool, (rows, P), False for points that do not count; `None` where all do.
        scales: of the mask and the dice loss, (rows,) each.
        needs_gradient: `False` leaves the gradient out.

    Returns:
        Both losses, (rows,) each, and the gradient, (rows, h * w).
    """
    with torch.set_grad_enabled(needs_gradient):
        leaf = masks.detach().requires_grad_(needs_gradient)
        logits = sample_maps(leaf, points)[:, 0]
        losses = binary_cross_entropy_loss(logits, labels, counted), dice_loss(logits, labels, counted)
        if not needs_gradient:
            return losses, masks
        total = (losses[0] * scales[0] + losses[1] * scales[1]).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return (losses[0].detach(), losses[1].detach()), gradient.flatten(1)


def binary_cross_entropy_loss(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over points of the binary cross entropy: logits and labels (R, P) to (R,).

    With `counted`, bool (R, P), over points that are True there; 0 where there is none.
    """
    losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if counted is None:
        return losses.mean(1)
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


def dice_loss(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1) over points: logits and labels (R, P) to (R,).

    With `counted`, bool (R, P), over points that are True there; 0 where there is none.
    """
    probabilities = logits.sigmoid()
    if counted is not None:
        probabilities, labels = probabilities * counted, labels * counted
    overlap = 2 * (probabilities * labels).sum(1)
    return 1 - (overlap + 1) / (probabilities.sum(1) + labels.sum(1) + 1)


# ----------------------------------------------------------------------------------------------------------------- helpers


def _to_device(columns: tuple[np.ndarray, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Copy int64 columns of one length in one go."""
    return tuple(torch.from_numpy(np.stack(columns).astype(np.int64)).to(device, non_blocking=True))


def _sum_over_processes(value: Tensor) -> int:
    """Sum a tensor over all processes in place; returns their number."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    torch.distributed.all_reduce(value)
    return torch.distributed.get_world_size()
