"""Labels of one image in all their forms against masks that are known."""

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from torch import Tensor, nn

from mpformer_hf.segment_labels import (
    SegmentLabels,
    resize_nearest,
    segments_from_coco_instances,
    segments_from_coco_panoptic,
    segments_from_map,
    segments_from_masks,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZE = (8, 10)


def striped(values: list[int], dtype: type = np.int64) -> np.ndarray:
    """A map of `SIZE` with one column for each value; the last value fills the rest."""
    columns = np.array(values + values[-1:] * (SIZE[1] - len(values)))
    return np.broadcast_to(columns, SIZE).astype(dtype)


def by_class(segments: SegmentLabels) -> dict[int, list[int]]:
    """Columns of each class; every test map has vertical stripes."""
    return {
        label: mask[0].nonzero().flatten().tolist()
        for label, mask in zip(segments.class_labels.tolist(), segments.masks, strict=True)
    }


# Maps of classes


def test_without_ids_every_value_of_a_map_is_a_class() -> None:
    segments = segments_from_map(striped([0, 1, 255, 1, 3]), SIZE, SIZE)
    assert by_class(segments) == {0: [0], 1: [1, 3], 3: [4, 5, 6, 7, 8, 9], 255: [2]}
    assert segments.masks.dtype == torch.bool
    assert segments.class_labels.dtype == torch.int64


def test_the_ignored_value_of_a_map_is_dropped() -> None:
    assert set(by_class(segments_from_map(striped([0, 1, 255, 1, 3]), SIZE, SIZE, ignore_index=255))) == {0, 1, 3}


@pytest.mark.parametrize("ignore_index", [255, None])
def test_reducing_drops_class_zero_and_lowers_the_others(ignore_index: int | None) -> None:
    segments = segments_from_map(striped([0, 1, 2, 150]), SIZE, SIZE, ignore_index=ignore_index, do_reduce_labels=True)
    assert by_class(segments) == {0: [1], 1: [2], 149: [3, 4, 5, 6, 7, 8, 9]}


def test_an_ignored_map_has_no_segments() -> None:
    segments = segments_from_map(striped([7]), SIZE, (4, 5), ignore_index=7)
    assert segments.masks.shape == (0, 4, 5)
    assert segments.class_labels.shape == (0,)


# Maps of segment ids


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.float32])
def test_three_hundred_instances_survive_reducing_with_the_ignored_value_255(dtype: type) -> None:
    ids = np.arange(1, 301).reshape(15, 20).astype(dtype)
    segments = segments_from_map(
        ids,
        (15, 20),
        (15, 20),
        instance_id_to_semantic_id={segment_id: 1 + segment_id % 3 for segment_id in range(1, 301)},
        ignore_index=255,
        do_reduce_labels=True,
    )
    assert len(segments.masks) == 300
    assert (segments.masks.flatten(1).sum(1) == 1).all()
    assert segments.class_labels.tolist() == [segment_id % 3 for segment_id in range(1, 301)]


def test_reducing_lowers_classes_and_never_ids() -> None:
    segments = segments_from_map(
        striped([0, 5, 255, 256]),
        SIZE,
        SIZE,
        instance_id_to_semantic_id={5: 3, 255: 1, 256: 2},
        ignore_index=255,
        do_reduce_labels=True,
    )
    assert by_class(segments) == {2: [1], 0: [2], 1: [3, 4, 5, 6, 7, 8, 9]}


def test_reducing_drops_segments_of_class_zero() -> None:
    segments = segments_from_map(
        striped([1, 2]), SIZE, SIZE, instance_id_to_semantic_id={1: 0, 2: 4}, do_reduce_labels=True
    )
    assert segments.class_labels.tolist() == [3]


def test_without_reducing_the_ignored_value_is_no_segment() -> None:
    segments = segments_from_map(
        striped([0, 5, 255]), SIZE, SIZE, instance_id_to_semantic_id={0: 1, 5: 1}, ignore_index=255
    )
    assert segments.class_labels.tolist() == [1, 1]


