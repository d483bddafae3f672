"""Checks of images and ground truth: shapes and counts at once, values in the one host transfer of a step.

Asking a GPU whether a value is in range stops the host until the GPU has caught up. So values are reduced to a few numbers an
image on the device; the criterion fetches them together with the matching costs and raises before the loss is returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    """

    mask_labels: list[Tensor]
    class_labels: list[Tensor]
    padded_size: tuple[int, int]
    values: Tensor

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
) -> Targets:
    """Refuse ground truth whose shapes cannot be right, and prepare the check of its values.

    Args:
        pixel_values: (B, C, H, W).
        image_sizes: int64, (B, 2), valid sizes; `None` where every pixel is valid.
        mask_labels: per image, (T, h, w); (h, w) is the padded size or the image's valid size.
        class_labels: per image, (T,).
        num_labels: K.

    Raises:
        ValueError: names the image, what was expected, what came and what to do.
    """
    padded_size = (pixel_values.shape[2], pixel_values.shape[3])
    for name, given in (("mask_labels", mask_labels), ("class_labels", class_labels)):
        if len(given) != len(pixel_values):
            raise ValueError(
                f"Expected `{name}` with one tensor for each of the {len(pixel_values)} images, got {len(given)}. "
                "An image without segments has an empty tensor."
            )
    pixels = pixel_values.detach().flatten(1)
    masks_on_device, labels_on_device, values = [], [], []
    for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        masks = _check_masks(image, masks).to(pixels.device, non_blocking=True)  # noqa: PLW2901
        labels = _check_labels(image, labels, len(masks)).to(pixels.device, non_blocking=True)  # noqa: PLW2901
        size_differs = _compare_sizes(image, masks, padded_size, image_sizes)
        values.append(_summarise(pixels[image], masks, labels, size_differs))
        masks_on_device.append(masks)
        labels_on_device.append(labels.clamp(0, num_labels - 1))
    return Targets(masks_on_device, labels_on_device, padded_size, torch.stack(values))


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


def _compare_sizes(
    image: int, masks: Tensor, padded_size: tuple[int, int], image_sizes: Tensor | None
) -> Tensor | None:
    """Whether the masks have neither the padded size nor, as far as the device knows, the image's own: bool, ()."""
    size = tuple(masks.shape[1:])
    if size == padded_size or len(masks) == 0:
        return None
    if image_sizes is None or size[0] > padded_size[0] or size[1] > padded_size[1] or 0 in size:
        raise ValueError(_size_message(image, size, padded_size))
    return (image_sizes[image, 0] != size[0]) | (image_sizes[image, 1] != size[1])


def _size_message(image: int, size: tuple[int, ...], padded_size: tuple[int, int]) -> str:
    return (
        f"Expected the masks of image {image} to be {padded_size[0]}x{padded_size[1]} (the padded size of `pixel_values`) or as "
        f"large as its valid part in `pixel_mask`, got {size[0]}x{size[1]}. Resize the masks together with the image, or pass "
        "the `pixel_mask` of the image processor."
    )


def _summarise(pixels: Tensor, masks: Tensor, labels: Tensor, size_differs: Tensor | None) -> Tensor:
    """Six numbers: pixels finite, lowest and highest label, lowest and highest mask value, size differs."""
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
            size = tuple(targets.mask_labels[image].shape[1:])
            raise ValueError(_size_message(image, size, targets.padded_size))
