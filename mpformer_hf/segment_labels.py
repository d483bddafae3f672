"""Labels of one image, in whatever form they come, to one: a mask and a class for every segment.

Each reader takes the size of the image and the size at which the model sees it, and returns masks of the latter. Masks
and maps are resized by picking the nearest pixel, so ids of any width and overlaps survive. A segment that has no pixel
left is dropped, and so is its class label.

Axes: N segments, H W the image, h w the image as the model sees it (before padding).
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mask_encoding import decode_rle, rasterize_polygons

Size = tuple[int, int]  # height, width
MAP_RANK = 2
MASKS_RANK = 3
NUMBER_KINDS = "biuf"  # of numpy: bool, integers, floats


@dataclass(frozen=True)
class SegmentLabels:
    """The segments of one image.

    Attributes:
        masks: bool, or float32 in [0, 1] where soft masks came; (N, h, w). They may overlap.
        class_labels: int64, (N,).
    """

    masks: Tensor
    class_labels: Tensor


def segments_from_map(
    segmentation_map: Tensor | np.ndarray,
    image_size: Size,
    model_size: Size,
    *,
    instance_id_to_semantic_id: Mapping[int, int] | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
) -> SegmentLabels:
    """Split a map into one mask for each value.

    Without `instance_id_to_semantic_id` a value is a class. `do_reduce_labels` makes 0 the ignored value and lowers the
    others by one; then pixels equal to `ignore_index` are dropped.

    With it a value is a segment's id, of any size. `do_reduce_labels` drops id 0 and lowers the classes by one, never
    the ids; a segment whose class was 0 is background and goes too. `ignore_index` is then not compared with ids.
    Without `do_reduce_labels`, pixels equal to `ignore_index` are dropped.

    Args:
        segmentation_map: integers, (H, W); bool is 0 and 1, floats must be whole.
        image_size: H and W.
        model_size: h and w.
        instance_id_to_semantic_id: class of each segment id.
        ignore_index: value to drop.
        do_reduce_labels: classes count from 1 in the data, and 0 is background.

    Raises:
        ValueError: wrong rank, size or type, or an id without a class.
    """
    values = integer_map(segmentation_map, image_size)
    values = resize_nearest(values, model_size)
    if instance_id_to_semantic_id is None:
        if do_reduce_labels:
            background = -1 if ignore_index is None else ignore_index
            values = torch.where(values == 0, background, values - 1)
            ignore_index = background
        ids = [value for value in values.unique().tolist() if value != ignore_index]
        return split_map(values, dict(zip(ids, ids, strict=True)))
    ignored_id = 0 if do_reduce_labels else ignore_index
    ids = [value for value in values.unique().tolist() if value != ignored_id]
    classes = classes_of_ids(ids, instance_id_to_semantic_id)
    if do_reduce_labels:
        classes = {segment_id: label - 1 for segment_id, label in classes.items() if label != 0}
    return split_map(values, classes)


def classes_of_ids(ids: list[int], instance_id_to_semantic_id: Mapping[int, int]) -> dict[int, int]:
    """Look up the class of each segment id of a map."""
    if not isinstance(instance_id_to_semantic_id, Mapping):
        raise ValueError(  # noqa: TRY004 - as for every other bad input
            "its `instance_id_to_semantic_id` must be a dict of the class of each segment id, got "
            f"{type(instance_id_to_semantic_id).__name__}."
        )
    if missing := [segment_id for segment_id in ids if segment_id not in instance_id_to_semantic_id]:
        raise ValueError(
            f"its segmentation map holds the segment ids {missing[:5]}, which `instance_id_to_semantic_id` does not "
            f"know (it has {list(instance_id_to_semantic_id)[:5]}). Add their classes as integers, or set "
            "`ignore_index` to the id that means nothing."
        )
    return {
        segment_id: integer(instance_id_to_semantic_id[segment_id], f"the class of its segment id {segment_id}")
        for segment_id in ids
    }


def segments_from_masks(
    masks: Tensor | np.ndarray | Sequence[Any],
    class_labels: Tensor | np.ndarray | Sequence[int],
    image_size: Size,
    model_size: Size,
) -> SegmentLabels:
    """Take masks as they are; they may overlap.

    Args:
        masks: bool, uint8 or float in [0, 1], (N, H, W), or a sequence of N masks (H, W).
        class_labels: integers, (N,).
        image_size: H and W.
        model_size: h and w.

    Raises:
        ValueError: wrong rank, size or values, or other counts of masks and labels.
    """
    stacked = stack_masks(masks, image_size)
    labels = class_array(class_labels)
    if len(stacked) != len(labels):
        raise ValueError(
            f"it has {len(stacked)} masks but {len(labels)} class labels. Pass one class label per mask; an image "
            "without segments has zero of both."
        )
    return drop_empty(resize_nearest(stacked, model_size), labels)


def class_array(class_labels: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    """Check the class labels of one image and make them int64 (N,)."""
    try:
        labels = widened(class_labels if isinstance(class_labels, Tensor) else np.asarray(class_labels))
    except ValueError as error:
        raise ValueError(f"its class labels must be integers of shape (segments,): {error}") from error
    is_integer = not labels.is_floating_point() and labels.dtype != torch.bool
    if labels.dim() != 1 or (labels.numel() and not is_integer):
        raise ValueError(
            f"its class labels must be integers of shape (segments,), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Pass one for each mask."
        )
    return labels.long()


def segments_from_coco_instances(
    instances: Sequence[Mapping[str, Any]], image_size: Size, model_size: Size
) -> SegmentLabels:
    """Read instances in COCO's form. Crowds (`iscrowd`) are dropped, as the original does.

    Args:
        instances: dicts with `category_id` (the class label of the model) and `segmentation`: polygons, or run lengths.
        image_size: H and W.
        model_size: h and w.

    Raises:
        ValueError: a dict lacks a key, or its mask is not of the image's size.
    """
    masks, classes = [], []
    for index, instance in enumerate(list_of_dicts(instances, "annotations")):
        if instance.get("iscrowd", 0):
            continue
        if missing := {"category_id", "segmentation"} - set(instance):
            raise ValueError(f"its annotation {index} lacks {sorted(missing)}; it has {sorted(instance)}.")
        classes.append(integer(instance["category_id"], f"`category_id` of its annotation {index}"))
        try:
            mask = coco_mask(instance["segmentation"], image_size)
        except (ValueError, TypeError) as error:
            raise ValueError(f"its annotation {index}: {error}") from error
        masks.append(resize_nearest(mask, model_size))
    stacked = torch.stack(masks) if masks else torch.zeros((0, *model_size), dtype=torch.bool)
    return drop_empty(stacked, torch.tensor(classes, dtype=torch.int64))


def segments_from_coco_panoptic(
    panoptic_map: Tensor | np.ndarray, segments_info: Sequence[Mapping[str, Any]], image_size: Size, model_size: Size
) -> SegmentLabels:
    """Read a panoptic annotation in COCO's form. Crowds and pixels of ids that are not listed are dropped.

    Args:
        panoptic_map: the PNG's colours, uint8 (H, W, 3), id = R + 256 G + 65536 B; or the ids themselves, (H, W).
        segments_info: dicts with `id` and `category_id` (the class label of the model).
        image_size: H and W.
        model_size: h and w.

    Raises:
        ValueError: wrong rank or size, a dict lacks a key, or none of the listed segments has a pixel in the map.
    """
    classes, crowds = classes_of_segments(segments_info)
    colours = widened(panoptic_map)
    if colours.dim() == MASKS_RANK and colours.shape[-1] == 3:  # noqa: PLR2004 - red, green, blue
        colours = (colours.long() * torch.tensor([1, 256, 256 * 256], device=colours.device)).sum(-1)
    ids = integer_map(colours, image_size, "panoptic map")
    listed = {*classes, *crowds}
    if listed and not listed & set(ids.unique().tolist()):
        raise ValueError(
            f"no pixel of its panoptic map has one of the ids that its segments_info lists ({sorted(listed)[:5]}). "
            "Check that the map belongs to the annotation, that its colours are in the order red, green, blue, and "
            "that it was not stored with lossy compression."
        )
    ids = resize_nearest(ids, model_size)
    remaining = set(ids.unique().tolist())
    return split_map(ids, {segment_id: label for segment_id, label in classes.items() if segment_id in remaining})


def classes_of_segments(segments_info: Sequence[Mapping[str, Any]]) -> tuple[dict[int, int], set[int]]:
    """Read the class of each listed segment, and the ids of the crowds, from a panoptic annotation."""
    classes: dict[int, int] = {}
    crowds: set[int] = set()
    for index, segment in enumerate(list_of_dicts(segments_info, "segments_info")):
        if missing := {"id", "category_id"} - set(segment):
            raise ValueError(f"its segments_info[{index}] lacks {sorted(missing)}; it has {sorted(segment)}.")
        segment_id = integer(segment["id"], f"`id` of its segments_info[{index}]")
        if segment_id in classes or segment_id in crowds:
            raise ValueError(f"its segments_info[{index}] has the id {segment_id} of another segment. Ids are unique.")
        if segment.get("iscrowd", 0):
            crowds.add(segment_id)
        else:
            classes[segment_id] = integer(segment["category_id"], f"`category_id` of its segments_info[{index}]")
    return classes, crowds


def list_of_dicts(entries: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """Check that an annotation is a list of dicts."""
    if not isinstance(entries, list | tuple):
        raise ValueError(  # noqa: TRY004 - as for every other bad input
            f"its {name} must be a list of dicts, got {type(entries).__name__}. A file of annotations must be read "
            "before."
        )
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"its {name}[{index}] must be a dict, got {type(entry).__name__}.")  # noqa: TRY004
    return list(entries)


def integer(value: object, what: str) -> int:
    """Read an integer of any type that is one; torch would cut the fraction of a float without a word."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{what} must be an integer, got {value!r}.") from error


