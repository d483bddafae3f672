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
    ("mapping", "message"),
    [
        (5, "its `instance_id_to_semantic_id` must be a dict of the class of each segment id, got int"),
        (
            {"1": 2},
            r"holds the segment ids \[1\], which .* does not know \(it has \['1'\]\). Add their classes as integers",
        ),
        ({1: 2.7}, "the class of its segment id 1 must be an integer, got 2.7"),
        ({1: None}, "the class of its segment id 1 must be an integer, got None"),
        ({1: "2"}, "the class of its segment id 1 must be an integer, got '2'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("do_reduce_labels", [False, True])
def test_a_mapping_of_ids_that_is_none_is_refused(mapping, message: str, do_reduce_labels: bool) -> None:
    with pytest.raises(ValueError, match=message):
        segments_from_map(
            striped([1]), SIZE, SIZE, instance_id_to_semantic_id=mapping, do_reduce_labels=do_reduce_labels
        )


def test_a_negative_class_is_no_background_when_reducing() -> None:
    segments = segments_from_map(striped([1]), SIZE, SIZE, instance_id_to_semantic_id={1: -3}, do_reduce_labels=True)
    assert segments.class_labels.tolist() == [-4]  # the processor refuses it


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor])
def test_classes_may_be_integers_of_any_kind(kind) -> None:
    segments = segments_from_map(striped([1]), SIZE, SIZE, instance_id_to_semantic_id={1: kind(2)})
    assert segments.class_labels.tolist() == [2]


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f8", "<u4", "u8"])
def test_maps_of_every_byte_order_and_width_are_read(dtype: str) -> None:
    assert by_class(segments_from_map(striped([3, 300, 65535]).astype(dtype), SIZE, SIZE)) == {
        3: [0],
        300: [1],
        65535: list(range(2, 10)),
    }


def test_a_flipped_map_is_read_as_it_looks() -> None:
    assert by_class(segments_from_map(striped([1, 2])[:, ::-1], SIZE, SIZE)) == {1: [9], 2: list(range(9))}


@pytest.mark.parametrize(
    ("segmentation_map", "message"),
    [
        (np.zeros((8, 10, 3), dtype=np.uint8), r"must have the shape \(height, width\), got \(8, 10, 3\)"),
        (np.zeros(10), r"must have the shape \(height, width\), got \(10,\)"),
        (np.zeros((8, 11), dtype=np.uint8), "map is 8 x 11, but the image is 8 x 10"),
        (np.full(SIZE, 0.5), "must hold integers"),
        (np.full(SIZE, np.nan), "values that are not finite"),
        (np.full(SIZE, np.inf), "values that are not finite"),
        (torch.full(SIZE, float("-inf")), "values that are not finite"),
        (np.full(SIZE, "a"), "expected an array of numbers, got the type <U1"),
        (np.zeros(SIZE, dtype=complex), "expected an array of numbers, got the type complex128"),
        (torch.zeros(SIZE, dtype=torch.complex64), "expected real numbers, got the type torch.complex64"),
    ],
)
def test_maps_that_do_not_fit_are_refused(segmentation_map: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments_from_map(segmentation_map, SIZE, SIZE)


@pytest.mark.parametrize("shape", [(1, 8, 10), (8, 10, 1), (1, 1, 8, 10)])
def test_an_axis_of_length_one_is_no_obstacle(shape: tuple[int, ...]) -> None:
    assert by_class(segments_from_map(striped([2]).reshape(shape), SIZE, SIZE)) == {2: list(range(10))}


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1)])
def test_an_axis_of_length_one_may_be_that_of_a_narrow_image(size: tuple[int, int]) -> None:
    for shape in (size, (1, *size), (*size, 1)):
        assert segments_from_map(np.full(shape, 2), size, size).masks.shape == (1, *size)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_masks_stay_soft_as_float32(dtype: torch.dtype) -> None:
    soft = (overlapping() * 0.3).to(dtype)
    segments = segments_from_masks(soft, [1, 1, 0], SIZE, SIZE)
    assert segments.masks.dtype == torch.float32
    assert torch.equal(segments.masks, soft.float())


def test_a_soft_mask_among_hard_ones_keeps_its_shares() -> None:
    masks = overlapping()
    segments = segments_from_masks([masks[0].bool(), masks[1] * 0.3, masks[2].to(torch.uint8)], [1, 1, 0], SIZE, SIZE)
    torch.testing.assert_close(segments.masks, masks * torch.tensor([1, 0.3, 1])[:, None, None])


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
        (torch.ones(1, 8, 10), [True], "class labels must be integers of shape .*, got torch.bool"),
        (torch.ones(1, 8, 10), ["cat"], "class labels must be integers of shape .*numbers, got the type <U3"),
        (torch.ones(1, 8, 10), [None], "class labels must be integers of shape .*numbers, got the type object"),
        (torch.ones(1, 8, 10), [[1], [1, 2]], "class labels must be integers of shape"),
        (torch.ones(1, 8, 10), 5, r"got torch.int64 of shape \(\)"),
        (None, [1], "its masks must be an array .* or a list of masks, got NoneType"),
        ("mask.png", [1], "its masks must be an array .* or a list of masks, got str"),
        ([np.ones((8, 10)), np.ones((8, 9))], [1, 1], r"masks have different shapes \(\[\(8, 9\), \(8, 10\)\]\)"),
        ([None], [1], "expected an array of numbers, got the type object"),
        (np.ones((1, 8, 10), dtype=complex), [1], "expected an array of numbers, got the type complex128"),
        (torch.full((1, 8, 10), 2, dtype=torch.int64), [1], "values from 2 to 2"),
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

