"""Ground truth of a row as each task compares it: by hand, with regions of crowd, and from arrays of every kind."""

import numpy as np
import pytest
import torch

from mpformer_hf.mask_encoding import decode_rle
from training.data import DigitScenes
from training.metrics.panoptic_quality import PanopticQuality
from training.targets import instance_targets, panoptic_target, semantic_target, size_of

VOID = 255


def make_row(*segments, crowd=()):
    """Make a row of one row of pixels; a segment is (class, pixels as 0 and 1)."""
    width = len((*segments, *crowd)[0][1])

    def masks_of(entries):
        return np.array([pixels for _, pixels in entries], dtype=bool).reshape(-1, 1, width)

    def classes_of(entries):
        return np.array([class_id for class_id, _ in entries], dtype=np.int64)

    row = {"image_id": 1, "mask_labels": masks_of(segments), "class_labels": classes_of(segments)}
    return {**row, "crowd_masks": masks_of(crowd), "crowd_labels": classes_of(crowd)} if crowd else row


ROW = make_row((4, [1, 1, 0, 0, 0, 0]), (2, [0, 0, 1, 0, 0, 0]), crowd=[(4, [0, 1, 1, 1, 1, 0])])


def pixels_of(annotation):
    return decode_rle(annotation["segmentation"]).int().tolist()


def test_size_is_that_of_the_masks_also_without_any():
    assert size_of(ROW) == (1, 6)
    assert size_of({"mask_labels": torch.zeros(0, 7, 9)}) == (7, 9)


# ---------------------------------------------------------------------------------------------------------------------
# Panoptic
# ---------------------------------------------------------------------------------------------------------------------


def test_panoptic_map_numbers_the_segments_and_gives_crowd_what_no_segment_has():
    ids, segments = panoptic_target(ROW)
    assert ids.tolist() == [[1, 1, 2, 3, 3, 0]]
    assert segments == [
        {"id": 1, "label_id": 4, "iscrowd": 0},
        {"id": 2, "label_id": 2, "iscrowd": 0},
        {"id": 3, "label_id": 4, "iscrowd": 1},
    ]


def test_panoptic_segments_without_pixels_are_not_listed():
    crowd = [(5, [0, 0, 0, 0]), (5, [1, 1, 0, 0]), (6, [1, 1, 1, 0])]
    ids, segments = panoptic_target(make_row((4, [1, 1, 0, 0]), (2, [0, 0, 0, 0]), crowd=crowd))
    assert ids.tolist() == [[1, 1, 5, 0]]
    assert segments == [{"id": 1, "label_id": 4, "iscrowd": 0}, {"id": 5, "label_id": 6, "iscrowd": 1}]


def test_panoptic_crowd_regions_that_overlap_share_no_pixel():
    ids, segments = panoptic_target(make_row((4, [1, 0, 0, 0]), crowd=[(5, [0, 1, 1, 0]), (6, [0, 0, 1, 1])]))
    assert ids.tolist() == [[1, 2, 2, 3]]
    assert [segment["iscrowd"] for segment in segments] == [0, 1, 1]