def split_map(values: Tensor, class_of_value: Mapping[int, int]) -> SegmentLabels:
    """Make one mask for each named value of a map; int64 (h, w)."""
    wanted = torch.tensor(list(class_of_value), dtype=torch.int64, device=values.device)
    labels = torch.tensor(list(class_of_value.values()), dtype=torch.int64, device=values.device)
    return SegmentLabels(values[None] == wanted[:, None, None], labels)


def drop_empty(masks: Tensor, labels: Tensor) -> SegmentLabels:
    """Keep the segments that have a pixel."""
    keep = (masks > 0).flatten(1).any(1)
    return SegmentLabels(masks[keep], labels.to(masks.device)[keep])


def coco_mask(segmentation: Mapping[str, Any] | list[list[float]], image_size: Size) -> Tensor:
    """Read one COCO `segmentation` (polygons or run lengths) as bool (H, W)."""
    if isinstance(segmentation, Mapping):
        # Before decoding, so that a wrong size costs no memory.
        size = segmentation.get("size")
        if size is not None and list(size) != list(image_size):
            raise ValueError(
                f"its run lengths belong to an image of {' x '.join(map(str, size))}, but the image has "
                f"{image_size[0]} x {image_size[1]}. Pass annotations at the size of the image before processing."
            )
        return decode_rle(dict(segmentation))
    if not isinstance(segmentation, list | tuple):
        raise ValueError(  # noqa: TRY004 - as for every other bad input
            f"`segmentation` must be a list of polygons, or run lengths, got {type(segmentation).__name__}."
        )
    if len(segmentation) == 0:
        raise ValueError("`segmentation` is empty, so there is a box at most. Give it a mask, or leave it out.")
    return rasterize_polygons(list(segmentation), *image_size)


