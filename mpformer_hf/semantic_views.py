"""Semantic segmentation from several views of one image: at other scales, mirrored, or in windows of a large image.

`augmented_semantic_segmentation` is the test-time augmentation of Mask2Former's semantic models: class scores of all views
are brought to the size of the image and averaged, each view with the same weight. `sliding_window_semantic_segmentation`
does it for an image that is larger than the crops which the model was trained on: views are overlapping windows. Both can be
had at once. `average_views` is what they share: it takes logits and knows no model.

Memory, beside the image as it came and the model's own: the logits of the views that reach the rows at hand (of windows: of two
rows of them), blocks of class scores, and the result. The (classes, H, W) scores are made only when they are asked for.

Axes: Q queries, K classes, h w mask logits, H W image.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import ChannelDimension, SizeDict

from .image_processing_mpformer import MPFormerImageProcessor, resized_size
from .image_tiles import AnyImage, Model, Region, SourceImage, cover_axis, run_model
from .mask_post_processing import ClassScores, SemanticPrediction, batch_geometries
from .mask_resizing import Size, blocks, exact_float32

DEFAULT_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the original's 256 to 896, where the model's size is 512


@dataclass(frozen=True)
class SemanticView:
    """What a model says of one view of an image.

    Attributes:
        class_logits: any float type, (Q, K + 1), last is "no object".
        mask_logits: any float type, (Q, h, w).
        valid_size: height and width of the view in its padded image; `None`: all of it is valid.
        region: the pixels of the image that the view shows.
        is_flipped: it shows them mirrored, left to right.
    """

    class_logits: Tensor
    mask_logits: Tensor
    valid_size: Size | None
    region: Region
    is_flipped: bool = False


def augmented_semantic_segmentation(
    model: Model,
    processor: MPFormerImageProcessor,
    image: AnyImage,
    *,
    scales: Sequence[float] = DEFAULT_SCALES,
    flip: bool = True,
    return_scores: bool = False,
    combine_before_resize: bool | None = None,
    progress: bool = True,
    **processor_kwargs: Any,
) -> SemanticPrediction:
    """Segment an image at several scales, and mirrored, and average the class scores.

    Args:
        model: in evaluation mode; takes what `processor` returns as keywords, and returns `class_queries_logits`,
            `masks_queries_logits` and perhaps `image_sizes`. MP-Former, and transformers' Mask2Former, MaskFormer, EoMT.
        processor: an `MPFormerImageProcessor`; it also reads the files of transformers' processors.
        image: one image; PIL, numpy or torch, as for the processor. EXIF rotation is not applied.
        scales: of the size that the processor makes of the image; above 0.
        flip: show each scale mirrored too.
        return_scores: return the averaged scores of all classes too.
        combine_before_resize: as in `semantic_segmentation`; `None`: the processor's field.
        progress: show a progress bar.
        **processor_kwargs: for the call of the processor.

    Returns:
        Classes (and scores) of the image's pixels.

    Raises:
        ValueError: says what was expected, what came and what to do.
    """
    return segment_windows(
        model,
        processor,
        image,
        Augmentation(tuple(scales), flip, batch_size=1, progress=progress),
        layout=None,
        combine_before_resize=combine_before_resize,
        return_scores=return_scores,
        processor_kwargs=processor_kwargs,
    )


def sliding_window_semantic_segmentation(
    model: Model,
    processor: MPFormerImageProcessor,
    image: AnyImage,
    *,
    window_size: Size,
    overlap: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 1,
    return_scores: bool = False,
    combine_before_resize: bool | None = None,
    progress: bool = True,
    **processor_kwargs: Any,
) -> SemanticPrediction:
    """Segment a large image in overlapping windows, and average the class scores where windows overlap.

    Args:
        model: as for `augmented_semantic_segmentation`.
        processor: likewise.
        image: likewise.
        window_size: height and width of a window in pixels of the image. The processor resizes each window as it would an
            image: pass `do_resize=False` to keep its scale.
        overlap: pixels that neighbouring windows share at least, below the sides of a window; `None`: a third of the
            shorter side.
        scales: each window is also shown at these scales.
        flip: each window is also shown mirrored.
        batch_size: windows that go through the model together.
        return_scores: as for `augmented_semantic_segmentation`; so are the rest.
        combine_before_resize: likewise.
        progress: likewise.
        **processor_kwargs: likewise.

    Returns:
        Classes (and scores) of the image's pixels. An image that fits into one window gets the result without windows.

    Raises:
        ValueError: says what was expected, what came and what to do.
    """
    return segment_windows(
        model,
        processor,
        image,
        Augmentation(tuple(scales), flip, batch_size, progress),
        layout=(window_size, min(window_size) // 3 if overlap is None else overlap),
        combine_before_resize=combine_before_resize,
        return_scores=return_scores,
        processor_kwargs=processor_kwargs,
    )


def average_views(
    views: Iterable[SemanticView],
    size: Size,
    *,
    combine_before_resize: bool = False,
    return_scores: bool = False,
) -> SemanticPrediction:
    """Average the class scores of views and take the best class of each pixel.

    Args:
        views: ordered by the top of their region. They are taken one after the other, as the result grows from top to
            bottom, and let go as soon as nothing below needs them.
        size: height and width of the result.
        combine_before_resize: as in `semantic_segmentation`.
        return_scores: return the averaged scores of all classes too.

    Raises:
        ValueError: views do not cover the image, reach beyond it, come in the wrong order or differ in their classes.
    """
    reaching = ReachingViews(views, size, combine_before_resize)
    segmentation = torch.empty(size, dtype=torch.int64, device=reaching.device)
    all_scores = torch.empty((reaching.num_classes, *size), device=reaching.device) if return_scores else None
    for rows, columns in blocks(size, reaching.num_channels, reaching.device, reaching.shrink):
        block = Region(rows.start, columns.start, rows.stop, columns.stop)
        views_here = reaching.at(rows)  # runs the model, in the caller's precision
        with exact_float32(reaching.device):
            scores = mean_scores(views_here, block, reaching.num_classes)
        segmentation[rows, columns] = scores.max(1).indices
        if all_scores is not None:
            all_scores[:, rows, columns] = scores.transpose(0, 1)
    return SemanticPrediction(segmentation, all_scores)


# ------------------------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class PlacedScores:
    """Class scores of one view, and where it lies."""

    scores: ClassScores
    region: Region
    is_flipped: bool

    @classmethod
    def of(cls, view: SemanticView, combine_before_resize: bool) -> "PlacedScores":
        """Check the sizes of a view and prepare its scores."""
        [geometry] = batch_geometries(
            view.class_logits[None],
            view.mask_logits[None],
            None if view.valid_size is None else [view.valid_size],
            [view.region.size],
        )
        with exact_float32(view.mask_logits.device):
            scores = ClassScores(view.class_logits, view.mask_logits, geometry, combine_before_resize)
        return cls(scores, view.region, view.is_flipped)

    def window(self, part: Region) -> Tensor:
        """Compute the scores of some pixels of the image: float32, (rows, K, columns)."""
        rows, columns = part.within(self.region)
        if not self.is_flipped:
            return self.scores.window(rows, columns)
        width = self.region.size[1]
        return self.scores.window(rows, slice(width - columns.stop, width - columns.start)).flip(-1)


class ReachingViews:
    """The views that reach the rows at hand; takes new ones as the rows go down, and lets old ones go.

    Attributes:
        num_classes: K, of all views.
        num_channels: float values that work on one pixel takes.
        device: of the views.
        shrink: of the first view, see `ClassScores`.
    """

    def __init__(self, views: Iterable[SemanticView], size: Size, combine_before_resize: bool) -> None:
        self.size = size
        self.combine_before_resize = combine_before_resize
        self.coming = iter(views)
        self.current: list[PlacedScores] = []
        first = next(self.coming, None)
        if first is None:
            raise ValueError("There are no views to average: pass at least one.")
        placed = PlacedScores.of(first, combine_before_resize)
        scores = placed.scores
        self.num_classes = scores.num_classes
        self.num_channels = scores.num_queries + 2 * scores.num_classes
        self.device, self.shrink = scores.device, scores.shrink
        self.waiting: PlacedScores | None = self.checked(placed, top=0)

    def at(self, rows: slice) -> list[PlacedScores]:
        """Find the views that reach some rows; from call to call rows only go down."""
        self.current = [view for view in self.current if view.region.bottom > rows.start]
        while self.waiting is not None and self.waiting.region.top < rows.stop:
            view, self.waiting = self.waiting, None
            self.current.append(view)
            following = next(self.coming, None)
            if following is not None:
                self.waiting = self.checked(PlacedScores.of(following, self.combine_before_resize), view.region.top)
        return self.current

    def checked(self, view: PlacedScores, top: int) -> PlacedScores:
        """Refuse a view that does not fit the image or those before it."""
        region, size = view.region, self.size
        if region.top < 0 or region.left < 0 or region.bottom > size[0] or region.right > size[1]:
            raise ValueError(f"A view shows {region}, which reaches beyond the image of {size[0]} x {size[1]} pixels.")
        if region.top < top:
            raise ValueError(f"Views must come ordered by their tops, but one at {region.top} follows one at {top}.")
        if view.scores.num_classes != self.num_classes:
            raise ValueError(
                f"All views must have the classes of the first, {self.num_classes}, but one has "
                f"{view.scores.num_classes}. Take them from one model."
            )
        return view


def mean_scores(views: list[PlacedScores], block: Region, num_classes: int) -> Tensor:
    """Average what views say of a block of pixels: float32, (rows, K, columns).

    Raises:
        ValueError: no view shows one of the pixels.
    """
    height, width = block.size
    counts = torch.zeros(height, 1, width)
    total: Tensor | None = None
    for view in views:
        common = view.region & block
        if min(common.size) <= 0:
            continue
        rows, columns = common.within(block)
        scores = view.window(common)
        if total is None:
            total = scores.new_zeros(height, num_classes, width)
        total[rows, :, columns] += scores
        counts[rows, :, columns] += 1
    if total is None or not counts.all():
        raise ValueError(f"The views leave pixels of {block} out. Let them cover the image.")
    return total / counts.to(total.device)


# ------------------------------------------------------------------------------------------------------- image and model


@dataclass(frozen=True)
class Augmentation:
    """How windows are shown: at which scales, mirrored too (True) or not, how many together, with a progress bar or not."""

    scales: tuple[float, ...]
    flip: bool
    batch_size: int
    progress: bool

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"`scales` must be some numbers above 0, got {self.scales}.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")

    @property
    def variants(self) -> list[tuple[float, bool]]:
        """Scale, and whether mirrored, of each view of a window."""
        return [
            (scale, is_flipped) for scale in self.scales for is_flipped in ((False, True) if self.flip else (False,))
        ]


@dataclass(frozen=True)
class ViewPredictor:
    """Runs the model on windows of an image."""

    model: Model
    processor: MPFormerImageProcessor
    processor_kwargs: Mapping[str, Any]
    source: SourceImage
    augmentation: Augmentation

    def views(self, windows: Sequence[Region]) -> Iterator[SemanticView]:
        """Predict the views of the windows, batch after batch, when they are asked for."""
        variants, batch_size = self.augmentation.variants, self.augmentation.batch_size
        total = len(windows) * len(variants)
        with tqdm(total=total, desc="views", unit="view", disable=not self.augmentation.progress) as bar:
            for first in range(0, len(windows), batch_size):
                batch = windows[first : first + batch_size]
                predicted = []
                for scale, is_flipped in variants:
                    predicted.append(self.predict(batch, scale, is_flipped))
                    bar.update(len(batch))
                # Window by window, so that tops only grow.
                yield from (variant[number] for number in range(len(batch)) for variant in predicted)

    def predict(self, windows: Sequence[Region], scale: float, is_flipped: bool) -> list[SemanticView]:
        """Run the model on one variant of some windows, which are all of one size."""
        crops: list[Any] = [self.source.crop(window) for window in windows]
        if is_flipped:
            crops = [mirrored(crop, self.source.data_format) for crop in crops]
        kwargs = dict(self.processor_kwargs)
        if self.source.data_format is not None:
            kwargs["input_data_format"] = self.source.data_format.value
        if scale != 1:
            kwargs |= size_at_scale(self.processor, windows[0].size, scale, kwargs)
        logits = run_model(self.model, self.processor(images=crops, return_tensors="pt", **kwargs), len(crops))
        sizes = [None] * len(windows) if logits.sizes is None else logits.sizes.tolist()
        return [
            SemanticView(classes, masks, size and tuple(size), window, is_flipped)
            for classes, masks, size, window in zip(logits.classes, logits.masks, sizes, windows, strict=True)
        ]


def mirrored(image: AnyImage, data_format: ChannelDimension | None) -> AnyImage:
    """Mirror an image, left to right."""
    if isinstance(image, PIL.Image.Image):
        return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    axis = -1 if data_format == ChannelDimension.FIRST else -2
    return image.flip(axis) if isinstance(image, Tensor) else np.flip(image, axis)


def size_at_scale(
    processor: MPFormerImageProcessor, image_size: Size, scale: float, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Say by which fields the processor resizes an image to a multiple of the size that it usually makes of it."""
    height, width = image_size
    if kwargs.get("do_resize", processor.do_resize):
        size = kwargs.get("size", processor.size)
        size = size if isinstance(size, SizeDict) else SizeDict(**get_size_dict(size, default_to_square=False))
        height, width = resized_size(image_size, size)
    scaled = {"height": max(1, round(height * scale)), "width": max(1, round(width * scale))}
    # A fixed size of the padded image was chosen for the usual size.
    return {"do_resize": True, "size": scaled, "pad_size": None, "size_buckets": ()}


