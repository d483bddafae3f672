"""Checks of images and ground truth: shapes and counts at once, values in the one host transfer of a step.

Asking a GPU whether a value is in range stops the host until the GPU has caught up. So values are reduced to a few numbers an
image on the device; the criterion fetches them together with the matching costs and raises before the loss is returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .global_batch import GlobalBatch
from .mask_post_processing import valid_sizes

SMALLEST_IMAGE = 32


@dataclass(frozen=True)
class Targets:
    """Ground truth of one batch, checked for shapes.

    Attributes:
        mask_labels: per image, (T, h, w), bool, uint8 or float in [0, 1].
        class_labels: per image, int64, (T,); clamped into the range of classes.
        padded_size: height and width of the padded images.
        values: float32, (B, 6), what `raise_for_values` looks at on the host.
        ignore_masks: per image, bool, (h, w), True where the label is unknown, or `None`; `None` where all labels are known.
        global_batch: counts of the whole optimiser step; `None` where this batch, on every process, is all of it.
    """

    mask_labels: list[Tensor]
    class_labels: list[Tensor]
    padded_size: tuple[int, int]
    values: Tensor
    ignore_masks: list[Tensor | None] | None = None
    global_batch: GlobalBatch | None = None

    @property
    def num_segments(self) -> list[int]:
        """Segments of each image."""
        return [len(labels) for labels in self.class_labels]


def check_images(pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
    """Refuse images of a wrong rank, with a mask of another size, or smaller than the largest stride."""
    if pixel_values.ndim != 4:  # noqa: PLR2004
        raise ValueError(
            f"Expected `pixel_values` of shape (batch, channels, height, width), got {tuple(pixel_values.shape)}. "
            "Add the batch axis to a single image, or use the image processor."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"Expected floating-point `pixel_values`, got {pixel_values.dtype}. Normalise the images, or use the image processor."
        )
    height, width = pixel_values.shape[-2:]
    if min(height, width) < SMALLEST_IMAGE:
        raise ValueError(
            f"Expected images of at least {SMALLEST_IMAGE}x{SMALLEST_IMAGE} pixels, the largest stride, got {height}x{width}. "
            "Pad them (the image processor does) or resize them."
        )
    if pixel_mask is not None and pixel_mask.shape != (pixel_values.shape[0], height, width):
        raise ValueError(
            f"Expected `pixel_mask` of shape {(pixel_values.shape[0], height, width)}, that of the images, got "
            f"{tuple(pixel_mask.shape)}. Pass one value per pixel: 1 for the image, 0 for padding."
        )


def measure_images(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Height and width of the valid part of each padded image, int64, (B, 2), on the device of the images."""
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask is None:
        # Filled, not copied: copying numbers to an accelerator would wait for it.
        sides = [
            torch.full((batch_size,), side, dtype=torch.int64, device=pixel_values.device) for side in (height, width)
        ]
        return torch.stack(sides, dim=1)
    return valid_sizes(pixel_mask)


@torch.compiler.disable  # every new number of segments would be another graph
def check_targets(
    pixel_values: Tensor,
    image_sizes: Tensor | None,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    num_labels: int,
    *,
    ignore_masks: Sequence[Tensor | None] | None = None,
    global_batch: GlobalBatch | None = None,
) -> Targets:
    """Refuse ground truth whose shapes cannot be right, and prepare the check of its values.

    Args:
        pixel_values: (B, C, H, W).
        image_sizes: int64, (B, 2), valid sizes; `None` where every pixel is valid.
        mask_labels: per image, (T, h, w); (h, w) is the padded size or the image's valid size.
        class_labels: per image, (T,).
        num_labels: K.
        ignore_masks: per image, bool, (h, w), True where the label is unknown, or `None`; sizes as of the masks.
        global_batch: counts of the whole optimiser step.

    Raises:
        ValueError: names the image, what was expected, what came and what to do.
    """
    padded_size = (pixel_values.shape[2], pixel_values.shape[3])
    advice = "An image without segments has an empty tensor."
    _check_number("mask_labels", mask_labels, len(pixel_values), advice)
    _check_number("class_labels", class_labels, len(pixel_values), advice)
    ignored: list[Tensor | None] = [None] * len(pixel_values)
    if ignore_masks is not None:
        _check_number("ignore_masks", ignore_masks, len(pixel_values), "It is `None` for an image without such pixels.")
        ignored = [
            mask if mask is None else _check_ignore_mask(image, mask).to(pixel_values.device, non_blocking=True)
            for image, mask in enumerate(ignore_masks)
        ]
    pixels = pixel_values.detach().flatten(1)
    masks_on_device, labels_on_device, values = [], [], []
    for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        masks = _check_masks(image, masks).to(pixels.device, non_blocking=True)  # noqa: PLW2901
        labels = _check_labels(image, labels, len(masks)).to(pixels.device, non_blocking=True)  # noqa: PLW2901
        size_differs = _compare_sizes(image, masks, ignored[image], padded_size, image_sizes)
        values.append(_summarise(pixels[image], masks, labels, size_differs))
        masks_on_device.append(masks)
        labels_on_device.append(labels.clamp(0, num_labels - 1))
    targets = Targets(
        masks_on_device,
        labels_on_device,
        padded_size,
        torch.stack(values),
        ignore_masks=None if ignore_masks is None else ignored,
        global_batch=global_batch,
    )
    _check_global_batch(targets)
    return targets


def _check_number(name: str, given: Sequence[Tensor | None], num_images: int, advice: str) -> None:
    if len(given) != num_images:
        raise ValueError(
            f"Expected `{name}` with one tensor for each of the {num_images} images, got {len(given)}. {advice}"
        )