def test_ids_beyond_24_bits_survive() -> None:
    large = 2**24 + 1  # not a float32
    segments = segments_from_map(
        striped([large, large + 1]), SIZE, (16, 20), instance_id_to_semantic_id={large: 0, large + 1: 1}
    )
    assert by_class(segments) == {0: [0, 1], 1: list(range(2, 20))}


def test_an_id_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds the segment ids \[3\], which `instance_id_to_semantic_id`"):
        segments_from_map(striped([1, 3]), SIZE, SIZE, instance_id_to_semantic_id={1: 0})


@pytest.mark.parametrize(
    ("segmentation_map", "message"),
    [
        (np.zeros((8, 10, 3), dtype=np.uint8), r"must have the shape \(height, width\), got \(8, 10, 3\)"),
        (np.zeros(10), r"must have the shape \(height, width\), got \(10,\)"),
        (np.zeros((8, 11), dtype=np.uint8), "map is 8 x 11, but the image is 8 x 10"),
        (np.full(SIZE, 0.5), "must hold integers"),
    ],
)
def test_maps_that_do_not_fit_are_refused(segmentation_map: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments_from_map(segmentation_map, SIZE, SIZE)


@pytest.mark.parametrize("shape", [(1, 8, 10), (8, 10, 1)])
def test_an_axis_of_length_one_is_no_obstacle(shape: tuple[int, ...]) -> None:
    assert by_class(segments_from_map(striped([2]).reshape(shape), SIZE, SIZE)) == {2: list(range(10))}


# Masks


def overlapping() -> Tensor:
    masks = torch.zeros(3, *SIZE)
    masks[0, :, :6] = 1
    masks[1, :, 4:] = 1
    masks[2, 2:4] = 1
    return masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_overlapping_masks_stay_as_they_are(dtype: torch.dtype) -> None:
    segments = segments_from_masks(overlapping().to(dtype), [1, 1, 0], SIZE, SIZE)
    assert torch.equal(segments.masks, overlapping().bool())
    assert segments.class_labels.tolist() == [1, 1, 0]


def test_soft_masks_stay_soft() -> None:
    segments = segments_from_masks(overlapping() * 0.3, [1, 1, 0], SIZE, SIZE)
    torch.testing.assert_close(segments.masks, overlapping() * 0.3)


@pytest.mark.parametrize("as_list", [list, tuple, lambda masks: [mask.numpy() for mask in masks]])
def test_masks_may_come_one_by_one(as_list) -> None:
    segments = segments_from_masks(as_list(overlapping().bool()), np.array([1, 1, 0]), SIZE, SIZE)
    assert torch.equal(segments.masks, overlapping().bool())


@pytest.mark.parametrize("masks", [[], torch.zeros(0, *SIZE), np.zeros((0, *SIZE), dtype=bool)])
@pytest.mark.parametrize("labels", [[], torch.zeros(0, dtype=torch.int64)])
def test_no_segment_is_normal_input(masks, labels) -> None:
    segments = segments_from_masks(masks, labels, SIZE, (16, 20))
    assert segments.masks.shape == (0, 16, 20)
    assert segments.class_labels.dtype == torch.int64


def test_segments_that_vanish_when_resized_are_dropped_with_their_class() -> None:
    masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    masks[0, 1, 1] = True  # between the pixels that are picked
    masks[1, 50:] = True
    assert segments_from_masks(masks, [4, 7], (100, 100), (10, 10)).class_labels.tolist() == [7]


@pytest.mark.parametrize(
    ("masks", "labels", "message"),
    [
        (torch.zeros(2, 8, 10), [1], "has 2 masks but 1 class labels"),
        (torch.zeros(0, 8, 10), [1], "has 0 masks but 1 class labels"),
        (torch.zeros(8, 10), [1], r"must have the shape \(segments, height, width\), got \(8, 10\)"),
        (torch.zeros(1, 10, 8), [1], "masks are 10 x 8, but the image is 8 x 10"),
        (torch.full((1, 8, 10), 255.0), [1], "values from 255 to 255. Divide masks of 0 and 255 by 255"),
        (torch.full((1, 8, 10), 255, dtype=torch.uint8), [1], "values from 255 to 255"),
        (torch.full((1, 8, 10), -1.0), [1], "got values from -1"),
        (torch.full((1, 8, 10), float("nan")), [1], "got values from nan"),
        (torch.ones(1, 8, 10), [0.5], "class labels must be integers"),
        (torch.ones(1, 8, 10), [[1]], r"of shape \(segments,\), got torch.int64 of shape \(1, 1\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments_from_masks(masks, labels, SIZE, SIZE)


@pytest.mark.parametrize("size", [(16, 20), (5, 7), (8, 30), (3, 10), (1, 1)])
def test_resizing_picks_the_pixels_of_torch(size: tuple[int, int]) -> None:
    values = torch.arange(80.0).reshape(SIZE)
    expected = nn.functional.interpolate(values[None, None], size, mode="nearest-exact")[0, 0]
    assert torch.equal(resize_nearest(values, size), expected)


# COCO


def test_coco_instances_are_read_from_polygons_and_run_lengths() -> None:
    masks = overlapping().bool()
    compressed = pycocotools_mask.encode(np.asfortranarray(masks[1].numpy().astype(np.uint8)))
    instances = [
        {"category_id": 3, "segmentation": [[0, 0, 6, 0, 6, 8, 0, 8]], "iscrowd": 0, "id": 11},
        {"category_id": 1, "segmentation": compressed},
        {"category_id": 0, "segmentation": {"size": [8, 10], "counts": [2, 2] + [6, 2] * 9 + [4]}},
    ]
    segments = segments_from_coco_instances(instances, SIZE, SIZE)
    assert torch.equal(segments.masks, masks)
    assert segments.class_labels.tolist() == [3, 1, 0]


def test_crowds_are_dropped() -> None:
    crowd = {"category_id": 3, "segmentation": {"size": [8, 10], "counts": [0, 80]}, "iscrowd": 1}
    assert segments_from_coco_instances([crowd], SIZE, (16, 20)).masks.shape == (0, 16, 20)
    panoptic = [{"id": 1, "category_id": 2}, {"id": 2, "category_id": 2, "iscrowd": 1}]
    assert by_class(segments_from_coco_panoptic(striped([1, 2]), panoptic, SIZE, SIZE)) == {2: [0]}


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"category_id": 1}, r"annotation 0 lacks \['segmentation'\]"),
        ({"category_id": 1, "segmentation": [[1, 2, 3, 4]]}, "annotation 0: A polygon needs at least three corners"),
        ({"category_id": 1, "segmentation": {"size": [9, 10], "counts": [90]}}, "9 x 10, but the image has 8 x 10"),
    ],
)
def test_coco_instances_that_do_not_fit_are_refused(instance: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments_from_coco_instances([instance], SIZE, SIZE)


def colours(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("draw", [colours, lambda ids: ids], ids=["colours", "ids"])
def test_coco_panoptic_maps_are_read_from_colours_and_ids(draw) -> None:
    ids = striped([0, 7, 70_000, 7, 3_000_000])
    listed = [
        {"id": 7, "category_id": 4},
        {"id": 70_000, "category_id": 2},
        {"id": 3_000_000, "category_id": 9},
        {"id": 8, "category_id": 1},  # cropped away
    ]
    segments = segments_from_coco_panoptic(draw(ids), listed, SIZE, SIZE)
    assert by_class(segments) == {4: [1, 3], 2: [2], 9: [4, 5, 6, 7, 8, 9]}


def test_a_panoptic_map_of_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no pixel of its panoptic map has one of the ids .*\(\[7\]\)"):
        segments_from_coco_panoptic(striped([1, 2]), [{"id": 7, "category_id": 1}], SIZE, SIZE)


def test_a_panoptic_segment_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"segments_info\[0\] lacks \['category_id'\]"):
        segments_from_coco_panoptic(striped([1, 2]), [{"id": 1}], SIZE, SIZE)
