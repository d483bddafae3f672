"""Pictures of segmentations: coloured masks on the image, each with its label and score.

`draw_segments` draws one image; `draw_comparison` puts image, ground truth and predictions of several images side by side.
Both take every form in which segments occur here, see `read_segments`: results of the image processor, results of
`pipeline("image-segmentation")`, and ground-truth masks. `draw_layers` shows one query's mask at every decoder layer.

Axes: n segments, V levels, H W image.
"""

import colorsys
import functools
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

Color = tuple[int, int, int]
_Box = tuple[int, int, int, int]  # left, top, right, bottom
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class DrawnSegment:
    """One segment to draw: `mask` is bool (H, W), True inside; `class_id` chooses the colour, `label` is its name."""

    mask: Tensor
    class_id: int
    label: str
    score: float | None = None

    @property
    def text(self) -> str:
        """The words on the picture; a segment without any gets no label."""
        return self.label if self.score is None else f"{self.label} {self.score:.2f}".strip()


def draw_segments(
    image: Image.Image | np.ndarray | Tensor,
    result: Any,  # noqa: ANN401
    id2label: Mapping[int, str] | None = None,
    *,
    longest_side: int | None = None,
    opacity: float = 0.55,
) -> Image.Image:
    """Draw segments on an image, with labels and scores.

    Where masks overlap, the higher score is on top; without scores the smaller mask is. Segments without a pixel are left
    out.

    Args:
        image: PIL image, uint8 array (H, W, 3), or uint8 tensor (3, H, W).
        result: segments of this image in any form that `read_segments` takes; masks have the size of the image.
        id2label: names of the classes; without it the ids are written.
        longest_side: the picture is enlarged (or reduced) to this many pixels on its longer side, before anything is
            written on it: small images need about 384 for readable words. `None` keeps the size.
        opacity: of the masks, 0 (outlines alone) to 1.

    Returns:
        RGB image.
    """
    picture = _to_rgb(image)
    segments = [segment for segment in read_segments(result, id2label) if bool(segment.mask.any())]
    for segment in segments:
        if tuple(segment.mask.shape) != (picture.height, picture.width):
            raise ValueError(
                f"Image is {picture.height} x {picture.width} (height x width), but a mask is "
                f"{tuple(segment.mask.shape)}. Post-process with target_sizes=[(height, width)] of the image."
            )
    if longest_side is not None:
        picture, segments = _resize(picture, segments, longest_side)
    if not segments:
        return picture
    segments = sorted(segments, key=_height_in_stack)
    colors = _segment_colors(segments)
    picture = _draw_masks(picture, segments, colors, opacity)
    _write_labels(picture, segments, colors)
    return picture


def draw_comparison(
    images: Sequence[Image.Image | np.ndarray | Tensor],
    columns: Mapping[str, Sequence[Any]],
    id2label: Mapping[int, str] | None = None,
    *,
    panel_size: int = 384,
    opacity: float = 0.55,
) -> Image.Image:
    """Put images and their segmentations side by side: one row an image, the plain image first.

    Args:
        images: PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W), of any sizes.
        columns: title to one result for each image, for example `{"ground truth": rows, "prediction": results}`; results
            as in `read_segments`.
        id2label: names of the classes.
        panel_size: longer side of each picture in pixels; small images are enlarged to it.
        opacity: of the masks, 0 to 1.

    Returns:
        RGB image, with the titles above the columns.
    """
    for title, results in columns.items():
        if len(results) != len(images):
            raise ValueError(
                f"Column {title!r} has {len(results)} results for {len(images)} images. Pass one for each."
            )
    rows = [
        [
            draw_segments(image, [], longest_side=panel_size),
            *(
                draw_segments(image, results[number], id2label, longest_side=panel_size, opacity=opacity)
                for results in columns.values()
            ),
        ]
        for number, image in enumerate(images)
    ]
    return _arrange(rows, ["image", *columns], panel_size)


