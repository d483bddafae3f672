"""Images as people have them to tensors (channels, height, width): files, PIL images of every mode, arrays, tensors.

Values keep their meaning: 8 bits stay 8 bits, 16 bits and booleans come to 0..255, palettes and CMYK become colours, what is
transparent becomes white. EXIF rotation is not applied. What cannot be read without guessing is refused.
"""

import base64
import binascii
import io
import os
import urllib.request
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.image_utils import ChannelDimension, ImageInput
from transformers.utils import logging

logger = logging.get_logger(__name__)

FILE_TYPES = (str, os.PathLike)
DOWNLOAD_SECONDS = 60

IMAGE_RANK = 3
GRAY_RANK = 2
RGB_CHANNELS = 3
RGBA_CHANNELS = 4
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
WHITE = 255
LARGEST_16_BIT = 65535
# Above every number of an image in [0, 1], or normalised with ImageNet's mean (2.64), and next to nothing of 255.
LARGEST_SCALED = 4


def flatten_images(images: ImageInput) -> list[Any]:
    """Flatten one image, an array of several (4 axes), or lists of either, to a list of images."""
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten_images(entry)]
    return list(images) if isinstance(images, Tensor | np.ndarray) and images.ndim == IMAGE_RANK + 1 else [images]


def open_image(source: str | os.PathLike[str]) -> PIL.Image.Image:
    """Read an image file: from a path, or as transformers allows it for text, from an URL or base64.

    Pixels stay as they are stored; in contrast to transformers' `load_image`, EXIF rotation is not applied.
    """
    text = str(os.fspath(source))
    is_path = os.path.isfile(text)  # noqa: PTH113 - no error for base64, which is too long for a name
    try:
        with PIL.Image.open(text if is_path else encoded_image(text)) as image:
            image.load()
            return image
    except PIL.UnidentifiedImageError as error:  # the bytes are of no known form
        what = "is no image that Pillow can read" if is_path else "is neither a file, nor the URL or base64 of an image"
        raise ValueError(f"{shortened(text)} {what}. Check the path, and that the file is complete.") from error
    except Exception as error:  # each decoder of Pillow has errors of its own
        raise ValueError(
            f"{shortened(text)} cannot be read ({type(error).__name__}: {error}). Fetch the file again, or leave it out."
        ) from error


def encoded_image(text: str) -> io.BytesIO:
    """Fetch the bytes of an image from an URL, or decode them from base64, with or without `data:image/...,`."""
    if text.startswith(("http://", "https://")):
        with urllib.request.urlopen(text, timeout=DOWNLOAD_SECONDS) as reply:
            return io.BytesIO(reply.read())
    try:
        return io.BytesIO(base64.b64decode(text.partition(",")[2] if text.startswith("data:image/") else text))
    except (binascii.Error, ValueError):
        return io.BytesIO()


def shortened(text: str) -> str:
    """Quote a path or URL; base64 is cut."""
    longest = 200
    return repr(text) if len(text) <= longest else repr(text[:longest]) + "..."


def channels_first(image: Tensor, input_data_format: str | ChannelDimension | None) -> Tensor:
    """Bring (height, width), (height, width, channels) or (channels, height, width) to the last of these."""
    if image.ndim == GRAY_RANK:
        return image[None]
    if image.ndim != IMAGE_RANK:
        raise ValueError(
            f"expected an image of 2 or 3 axes, got the shape {tuple(image.shape)}. Pass several images as a list, or "
            "as an array of 4 axes."
        )
    is_last = ChannelDimension(input_data_format or channel_format(image)) is ChannelDimension.LAST
    return image.permute(2, 0, 1) if is_last else image


