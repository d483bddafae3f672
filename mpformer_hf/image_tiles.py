"""Parts of a large image: where they lie, how they are cut, and what a model says of them.

Axes: B images, Q queries, K classes, h w mask logits, H W the whole image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.image_utils import ChannelDimension

from .image_reading import channel_format, decode
from .mask_post_processing import valid_sizes
from .mask_resizing import Size

Model = Callable[..., Any]
AnyImage = PIL.Image.Image | np.ndarray | Tensor

CUT_MARGIN = 8  # pixels; an object that comes this near to a seam of its tile may go on behind it
IMAGE_RANK = 3


@dataclass(frozen=True)
class Region:
    """A rectangle of pixels; bottom and right are behind its last ones."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    def __and__(self, other: "Region") -> "Region":
        """The pixels of both, which are some."""
        return Region(
            max(self.top, other.top),
            max(self.left, other.left),
            min(self.bottom, other.bottom),
            min(self.right, other.right),
        )

    def __or__(self, other: "Region") -> "Region":
        """The smallest rectangle around both."""
        return Region(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )

    def within(self, outer: "Region") -> tuple[slice, slice]:
        """Rows and columns of this region in an array that holds `outer`."""
        return (
            slice(self.top - outer.top, self.bottom - outer.top),
            slice(self.left - outer.left, self.right - outer.left),
        )


@dataclass(frozen=True)
class Span:
    """What a tile has of one axis: from `start` to before `stop`; likewise its core, and what no seam cuts."""

    start: int
    stop: int
    core_start: int
    core_stop: int
    uncut_start: int
    uncut_stop: int


def cover_axis(length: int, side: int, overlap: int) -> list[Span]:
    """Spread tiles over one axis, as few as the overlap allows.

    >>> [(span.start, span.stop, span.core_start, span.core_stop) for span in cover_axis(10, 6, 1)]
    [(0, 6, 0, 5), (4, 10, 5, 10)]
    """
    side = min(side, length)
    gaps = -(-(length - side) // (side - overlap)) if length > side else 0
    starts = [number * (length - side) // gaps for number in range(gaps + 1)] if gaps else [0]
    cuts = [(start + side + next_start) // 2 for start, next_start in pairwise(starts)]
    margin = min(CUT_MARGIN, side)
    return [
        Span(
            start=start,
            stop=start + side,
            core_start=core_start,
            core_stop=core_stop,
            uncut_start=start + margin if start else 0,
            uncut_stop=start + side - margin if start + side < length else length,
        )
        for start, core_start, core_stop in zip(starts, [0, *cuts], [*cuts, length], strict=True)
    ]


@dataclass(frozen=True)
class SourceImage:
    """An image that is cut without being converted; `data_format` says where an array has its channels."""

    pixels: AnyImage
    size: Size
    data_format: ChannelDimension | None = None

    @classmethod
    def of(cls, image: AnyImage, data_format: str | ChannelDimension | None) -> Self:
        """Find height and width of an image; a gray array (H, W) gets a first axis of one channel."""
        if isinstance(image, PIL.Image.Image):
            decode(image)
            return cls(image, (image.height, image.width))
        if not isinstance(image, np.ndarray | Tensor) or image.ndim not in {IMAGE_RANK - 1, IMAGE_RANK}:
            shape = f" of shape {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else ""
            raise ValueError(
                "Expected one image: a PIL image, or an array or tensor (height, width), (height, width, channels) or "
                f"(channels, height, width), got {type(image).__name__}{shape}. Open files with "
                "`PIL.Image.open`, and call this once for each image."
            )
        if image.ndim == IMAGE_RANK - 1:
            image, data_format = image[None], ChannelDimension.FIRST
        data_format = ChannelDimension(data_format or channel_format(cast("Tensor", image)))
        height, width = image.shape[-2:] if data_format == ChannelDimension.FIRST else image.shape[:2]
        if not height or not width:
            raise ValueError(f"The image is empty: its shape is {tuple(image.shape)}.")
        return cls(image, (height, width), data_format)

    def crop(self, region: Region) -> AnyImage:
        """Cut a region out."""
        if isinstance(self.pixels, PIL.Image.Image):
            return self.pixels.crop((region.left, region.top, region.right, region.bottom))
        rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
        return (
            self.pixels[:, rows, columns] if self.data_format == ChannelDimension.FIRST else self.pixels[rows, columns]
        )


@dataclass(frozen=True)
class Logits:
    """A model's outputs for one image (a part of a larger one) or several.

    Attributes:
        classes: any float type, (B, Q, K + 1).
        masks: any float type, (B, Q, h, w).
        sizes: int64, (B, 2), valid height and width of each padded image; `None`: all of it is valid.
    """

    classes: Tensor
    masks: Tensor
    sizes: Tensor | None

    def one(self, number: int) -> Self:
        """The outputs of one image, still as a batch."""
        one = slice(number, number + 1)
        return type(self)(self.classes[one], self.masks[one], None if self.sizes is None else self.sizes[one])


@torch.inference_mode()
def run_model(model: Model, inputs: Mapping[str, Any], num_images: int) -> Logits:
    """Run the model on its own device and in its own float type.

    Valid sizes that the model does not return are read from the pixel mask, where there is one.

    Raises:
        ValueError: the model is in training mode, or its outputs are none of a model for universal segmentation.
    """
    if getattr(model, "training", False):
        raise ValueError("The model is in training mode, in which predictions vary. Call `model.eval()` first.")
    moved = move_to_model(inputs, model)
    outputs = model(**moved)
    classes = required_logits(outputs, "class_queries_logits", num_images)
    masks = required_logits(outputs, "masks_queries_logits", num_images)
    sizes = getattr(outputs, "image_sizes", None)
    pixel_mask = moved.get("pixel_mask")
    if sizes is None and pixel_mask is not None:
        sizes = valid_sizes(pixel_mask)
    return Logits(classes, masks, sizes)


def move_to_model(inputs: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Move tensors to the model's device, and floats to its float type, where it has them."""
    device, dtype = getattr(model, "device", None), getattr(model, "dtype", None)
    float_type = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None
    return {
        name: value.to(device=device, dtype=float_type if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def required_logits(outputs: Any, name: str, num_images: int) -> Tensor:  # noqa: ANN401
    """Read one tensor of the model's outputs, of as many images as went in."""
    logits = getattr(outputs, name, None)
    if isinstance(logits, Tensor) and logits.ndim and len(logits) == num_images:
        return logits
    came = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(
        f"Expected outputs with a tensor `{name}` of {num_images} images, got {type(outputs).__name__} with {came} there. "
        "Pass the model for universal segmentation, not its inner model, and one that returns its outputs by name "
        "(`return_dict`)."
    )
