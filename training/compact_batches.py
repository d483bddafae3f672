"""Batches as workers send them: pixels of 8 bits, masks as bits, nothing computed that the device can compute.

    worker: rows ── pack_batch ── CompactBatch  ───▶  device: unpack_batch ── the model's inputs

A batch of one image of 1024 x 1024 with 20 segments is 6 MB and not 40, which matters more than any arithmetic: memory that
processes share is slow to come by. `CompactBatch` is a named tuple of tensors, so pinning and moving to a device reach all of it;
sizes are plain numbers, so that nothing waits for the device.

Axes: B images, n segments of one image, H W the batch, h w what is seen of one image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpformer_hf import MPFormerImageProcessor
from training.augmentation import AugmentedRow
from training.broken_images import Skipped, skipped_of
from training.windows import Size

BITS = 8


class CompactBatch(NamedTuple):
    """Some augmented rows.

    Attributes:
        pixels: uint8, (B, H, W, 3), padding painted.
        image_sizes: h and w of each image.
        canvas_sizes: the same with the padding of the augmentation; what is beyond makes the batch rectangular.
        mask_bits: for each image uint8 (n, h, w / 8 rounded up), the first pixel is the highest bit.
        class_labels: for each image int64 (n,).
        ignore_bits: for each image as a mask (1, h, w / 8 rounded up); empty if no row has a mask of what to ignore.
        skipped: position and reason of images that cannot be read, for `training.broken_images.BrokenImages`.
    """

    pixels: Tensor
    image_sizes: list[Size]
    canvas_sizes: list[Size]
    mask_bits: list[Tensor]
    class_labels: list[Tensor]
    ignore_bits: list[Tensor]
    skipped: Sequence[Skipped] = ()


def pack_batch(rows: Sequence[AugmentedRow], size_divisor: int = 32) -> CompactBatch:
    """Collect augmented rows: the `collate_fn` of a `DataLoader`.

    Args:
        rows: at least one.
        size_divisor: height and width of the batch are those of the largest canvas, rounded up to a multiple of it.
    """
    canvas_sizes = [row["canvas_size"] for row in rows]
    height, width = (-(-max(sides) // size_divisor) * size_divisor for sides in zip(*canvas_sizes, strict=True))
    pixels = torch.empty((len(rows), height, width, 3), dtype=torch.uint8)
    for canvas, row in zip(pixels.numpy(), rows, strict=True):
        seen = np.asarray(row["image"])
        canvas[: seen.shape[0], : seen.shape[1]] = seen
        canvas[seen.shape[0] :] = row["pad_value"]
        canvas[: seen.shape[0], seen.shape[1] :] = row["pad_value"]
    ignored = [row.get("ignore_mask") for row in rows]
    return CompactBatch(
        pixels=pixels,
        image_sizes=[(row["image"].height, row["image"].width) for row in rows],
        canvas_sizes=canvas_sizes,
        mask_bits=[pack_masks(row["mask_labels"]) for row in rows],
        class_labels=[torch.from_numpy(np.asarray(row["class_labels"], dtype=np.int64)) for row in rows],
        ignore_bits=[
            pack_masks(
                np.zeros((1, row["image"].height, row["image"].width), dtype=bool) if mask is None else mask[None]
            )
            for row, mask in zip(rows, ignored, strict=True)
        ]
        if any(mask is not None for mask in ignored)
        else [],
        skipped=skipped_of(rows),
    )


def unpack_batch(batch: CompactBatch, processor: MPFormerImageProcessor) -> dict[str, Any]:
    """Make the inputs of the model, on the device of the batch.

    Args:
        batch: see `pack_batch`.
        processor: its `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean` and `image_std` are applied. What is beyond the
            canvas of an image is 0 afterwards, as the processor pads.

    Returns:
        `pixel_values` float32 (B, 3, H, W), `pixel_mask` bool (B, H, W) with True on the image, `mask_labels`, for each image bool
        (n, h, w), and `class_labels`; all that `model(**inputs)` takes.
    """
    device = batch.pixels.device
    height, width = batch.pixels.shape[1:3]
    # Transposed and made float in one pass; the rest happens in place.
    values = torch.empty((len(batch.pixels), 3, height, width), device=device)
    values.copy_(batch.pixels.permute(0, 3, 1, 2))
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    if processor.do_normalize:
        mean, deviation = (
            torch.tensor(numbers, device=device).view(3, 1, 1) / factor
            for numbers in (processor.image_mean, processor.image_std)
        )
        values.sub_(mean).div_(deviation)
    elif factor != 1:
        values.mul_(factor)
    if any(size != (height, width) for size in batch.canvas_sizes):
        values.masked_fill_(~inside(batch.canvas_sizes, height, width, device)[:, None], 0.0)
    return {
        "pixel_values": values,
        "pixel_mask": inside(batch.image_sizes, height, width, device),
        "mask_labels": unpack_all(batch.mask_bits, batch.image_sizes),
        "class_labels": batch.class_labels,
    }


def unpack_ignore_masks(batch: CompactBatch) -> list[Tensor] | None:
    """For each image where nobody knows what is right, bool (h, w); `None` if no row of the batch says so."""
    return [masks[0] for masks in unpack_all(batch.ignore_bits, batch.image_sizes)] or None


def inside(sizes: Sequence[Size], height: int, width: int, device: torch.device) -> Tensor:
    """Mark rectangles of some sizes in the upper left corner; bool, (B, height, width)."""
    heights, widths = torch.tensor(sizes, device=device).unbind(1)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return (rows < heights[:, None])[:, :, None] & (columns < widths[:, None])[:, None, :]


def unpack_all(bits: Sequence[Tensor], image_sizes: Sequence[Size]) -> list[Tensor]:
    """Unpack the masks of each image; none if there are none of any."""
    return [unpack_masks(one, width) for one, (_, width) in zip(bits, image_sizes, strict=False)]


def pack_masks(masks: NDArray[np.bool_]) -> Tensor:
    """Eight pixels of a row in a byte: bool (n, h, w) to uint8 (n, h, w / 8 rounded up)."""
    return torch.from_numpy(np.packbits(masks, axis=-1))


def unpack_masks(bits: Tensor, width: int) -> Tensor:
    """Undo `pack_masks`: uint8 (n, h, w / 8 rounded up) to bool (n, h, w), on the same device."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=width).view(bool))
    return shift_out(bits, width)


def shift_out(bits: Tensor, width: int) -> Tensor:
    """Unpack masks on any device; on a CPU numpy is fifteen times faster."""
    shifts = torch.arange(BITS - 1, -1, -1, dtype=torch.uint8, device=bits.device)
    pixels = (bits[..., None] >> shifts) & 1  # (n, h, bytes, 8)
    return pixels.flatten(-2)[..., :width].bool()
