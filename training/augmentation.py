"""Augmentation of rows: what the original does, deterministic, and only where it is seen.

An `Augmentation` is the settings; called with a row and where it stands in the training, it gives an `AugmentedRow`. All random
numbers come from one generator that is made of (seed, epoch, index): neither the number of workers nor any global state matters.
Only the generator's uniform doubles are used, which are the same on every machine.

    large_scale_jitter  resize to fit into scale x size, scale drawn uniformly; cut or pad to size        COCO
    short_side          resize the short side to one of several lengths; cut or pad to size, if given     ADE20K, Cityscapes ...
    none                keep the size

Then the colours are jittered, the image is mirrored, and torchvision's own transforms follow, if the recipe names any. Padding, at
the right and the bottom, comes last: `pad_row` for eyes, `training.compact_batches` for the model.

Axes: n segments, c crowd regions, H W the image, h w what is seen of it.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.colors import between, jitter_colors
from training.data import SegmentationDataset, SegmentationRow
from training.torchvision_transforms import apply_transforms, check_transforms
from training.windows import Size, Window, cut_image, cut_masks

Kind = Literal["large_scale_jitter", "short_side", "none"]
Crop = Literal["original", "anywhere"]
MOST_CROPS = 10  # that are tried until the classes are mixed enough, as in the original
LARGEST_LEVEL = 255


class AugmentedRow(SegmentationRow):
    """A row after augmentation, without its padding.

    `canvas_size` is height and width with padding at the right and the bottom, of level `pad_value` in all channels; in masks it
    is False. `ignore_mask`, bool (h, w), is there if the row had one: True where nobody knows what is right.
    """

    canvas_size: Size
    pad_value: int
    ignore_mask: NotRequired[NDArray[np.bool_]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Settings of the augmentation; the fields are the keys of a recipe.

    Attributes:
        kind: `"large_scale_jitter"`, `"short_side"` or `"none"`.
        size: height and width of the result, or one number for both. `short_side` keeps the resized image if it is `None`.
        scale: of large-scale jitter; 1 fits the whole image into `size`.
        short_sides: lengths of the shorter side, in pixels, one of which is drawn.
        longest_side: of `short_side`; an image that would be longer becomes smaller. `None`: no limit.
        crop: where large-scale jitter cuts. `"original"` draws one number for both directions, as Detectron2 does, so that the
            window moves along the diagonal; `"anywhere"` draws two. `short_side` always draws two.
        max_category_area: of `short_side`; up to 10 windows are tried until there are two classes, and none covers this share of
            the labelled pixels or more. 1 is off.
        flip: probability of mirroring left and right.
        color: whether the colours are jittered as in SSD.
        pad_value: level of padding, before normalisation.
        transforms: of torchvision.transforms.v2, each a mapping of `name` and its arguments; applied to image and masks together.
    """

    kind: Kind = "large_scale_jitter"
    size: Size | int | None = None
    scale: tuple[float, float] = (0.1, 2.0)
    short_sides: tuple[int, ...] = ()
    longest_side: int | None = None
    crop: Crop = "original"
    max_category_area: float = 1.0
    flip: float = 0.5
    color: bool = False
    pad_value: int = 128
    transforms: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Check the values, and that each belongs to this kind."""
        for name, convert in CONVERSIONS.items():
            object.__setattr__(self, name, convert(name, getattr(self, name)))
        for name, kinds in OWNERS.items():
            if self.kind not in kinds and getattr(self, name) != DEFAULTS[name]:
                raise ValueError(f"`{name}` belongs to kind {' or '.join(kinds)}, but it is {self.kind}. Remove it.")
        if self.kind == "large_scale_jitter" and self.size is None:
            raise ValueError("kind large_scale_jitter needs `size`, such as [1024, 1024].")
        if self.kind == "short_side" and not self.short_sides:
            raise ValueError("kind short_side needs `short_sides`, a list of lengths such as [512, 640, 768].")
        if self.size is None and self.max_category_area < 1:
            raise ValueError("`max_category_area` chooses where to cut, so it needs `size`.")
        check_transforms(self.transforms)

    @classmethod
    def from_recipe(cls, settings: Mapping[str, Any] | str) -> "Augmentation":
        """Make the settings that a recipe holds: the name of a preset, or keys, among which `preset` may be.

        >>> Augmentation.from_recipe({"preset": "coco", "size": 512, "flip": 0}).size
        (512, 512)

        Raises:
            ValueError: a sentence for the user; it names the nearest key that is known.
        """
        if isinstance(settings, str):
            settings = {"preset": settings}
        if not isinstance(settings, Mapping):
            raise ValueError(  # noqa: TRY004 - as for every other bad recipe
                f"`augmentation` must be the name of a preset ({', '.join(PRESETS)}) or a mapping, got {settings!r}."
            )
        for key in settings:
            if key != "preset" and key not in DEFAULTS:
                raise ValueError(f"`augmentation` has no key `{key}`.{nearest(key, ('preset', *DEFAULTS))}")
        fields = dict(settings)
        preset = fields.pop("preset", None)
        if preset is None:
            return cls(**fields)
        if preset not in PRESETS:
            raise ValueError(f"`augmentation` has no preset `{preset}`.{nearest(preset, PRESETS)}")
        return dataclasses.replace(PRESETS[preset], **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings in the types of YAML and JSON; `from_recipe` reads them."""
        settings = {name: getattr(self, name) for name in DEFAULTS}
        settings["transforms"] = tuple(dict(one) for one in self.transforms)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    def __call__(self, row: SegmentationRow, *, seed: int, epoch: int, index: int, repeat: int = 0) -> AugmentedRow:
        """Augment a row.

        Args:
            row: an image and its masks; it is not changed. Masks may be any of `training.windows`.
            seed: of the training, >= 0.
            epoch: >= 0.
            index: of the row in its data set, >= 0.
            repeat: how often the row came before in this epoch, for samplers that repeat rows, >= 0.

        Returns:
            A new row. Masks that have no pixel left are dropped, and their labels too.
        """
        rng = generator_of(seed, epoch, index, repeat)
        image = row["image"]
        window, masks, kept = self._choose_window(row, (image.height, image.width), rng)
        seen = cut_image(image, window)
        if self.color:
            seen = jitter_colors(seen, rng)
        result: AugmentedRow = {
            **row,
            "image": seen,
            "mask_labels": masks,
            "class_labels": np.asarray(row["class_labels"], dtype=np.int64)[kept],
            "canvas_size": self._canvas_size(window.size),
            "pad_value": self.pad_value,
        }
        if "crowd_masks" in row:
            result["crowd_masks"], kept = cut_masks(row["crowd_masks"], window)
            result["crowd_labels"] = np.asarray(row["crowd_labels"], dtype=np.int64)[kept]
        if "ignore_mask" in row:
            result["ignore_mask"] = np.ascontiguousarray(
                row["ignore_mask"].take(window.rows, 0).take(window.columns, 1)
            )
        return apply_transforms(result, self.transforms, rng) if self.transforms else result

    def _choose_window(
        self, row: SegmentationRow, source_size: Size, rng: np.random.Generator
    ) -> tuple[Window, NDArray[np.bool_], NDArray[np.int64]]:
        """Draw a window; returns it, the masks in it, and their positions in the row."""
        # Drawn one after the other whatever the settings are, so that a setting changes nothing but what it is for.
        draws = rng.random(2 + 2 * MOST_CROPS)
        resized = self._resized_size(source_size, float(draws[0]))
        is_flipped = bool(draws[1] < self.flip)
        canvas = self._canvas_size(resized)
        size = min(canvas[0], resized[0]), min(canvas[1], resized[1])
        for down, right in draws[2:].reshape(MOST_CROPS, 2):
            is_diagonal = self.kind == "large_scale_jitter" and self.crop == "original"
            top = self._offset(resized[0] - size[0], down)
            left = self._offset(resized[1] - size[1], down if is_diagonal else right)
            window = Window(source_size, resized, top, left, size, is_flipped)
            masks, kept = cut_masks(row["mask_labels"], window)
            if self.max_category_area == 1 or self._is_mixed(masks, np.asarray(row["class_labels"])[kept]):
                break
        return window, masks, kept

    def _resized_size(self, source_size: Size, draw: float) -> Size:
        """Size of the whole image after resizing."""
        height, width = source_size
        if self.kind == "none":
            return source_size
        if self.kind == "large_scale_jitter":
            scale = between(*self.scale, draw)
            target = self._canvas_size(source_size)
            factor = min(scale * target[0] / height, scale * target[1] / width)
            return max(1, round(height * factor)), max(1, round(width * factor))
        short_side = self.short_sides[int(draw * len(self.short_sides))]
        factor = short_side / min(height, width)
        if self.longest_side is not None:
            factor = min(factor, self.longest_side / max(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

    def _canvas_size(self, seen: Size) -> Size:
        """Size of the result with its padding; without `size` that of what is seen."""
        return seen if self.size is None else self.size  # type: ignore[return-value] # a pair after `__post_init__`

    def _offset(self, room: int, draw: float) -> int:
        """Where the window begins, 0 to `room`."""
        if self.kind == "large_scale_jitter":
            return round(room * float(draw))  # as Detectron2, where the first and the last place are half as likely
        return int((room + 1) * float(draw))

    def _is_mixed(self, masks: NDArray[np.bool_], labels: NDArray[np.int64]) -> bool:
        """Whether there are two classes at least, and none has too large a share of the pixels of all segments."""
        classes, positions = np.unique(labels, return_inverse=True)
        areas = np.zeros(len(classes), dtype=np.int64)
        np.add.at(areas, positions, np.count_nonzero(masks, axis=(1, 2)))
        return len(classes) > 1 and bool(areas.max() < areas.sum() * self.max_category_area)


def generator_of(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """Make the generator of one row in one epoch; all four numbers are integers, >= 0."""
    key = {"seed": seed, "epoch": epoch, "index": index, "repeat": repeat}
    if min(key.values()) < 0:
        raise ValueError(f"Expected numbers that are not negative, got {key}. Count all of them from 0.")
    # Each number is a word of its own: a list would run together numbers above 32 bits with their neighbours.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, index, repeat))))


class AugmentedDataset:
    """A data set whose rows are augmented when they are read.

    A position is an index, then of epoch 0, or (epoch, index), or (epoch, index, repeat). A sampler that yields such tuples reaches
    every worker; an attribute for the epoch would not reach those that live on.
    """

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        """Describe the data set; `seed` is that of the training."""
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int | tuple[int, ...]) -> AugmentedRow:
        epoch, index, *repeat = position if isinstance(position, tuple) else (0, position)
        return self.augmentation(
            self.dataset[index], seed=self.seed, epoch=epoch, index=index, repeat=repeat[0] if repeat else 0
        )


def pad_row(row: AugmentedRow) -> SegmentationRow:
    """Paint the padding: a row whose image and masks have the size of the canvas, for people to look at."""
    height, width = row["canvas_size"]
    below, beside = height - row["image"].height, width - row["image"].width
    image = Image.new("RGB", (width, height), (row["pad_value"],) * 3)
    image.paste(row["image"])
    padded: dict[str, Any] = {name: value for name, value in row.items() if name not in ("canvas_size", "pad_value")}
    padded["image"] = image
    for name in ("mask_labels", "crowd_masks", "ignore_mask"):
        if name in padded:
            before = [(0, 0)] * (padded[name].ndim - 2)
            padded[name] = np.pad(padded[name], [*before, (0, below), (0, beside)])
    return padded  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def nearest(name: object, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Suggest the name that was meant."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)
    return f" Did you mean `{near[0]}`? Known are: {', '.join(known)}."


def _choice(name: str, value: object) -> object:
    choices = get_args(Kind if name == "kind" else Crop)
    if value not in choices:
        hint = nearest(value, choices)
        raise ValueError(f"`{name}` has no choice {value!r}.{hint}")
    return value


def _whole(name: str, value: object, low: int, high: int | None = None) -> int:
    if type(value) is not int or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be an integer {limits}, got {value!r}.")
    return value


def _number(name: str, value: object, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be a number from {low:g} to {high:g}, got {value!r}.")
    return float(value)  # type: ignore[arg-type]


def _length(name: str, value: object) -> int | None:
    return None if value is None else _whole(name, value, 1)


def _size(name: str, value: object) -> Size | None:
    if value is None:
        return None
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:  # noqa: PLR2004 - height and width
        raise ValueError(f"`{name}` must be one number, or height and width such as [512, 1024], got {value!r}.")
    return _whole(name, sides[0], 1), _whole(name, sides[1], 1)


def _scale(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:  # noqa: PLR2004 - lowest and highest
        raise ValueError(f"`{name}` must be the lowest and the highest factor, such as [0.1, 2.0], got {value!r}.")
    low, high = (_number(name, bound, 0.001, 1000) for bound in value)
    if low > high:
        raise ValueError(f"`{name}` must begin with the lower factor, got {value!r}. Exchange them.")
    return low, high


def _lengths(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{name}` must be a list of lengths in pixels, got {value!r}.")  # noqa: TRY004
    return tuple(_whole(name, side, 1) for side in value)


def _switch(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    return value


def _share(name: str, value: object) -> float:
    return _number(name, value, 0, 1)


def _level(name: str, value: object) -> int:
    return _whole(name, value, 0, LARGEST_LEVEL)


def _list_of_mappings(name: str, value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(
            f"`{name}` must be a list of mappings such as {{name: GaussianBlur, kernel_size: 5}}, got {value!r}."
        )
    return tuple(value)


CONVERSIONS = {
    "kind": _choice,
    "size": _size,
    "scale": _scale,
    "short_sides": _lengths,
    "longest_side": _length,
    "crop": _choice,
    "max_category_area": _share,
    "flip": _share,
    "color": _switch,
    "pad_value": _level,
    "transforms": _list_of_mappings,
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Augmentation)}
OWNERS = {
    "size": ("large_scale_jitter", "short_side"),
    "scale": ("large_scale_jitter",),
    "crop": ("large_scale_jitter",),
    "short_sides": ("short_side",),
    "longest_side": ("short_side",),
    "max_category_area": ("short_side",),
}


def _short_sides(side: int) -> tuple[int, ...]:
    """0.5 to 2.0 times a length, in steps of 0.1, rounded down."""
    return tuple(side * tenths // 10 for tenths in range(5, 21))


# As the original trains; of Mapillary the limit of the longest side is ours: four times the side, as in the others.
PRESETS = {
    "coco": Augmentation(kind="large_scale_jitter", size=1024),
    "ade20k_512": Augmentation(
        kind="short_side", size=512, short_sides=_short_sides(512), longest_side=2048, color=True
    ),
    "ade20k_640": Augmentation(
        kind="short_side", size=640, short_sides=_short_sides(640), longest_side=2560, color=True
    ),
    "cityscapes": Augmentation(
        kind="short_side", size=(512, 1024), short_sides=_short_sides(1024), longest_side=4096, color=True
    ),
    "mapillary": Augmentation(
        kind="short_side", size=1024, short_sides=_short_sides(2048), longest_side=8192, color=True
    ),
}
