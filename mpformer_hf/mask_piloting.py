"""Mask-piloted training (MP-Former, section 3): decoder queries that already know their segment.

Every ground-truth segment gets one query per group. Its content is the (possibly wrong) label, `embed_pilot_labels`;
what it may look at is the (noised) ground-truth mask, `PilotMasks`; whom it may talk to, `isolate_pilot_groups`; where
it sits, `SlotLayout`.

Axes: B images, S segments of the whole batch in image order, T most segments in one image, G pilot groups, P = G * T
pilot slots, Q matched queries, N attention heads, K labels, C channels, H W size of the padded images, h w size of a
mask. Pilot slots come before the matched queries. The first T slots belong to the first group: slot = group * T + place
in its image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

MOVING_NOISES = ("shift", "scale", "shift_scale")
NOISE_KINDS = ("point", *MOVING_NOISES, "none")

# Moved masks exist for as many groups at a time as fit in this many pixels (one byte each); only pooled cells are kept.
MOVED_PIXELS_AT_ONCE = 2**26


def count_pilot_groups(max_targets: int, pilot_groups: int, pilot_query_budget: int | None = None) -> int:
    """Number of copies of the ground truth that are fed as pilot queries in this step.

    Args:
        max_targets: T, most segments in one image of the global batch, >= 0.
        pilot_groups: number of groups when there is no budget, >= 1.
        pilot_query_budget: most pilot queries an image may have, >= 1; `None` for no budget. It overrides
            `pilot_groups`.

    Returns:
        G. 0 means no piloting in this step: no image has a segment, or one image has more segments than the budget
        allows.
    """
    if pilot_groups < 1 or (pilot_query_budget is not None and pilot_query_budget < 1):
        raise ValueError(
            f"Expected pilot_groups >= 1 and pilot_query_budget >= 1 or None, got {pilot_groups} and "
            f"{pilot_query_budget}. Switch piloting off with mask_piloting=False."
        )
    if max_targets == 0:
        return 0
    return pilot_groups if pilot_query_budget is None else pilot_query_budget // max_targets


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """Which pilot slot holds which segment; the same place in every group.

    Attributes:
        num_groups: G.
        max_targets: T.
        num_images: B.
        image_index: int64, (S,). Image of each segment, ascending.
        target_index: int64, (S,). Place of each segment within its own image, in [0, T).
        slot_index: int64, (G, S). Slot of each segment in each group, in [0, P). Slots that are not named are empty.
    """

    num_groups: int
    max_targets: int
    num_images: int
    image_index: Tensor
    target_index: Tensor
    slot_index: Tensor

    @property
    def num_slots(self) -> int:
        """P, pilot slots of one image."""
        return self.num_groups * self.max_targets

    @property
    def num_segments(self) -> int:
        """S, segments of all images."""
        return self.image_index.shape[0]


def lay_out_slots(
    num_segments: Sequence[int], num_groups: int, max_targets: int, device: torch.device | str
) -> SlotLayout:
    """Give every segment one slot per group.

    Args:
        num_segments: segments of each image, B numbers.
        num_groups: G.
        max_targets: T, at least the largest of `num_segments`; larger when another process has an image with more
            segments.
        device: where the indices will be.
    """
    if max(num_segments, default=0) > max_targets:
        raise ValueError(
            f"Expected max_targets to be at least the most segments in one image, {max(num_segments)}, got "
            f"{max_targets}. Pass the maximum over all images of all processes."
        )
    # Counted on the host and copied without waiting: an accelerator would be asked for the length of the result.
    counts = torch.tensor(list(num_segments), dtype=torch.int64)
    image_index = torch.arange(len(counts)).repeat_interleave(counts)  # (S,)
    first_of_image = (counts.cumsum(0) - counts).repeat_interleave(counts)
    target_index = torch.arange(len(image_index)) - first_of_image
    slot_index = target_index + max_targets * torch.arange(num_groups)[:, None]  # (G, S)
    return SlotLayout(
        num_groups=num_groups,
        max_targets=max_targets,
        num_images=len(counts),
        image_index=image_index.to(device, non_blocking=True),
        target_index=target_index.to(device, non_blocking=True),
        slot_index=slot_index.to(device, non_blocking=True),
    )


def isolate_pilot_groups(num_groups: int, max_targets: int, num_queries: int, device: torch.device | str) -> Tensor:
    """Forbid attention from one pilot group to another, and from matched queries to any pilot.

    Pilot queries see their own group, empty slots included, and the matched queries. Matched queries see only each
    other, so their predictions are those of a model without piloting.

    Returns:
        bool, (P + Q, P + Q). True forbids row to attend to column.
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(max_targets)  # (P,)
    group = torch.cat([group, group.new_full((num_queries,), -1)])  # (P + Q,), -1 marks matched queries
    return (group[:, None] != group[None, :]) & (group[None, :] != -1)