def _check_ignore_mask(image: int, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool:  # noqa: PLR2004
        came = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"Expected the ignore mask of image {image} as a bool tensor of shape (height, width), got {came}. "
            "Pass True for pixels whose label is unknown, such as `label_map == 255`."
        )
    return mask


def _check_global_batch(targets: Targets) -> None:
    counts, num_segments = targets.global_batch, targets.num_segments
    if counts is None or max(num_segments, default=0) <= counts.max_segments:
        return
    image = int(np.argmax(num_segments))
    raise ValueError(
        f"Expected images of at most {counts.max_segments} segments, as `global_batch` has counted, got {num_segments[image]} in "
        f"image {image}. Count the class labels of all batches of the step, this one included."
    )


def _check_masks(image: int, masks: Tensor) -> Tensor:
    if not isinstance(masks, Tensor) or masks.ndim != 3:  # noqa: PLR2004
        came = f"shape {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(
            f"Expected the masks of image {image} as a tensor of shape (segments, height, width), got {came}. "
            "Stack one binary mask per segment; an image without segments has shape (0, height, width)."
        )
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        return masks.to(torch.float32)  # other integers: the check of values finds what is not 0 or 1
    return masks


def _check_labels(image: int, labels: Tensor, num_masks: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        came = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"Expected the class labels of image {image} as an integer tensor of shape (segments,), got {came}. "
            "Pass one class index per mask."
        )
    if len(labels) != num_masks:
        raise ValueError(
            f"Image {image} has {num_masks} masks but {len(labels)} class labels. Pass one class label per mask; "
            "an image without segments has zero of both."
        )
    return labels.long()


MASKS, IGNORE_MASK = "masks", "ignore mask"


def _compare_sizes(
    image: int, masks: Tensor, ignore_mask: Tensor | None, padded_size: tuple[int, int], image_sizes: Tensor | None
) -> Tensor | None:
    """What has neither the padded size nor, as far as the device knows, the image's own: float32, (), see `_find_misfit`."""
    sizes = {} if len(masks) == 0 else {MASKS: tuple(masks.shape[1:])}
    if ignore_mask is not None:
        sizes[IGNORE_MASK] = tuple(ignore_mask.shape)
    differs = None
    for name, size in sizes.items():
        if size == padded_size:
            continue
        if image_sizes is None or size[0] > padded_size[0] or size[1] > padded_size[1] or 0 in size:
            raise ValueError(_size_message(name, image, size, padded_size))
        misfit = (image_sizes[image, 0] != size[0]) | (image_sizes[image, 1] != size[1])
        misfit = misfit.float() * (1 if name == MASKS else 2)
        differs = misfit if differs is None else differs + misfit
    return differs


def _find_misfit(image: int, size_differs: float, targets: Targets) -> tuple[str, tuple[int, ...]]:
    """Name and size of what does not fit: 1 are the masks, 2 is the ignore mask, 3 are both."""
    ignore_mask = None if targets.ignore_masks is None else targets.ignore_masks[image]
    if size_differs == 2 and ignore_mask is not None:  # noqa: PLR2004
        return IGNORE_MASK, tuple(ignore_mask.shape)
    return MASKS, tuple(targets.mask_labels[image].shape[1:])


def _size_message(name: str, image: int, size: tuple[int, ...], padded_size: tuple[int, int]) -> str:
    return (
        f"Expected the {name} of image {image} to be {padded_size[0]}x{padded_size[1]} (the padded size of `pixel_values`) or as "
        f"large as its valid part in `pixel_mask`, got {size[0]}x{size[1]}. Resize the masks together with the image, or pass "
        "the `pixel_mask` of the image processor."
    )


def _summarise(pixels: Tensor, masks: Tensor, labels: Tensor, size_differs: Tensor | None) -> Tensor:
    """Six numbers: pixels finite, lowest and highest label, lowest and highest mask value, what size differs."""
    zero = torch.zeros((), device=pixels.device)
    low_label, high_label = labels.aminmax() if len(labels) else (zero, zero)
    low_mask, high_mask = masks.aminmax() if masks.numel() and masks.dtype != torch.bool else (zero, zero)
    numbers = (
        pixels.isfinite().all(),
        low_label,
        high_label,
        low_mask,
        high_mask,
        zero if size_differs is None else size_differs,
    )
    return torch.stack([number.float() for number in numbers])


def raise_for_values(values: np.ndarray, targets: Targets, num_labels: int) -> None:
    """Raise for the first image whose values are out of range.

    Args:
        values: `Targets.values`, on the host.
        targets: whose values they are.
        num_labels: K.
    """
    for image, (finite, low_label, high_label, low_mask, high_mask, size_differs) in enumerate(values):
        if not finite:
            raise ValueError(
                f"Image {image} has pixels that are not finite. Check the image file and its normalisation (a standard deviation "
                "of zero, an overflow in float16)."
            )
        if low_label < 0 or high_label >= num_labels:
            raise ValueError(
                f"Expected class labels from 0 to {num_labels - 1}, got {int(low_label)} to {int(high_label)} in image {image}. "
                "Drop ignored segments, or set `num_labels` (or `id2label`) to the number of classes without background."
            )
        if not (low_mask >= 0 and high_mask <= 1):
            raise ValueError(
                f"Expected mask values in [0, 1], got {low_mask:g} to {high_mask:g} in image {image}. Pass binary masks; pixels to "
                "be ignored are 0, not 255."
            )
        if size_differs:
            name, size = _find_misfit(image, size_differs, targets)
            raise ValueError(_size_message(name, image, size, targets.padded_size))
