"""Colour jitter of SSD (Liu et al. 2016), as the original draws it for semantic segmentation, on images of 8 bits.

Brightness and contrast are tables of 256 entries. Saturation and hue are arithmetic on the pixels: half the time of Pillow's
conversion to HSV and back, a fifth of torchvision's two functions, and the hue is not rounded to 256 steps.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BRIGHTNESS = 32.0  # added, to both sides, of 255
CONTRAST = (0.5, 1.5)  # factor
SATURATION = (0.5, 1.5)  # factor
HUE = 36.0  # degrees, to both sides
PROBABILITY = 0.5  # of each of the four, and of contrast before saturation and hue
NUM_DRAWS = 9

ROWS_AT_ONCE = 32  # so that what is computed with stays in the cache
SEXTANT = 60.0  # degrees

Plane = NDArray[np.float32]


def jitter_colors(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue, each with probability 1/2.

    Brightness comes first. Contrast comes next or last, with equal probability; saturation comes before hue.

    Args:
        image: RGB.
        rng: source of randomness; `NUM_DRAWS` numbers are drawn in any case.
    """
    draws = rng.random(NUM_DRAWS)
    brightens, contrasts, saturates, turns = draws[:4] < PROBABILITY
    levels = np.arange(256.0)
    if brightens:
        levels = clip_to_levels(levels + between(-BRIGHTNESS, BRIGHTNESS, draws[4]))
    factor = between(*CONTRAST, draws[5]) if contrasts else 1.0
    is_contrast_early = draws[8] < PROBABILITY
    if is_contrast_early:
        levels = clip_to_levels(levels * factor)
    image = apply_table(image, levels)
    image = change_hue_and_saturation(
        image,
        between(*SATURATION, draws[6]) if saturates else 1.0,
        between(-HUE, HUE, draws[7]) if turns else 0.0,
    )
    return image if is_contrast_early else apply_table(image, clip_to_levels(np.arange(256.0) * factor))


def between(low: float, high: float, draw: float) -> float:
    """Map a number drawn from [0, 1) to [low, high)."""
    return low + (high - low) * float(draw)


def clip_to_levels(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to the levels of a channel, 0 to 255."""
    return np.clip(np.rint(values), 0, 255)


def apply_table(image: Image.Image, levels: NDArray[np.float64]) -> Image.Image:
    """Replace each level of each channel by another one, (256,)."""
    if np.array_equal(levels, np.arange(256)):
        return image
    return image.point([int(level) for level in levels] * 3)


def change_hue_and_saturation(image: Image.Image, saturation: float, hue: float) -> Image.Image:
    """Multiply the saturation and turn the hue, in the sense of HSV; the value of a pixel, its largest channel, stays.

    Args:
        image: RGB.
        saturation: factor, >= 0; a saturation above 1 becomes 1.
        hue: angle to add, in degrees.
    """
    if saturation == 1 and hue == 0:
        return image
    pixels = np.array(image)
    for start in range(0, len(pixels), ROWS_AT_ONCE):
        rows = pixels[start : start + ROWS_AT_ONCE]
        channels = [rows[..., channel].astype(np.float32) for channel in range(3)]
        value = np.maximum(np.maximum(channels[0], channels[1]), channels[2])
        chroma = value - np.minimum(np.minimum(channels[0], channels[1]), channels[2])
        if hue == 0:
            changed = scale_saturation(channels, value, chroma, saturation)
        else:
            changed = turn_hue(channels, value, chroma, saturation, hue)
        for channel, plane in enumerate(changed):
            rows[..., channel] = np.rint(plane, out=plane)
    return Image.fromarray(pixels)


def scale_saturation(channels: list[Plane], value: Plane, chroma: Plane, saturation: float) -> Iterator[Plane]:
    """Move the channels, three of (rows, W), away from the largest of them, or towards it."""
    # A grey pixel has no chroma and stays as it is.
    factor = np.minimum(np.float32(saturation), value / np.maximum(chroma, 1))
    for plane in channels:
        yield value - (value - plane) * factor


def turn_hue(channels: list[Plane], value: Plane, chroma: Plane, saturation: float, hue: float) -> Iterator[Plane]:
    """Turn the hue of channels, three of (rows, W), and scale their saturation too."""
    red, green, blue = channels
    inverse = 1 / np.maximum(chroma, 1)
    # In sextants of the circle of colours: red is 0, green 2, blue 4.
    angle = (red - green) * inverse + 4
    np.copyto(angle, (blue - red) * inverse + 2, where=value == green)
    np.copyto(angle, (green - blue) * inverse, where=value == red)
    angle += np.float32(hue / SEXTANT)
    chroma = np.minimum(chroma * np.float32(saturation), value)
    for offset in (5, 3, 1):
        distance = angle + np.float32(offset)
        distance -= 6 * np.floor(distance / 6)
        share = np.minimum(distance, 4 - distance)
        yield value - chroma * np.clip(share, 0, 1, out=share)