# --------------------------------------------------------------------------------------------------------------- labels


def flip_labels(labels: Tensor, ratio: float, num_labels: int, generator: torch.Generator | None = None) -> Tensor:
    """Replace some labels by a uniform draw from all labels.

    The true label may be drawn again, so that on average a share `ratio * (1 - 1 / K)` changes.

    Args:
        labels: int64, any shape, in [0, K).
        ratio: probability that a label is replaced, in [0, 1]. At 0 the input is returned and nothing is drawn.
        num_labels: K.
        generator: source of randomness, on the device of `labels`.

    Returns:
        int64, the shape of `labels`.
    """
    _check_ratio(ratio)
    if ratio == 0:
        return labels
    is_replaced = torch.rand(labels.shape, generator=generator, device=labels.device) < ratio
    replacements = torch.randint(num_labels, labels.shape, generator=generator, device=labels.device)
    return torch.where(is_replaced, replacements, labels)


def embed_pilot_labels(
    class_labels: Tensor,
    label_embedding: Tensor,
    layout: SlotLayout,
    ratio: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Content of the pilot queries: the embedding of each segment's label, flipped independently in every group.

    Args:
        class_labels: int64, (S,), in [0, K). Labels of all images, in image order.
        label_embedding: float, (K, C). One row per label, none for "no object".
        layout: where the segments go.
        ratio: probability that a label is replaced by a uniform draw, in [0, 1].
        generator: source of randomness, on the device of `class_labels`.

    Returns:
        dtype of `label_embedding`, (B, P, C). Empty slots are zero vectors. Gradients reach `label_embedding`, with
        zeros when S = 0.
    """
    num_labels, num_channels = label_embedding.shape
    _check_class_labels(class_labels, layout.num_segments, num_labels)
    labels = class_labels.expand(layout.num_groups, -1)  # (G, S)
    content = nn.functional.embedding(flip_labels(labels, ratio, num_labels, generator), label_embedding)  # (G, S, C)
    empty = content.new_zeros(layout.num_images, layout.num_slots, num_channels)
    return empty.index_put((layout.image_index.expand_as(layout.slot_index), layout.slot_index), content)


# ---------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class PilotNoise:
    """What is done to the ground-truth masks that pilot queries attend with.

    Attributes:
        kind: "point" flips cells of the pooled masks (`flip_cells`); "shift", "scale" and "shift_scale" move the
            full-resolution masks before they are pooled (`move_masks`); "none" leaves them clean.
        ratio: strength, relative to the mask's own area ("point") or box (the others), in [0, 1]. 0 is the same as
            "none".
        per_head: draw point noise for every attention head. The moving kinds are the same for all heads.
    """

    kind: str = "point"
    ratio: float = 0.2
    per_head: bool = False

    def __post_init__(self) -> None:
        """Refuse names and strengths that mean nothing."""
        if self.kind not in NOISE_KINDS:
            raise ValueError(f"Expected the mask noise to be one of {', '.join(NOISE_KINDS)}, got {self.kind!r}.")
        _check_ratio(self.ratio)

    @property
    def flips_cells(self) -> bool:
        """True if pooled cells are flipped."""
        return self.kind == "point" and self.ratio > 0

    @property
    def moves_masks(self) -> bool:
        """True if the full-resolution masks are moved."""
        return self.kind in MOVING_NOISES and self.ratio > 0


@dataclass(frozen=True, eq=False)
class PilotMasks:
    """Ground truth of one batch, ready to draw the attention mask of the pilot slots for any decoder layer.

    Make it with `prepare`, once a step.

    Attributes:
        layout: where the segments go.
        noise: what is done to the masks at every draw.
        num_heads: N.
        padded_size: (H, W).
        level_sizes: height and width of every feature level.
        pooled_masks: bool, one (S, cells) a level; True is visible. Empty when the noise moves masks.
        full_masks: bool, one (T_i, h_i, w_i) an image; True is foreground. Empty unless the noise moves masks.
        boxes: of all segments, `None` unless the noise moves masks.
    """

    layout: SlotLayout
    noise: PilotNoise
    num_heads: int
    padded_size: tuple[int, int]
    level_sizes: tuple[tuple[int, int], ...]
    pooled_masks: tuple[Tensor, ...] = ()
    full_masks: tuple[Tensor, ...] = ()
    boxes: _Boxes | None = None

    @classmethod
    def prepare(
        cls,
        mask_labels: Sequence[Tensor],
        padded_size: tuple[int, int],
        level_sizes: Sequence[tuple[int, int]],
        layout: SlotLayout,
        noise: PilotNoise,
        *,
        num_heads: int,
    ) -> PilotMasks:
        """Do the part of the work that all layers share.

        Args:
            mask_labels: B tensors (T_i, h_i, w_i); bool, uint8 or float in [0, 1]; a pixel above 0 is foreground. A
                mask smaller than the padded image lies in its top left corner, the rest is background.
            padded_size: (H, W) of the padded images.
            level_sizes: height and width of every feature level.
            layout: from `lay_out_slots`, with the number of segments of the same images.
            noise: what to do to the masks.
            num_heads: N; matters only for `noise.per_head`.
        """
        _check_mask_labels(mask_labels, padded_size, layout)
        sizes = tuple((height, width) for height, width in level_sizes)
        shared = (layout, noise, num_heads, padded_size, sizes)
        if noise.moves_masks:
            full_masks = tuple(masks > 0 if masks.dtype != torch.bool else masks for masks in mask_labels)
            boxes = [_find_boxes(masks) for masks in full_masks if len(masks)]
            return cls(*shared, full_masks=full_masks, boxes=_Boxes.cat(boxes) if boxes else None)
        pooled = [_pool_to_levels(masks, padded_size, sizes) for masks in mask_labels if len(masks)]
        no_masks = [layout.slot_index.new_zeros(0, height * width, dtype=torch.bool) for height, width in sizes]
        return cls(*shared, pooled_masks=tuple(torch.cat(level) for level in zip(no_masks, *pooled, strict=True)))

    @torch.compiler.disable  # every new number of segments would be another graph
    def draw_attention_mask(self, level: int, generator: torch.Generator | None = None) -> Tensor:
        """Cross-attention mask of the pilot slots on one feature level, with fresh noise for every segment and group.

        Args:
            level: index into `level_sizes`.
            generator: source of randomness, on the device of the masks. Untouched when the noise is "none" or its ratio
                0.

        Returns:
            bool, (B, 1, P, cells), or (B, N, P, cells) when every head has its own noise. True forbids the slot to
            attend to the cell. A row that would forbid everything (an empty slot, an empty mask, a mask that the noise
            has removed) allows everything.
        """
        layout = self.layout
        visible = self._draw_moved(level, generator) if self.noise.moves_masks else self._draw_flipped(level, generator)
        blocked = ~visible & visible.any(dim=-1, keepdim=True)  # (G, S, 1 or N, cells)
        attention_mask = blocked.new_zeros(layout.num_images, blocked.shape[2], layout.num_slots, blocked.shape[3])
        attention_mask[layout.image_index.expand_as(layout.slot_index), :, layout.slot_index] = blocked
        return attention_mask

    def _draw_flipped(self, level: int, generator: torch.Generator | None) -> Tensor:
        """Visible cells under point noise or none: bool, (G, S, 1 or N, cells)."""
        num_heads = self.num_heads if self.noise.flips_cells and self.noise.per_head else 1
        clean = self.pooled_masks[level]
        visible = clean[None, :, None].expand(self.layout.num_groups, -1, num_heads, -1)
        return flip_cells(visible, self.noise.ratio, generator) if self.noise.flips_cells else visible

    def _draw_moved(self, level: int, generator: torch.Generator | None) -> Tensor:
        """Visible cells of masks that are moved at full resolution and then pooled: bool, (G, S, 1, cells)."""
        height, width = self.level_sizes[level]
        if self.boxes is None:
            return self.layout.slot_index.new_zeros(self.layout.num_groups, 0, 1, height * width, dtype=torch.bool)
        movement = _draw_movement(self.boxes, self.noise.kind, self.noise.ratio, (self.layout.num_groups,), generator)
        counts = [len(masks) for masks in self.full_masks]
        rows = movement.find_sources(0, self.padded_size[0]).split(counts, dim=1)  # B times (G, T_i, H)
        columns = movement.find_sources(1, self.padded_size[1]).split(counts, dim=1)  # B times (G, T_i, W)
        visible = [
            _move_and_pool(*image, (height, width))
            for image in zip(self.full_masks, rows, columns, strict=True)
            if len(image[0])
        ]
        return torch.cat(visible, dim=1)[:, :, None]


def pool_masks(masks: Tensor, padded_size: tuple[int, int], level_size: tuple[int, int]) -> Tensor:
    """Ground truth at the resolution of a feature level: a cell is visible if any pixel of the segment falls in it.

    Along an axis of length `L`, cell `i` of `n` covers the pixels from `floor(i * L / n)` up to, not including,
    `ceil((i + 1) * L / n)`, as in adaptive average pooling; where `n` does not divide `L`, neighbouring cells share
    pixels.

    Args:
        masks: (n, h, w), bool, uint8 or float in [0, 1]. A pixel above 0 is foreground.
        padded_size: (H, W), at least (h, w). The masks lie in the top left corner, the rest is background.
        level_size: height and width of the feature level.

    Returns:
        bool, (n, cells), row by row. True is visible.
    """
    if not _lies_inside(masks, padded_size):
        raise ValueError(
            f"Expected masks of shape (n, h, w) inside the padded size {tuple(padded_size)}, got {tuple(masks.shape)}. "
            "Resize the masks together with their image."
        )
    # Rows first: that reads the big tensor once, along memory. Here and below, booleans travel as bytes, for which
    # maximum, selection and conjunction are several times faster.
    pooled = masks.view(torch.uint8) if masks.dtype == torch.bool else masks
    pooled = _pool_axis(pooled, 1, padded_size[0], level_size[0])
    pooled = _pool_axis(pooled, 2, padded_size[1], level_size[1])
    return (pooled > 0).flatten(1)


def flip_cells(visible: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Point noise: flip on average `ratio * area` cells of every mask, inside and outside alike.

    The probability is the same for all cells of a mask, `ratio * visible cells / all cells`. Cells on the padding count
    and may be switched on, as in the original.

    Args:
        visible: bool, (..., cells). True is visible.
        ratio: share of a mask's own area, in [0, 1]. At 0 the input is returned and nothing is drawn.
        generator: source of randomness, on the device of `visible`.

    Returns:
        bool, (..., cells).
    """
    _check_ratio(ratio)
    if ratio == 0:
        return visible
    flip_probability = ratio * visible.sum(dim=-1, keepdim=True) / visible.shape[-1]  # (..., 1)
    flips = torch.rand(visible.shape, generator=generator, device=visible.device) < flip_probability
    return visible ^ flips


def shift_masks(masks: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Translate every mask by up to `ratio` times half its box: `move_masks` of kind "shift"."""
    return move_masks(masks, "shift", ratio, generator)


def scale_masks(masks: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Resize every mask about the centre of its box by 1 - `ratio` to 1 + `ratio`: `move_masks` of kind "scale"."""
    return move_masks(masks, "scale", ratio, generator)


def move_masks(
    masks: Tensor,
    kind: Literal["shift", "scale", "shift_scale"],
    ratio: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Geometric noise, as MP-Former takes it from DN-DETR's noise on boxes.

    With the tight box of a mask, `box_w` wide and `box_h` high, and every U an independent uniform draw for each mask:

    * "shift" translates by `dx = U(-1, 1) * ratio * box_w / 2` and `dy = U(-1, 1) * ratio * box_h / 2`, rounded to
      whole pixels.
    * "scale" resizes about the centre of the box by `U(1 - ratio, 1 + ratio)` in width and, independently, in height,
      but to no less than one pixel. A pixel of the result takes the value of the pixel that its centre comes from
      (nearest sampling).
    * "shift_scale" resizes, then translates, both relative to the clean box.

    What leaves the image vanishes, what enters is background. An empty mask stays empty. Noise can empty a thin or
    ragged mask at a large ratio; its query then sees the whole image (`PilotMasks.draw_attention_mask`).

    The released code does none of this, and is not imitated. It shifts rows by the width of the box and columns by its
    height, both in units of the map's width, and piles up on the border what should leave the image. It only ever
    enlarges, by the fixed factor `1 + ratio`, about a centre with x and y exchanged. It draws once for all layers, and
    from the second layer on lets a query see everything except its segment. It fails at ratio 0 and on bool masks.

    Args:
        masks: bool, (n, H, W). True is foreground.
        kind: see above.
        ratio: in [0, 1]. At 0 the input is returned and nothing is drawn.
        generator: source of randomness, on the device of `masks`.

    Returns:
        bool, (n, H, W).
    """
    noise = PilotNoise(kind, ratio)
    if kind not in MOVING_NOISES:
        raise ValueError(f"Expected a noise that moves masks, one of {', '.join(MOVING_NOISES)}, got {kind!r}.")
    if not noise.moves_masks or not len(masks):
        return masks
    height, width = masks.shape[-2:]
    movement = _draw_movement(_find_boxes(masks), kind, ratio, (), generator)
    moved = _take_rows(masks.view(torch.uint8), movement.find_sources(0, height))
    return _take_columns(moved, movement.find_sources(1, width)).view(torch.bool)


# -------------------------------------------------------------------------------------------------------------- helpers


def _pool_to_levels(
    masks: Tensor, padded_size: tuple[int, int], level_sizes: tuple[tuple[int, int], ...]
) -> list[Tensor]:
    """`pool_masks` to all levels; the full masks are read once if the cells of the finest level make up all others."""
    finest = max(level_sizes)
    finest_masks = pool_masks(masks, padded_size, finest)
    pooled = []
    for level_size in level_sizes:
        axes = zip(padded_size, finest, level_size, strict=True)
        is_nested = all(length % fine == 0 and fine % coarse == 0 for length, fine, coarse in axes)
        source = finest_masks.unflatten(1, finest) if is_nested else masks
        pooled.append(pool_masks(source, finest if is_nested else padded_size, level_size))
    return pooled


def _pool_axis(values: Tensor, dim: int, length: int, num_cells: int) -> Tensor:
    """Largest value of every cell along one axis, which is `length` long with its padding of zeros."""
    if length % num_cells == 0:
        return _pool_even_axis(values, dim, length // num_cells, num_cells)
    cell = torch.arange(num_cells, device=values.device)
    start = cell * length // num_cells
    end = ((cell + 1) * length + num_cells - 1) // num_cells
    longest = length // num_cells + 2
    given = values.shape[dim]
    # Shorter cells repeat their last pixel, and cells that begin on the padding are cleared afterwards.
    pixel = start[:, None] + torch.arange(longest, device=values.device)
    pixel = pixel.minimum(end[:, None] - 1).clamp(max=given - 1)
    pooled = values.index_select(dim, pixel.flatten()).unflatten(dim, pixel.shape).amax(dim + 1)
    is_on_padding = (start >= given).view(-1, *[1] * (values.dim() - 1 - dim))
    return pooled.masked_fill(is_on_padding, 0)


def _pool_even_axis(values: Tensor, dim: int, stride: int, num_cells: int) -> Tensor:
    """Largest value of cells of `stride` pixels, without a padded copy: whole cells, a part of one, padding."""
    num_whole, rest = divmod(values.shape[dim], stride)
    parts = [values.narrow(dim, 0, num_whole * stride).unflatten(dim, (num_whole, stride)).amax(dim + 1)]
    if rest:
        parts.append(values.narrow(dim, num_whole * stride, rest).amax(dim, keepdim=True))
    num_empty = num_cells - num_whole - len(parts[1:])
    if num_empty:
        parts.append(values.new_zeros(*values.shape[:dim], num_empty, *values.shape[dim + 1 :]))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, eq=False)
class _Boxes:
    """Tight boxes of masks; the last axis is y, x. The box of an empty mask is meaningless but finite.

    Attributes:
        centre: float32, (n, 2). Pixel `i` reaches from `i` to `i + 1`.
        extent: float32, (n, 2), height and width, at least 1.
    """

    centre: Tensor
    extent: Tensor

    @staticmethod
    def cat(boxes: list[_Boxes]) -> _Boxes:
        return _Boxes(torch.cat([box.centre for box in boxes]), torch.cat([box.extent for box in boxes]))


def _find_boxes(masks: Tensor) -> _Boxes:
    """Tight boxes of bool masks (n, h, w), n >= 1."""
    centres, extents = [], []
    for other_axis in (2, 1):
        occupied = masks.view(torch.uint8).amax(other_axis).view(torch.bool)  # (n, h), then (n, w)
        length = occupied.shape[1]
        position = torch.arange(length, device=masks.device)
        start = torch.where(occupied, position, length).amin(dim=1)
        end = torch.where(occupied, position + 1, 0).amax(dim=1)
        centres.append((start + end) / 2)
        extents.append((end - start).clamp(min=1).float())
    return _Boxes(torch.stack(centres, dim=1), torch.stack(extents, dim=1))


@dataclass(frozen=True, eq=False)
class _Movement:
    """Resize about a centre, then translate; the last axis is y, x.

    Attributes:
        centre: float32, (n, 2).
        factor: float32, (..., n, 2), above 0. More than 1 enlarges.
        shift: float32, (..., n, 2), whole pixels to the bottom and to the right.
    """

    centre: Tensor
    factor: Tensor
    shift: Tensor

    def find_sources(self, axis: int, length: int) -> Tensor:
        """Pixel that each pixel of the result comes from: int64, (..., n, length). May lie outside the mask."""
        target = torch.arange(length, device=self.centre.device) + 0.5
        centre, factor, shift = (part[..., axis, None] for part in (self.centre, self.factor, self.shift))
        return (centre + (target - shift - centre) / factor).floor().long()


def _draw_movement(
    boxes: _Boxes, kind: str, ratio: float, copies: tuple[int, ...], generator: torch.Generator | None
) -> _Movement:
    """Draw how every mask moves, independently for each of `copies`; the definition is that of `move_masks`."""
    shape = (*copies, *boxes.extent.shape)
    factor, shift = boxes.extent.new_ones(shape), boxes.extent.new_zeros(shape)
    if kind in ("scale", "shift_scale"):
        draw = torch.rand(shape, generator=generator, device=shift.device) * 2 - 1
        factor = (1 + ratio * draw).maximum(1 / boxes.extent)
    if kind in ("shift", "shift_scale"):
        draw = torch.rand(shape, generator=generator, device=shift.device) * 2 - 1
        shift = (ratio * draw * boxes.extent / 2).round()
    return _Movement(boxes.centre, factor, shift)


def _move_and_pool(masks: Tensor, rows: Tensor, columns: Tensor, level_size: tuple[int, int]) -> Tensor:
    """Moved and pooled masks of one image, for a few groups at a time so that memory stays bounded.

    Both steps work on one axis at a time and so can take turns: rows are pooled before columns move, on a tensor that
    is much smaller.

    Args:
        masks: bool, (n, h, w).
        rows: int64, (G, n, H), the row of the mask that each row of the padded image shows.
        columns: int64, (G, n, W), the same for columns.
        level_size: height and width of the feature level.

    Returns:
        bool, (G, n, cells). True is visible.
    """
    _, num_masks, height = rows.shape
    groups_at_once = max(1, MOVED_PIXELS_AT_ONCE // (num_masks * height * masks.shape[-1]))
    pooled = []
    for some_rows, some_columns in zip(rows.split(groups_at_once), columns.split(groups_at_once), strict=True):
        moved = _take_rows(masks.view(torch.uint8), some_rows)
        moved = _pool_axis(moved, 2, height, level_size[0])
        moved = _take_columns(moved, some_columns)
        pooled.append(_pool_axis(moved, 3, columns.shape[-1], level_size[1]))
    return torch.cat(pooled).flatten(2).view(torch.bool)


def _take_rows(masks: Tensor, rows: Tensor) -> Tensor:
    """Rows of each mask, uint8 (n, h, w), as `rows`, int64 (..., n, H), says; outside is 0."""
    num_masks, height, _ = masks.shape
    mask_index = torch.arange(num_masks, device=masks.device)[:, None]
    is_inside = (rows >= 0) & (rows < height)
    taken = masks[mask_index, rows.clamp(0, height - 1)]
    return taken.mul_(is_inside[..., None])


def _take_columns(masks: Tensor, columns: Tensor) -> Tensor:
    """Columns of each mask, uint8 (..., n, h, w), as `columns`, int64 (..., n, W), says; outside is 0."""
    *_, height, width = masks.shape
    is_inside = (columns >= 0) & (columns < width)
    index = columns.clamp(0, width - 1)[..., None, :].expand(*columns.shape[:-1], height, -1)
    return masks.gather(-1, index).mul_(is_inside[..., None, :])


# --------------------------------------------------------------------------------------------------------------- checks


def _lies_inside(masks: Tensor, padded_size: tuple[int, int]) -> bool:
    """True for masks (n, h, w) that are no larger than the padded image."""
    size = masks.shape[1:]
    return len(size) == len(padded_size) and size[0] <= padded_size[0] and size[1] <= padded_size[1]


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"Expected a noise ratio in [0, 1], got {ratio}. 0 switches the noise off.")


def _check_class_labels(class_labels: Tensor, num_segments: int, num_labels: int) -> None:
    if class_labels.shape != (num_segments,):
        raise ValueError(
            f"Expected one class label for each of the {num_segments} segments, got shape {tuple(class_labels.shape)}. "
            "Concatenate the labels of all images in order."
        )
    # On an accelerator this would have to wait, and would break a compiled graph; there the embedding reports them.
    if class_labels.device.type != "cpu" or not num_segments or torch.compiler.is_compiling():
        return
    lowest, highest = (int(bound) for bound in class_labels.aminmax())
    if lowest < 0 or highest >= num_labels:
        raise ValueError(
            f"Expected class labels in [0, {num_labels}), got labels from {lowest} to {highest}. "
            "Remove segments to be ignored from mask_labels and class_labels, or raise num_labels."
        )


def _check_mask_labels(mask_labels: Sequence[Tensor], padded_size: tuple[int, int], layout: SlotLayout) -> None:
    num_segments = sum(len(masks) for masks in mask_labels)
    if (len(mask_labels), num_segments) != (layout.num_images, layout.num_segments):
        raise ValueError(
            f"Expected masks of {layout.num_segments} segments in {layout.num_images} images, as laid out, got "
            f"{num_segments} in {len(mask_labels)}. Lay out the slots with the number of masks of each image."
        )
    for index, masks in enumerate(mask_labels):
        if len(masks) and not _lies_inside(masks, padded_size):
            raise ValueError(
                f"Expected the masks of image {index} to be (segments, h, w) inside the padded size "
                f"{tuple(padded_size)}, got {tuple(masks.shape)}. Resize the masks together with their image."
            )