def test_panoptic_quality_does_not_miss_crowd_and_excuses_what_is_predicted_in_it():
    found, segments = np.array([[1, 1, 2, 3, 3, 3]]), [
        {"id": 1, "label_id": 4}, {"id": 2, "label_id": 2}, {"id": 3, "label_id": 4},
    ]  # fmt: skip
    for predicted, listed in ((found, segments), (np.where(found == 3, 0, found), segments[:2])):
        quality = PanopticQuality([2, 4], [])
        quality.add(1, predicted, listed, *panoptic_target(ROW))
        assert quality.compute()["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 2}


def test_segments_that_overlap_are_no_panoptic_target():
    with pytest.raises(ValueError, match="masks overlap"):
        panoptic_target(make_row((4, [1, 1]), (2, [0, 1])))


# ---------------------------------------------------------------------------------------------------------------------
# Semantic
# ---------------------------------------------------------------------------------------------------------------------


def test_semantic_crowd_counts_as_its_class_where_no_segment_is():
    assert semantic_target(ROW, VOID).tolist() == [[4, 4, 2, 4, 4, VOID]]
    assert semantic_target(ROW, -1).tolist() == [[4, 4, 2, 4, 4, -1]]


def test_semantic_crowd_that_comes_first_keeps_its_pixels_as_in_panoptic_maps():
    row = make_row((4, [1, 0, 0, 0]), crowd=[(5, [1, 1, 1, 0]), (6, [0, 0, 1, 1])])
    assert semantic_target(row, VOID).tolist() == [[4, 5, 5, 6]]
    ids, segments = panoptic_target(row)
    classes = {segment["id"]: segment["label_id"] for segment in segments}
    assert [classes[key] for key in ids[0].tolist()] == [4, 5, 5, 6]


def test_semantic_segments_of_two_classes_must_not_overlap():
    with pytest.raises(ValueError, match="class 2 overlaps a mask of another class"):
        semantic_target(make_row((4, [1, 1]), (2, [0, 1])), VOID)


# ---------------------------------------------------------------------------------------------------------------------
# Instance
# ---------------------------------------------------------------------------------------------------------------------


def test_instance_targets_are_whole_masks_objects_first_then_crowd():
    targets = instance_targets(ROW)
    assert [(target["label_id"], target["iscrowd"], pixels_of(target)) for target in targets] == [
        (4, 0, [[1, 1, 0, 0, 0, 0]]),
        (2, 0, [[0, 0, 1, 0, 0, 0]]),
        (4, 1, [[0, 1, 1, 1, 1, 0]]),
    ]
    assert all(type(target["label_id"]) is int for target in targets), "goes to JSON"


def test_instance_targets_may_overlap():
    targets = instance_targets(make_row((4, [1, 1]), (2, [0, 1])))
    assert [pixels_of(target) for target in targets] == [[[1, 1]], [[0, 1]]]


# ---------------------------------------------------------------------------------------------------------------------
# All tasks
# ---------------------------------------------------------------------------------------------------------------------


def targets_of(row):
    """List the targets of all tasks in plain Python."""
    ids, segments = panoptic_target(row)
    return ids.tolist(), segments, semantic_target(row, VOID).tolist(), instance_targets(row)


def test_row_without_segments_is_void_and_has_no_targets():
    row = {"image_id": 1, "mask_labels": np.zeros((0, 1, 3), bool), "class_labels": np.zeros(0, np.int64)}
    assert targets_of(row) == ([[0, 0, 0]], [], [[VOID] * 3], [])
    assert targets_of({**row, "crowd_masks": row["mask_labels"], "crowd_labels": row["class_labels"]}) == (
        targets_of(row)
    )


def test_row_of_crowd_alone_has_targets():
    row = {"image_id": 1, "mask_labels": np.zeros((0, 1, 2), bool), "class_labels": np.zeros(0, np.int64),
           "crowd_masks": np.array([[[False, True]]]), "crowd_labels": np.array([3])}  # fmt: skip
    ids, segments, classes, instances = targets_of(row)
    assert (ids, classes) == ([[0, 1]], [[VOID, 3]])
    assert segments == [{"id": 1, "label_id": 3, "iscrowd": 1}]
    assert [target["iscrowd"] for target in instances] == [1]


def test_arrays_that_may_not_be_written_tensors_and_bytes_give_the_same_targets():
    def convert(function):
        return {key: function(value) if key != "image_id" else value for key, value in ROW.items()}

    def freeze(array):
        array = array.copy()
        array.flags.writeable = False  # as those of Arrow files are
        return array

    expected = targets_of(ROW)
    assert targets_of(convert(freeze)) == expected
    assert targets_of(convert(torch.from_numpy)) == expected
    assert targets_of(convert(lambda array: array.astype(np.uint8))) == expected


def test_targets_of_digit_scenes_show_every_mask():
    for row in DigitScenes("validation", task="panoptic", preset="hard", image_size=96, num_images=3):
        ids, segments = panoptic_target(row)
        classes = semantic_target(row, VOID)
        instances = instance_targets(row)
        assert len(segments) == len(instances) == len(row["mask_labels"])
        for mask, class_id, segment, instance in zip(
            row["mask_labels"], row["class_labels"], segments, instances, strict=True
        ):
            assert segment["label_id"] == instance["label_id"] == class_id
            np.testing.assert_array_equal(ids == segment["id"], mask)
            np.testing.assert_array_equal(decode_rle(instance["segmentation"]).numpy(), mask)
            assert set(classes[mask].tolist()) == {class_id}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crowd_labels": np.array([], dtype=int)}, r"masks \(1, 1, 6\) and labels \(0,\)"),
        ({"crowd_masks": np.zeros((1, 2, 6), bool)}, r"Expected crowd masks \(c, 1, 6\).* got masks \(1, 2, 6\)"),
        ({"class_labels": np.array([4])}, r"masks \(2, 1, 6\) and labels \(1,\)"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [panoptic_target, instance_targets, lambda row: semantic_target(row, VOID)],
    ids=["panoptic", "instance", "semantic"],
)
def test_masks_without_labels_and_of_another_size_are_named(make, change, message):
    with pytest.raises(ValueError, match=message):
        make({**ROW, **change})