def channel_format(image: Tensor) -> ChannelDimension:
    """Find the axis of the channels; where both ends could be it, guess as transformers and warn as it does."""
    counts = (1, RGB_CHANNELS, RGBA_CHANNELS)
    first, last = image.shape[0], image.shape[-1]
    if first not in counts and last not in counts:
        raise ValueError(
            f"neither the first nor the last axis of its shape {tuple(image.shape)} has 1, 3 or 4 channels. Pass "
            "several gray images as a list, and other numbers of channels with `input_data_format` and "
            "`do_convert_rgb=False`."
        )
    # One pixel high is more likely than one channel where the other end has three or four.
    is_last = first not in counts or (first == 1 and last in counts[1:])
    result = ChannelDimension.LAST if is_last else ChannelDimension.FIRST
    if first in counts and last in counts and set(image.shape) != {1}:
        logger.warning(
            "The channels of an image of shape %s could be its first or its last axis; `%s` is assumed. Pass "
            "`input_data_format`.",
            tuple(image.shape),
            result.value,
        )
    return result


def pil_to_array(image: PIL.Image.Image) -> np.ndarray:
    """Read the values of a PIL image as they are stored."""
    decode(image)
    if image.mode in ("P", "PA"):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} holds indices of a palette, which are no colours. Set "
            "`do_convert_rgb=True`, or convert it."
        )
    return np.array(image)


def pil_to_rgb(image: PIL.Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode to (height, width, 3), or of 16 bits to (height, width); transparent is white."""
    decode(image)
    if image.mode.startswith("I;16"):
        return np.array(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} has no defined range. Pass an array instead: of uint8 or uint16, such "
            "as `np.array(image).astype('uint16')` for 16 bits, or of floats from 0 to 255."
        )
    if is_transparent(image):
        if image.mode == "La":  # Pillow converts it to nothing else
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (WHITE,) * RGBA_CHANNELS), image)
    return np.array(image.convert("RGB"))


def is_transparent(image: PIL.Image.Image) -> bool:
    """Tell whether a PIL image has an opacity: as a channel, for one colour, or in its palette."""
    return (
        image.mode in TRANSPARENT_MODES
        or image.info.get("transparency") is not None
        or (image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA")
    )


def decode(image: PIL.Image.Image) -> None:
    """Read the pixels of a PIL image, which does so late, from its file."""
    try:
        image.load()
    except Exception as error:  # each decoder of Pillow has errors of its own
        raise ValueError(
            f"its file cannot be decoded ({type(error).__name__}: {error}). It is damaged or incomplete, or was closed "
            "before its pixels were read: fetch it again, call `image.load()` before closing it, or leave it out."
        ) from error


def eight_bit_range(image: Tensor) -> Tensor:
    """Bring an image of bool or integers to 0..255; uint8 stays as it is, floats become float32."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * WHITE
    if image.is_floating_point():
        return image.float()
    values = image.float()
    low, high = (float(value) for value in values.aminmax())
    is_16_bit = image.dtype == torch.uint16
    if low < 0 or high > (LARGEST_16_BIT if is_16_bit else WHITE):
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(
            f"an image of type {kind} must hold 0 to {WHITE}, got {low:g} to {high:g}. Convert it to uint8, or to "
            "uint16 if it uses all 16 bits."
        )
    if is_16_bit and 0 < high <= LARGEST_SCALED * (LARGEST_16_BIT / WHITE):
        raise ValueError(
            f"its type is uint16, which means 0 to {LARGEST_16_BIT}, but its largest value is {high:g}, next to black. "
            "Convert values of 8 bits to uint8, and stretch those of other depths to 16 bits."
        )
    return values / (LARGEST_16_BIT / WHITE) if is_16_bit else values.to(torch.uint8)


def channels_to_rgb(image: Tensor, white: int) -> Tensor:
    """Convert (1, 3 or 4 channels, height, width) to three channels; what is transparent becomes white."""
    channels = image.shape[0]
    if channels == 1:
        return image.expand(RGB_CHANNELS, -1, -1)
    if channels == RGBA_CHANNELS:
        opacity = image[RGB_CHANNELS:].float() / white
        blended = image[:RGB_CHANNELS].float() * opacity + white * (1 - opacity)
        return blended if image.is_floating_point() else blended.round().to(image.dtype)
    if channels != RGB_CHANNELS:
        raise ValueError(
            f"expected 1, 3 or 4 channels, got {channels}. Set `do_convert_rgb=False` for a model of {channels} "
            "channels."
        )
    return image
