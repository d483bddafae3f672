"""Ground truth of a row in the form in which each task compares it.

Axes: n segments, c crowd regions, H W image.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpformer_hf.mask_encoding import encode_rle
from training.data import SegmentationRow
from training.metrics.image_scores import to_numpy
from training.metrics.panoptic_quality import VOID, panoptic_map_from_masks
from training.metrics.semantic_quality import semantic_map_from_masks


def size_of(row: SegmentationRow) -> tuple[int, int]:
    """Height and width of the ground truth."""
    height, width = row["mask_labels"].shape[-2:]
    return int(height), int(width)


def instance_targets(row: SegmentationRow) -> list[dict[str, Any]]:
    """List the objects and the crowd regions of a row, each with `label_id`, `iscrowd` and its run lengths."""
    masks, classes = _crowd(row)
    objects = _annotations(row["mask_labels"], row["class_labels"], iscrowd=0)
    return [*objects, *_annotations(masks, classes, iscrowd=1)]


def panoptic_target(row: SegmentationRow) -> tuple[NDArray[np.int64], list[dict[str, int]]]:
    """Write the segments of a row into one map; a crowd region has the pixels that no segment has.

    Returns:
        The map, int64 (H, W), 0 is void, and a dictionary with `id`, `label_id` and `iscrowd` for each segment that has pixels.
    """
    ids, segments = panoptic_map_from_masks(row["mask_labels"], row["class_labels"])
    listed = [{**segment, "iscrowd": 0} for segment in segments]
    masks, classes = _crowd(row)
    for mask, class_id in zip(masks, classes.tolist(), strict=True):
        segment_id = len(listed) + 1
        ids = np.where(mask & (ids == VOID), segment_id, ids)
        listed.append({"id": segment_id, "label_id": class_id, "iscrowd": 1})
    present = set(np.unique(ids).tolist())
    return ids, [segment for segment in listed if segment["id"] in present]


def semantic_target(row: SegmentationRow, ignore_index: int) -> NDArray[np.int64]:
    """Write the classes of a row into one map, int64 (H, W); a crowd region counts as its class where no segment is."""
    classes = semantic_map_from_masks(row["mask_labels"], row["class_labels"], ignore_index)
    for mask, class_id in zip(*_crowd(row), strict=True):
        classes[mask & (classes == ignore_index)] = class_id
    return classes


def _crowd(row: SegmentationRow) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    no_masks = np.zeros((0, *size_of(row)), dtype=bool)
    masks = to_numpy(row.get("crowd_masks", no_masks)).astype(bool)
    classes = to_numpy(row.get("crowd_labels", np.zeros(0, dtype=np.int64)))
    if masks.shape[1:] != size_of(row) or classes.shape != masks.shape[:1]:
        raise ValueError(
            f"Expected crowd masks (c, {', '.join(map(str, size_of(row)))}) and one crowd label each, got masks {masks.shape} and "
            f"labels {classes.shape}."
        )
    return masks, classes


def _annotations(masks: Any, class_ids: Any, iscrowd: int) -> list[dict[str, Any]]:  # noqa: ANN401 - arrays or tensors
    classes = to_numpy(class_ids)
    if classes.shape != masks.shape[:1]:
        raise ValueError(f"Expected one class label for each mask, got masks {masks.shape} and labels {classes.shape}.")
    # A copy where an array may not be written, as those of Arrow files: torch warns of such.
    encoded = encode_rle(torch.from_numpy(np.require(to_numpy(masks), requirements="W")))
    return [
        {"label_id": int(class_id), "segmentation": rle, "iscrowd": iscrowd}
        for class_id, rle in zip(classes.tolist(), encoded, strict=True)
    ]