def draw_layers(
    image: Image.Image | np.ndarray | Tensor,
    masks: Tensor | np.ndarray,
    *,
    title: str = "",
    ground_truth: Tensor | np.ndarray | None = None,
    next_iou: Sequence[float] | None = None,
    notes: Sequence[str] | None = None,
    panel_size: int = 256,
    columns: int = 6,
) -> Image.Image:
    """Show the mask of one query at every level beside the image (MP-Former, figure 3).

    Under each panel stands the IoU of its mask with the ground truth, where there is one (it is drawn as an outline), and
    with the mask of the next level. Two empty masks have IoU 1.

    Args:
        image: PIL image, uint8 array (H, W, 3), or uint8 tensor (3, H, W).
        masks: bool, (V, H, W), True inside, level 0 first; `enlarge_masks` of `layer_consistency.py` makes them.
        title: written above everything.
        ground_truth: bool, (H, W), the segment that the query stands for.
        next_iou: IoU of each level but the last with the next, where it is known from the mask logits
            (`LayerConsistency.query_iou[:, query]`); `None`: computed from `masks`.
        notes: a line for each level, written after its name.
        panel_size: longer side of each panel in pixels.
        columns: panels in a row.

    Returns:
        RGB image.
    """
    picture = _to_rgb(image)
    levels = [] if np.ndim(masks) < 3 else [_to_tensor(mask).bool() for mask in masks]  # noqa: PLR2004 - (V, H, W)
    truth = None if ground_truth is None else _to_tensor(ground_truth).bool()
    for mask in [*levels, *([] if truth is None else [truth])] or [torch.zeros(())]:
        if tuple(mask.shape) != (picture.height, picture.width):
            raise ValueError(
                f"Expected masks (levels, {picture.height}, {picture.width}), at the size of the image, and one such mask "
                f"as ground truth, got {tuple(mask.shape)} for one level. `enlarge_masks` brings mask logits to that size."
            )
    if next_iou is None:
        next_iou = [_mask_iou(one, other) for one, other in itertools.pairwise(levels)]
    if len(next_iou) != len(levels) - 1 or (notes is not None and len(notes) != len(levels)):
        raise ValueError(
            f"Expected one `next_iou` for each of the {len(levels)} levels but the last, and one of `notes` for each, got "
            f"{len(next_iou)} and {len(notes or ())}."
        )
    panels = [
        (_draw_layer(picture, None, truth, panel_size), ["image" if truth is None else "image, segment outlined"])
    ]
    for number, mask in enumerate(levels):
        lines = [f"level {number}" + (" (last)" if number == len(levels) - 1 else "")]
        lines += [] if notes is None else [notes[number]]
        lines += [] if truth is None else [f"IoU with segment: {_mask_iou(mask, truth):.2f}"]
        lines += [f"IoU with level {number + 1}: {next_iou[number]:.2f}"] if number < len(levels) - 1 else []
        panels.append((_draw_layer(picture, mask, truth, panel_size), lines))
    return _arrange_panels(panels, title, panel_size, columns)


