"""Digit scenes: a data set that is drawn when it is asked for.

scikit-learn's real handwritten digits (things) lie over crops of scikit-learn's two real photographs (stuff). Nothing is
downloaded, and any index of any split can be had in any order.

Axes: n segments, H W image.
"""

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data import SPLITS, TASKS, SegmentationRow, Split, Task


class DigitScenes:
    """Handwritten digits on photographs: a data set that is drawn, not stored.

    A scene is a crop of one photograph, or of both with a straight border between them, and some digits, each scaled,
    turned a little, coloured, and laid over what is there. A pixel belongs to the segment on top; a segment of which
    fewer than `MIN_VISIBLE_PIXELS` pixels are left is none, and its pixels are void.

    The scene depends on `seed`, `split`, `index`, `preset` and `image_size`; `task` only chooses which segments are
    reported, and `num_images` only where the data set ends. The splits share neither a digit nor a pixel of a photograph.

    >>> scenes = DigitScenes("validation", task="panoptic", num_images=50)
    >>> scenes[7]["mask_labels"].shape[1:]
    (128, 128)
    """

    id2label: dict[int, str]
    thing_ids: tuple[int, ...]
    stuff_ids: tuple[int, ...]

    def __init__(
        self,
        split: Split,
        *,
        task: Task = "panoptic",
        preset: str = "easy",
        image_size: int | Sequence[int] = 128,
        num_images: int = 1000,
        seed: int = 0,
        tell_digits_apart: bool = True,
    ) -> None:
        """Describe the scenes; nothing is drawn yet.

        Args:
            split: `"train"` or `"validation"`.
            task: `"instance"` (digits alone), `"panoptic"` (digits and photographs) or `"semantic"` (one mask for each
                class that is visible).
            preset: `"easy"` (few, large, strong in contrast) or `"hard"` (many, small, overlapping, weak in contrast).
            image_size: side of the square scenes, or (height, width), in pixels; each at least 32. Digits keep their
                size of 24 to 64 pixels, so a larger image has more of them.
            num_images: number of scenes, >= 0. Scenes are drawn when read, so a large number costs nothing.
            seed: of all scenes, >= 0. Another seed is another data set.
            tell_digits_apart: ten thing classes, `0` to `9` (True), or a single one, `digit` (False): the scenes are the
                same, but what is to be learnt is to find and separate digits, not to read them.
        """
        _require_choice("split", split, SPLITS)
        _require_choice("task", task, TASKS)
        _require_choice("preset", preset, SCENE_PRESETS)
        if num_images < 0 or seed < 0:
            raise ValueError(f"num_images and seed must not be negative, got {num_images} and {seed}.")
        self.split = split
        self.task = task
        self.preset = preset
        self.image_size = _height_and_width(image_size)
        self.num_images = num_images
        self.seed = seed
        things = tuple(map(str, range(NUM_DIGITS))) if tell_digits_apart else ("digit",)
        self.thing_ids = tuple(range(len(things)))
        self.stuff_ids = () if task == "instance" else tuple(len(things) + number for number in range(len(PHOTOGRAPHS)))
        self.id2label = dict(enumerate((*things, *PHOTOGRAPHS)[: len(things) + len(self.stuff_ids)]))

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[SegmentationRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> SegmentationRow:
        """Draw scene `index`; a negative index counts from the end."""
        if not -self.num_images <= index < self.num_images:
            raise IndexError(f"Scene {index} of {self.num_images}: the index must lie below num_images.")
        number = int(index) % self.num_images
        scene = self._draw(np.random.default_rng((self.seed, SPLITS.index(self.split), number)))
        masks, class_ids = visible_segments(scene.owner, scene.class_ids)
        if len(self.thing_ids) < NUM_DIGITS:
            class_ids = np.maximum(class_ids - NUM_DIGITS + 1, 0)  # all digits become class 0
        masks, class_ids = select_segments(masks, class_ids, self.task, len(self.thing_ids))
        image = Image.fromarray(scene.pixels.round().astype(np.uint8))
        return {"image_id": number, "image": image, "mask_labels": masks, "class_labels": class_ids}

    def _draw(self, rng: np.random.Generator) -> "_Scene":
        preset = SCENE_PRESETS[self.preset]
        glyphs = load_glyphs(self.split)
        scene = _Scene.on_photographs(load_photographs(self.split), self.image_size, rng)
        for _ in range(preset.draw_number_of_digits(self.image_size, rng)):
            glyph, digit = glyphs[rng.integers(len(glyphs))]
            scene.add_digit(glyph, digit, preset, rng)
        return scene


# ---------------------------------------------------------------------------------------------------------------------
# What digit scenes are made of
# ---------------------------------------------------------------------------------------------------------------------

NUM_DIGITS = 10
PHOTOGRAPHS = ("china", "flower")

GLYPH_SIZE = 8  # scikit-learn's digits are 8 x 8 pixels, grey values 0..16
GLYPH_MARGIN = 2  # empty pixels around a glyph, so that turning and smoothing never cut a stroke
MIN_VISIBLE_PIXELS = 12
MIN_IMAGE_SIDE = 32

# Share of ink at which a stroke ends. A higher one breaks thin strokes, a lower one fills the loops of 4, 6, 8 and 9.
STROKE_LEVEL = 0.45
OPAQUE = 0.5  # from here on a soft edge belongs to the stroke
PLACES_TO_TRY = 8
ONE_PHOTOGRAPH_PROBABILITY = 0.4  # the other scenes have both

# The left part of both photographs is for validation: half of the pagoda, the edge of the blossom, sky and leaves.
VALIDATION_SHARE_OF_WIDTH = 0.35
VALIDATION_SHARE_OF_DIGITS = 0.2
CROP_ZOOM = (0.8, 1.7)  # pixels of the photograph per pixel of the scene, where the photograph is large enough

LIGHTNESS_WEIGHTS = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True)
class ScenePreset:
    """How difficult a scene is. Ranges are (lowest, highest), both drawn uniformly."""

    max_digits: int  # per 128 x 128 pixels
    scale: tuple[float, float]  # pixels of the scene per pixel of the 8 x 8 glyph
    max_angle: float  # degrees, to both sides
    contrast: tuple[float, float]  # distance to the colours around, as `color_distance`
    max_hidden: float  # share of any digit that later ones may cover
    crowding: float  # probability that a digit is put next to an earlier one
    empty: float = 0.04  # probability of a scene without digits

    def draw_number_of_digits(self, image_size: tuple[int, int], rng: np.random.Generator) -> int:
        """Zero with probability `empty`, else uniform from 1 to what the area allows."""
        most = max(1, round(self.max_digits * math.prod(image_size) / 128**2))
        return 0 if rng.random() < self.empty else int(rng.integers(1, most, endpoint=True))