def integer_map(segmentation_map: Tensor | np.ndarray, image_size: Size, what: str = "segmentation map") -> Tensor:
    """Check a map and make it int64 (H, W)."""
    values = without_channel(widened(segmentation_map), image_size)
    if values.dim() != MAP_RANK:
        raise ValueError(
            f"its {what} must have the shape (height, width), got {tuple(values.shape)}. Colours of a panoptic PNG go "
            "to `annotations=`; overlapping masks go to `mask_labels=` and `class_labels=`."
        )
    if tuple(values.shape) != image_size:
        raise ValueError(
            f"its {what} is {values.shape[0]} x {values.shape[1]}, but the image is {image_size[0]} x {image_size[1]}. "
            "Pass the map at the size of the image before processing."
        )
    if values.is_floating_point() and not (values.isfinite() & (values == values.round())).all():
        raise ValueError(
            f"its {what} must hold integers, got fractions, or values that are not finite. Resize maps by the nearest "
            "pixel only."
        )
    return values.long()


def without_channel(values: Tensor, image_size: Size) -> Tensor:
    """Remove the axes of length 1 before or after height and width."""
    while values.dim() > MASKS_RANK and values.shape[0] == 1:
        values = values[0]
    if values.dim() != MASKS_RANK:
        return values
    squeezed = [values.squeeze(axis) for axis in (0, 2) if values.shape[axis] == 1]
    return next((one for one in squeezed if tuple(one.shape) == image_size), squeezed[0] if squeezed else values)