def read_segments(result: Any, id2label: Mapping[int, str] | None = None) -> list[DrawnSegment]:  # noqa: ANN401
    """Bring segments of one image into one form.

    Args:
        result: one of

            - an instance result: a dictionary with `masks` (n, H, W), `labels`, `scores`;
            - a panoptic result, or instances of other processors: a dictionary with `segmentation`, an id map (H, W) or
              binary maps (n, H, W), and `segments_info` with `id`, `label_id` and perhaps `score`;
            - a semantic result: an integer map (H, W) of class ids; ids that `id2label` does not name are not drawn;
            - ground truth: a dictionary with `mask_labels` (n, H, W) and `class_labels` (n,);
            - a pipeline result: a list of dictionaries with `mask`, `label` and perhaps `score`;
            - a list of `DrawnSegment`.
        id2label: names of the classes.
    """
    names = id2label or {}
    if isinstance(result, Mapping):
        return _read_dictionary(result, names)
    if isinstance(result, list | tuple):
        return [entry if isinstance(entry, DrawnSegment) else _read_pipeline_entry(entry, names) for entry in result]
    if isinstance(result, np.ndarray | Tensor) and result.ndim == 2:  # noqa: PLR2004
        return _read_semantic_map(_to_tensor(result), id2label)
    raise ValueError(
        f"Cannot draw {type(result).__name__}. Pass one image's result of post_process_*_segmentation or of the "
        "image-segmentation pipeline, or a dictionary with mask_labels and class_labels."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _read_dictionary(result: Mapping[str, Any], names: Mapping[int, str]) -> list[DrawnSegment]:
    if "mask_labels" in result:
        return _read_masks(result["mask_labels"], result["class_labels"], None, names)
    if "masks" in result:
        return _read_masks(result["masks"], result["labels"], result.get("scores"), names)
    segmentation = result.get("segmentation")
    if isinstance(segmentation, np.ndarray | Tensor):
        maps, infos = _to_tensor(segmentation), result["segments_info"]
        is_stack = maps.ndim == 3  # noqa: PLR2004
        masks = [maps[number] > 0 if is_stack else maps == info["id"] for number, info in enumerate(infos)]
        return [
            _name(mask, info["label_id"], info.get("score"), names) for mask, info in zip(masks, infos, strict=True)
        ]
    raise ValueError(
        f"Cannot draw a dictionary with the keys {sorted(result)}. Expected mask_labels and class_labels, or masks, "
        "labels and scores, or segmentation (a map, not run lengths) and segments_info."
    )


def _read_masks(masks: Any, class_ids: Any, scores: Any, names: Mapping[int, str]) -> list[DrawnSegment]:  # noqa: ANN401
    tensor = _to_tensor(masks)
    ids = _to_tensor(class_ids).tolist()
    values = [None] * len(ids) if scores is None else _to_tensor(scores).tolist()
    if not len(tensor) == len(ids) == len(values):
        raise ValueError(
            f"Got {len(tensor)} masks, {len(ids)} class labels and {len(values)} scores. Pass one of each per segment."
        )
    foreground = tensor > 0.5 if tensor.is_floating_point() else tensor.bool()  # noqa: PLR2004
    return [_name(*segment, names) for segment in zip(foreground, ids, values, strict=True)]


def _read_semantic_map(classes: Tensor, id2label: Mapping[int, str] | None) -> list[DrawnSegment]:
    present = [int(class_id) for class_id in classes.unique()]
    drawn = [class_id for class_id in present if (class_id >= 0 if id2label is None else class_id in id2label)]
    return [_name(classes == class_id, class_id, None, id2label or {}) for class_id in drawn]


def _read_pipeline_entry(entry: Mapping[str, Any], names: Mapping[int, str]) -> DrawnSegment:
    if not (isinstance(entry, Mapping) and {"mask", "label"} <= entry.keys()):
        raise ValueError("A list is drawn as a pipeline result: each entry needs mask and label, and perhaps a score.")
    label = str(entry["label"])
    ids = {name: class_id for class_id, name in names.items()}
    # Without a table the colour still has to be the same in each picture and process, which `hash` is not.
    class_id = ids.get(label, zlib.crc32(label.encode()))
    mask = torch.from_numpy(np.array(entry["mask"])) > 0
    score = entry.get("score")
    return DrawnSegment(mask, class_id, label, None if score is None else float(score))


def _name(mask: Tensor, class_id: int, score: float | None, names: Mapping[int, str]) -> DrawnSegment:
    return DrawnSegment(mask, int(class_id), names.get(int(class_id), str(int(class_id))), score)


def _to_tensor(values: Any) -> Tensor:  # noqa: ANN401
    if isinstance(values, np.ndarray):
        # torch compares neither unsigned integers of more than 8 bits nor views that run backwards.
        values = np.ascontiguousarray(values, dtype=np.int64 if values.dtype.kind in "iu" else None)
    return torch.as_tensor(values).detach().cpu()


def _to_rgb(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    picture = image if isinstance(image, Image.Image) else to_pil_image(image)
    return picture.convert("RGB")


def _resize(
    picture: Image.Image, segments: Sequence[DrawnSegment], longest_side: int
) -> tuple[Image.Image, list[DrawnSegment]]:
    factor = longest_side / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    rows = (torch.arange(height) * picture.height // height)[:, None]  # nearest pixel
    columns = torch.arange(width) * picture.width // width
    resized = [
        DrawnSegment(segment.mask[rows, columns], segment.class_id, segment.label, segment.score)
        for segment in segments
    ]
    # Nothing thin may vanish when a picture is reduced, but then there is nothing left to draw either.
    resized = [segment for segment in resized if bool(segment.mask.any())]
    return picture.resize((width, height), Image.Resampling.BILINEAR), resized


# ---------------------------------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------------------------------

# The segments of one class in a picture go through these shades: share of white (> 0) or black (< 0) in the colour.
SHADES = (0.0, 0.4, -0.35, 0.2, -0.18)


@functools.cache
def class_palette(size: int = 256) -> tuple[Color, ...]:
    """Colours of the classes: each as far from those before it as possible, none near grey.

    The first two dozen are easily told apart; later ones come closer, as they must.
    """
    hues = [
        colorsys.hsv_to_rgb(hue / 36, saturation, value)
        for value in (1.0, 0.8, 0.6, 0.45)
        for saturation in (1.0, 0.75, 0.5)
        for hue in range(36)
    ]
    candidates = np.array(hues) * 255
    chosen = [0]
    nearest = _color_distance(candidates, candidates[0])
    for _ in range(size - 1):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _color_distance(candidates, candidates[chosen[-1]]))
    return tuple((round(red), round(green), round(blue)) for red, green, blue in candidates[chosen].tolist())


def segment_color(class_id: int, occurrence: int = 0) -> Color:
    """Colour of the n-th segment of a class in a picture: always the same, a lighter or darker shade for each."""
    palette = class_palette()
    shade = SHADES[occurrence % len(SHADES)]
    target = 255 if shade > 0 else 0
    red, green, blue = (round(part + abs(shade) * (target - part)) for part in palette[class_id % len(palette)])
    return red, green, blue


def _color_distance(colors: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distance (n,) of RGB colours (n, 3) as the eye weighs them, roughly."""
    return np.sqrt(((colors - other) ** 2 * (2, 4, 3)).sum(axis=-1))


def _segment_colors(segments: Sequence[DrawnSegment]) -> list[Color]:
    seen: Counter[int] = Counter()
    colors = []
    for segment in segments:
        colors.append(segment_color(segment.class_id, seen[segment.class_id]))
        seen[segment.class_id] += 1
    return colors


def _ink_on(color: Color) -> Color:
    """Black or white, whichever is easier to read on a colour: white on saturated red and magenta, unlike WCAG's ratio."""
    red, green, blue = color
    lightness = 0.299 * red + 0.587 * green + 0.114 * blue
    return (0, 0, 0) if lightness > 110 else (255, 255, 255)  # noqa: PLR2004


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def _height_in_stack(segment: DrawnSegment) -> tuple[float, int]:
    """Sort key: what is drawn later lies on top."""
    return segment.score or 0.0, -int(segment.mask.count_nonzero())


def _draw_masks(
    picture: Image.Image, segments: Sequence[DrawnSegment], colors: Sequence[Color], opacity: float
) -> Image.Image:
    """Fill the masks with transparent colour and draw their outlines, each pixel in the colour of the topmost one."""
    masks = torch.stack([segment.mask for segment in segments])  # (n, H, W)
    width = max(1, round(max(picture.size) / 220))
    drawn = pil_to_tensor(picture)
    drawn = draw_segmentation_masks(drawn, _topmost(masks), alpha=opacity, colors=list(colors))
    outlines = torch.stack([_outline(mask, width) for mask in masks])
    drawn = draw_segmentation_masks(drawn, _topmost(outlines), alpha=1.0, colors=list(colors))
    return to_pil_image(drawn)


def _topmost(masks: Tensor) -> Tensor:
    """Give each pixel to the last mask (n, H, W) that has it: torchvision draws pixels of two masks black."""
    owner = torch.full(masks.shape[1:], -1)
    for number, mask in enumerate(masks):
        owner[mask] = number
    return torch.stack([owner == number for number in range(len(masks))])


def _outline(mask: Tensor, width: int) -> Tensor:
    """Pixels of a mask (H, W) within `width` pixels of one that is not in it; the image's frame is no outline."""
    near_outside = ~mask
    for dimension in (0, 1):
        grown = near_outside.clone()
        for shift in range(1, width + 1):
            for source, target in ((shift, 0), (0, shift)):
                length = mask.shape[dimension] - shift
                grown.narrow(dimension, target, length).logical_or_(near_outside.narrow(dimension, source, length))
        near_outside = grown
    return mask & near_outside


LAYER_COLOR: Color = (240, 110, 0)  # stands out from grey, and from the white outline


def _draw_layer(picture: Image.Image, mask: Tensor | None, truth: Tensor | None, longest_side: int) -> Image.Image:
    """Draw the panel of one level: mask and outline on the image in pale grey; without a mask the image as it is."""
    masks = {"mask": mask, "truth": truth}
    segments = [DrawnSegment(each, 0, name) for name, each in masks.items() if each is not None]
    picture, segments = _resize(picture, segments, longest_side)
    drawn = {segment.label: segment.mask for segment in segments}
    if mask is not None:
        # Pale, so that neither the mask's colour nor the outline depends on what the image shows.
        picture = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.45)
    if "mask" in drawn:
        picture = to_pil_image(
            draw_segmentation_masks(pil_to_tensor(picture), drawn["mask"], alpha=0.7, colors=[LAYER_COLOR])
        )
    if "truth" in drawn:
        # White, then black, so that it shows on any background; outside of the segment, so that it hides nothing in it.
        width = max(1, round(longest_side / 160))
        white = _outline(~drawn["truth"], width)
        rims = torch.stack([_outline(~drawn["truth"], 2 * width) & ~white, white])
        picture = to_pil_image(
            draw_segmentation_masks(pil_to_tensor(picture), rims, alpha=1.0, colors=[(0, 0, 0), (255, 255, 255)])
        )
    return picture


def _mask_iou(one: Tensor, other: Tensor) -> float:
    """IoU of two masks; 1 if both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

LARGE_SHARE = 0.15  # segments above this share of the picture carry their label inside, smaller ones beside them
MAX_LAYOUT_SIDE = 480  # places are compared on masks no larger than this, whatever the picture's size


def _write_labels(picture: Image.Image, segments: Sequence[DrawnSegment], colors: Sequence[Color]) -> None:
    """Write each label in a box of its segment's colour, near the segment, where it hides as little as possible."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(11, round(0.82 * max(picture.size) ** 0.5)))
    boxes = _place_labels(segments, font)
    for number, box in boxes.items():
        _draw_pointer(draw, box, segments[number].mask.numpy(), colors[number])
    for number, (x, y, x_end, y_end) in boxes.items():
        ink = _ink_on(colors[number])
        draw.rectangle((x, y, x_end - 1, y_end - 1), fill=colors[number], outline=ink)
        draw.text(((x + x_end) / 2, (y + y_end) / 2), segments[number].text, fill=ink, font=font, anchor="mm")


def _place_labels(segments: Sequence[DrawnSegment], font: _Font) -> dict[int, _Box]:
    """Choose the box of each label, by the segment's position; segments without text have none."""
    height, width = segments[0].mask.shape
    coarse = math.ceil(max(height, width) / MAX_LAYOUT_SIDE)
    layout = _LabelLayout([_shrink(segment.mask, coarse) for segment in segments])
    boxes = {}
    for number in layout.order:
        if segments[number].text:
            left, top, right, bottom = font.getbbox(segments[number].text)
            box_width, box_height = math.ceil(right - left) + 7, math.ceil(bottom - top) + 7
            x, y, _, _ = layout.place(number, (math.ceil(box_width / coarse), math.ceil(box_height / coarse)))
            x, y = max(0, min(x * coarse, width - box_width)), max(0, min(y * coarse, height - box_height))
            boxes[number] = (x, y, min(x + box_width, width), min(y + box_height, height))
    return boxes


def _shrink(mask: Tensor, factor: int) -> np.ndarray:
    """Mask (ceil(H / factor), ceil(W / factor)) of the blocks in which a mask (H, W) has a pixel."""
    if factor == 1:
        return mask.numpy()
    return torch.nn.functional.max_pool2d(mask[None].float(), factor, ceil_mode=True)[0].bool().numpy()


class _LabelLayout:
    """Finds a place for one label after the other: beside or inside its segment, off other segments and other labels.

    `order` is the order in which the labels are best placed.
    """

    def __init__(self, masks: Sequence[np.ndarray]) -> None:
        """Start without labels on masks, bool (H, W), of the segments."""
        self.masks = masks
        areas = [int(mask.sum()) for mask in masks]
        self.is_large = [area > LARGE_SHARE * masks[0].size for area in areas]
        # Small segments have the least choice of places.
        self.order = sorted(range(len(masks)), key=areas.__getitem__)
        # What it costs to hide a pixel. Pixels of large segments are cheap: there are enough of them.
        self.cost: np.ndarray = np.zeros(masks[0].shape)
        for mask, is_large in zip(masks, self.is_large, strict=True):
            if not is_large:
                self.cost[mask] = 1.0

    def place(self, number: int, size: tuple[int, int]) -> _Box:
        """Choose the box (left, top, right, bottom) of a label of `size` (width, height) for one segment."""
        height, width = self.cost.shape
        box_width, box_height = min(size[0], width), min(size[1], height)
        step = max(1, box_height // 5)
        rows, columns = np.arange(0, height - box_height + 1, step), np.arange(0, width - box_width + 1, step)
        window = (rows, columns, box_height, box_width)
        mask = self.masks[number]
        own = _window_sums(mask, window)
        cost = _window_sums(self.cost, window)
        if self.is_large[number]:
            cost += 2 * (box_height * box_width - own)
        else:
            gap, offset = _distances(mask, window)
            cost += box_width * gap + 0.1 * box_width * offset - 0.3 * own
        row, column = divmod(int(cost.argmin()), len(columns))
        top, left = int(rows[row]), int(columns[column])
        self.cost[top : top + box_height, left : left + box_width] += 20.0
        return left, top, left + box_width, top + box_height


_Window = tuple[np.ndarray, np.ndarray, int, int]  # top rows, left columns, height and width of a window to be moved


def _window_sums(values: np.ndarray, window: _Window) -> np.ndarray:
    """Sum `values` (H, W) over a window at each of its positions, (rows, columns)."""
    rows, columns, height, width = window
    total = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    top, bottom = total[rows], total[rows + height]
    return bottom[:, columns + width] - bottom[:, columns] - top[:, columns + width] + top[:, columns]


def _distances(mask: np.ndarray, window: _Window) -> tuple[np.ndarray, np.ndarray]:
    """Measure a window at each position against a mask's box: free pixels between them, and distance of the centres."""
    rows, columns, height, width = window
    inside_rows, inside_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    gaps, offsets = [], []
    for starts, length, inside in ((rows, height, inside_rows), (columns, width, inside_columns)):
        first, last = inside[0], inside[-1] + 1
        gaps.append(np.maximum(0, np.maximum(first - (starts + length), starts - last)))
        offsets.append(starts + length / 2 - (first + last) / 2)
    return np.hypot(gaps[0][:, None], gaps[1][None]), np.hypot(offsets[0][:, None], offsets[1][None])


def _draw_pointer(draw: ImageDraw.ImageDraw, box: _Box, mask: np.ndarray, color: Color) -> None:
    """Connect a label with the nearest pixel of its mask, if it does not lie on it."""
    left, top, right, bottom = box
    if mask[top:bottom, left:right].any():
        return
    rows, columns = mask.nonzero()
    from_x, from_y = columns.clip(left, right - 1), rows.clip(top, bottom - 1)
    nearest = ((columns - from_x) ** 2 + (rows - from_y) ** 2).argmin()
    line = [(int(from_x[nearest]), int(from_y[nearest])), (int(columns[nearest]), int(rows[nearest]))]
    draw.line(line, fill=_ink_on(color), width=4)
    draw.line(line, fill=color, width=2)


# ---------------------------------------------------------------------------------------------------------------------
# Side by side
# ---------------------------------------------------------------------------------------------------------------------


def _arrange_panels(
    panels: Sequence[tuple[Image.Image, Sequence[str]]], title: str, panel_size: int, columns: int
) -> Image.Image:
    """Put pictures side by side, `columns` in a row, each over its lines of words, white between them."""
    gap = max(6, panel_size // 32)
    font = ImageFont.load_default(max(12, panel_size // 18))
    title_font = ImageFont.load_default(max(14, panel_size // 15))
    line_height = math.ceil(font.getbbox("Ag")[3]) + 3
    title_height = math.ceil(title_font.getbbox("Ag")[3]) + gap if title else 0
    cell_width = max(picture.width for picture, _ in panels)
    cell_width = max(cell_width, *(math.ceil(font.getlength(line)) for _, lines in panels for line in lines))
    picture_height = max(picture.height for picture, _ in panels)
    cell_height = picture_height + 4 + line_height * max(len(lines) for _, lines in panels)
    columns = max(1, min(columns, len(panels)))
    width = max(columns * (cell_width + gap), math.ceil(title_font.getlength(title)) + gap) + gap
    height = title_height + math.ceil(len(panels) / columns) * (cell_height + gap) + gap
    table = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(table)
    draw.text((gap, gap), title, fill="black", font=title_font, anchor="la")
    for number, (picture, lines) in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = gap + column * (cell_width + gap), title_height + gap + row * (cell_height + gap)
        center = left + cell_width / 2
        table.paste(picture, (left + (cell_width - picture.width) // 2, top))
        for index, line in enumerate(lines):
            position = (center, top + picture_height + 4 + index * line_height)
            draw.text(position, line, fill="black", font=font, anchor="ma")
    return table


def _arrange(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], column_width: int) -> Image.Image:
    """Put pictures into a table with titles, white between them."""
    gap = max(4, column_width // 48)
    font = ImageFont.load_default(max(14, column_width // 20))
    title_height = math.ceil(font.getbbox("Ag")[3]) + 2 * gap
    heights = [max(picture.height for picture in row) for row in rows]
    size = (len(titles) * (column_width + gap) + gap, title_height + sum(heights) + gap * len(heights))
    table = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(table)
    for column, title in enumerate(titles):
        center = gap + column * (column_width + gap) + column_width / 2
        draw.text((center, title_height / 2), title, fill="black", font=font, anchor="mm")
    top = title_height
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            table.paste(picture, (gap + column * (column_width + gap), top))
        top += height + gap
    return table