SCENE_PRESETS = {
    "easy": ScenePreset(
        max_digits=5, scale=(5.0, 8.0), max_angle=15, contrast=(150, 230), max_hidden=0.05, crowding=0.0
    ),
    "hard": ScenePreset(
        max_digits=12, scale=(3.0, 6.0), max_angle=25, contrast=(50, 120), max_hidden=0.35, crowding=0.5
    ),
}


@functools.cache
def load_glyphs(split: Split) -> tuple[tuple[Image.Image, int], ...]:
    """Read the handwritten digits of a split.

    Returns:
        (glyph, digit) pairs; a glyph is a grey image of 8 x 8 pixels and its empty margin, 255 is full ink.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  (a second to import; only digit scenes need it)

    digits = load_digits()
    ink = np.pad(digits.images * (255 / 16), ((0, 0), (GLYPH_MARGIN,) * 2, (GLYPH_MARGIN,) * 2))
    images = [Image.fromarray(glyph) for glyph in ink.round().astype(np.uint8)]
    glyphs = tuple(zip(images, digits.target.tolist(), strict=True))
    first_for_validation = round(len(glyphs) * (1 - VALIDATION_SHARE_OF_DIGITS))
    return glyphs[:first_for_validation] if split == "train" else glyphs[first_for_validation:]


@functools.cache
def load_photographs(split: Split) -> tuple[Image.Image, ...]:
    """Read the part of each photograph that belongs to a split, in the order of `PHOTOGRAPHS`."""
    from sklearn.datasets import load_sample_image  # noqa: PLC0415  (as in `load_glyphs`)

    photographs = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in PHOTOGRAPHS]
    return tuple(photograph.crop(photograph_region(split, photograph.size)) for photograph in photographs)


def photograph_region(split: Split, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of a photograph of `size` (width, height) that belongs to a split."""
    width, height = size
    border = round(width * VALIDATION_SHARE_OF_WIDTH)
    return (border, 0, width, height) if split == "train" else (0, 0, border, height)