TRIANGLE = [[0, 0, 5, 0, 5, 5]]


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
        ({"category_id": 1, "segmentation": {"size": [8], "counts": [80]}}, "an image of 8, but the image has 8 x 10"),
        ({"category_id": 1, "segmentation": {"size": [8, 10], "counts": [79]}}, "annotation 0: .*add up to 80"),
        ({"category_id": 1, "segmentation": {"counts": [80]}}, "annotation 0: Expected run lengths as a dict with"),
        ({"category_id": 1, "segmentation": []}, "annotation 0: `segmentation` is empty.* Give it a mask, or leave it"),
        (
            {"category_id": 1, "segmentation": None},
            "`segmentation` must be a list of polygons, or run lengths, got None",
        ),
        (
            {"category_id": 1, "segmentation": [0, 0, 5, 0, 5, 5]},
            "annotation 0: A polygon needs at least three corners",
        ),
        ({"category_id": 1, "segmentation": [["a"] * 6]}, "annotation 0: "),
        (
            {"category_id": 1.7, "segmentation": TRIANGLE},
            "`category_id` of its annotation 0 must be an integer, got 1.7",
        ),
        (
            {"category_id": "1", "segmentation": TRIANGLE},
            "`category_id` of its annotation 0 must be an integer, got '1'",
        ),
        ({"category_id": None, "segmentation": TRIANGLE}, "`category_id` .* must be an integer, got None"),
        (None, r"its annotations\[0\] must be a dict, got NoneType"),
        ("a", r"its annotations\[0\] must be a dict, got str"),
    ],
    ids=str,
)
def test_coco_instances_that_do_not_fit_are_refused(instance: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments_from_coco_instances([instance], SIZE, SIZE)


@pytest.mark.parametrize("instances", [None, 5, "instances.json", {"category_id": 1}])
def test_annotations_that_are_no_list_are_refused(instances) -> None:
    with pytest.raises(ValueError, match=r"its annotations must be a list of dicts, got .* must be read before"):
        segments_from_coco_instances(instances, SIZE, SIZE)


def test_the_place_of_a_bad_annotation_is_counted_with_the_crowds() -> None:
    good = {"category_id": 3, "segmentation": TRIANGLE}
    with pytest.raises(ValueError, match="its annotation 2 lacks"):
        segments_from_coco_instances([{"iscrowd": 1}, good, {"category_id": 1}], SIZE, SIZE)


def test_run_lengths_of_another_size_are_refused_before_they_are_decoded() -> None:
    huge = {"category_id": 1, "segmentation": {"size": [10**6, 10**6], "counts": [10**12]}}  # a terabyte
    with pytest.raises(ValueError, match="belong to an image of 1000000 x 1000000"):
        segments_from_coco_instances([huge], SIZE, SIZE)


def test_a_mask_without_a_pixel_is_dropped_with_its_class() -> None:
    instances = [
        {"category_id": 3, "segmentation": {"size": [8, 10], "counts": [80]}},
        {"category_id": 1, "segmentation": TRIANGLE},
    ]
    assert segments_from_coco_instances(instances, SIZE, SIZE).class_labels.tolist() == [1]


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


@pytest.mark.parametrize(
    ("segments_info", "message"),
    [
        ([{"id": 1}], r"segments_info\[0\] lacks \['category_id'\]"),
        ([{"category_id": 1}], r"segments_info\[0\] lacks \['id'\]"),
        ([{"id": "1", "category_id": 1}], r"`id` of its segments_info\[0\] must be an integer, got '1'"),
        ([{"id": 1, "category_id": 0.5}], r"`category_id` of its segments_info\[0\] must be an integer, got 0.5"),
        (
            [{"id": 1, "category_id": 0}, {"id": 1, "category_id": 3}],
            r"segments_info\[1\] has the id 1 of another segment",
        ),
        (
            [{"id": 1, "category_id": 0, "iscrowd": 1}, {"id": 1, "category_id": 3}],
            r"segments_info\[1\] has the id 1 of another segment",
        ),
        ([None], r"its segments_info\[0\] must be a dict, got NoneType"),
        (5, "its segments_info must be a list of dicts, got int"),
    ],
    ids=str,
)
def test_panoptic_segments_that_do_not_fit_are_refused(segments_info, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments_from_coco_panoptic(striped([1, 2]), segments_info, SIZE, SIZE)


def test_a_panoptic_map_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="its panoptic map is 8 x 10, but the image is 8 x 11"):
        segments_from_coco_panoptic(colours(striped([1])), [{"id": 1, "category_id": 1}], (8, 11), (8, 11))


def test_a_panoptic_annotation_of_crowds_alone_has_no_segments() -> None:
    crowds = [{"id": 1, "category_id": 1, "iscrowd": 1}]
    assert segments_from_coco_panoptic(striped([1]), crowds, SIZE, SIZE).masks.shape == (0, *SIZE)