def segment_windows(
    model: Model,
    processor: MPFormerImageProcessor,
    image: AnyImage,
    augmentation: Augmentation,
    *,
    layout: tuple[Size, int] | None,
    combine_before_resize: bool | None,
    return_scores: bool,
    processor_kwargs: dict[str, Any],
) -> SemanticPrediction:
    """Predict an image in windows (of a size, with a least overlap) or whole, and average the views."""
    if not isinstance(processor, MPFormerImageProcessor):
        raise TypeError(
            f"Expected an `MPFormerImageProcessor`, got {type(processor).__name__}. "
            "`MPFormerImageProcessor.from_pretrained` reads the files of transformers' processors too."
        )
    if combine_before_resize is None:
        combine_before_resize = processor.combine_before_resize
    source = SourceImage.of(image, processor_kwargs.pop("input_data_format", None))
    windows = [Region(0, 0, *source.size)] if layout is None else make_windows(source.size, *layout)
    predictor = ViewPredictor(model, processor, processor_kwargs, source, augmentation)
    return average_views(
        predictor.views(windows),
        source.size,
        combine_before_resize=combine_before_resize,
        return_scores=return_scores,
    )


def make_windows(image_size: Size, window_size: Size, overlap: int) -> list[Region]:
    """Cover an image with overlapping windows of one size, row by row."""
    sides = tuple(window_size) if isinstance(window_size, Sequence) else ()
    if len(sides) != len(image_size) or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"`window_size` must be (height, width), two positive integers, got {window_size!r}.")
    if not 0 <= overlap < min(sides):
        raise ValueError(f"`overlap` must be at least 0 and below both sides of `window_size` {sides}, got {overlap}.")
    rows, columns = (cover_axis(length, side, overlap) for length, side in zip(image_size, sides, strict=True))
    return [Region(row.start, column.start, row.stop, column.stop) for row in rows for column in columns]