def visible_segments(
    owner: NDArray[np.integer], class_ids: Sequence[int], min_pixels: int = MIN_VISIBLE_PIXELS
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Split a map of segment numbers into masks, without the segments that are too small to be seen.

    Args:
        owner: (H, W), each pixel's segment, a position in `class_ids`.
        class_ids: class of each segment.
        min_pixels: segments with fewer pixels are left out; their pixels are in no mask.

    Returns:
        masks, bool (n, H, W), and their classes, int64 (n,), in the order of `class_ids`.
    """
    areas = np.bincount(owner.ravel(), minlength=len(class_ids))
    kept = np.flatnonzero(areas >= min_pixels)
    return owner[None] == kept[:, None, None], np.asarray(class_ids, dtype=np.int64)[kept]


def select_segments(
    masks: NDArray[np.bool_], class_ids: NDArray[np.int64], task: Task, num_things: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Keep or join the segments that a task reports.

    Args:
        masks: bool, (n, H, W).
        class_ids: int64, (n,).
        task: `"instance"` keeps the digits, `"panoptic"` keeps all, `"semantic"` joins those of one class.
        num_things: thing classes; they come before those of stuff.

    Returns:
        masks, bool (m, H, W), and their classes, int64 (m,); for `"semantic"` in the order of the classes.
    """
    if task == "panoptic":
        return masks, class_ids
    if task == "instance":
        is_digit = class_ids < num_things
        return masks[is_digit], class_ids[is_digit]
    present = np.unique(class_ids)
    joined = [masks[class_ids == class_id].any(axis=0) for class_id in present]
    return np.stack(joined) if joined else masks, present


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


class _Scene:
    """A picture in the making: its colours, and which segment each pixel shows.

    Segments are numbered in the order in which they were added: the photographs first, then the digits.
    """

    def __init__(self, pixels: NDArray[np.float32], owner: NDArray[np.int32], class_ids: list[int]) -> None:
        self.pixels = pixels  # (H, W, 3), 0..255
        self.owner = owner  # (H, W)
        self.class_ids = class_ids
        self.num_stuff = len(class_ids)
        # Pixels of each segment before anything was laid over it, and now.
        self.full_areas = np.bincount(owner.ravel(), minlength=len(class_ids))
        self.visible_areas = self.full_areas
        self.digit_centers: list[tuple[float, float]] = []
        self.digit_colors: list[NDArray[np.float64]] = []

    @classmethod
    def on_photographs(
        cls, photographs: Sequence[Image.Image], image_size: tuple[int, int], rng: np.random.Generator
    ) -> "_Scene":
        """Start with a crop of one photograph, or of both with a straight border between them."""
        numbers = rng.permutation(len(photographs))
        if rng.random() < ONE_PHOTOGRAPH_PROBABILITY:
            number = int(numbers[0])
            pixels = random_crop(photographs[number], image_size, rng)
            return cls(pixels, np.zeros(image_size, dtype=np.int32), [NUM_DIGITS + number])
        behind, before = (random_crop(photographs[number], image_size, rng) for number in numbers)
        is_before = random_half_plane(image_size, rng)
        pixels = np.where(is_before[..., None], before, behind)
        return cls(pixels, is_before.astype(np.int32), [NUM_DIGITS + int(number) for number in numbers])

    def add_digit(self, glyph: Image.Image, digit: int, preset: ScenePreset, rng: np.random.Generator) -> None:
        """Lay one digit over the scene, or leave the scene as it is when no place for it is found."""
        height, width = self.owner.shape
        scale = min(rng.uniform(*preset.scale), min(height, width) / GLYPH_SIZE)
        ink = render_glyph(glyph, scale, math.radians(rng.uniform(-preset.max_angle, preset.max_angle)))
        for _ in range(PLACES_TO_TRY):
            center = self._draw_center(scale, preset.crowding, rng)
            window, ink_inside = self._place(ink, center)
            if self._may_cover(self.owner[window][ink_inside >= OPAQUE], preset.max_hidden):
                color = self._choose_color(window, ink_inside, rng.uniform(*preset.contrast), rng)
                self._paint(window, ink_inside, digit, color)
                self.digit_centers.append(center)
                return

    def _draw_center(self, scale: float, crowding: float, rng: np.random.Generator) -> tuple[float, float]:
        """Choose (y, x) so that the glyph's 8 x 8 pixels, unturned, lie inside the image."""
        half = scale * GLYPH_SIZE / 2
        lowest, highest = np.full(2, half), np.asarray(self.owner.shape) - half
        center = rng.uniform(lowest, highest)
        if self.digit_centers and rng.random() < crowding:
            neighbour = self.digit_centers[rng.integers(len(self.digit_centers))]
            angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.5) * half
            center = np.clip(
                np.add(neighbour, (distance * math.sin(angle), distance * math.cos(angle))), lowest, highest
            )
        return float(center[0]), float(center[1])

    def _place(
        self, ink: NDArray[np.float32], center: tuple[float, float]
    ) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
        """Cut a square of ink to what falls inside the image; returns where that is, and the ink there."""
        outer, inner = [], []
        for position, size in zip(center, self.owner.shape, strict=True):
            start = round(position - ink.shape[0] / 2)
            first, last = max(start, 0), min(start + ink.shape[0], size)
            outer.append(slice(first, last))
            inner.append(slice(first - start, last - start))
        return (outer[0], outer[1]), ink[inner[0], inner[1]]

    def _may_cover(self, covered: NDArray[np.int32], max_hidden: float) -> bool:
        """Whether each digit keeps enough of itself when the pixels of segments `covered` (k,) are painted over."""
        visible = self.visible_areas - np.bincount(covered, minlength=len(self.class_ids))
        return bool(np.all(visible[self.num_stuff :] >= (1 - max_hidden) * self.full_areas[self.num_stuff :]))

    def _choose_color(
        self, window: tuple[slice, slice], ink: NDArray[np.float32], contrast: float, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Choose a colour that stands out, as far as wanted, from the ground under the ink and from the digits near it."""
        pixels, owner = self.pixels[window], self.owner[window]
        is_ground = owner < self.num_stuff
        around = [self.digit_colors[number] for number in np.unique(owner[~is_ground]) - self.num_stuff]
        is_covered_ground = is_ground & (ink >= OPAQUE)
        if is_covered_ground.any():
            around.append(pixels[is_covered_ground].mean(axis=0))
        return contrasting_color(np.stack(around), contrast, rng)

    def _paint(
        self, window: tuple[slice, slice], ink: NDArray[np.float32], digit: int, color: NDArray[np.float64]
    ) -> None:
        pixels, owner = self.pixels[window], self.owner[window]
        is_ink = ink >= OPAQUE
        hidden = np.bincount(owner[is_ink], minlength=len(self.class_ids))
        self.visible_areas = np.append(self.visible_areas - hidden, is_ink.sum())
        self.full_areas = np.append(self.full_areas, is_ink.sum())
        self.pixels[window] = pixels + ink[..., None] * (color.astype(np.float32) - pixels)
        self.owner[window] = np.where(is_ink, len(self.class_ids), owner)
        self.class_ids.append(digit)
        self.digit_colors.append(color)


def random_crop(photograph: Image.Image, image_size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Cut a random window of the wanted shape, resize it, mirror it or not, and vary its brightness.

    Returns:
        float32, (H, W, 3), values 0..255.
    """
    height, width = image_size
    largest = min(photograph.width / width, photograph.height / height)
    lowest, highest = CROP_ZOOM
    zoom = rng.uniform(min(lowest, largest / 2), min(highest, largest))
    left = rng.uniform(0, photograph.width - zoom * width)
    top = rng.uniform(0, photograph.height - zoom * height)
    right, bottom = min(left + zoom * width, photograph.width), min(top + zoom * height, photograph.height)
    crop = photograph.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    pixels = np.asarray(crop, dtype=np.float32)
    pixels = pixels[:, ::-1] if rng.integers(2) else pixels
    return np.minimum(pixels * np.float32(rng.uniform(0.7, 1.05)), np.float32(255))


def random_half_plane(image_size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark one side, bool (H, W), of a straight line of random direction through the middle half of the image."""
    height, width = image_size
    angle = rng.uniform(0, 2 * math.pi)
    y, x = rng.uniform(0.25, 0.75, size=2) * image_size
    rows = (np.arange(height) - y) * math.sin(angle)
    columns = (np.arange(width) - x) * math.cos(angle)
    return rows[:, None] + columns[None, :] > 0


def render_glyph(glyph: Image.Image, scale: float, angle: float) -> NDArray[np.float32]:
    """Enlarge and turn a digit, with soft edges about one pixel wide.

    Args:
        glyph: grey image with an empty margin, 255 is full ink.
        scale: pixels of the result per pixel of the glyph.
        angle: in radians, to both sides of upright.

    Returns:
        float32, (side, side): opacity of the stroke in [0, 1]; the stroke is where it is at least 0.5.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    side = math.ceil(scale * (GLYPH_SIZE + 1) * (abs(cos) + abs(sin)))
    center = side / 2
    a, b = cos / scale, sin / scale
    to_glyph = (a, b, glyph.width / 2 - (a + b) * center, -b, a, glyph.height / 2 - (a - b) * center)
    turned = glyph.transform((side, side), Image.Transform.AFFINE, to_glyph, Image.Resampling.BICUBIC)
    darkness = np.asarray(turned, dtype=np.float32) / 255
    return np.clip(0.5 + (darkness - STROKE_LEVEL) * scale, 0, 1)


def color_distance(color: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.floating]:
    """Distance of RGB colours (..., 3), 0..255, in which a difference of lightness counts most: black to white is 255."""
    difference = color - other
    lightness = difference @ LIGHTNESS_WEIGHTS
    tint = difference - lightness[..., None]
    return np.sqrt(lightness**2 + (tint**2).mean(axis=-1))


def contrasting_color(around: NDArray[np.floating], contrast: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Choose a random colour whose distance to the nearest of the colours `around` (k, 3) is closest to `contrast`."""
    candidates = rng.uniform(0, 255, size=(64, 3))
    nearest = color_distance(candidates[:, None], around[None]).min(axis=1)  # (24,)
    return candidates[np.abs(nearest - contrast).argmin()]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def _require_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or min(sides) < MIN_IMAGE_SIDE:  # noqa: PLR2004
        raise ValueError(
            f"image_size must be one side or (height, width) of at least {MIN_IMAGE_SIDE} pixels, got {image_size}: "
            "the smallest digit is 24 pixels high."
        )
    return int(sides[0]), int(sides[1])