def stack_masks(masks: Tensor | np.ndarray | Sequence[Any], image_size: Size) -> Tensor:
    """Check masks and make them one tensor, bool or float32, (N, H, W)."""
    if not isinstance(masks, Tensor | np.ndarray):
        masks = stack_single_masks(masks, image_size)
    stacked = widened(masks)
    if stacked.dim() != MASKS_RANK:
        raise ValueError(
            f"its masks must have the shape (segments, height, width), got {tuple(stacked.shape)}. A single mask needs "
            "a first axis of length 1."
        )
    if tuple(stacked.shape[1:]) != image_size:
        raise ValueError(
            f"its masks are {stacked.shape[1]} x {stacked.shape[2]}, but the image is {image_size[0]} x "
            f"{image_size[1]}. Pass masks at the size of the image before processing."
        )
    if stacked.numel() and not (stacked.min() >= 0 and stacked.max() <= 1):
        raise ValueError(
            f"its masks must be bool, or numbers in [0, 1], got values from {stacked.min():g} to {stacked.max():g}. "
            "Divide masks of 0 and 255 by 255; drop pixels that mean 'ignore'."
        )
    return stacked.float() if stacked.is_floating_point() else stacked.bool()


def stack_single_masks(masks: Sequence[Any], image_size: Size) -> Tensor:
    """Stack masks that came one by one."""
    if not isinstance(masks, list | tuple):
        raise ValueError(  # noqa: TRY004 - as for every other bad input
            f"its masks must be an array (segments, height, width) or a list of masks, got {type(masks).__name__}."
        )
    each = [widened(mask if isinstance(mask, Tensor) else np.asarray(mask)) for mask in masks]
    if not each:
        return torch.zeros((0, *image_size))
    if len(shapes := {tuple(mask.shape) for mask in each}) > 1:
        raise ValueError(
            f"its masks have different shapes ({sorted(shapes)[:3]}), expected {image_size} of each. Pass masks at the "
            "size of the image before processing."
        )
    return torch.stack(each)


def plain_tensor(values: Tensor | np.ndarray) -> Tensor:
    """Make a tensor of an array of numbers, whatever its byte order, strides and write protection."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in NUMBER_KINDS:
            raise ValueError(f"expected an array of numbers, got the type {values.dtype}.")
        if not values.dtype.isnative or not values.flags.writeable or min(values.strides, default=0) < 0:
            values = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
    tensor = torch.as_tensor(values)
    if tensor.is_complex():
        raise ValueError(f"expected real numbers, got the type {tensor.dtype}.")
    return tensor


def widened(values: Tensor | np.ndarray) -> Tensor:
    """Make a tensor of a type that torch computes with: it has few operations for the unsigned ones beyond 8 bits."""
    tensor = plain_tensor(values)
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def resize_nearest(values: Tensor, size: Size) -> Tensor:
    """Pick the pixel nearest to each new pixel's centre; any type, (..., H, W) to (..., h, w)."""
    height, width = values.shape[-2:]
    if (height, width) == size:
        return values
    rows = nearest_positions(height, size[0]).to(values.device)
    columns = nearest_positions(width, size[1]).to(values.device)
    return values.index_select(-2, rows).index_select(-1, columns)


def nearest_positions(length_in: int, length_out: int) -> Tensor:
    """Compute floor((i + 1/2) * length_in / length_out) for each output position i, in integers."""
    return ((2 * torch.arange(length_out) + 1) * length_in) // (2 * length_out)
