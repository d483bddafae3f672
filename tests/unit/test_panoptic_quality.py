"""Panoptic quality: equal to panopticapi's recorded scores, to hand-made cases, and to a set-by-set count of pixels."""

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import DigitScenes
from training.metrics.panoptic_quality import PanopticQuality, count_overlaps, panoptic_map_from_masks

GOLDEN = Path(__file__).parent / "metrics_golden"


def read_golden(kind):
    """Yield (image id, map, segments) of `gt` or `pred`, in the order of the JSON file."""
    for annotation in json.loads((GOLDEN / f"panoptic_{kind}.json").read_text())["annotations"]:
        with Image.open(GOLDEN / kind / annotation["file_name"]) as png:
            red, green, blue = np.moveaxis(np.asarray(png.convert("RGB"), dtype=np.int64), -1, 0)
        yield annotation["image_id"], red + 256 * green + 65536 * blue, annotation["segments_info"]


def golden_quality(predictions="pred", order=slice(None)):
    categories = json.loads((GOLDEN / "panoptic_gt.json").read_text())["categories"]
    things = [category["id"] for category in categories if category["isthing"]]
    stuff = [category["id"] for category in categories if not category["isthing"]]
    quality = PanopticQuality(things, stuff)
    pairs = list(zip(read_golden(predictions), read_golden("gt"), strict=True))
    for (image_id, predicted_map, predicted), (target_id, target_map, target) in pairs[order]:
        assert image_id == target_id
        quality.add(image_id, predicted_map, predicted, target_map, target)
    return quality


def score(predicted_map, predicted_classes, target_map, target_classes, crowd=()):
    """Score one image; classes are given as {id: class}. Class 0 is a thing, 1 is stuff."""
    quality = PanopticQuality(thing_ids=[0], stuff_ids=[1])
    predicted = [{"id": key, "label_id": label} for key, label in predicted_classes.items()]
    target = [{"id": key, "label_id": label, "iscrowd": int(key in crowd)} for key, label in target_classes.items()]
    quality.add("image", np.asarray(predicted_map), predicted, np.asarray(target_map), target)
    return quality.compute()


def test_scores_equal_those_of_the_official_tool():
    expected = json.loads((GOLDEN / "expected.json").read_text())["panoptic"]
    scores = golden_quality().compute()
    for group in ("All", "Things", "Stuff"):
        assert scores[group] == pytest.approx(expected[group], rel=0, abs=1e-9)
    assert {str(key) for key in scores["per_class"]} == set(expected["per_class"])
    for class_id, quality in scores["per_class"].items():
        assert quality == pytest.approx(expected["per_class"][str(class_id)], rel=0, abs=1e-9)


def test_scores_are_an_evaluate_style_json_object():
    scores = json.loads(json.dumps(golden_quality().compute()))
    assert set(scores) == {"All", "Things", "Stuff", "per_class"}
    assert set(scores["All"]) == {"pq", "sq", "rq", "n"}


def test_ground_truth_as_prediction_is_exactly_one_although_it_holds_crowd_and_void():
    scores = golden_quality(predictions="gt").compute()
    for group in ("All", "Things", "Stuff"):
        assert (scores[group]["pq"], scores[group]["sq"], scores[group]["rq"]) == (1.0, 1.0, 1.0)


def test_order_of_images_does_not_change_a_digit():
    assert golden_quality(order=slice(None, None, -1)).compute() == golden_quality().compute()


@pytest.mark.parametrize("num_processes", [2, 3])
def test_merged_parts_that_share_an_image_equal_the_whole(num_processes):
    parts = [golden_quality(order=slice(rank, None, num_processes)) for rank in range(num_processes)]
    parts.append(golden_quality(order=slice(0, 1)))  # an image that a sampler repeated
    merged = pickle.loads(pickle.dumps(parts[-1]))
    for part in parts[:-1]:
        merged.merge(part)
    assert len(merged) == 10
    assert merged.compute() == golden_quality().compute()


def test_match_needs_an_iou_above_one_half():
    # 2 of 4 pixels: IoU is 2/4, no match, so one false positive and one missed segment.
    assert score([[1, 1, 0, 0]], {1: 0}, [[1, 1, 1, 1]], {1: 0})["per_class"][0]["pq"] == 0.0
    # 3 of 4 pixels.
    assert score([[1, 1, 1, 0]], {1: 0}, [[1, 1, 1, 1]], {1: 0})["per_class"][0] == {"pq": 0.75, "sq": 0.75, "rq": 1.0}


def test_quality_is_iou_sum_over_matches_and_half_the_errors():
    # One match of IoU 3/4, one false positive, one missed segment: PQ = 0.75 / (1 + 0.5 + 0.5).
    scores = score([[1, 1, 1, 0, 2, 0]], {1: 0, 2: 0}, [[1, 1, 1, 1, 2, 3]], {1: 0, 2: 1, 3: 0})
    assert scores["per_class"][0] == {"pq": 0.375, "sq": 0.75, "rq": 0.5}
    assert scores["per_class"][1] == {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    assert scores["All"] == {"pq": 0.1875, "sq": 0.375, "rq": 0.25, "n": 2}
    assert scores["Things"] == {"pq": 0.375, "sq": 0.75, "rq": 0.5, "n": 1}
    assert scores["Stuff"]["n"] == 1


def test_prediction_of_another_class_matches_nothing():
    scores = score([[1, 1]], {1: 1}, [[1, 1]], {1: 0})
    assert scores["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 2}


def test_predicted_pixels_over_void_do_not_count_in_the_union():
    scores = score([[1, 1, 1, 1, 1]], {1: 0}, [[1, 1, 0, 0, 0]], {1: 0})
    assert scores["per_class"][0] == {"pq": 1.0, "sq": 1.0, "rq": 1.0}


def test_prediction_mostly_over_void_is_no_false_positive():
    matched = {"predicted": [[1, 1]], "target": [[1, 1]]}
    over_void = score(
        [[*matched["predicted"][0], 2, 2, 2]], {1: 0, 2: 0}, [[*matched["target"][0], 0, 0, 3]], {1: 0, 3: 1}
    )
    half_over_void = score([[1, 1, 2, 2]], {1: 0, 2: 0}, [[1, 1, 0, 3]], {1: 0, 3: 1})
    assert over_void["per_class"][0]["rq"] == 1.0
    assert half_over_void["per_class"][0]["rq"] == 1 / 1.5


def test_crowd_is_neither_matched_nor_missed_and_swallows_predictions_of_its_class_only():
    predicted, target = [[1, 1, 1, 2, 2, 2]], [[1, 1, 1, 1, 1, 1]]
    scores = score(predicted, {1: 0, 2: 1}, target, {1: 0}, crowd={1})
    assert scores["per_class"][0] == {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    assert scores["All"]["n"] == 1, "only the stuff prediction over a crowd of things is an error"
    assert scores["Things"]["n"] == 0
    assert scores["Things"]["pq"] == 0.0


def test_void_and_crowd_together_excuse_a_prediction():
    # 5 pixels: 1 on void, 2 on crowd, 2 on stuff. Neither share alone is above one half.
    scores = score([[1, 1, 1, 1, 1]], {1: 0}, [[0, 2, 2, 3, 3]], {2: 0, 3: 1}, crowd={2})
    assert scores["Things"]["n"] == 0


def test_ids_beyond_32_bits_survive():
    big = 2**62
    predicted, target = np.array([[big, big + 1]]), np.array([[big + 1, big]], dtype=np.uint64)
    scores = score(predicted, {big: 0, big + 1: 1}, target, {big + 1: 0, big: 1})
    assert scores["All"]["pq"] == 1.0


def test_area_of_the_ground_truth_file_is_used_as_in_the_official_tool():
    quality = PanopticQuality([0], [])
    quality.add(1, [[1, 1]], [{"id": 1, "category_id": 0}], [[1, 1]], [{"id": 1, "category_id": 0, "area": 3}])
    assert quality.compute()["All"]["sq"] == 2 / 3


def test_pixels_of_unlisted_true_ids_are_neither_void_nor_an_object():
    scores = score([[1, 1, 1, 1]], {1: 0}, [[1, 1, 1, 7]], {1: 0})
    assert scores["per_class"][0] == {"pq": 0.75, "sq": 0.75, "rq": 1.0}


def test_empty_prediction_misses_every_segment_and_an_empty_image_counts_nothing():
    assert score([[0, 0]], {}, [[1, 2]], {1: 0, 2: 0})["per_class"][0]["pq"] == 0.0
    assert score([[0, 0]], {}, [[0, 0]], {})["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}


def plain_quality(images, class_ids):
    """The definition with sets of pixels, one pair of segments at a time.

    `images` is a list of (predicted segments, true segments); a segment is (class, set of pixels, is crowd).
    """
    totals = {class_id: [0.0, 0, 0] for class_id in class_ids}  # sum of IoU, matches, errors
    for predicted, target in images:
        void = set(range(10_000)).difference(*(pixels for _, pixels, _ in target))
        free_targets = [index for index, (_, _, crowd) in enumerate(target) if not crowd]
        for label, pixels, _ in predicted:
            for index in free_targets:
                true_label, true_pixels, _ = target[index]
                iou = len(pixels & true_pixels) / len((pixels - void) | true_pixels)
                if label == true_label and iou > 0.5:
                    totals[label][0] += iou
                    totals[label][1] += 1
                    free_targets.remove(index)
                    break
            else:
                crowds = [true_pixels for true_label, true_pixels, crowd in target if crowd and true_label == label]
                ignored = void.union(*crowds)
                totals[label][2] += len(pixels & ignored) <= len(pixels) / 2
        for index in free_targets:
            totals[target[index][0]][2] += 1
    return {label: iou / (matches + errors / 2) for label, (iou, matches, errors) in totals.items() if matches + errors}


def random_segments(rng, labels, side, num_segments):
    """A map of rectangles over one another, with their classes; the remaining background is void."""
    ids = np.zeros((side, side), dtype=np.int64)
    for key in range(1, num_segments + 1):
        (top, left), (height, width) = rng.integers(0, side - 4, 2), rng.integers(3, side // 2, 2)
        ids[top : top + height, left : left + width] = key
    return ids, {int(key): int(rng.choice(labels)) for key in np.unique(ids) if key}


def as_sets(ids, classes, crowd=()):
    flat = ids.ravel()
    return [(label, set(np.flatnonzero(flat == key).tolist()), key in crowd) for key, label in classes.items()]


def test_random_scenes_equal_a_count_with_sets_of_pixels():
    rng = np.random.default_rng(3)
    quality, images, num_crowd = PanopticQuality([0, 1], [2]), [], 0
    for number in range(40):
        target_map, target = random_segments(rng, [0, 1, 2], 24, 6)
        predicted_map, predicted = random_segments(rng, [0, 1, 2], 24, 3)
        if number % 2:  # half of the predictions are the ground truth, moved a little and partly renamed
            predicted_map = np.roll(target_map, rng.integers(0, 3, 2), axis=(0, 1))
            predicted = {key: label if rng.random() < 0.8 else 2 - label for key, label in target.items()}
        # The first segment of a class may be crowd, so that a class has at most one.
        crowd = (
            {min(key for key, label in target.items() if label == 0)} if 0 in target.values() and number % 3 else set()
        )
        num_crowd += len(crowd)
        quality.add(
            number,
            predicted_map,
            [{"id": key, "label_id": label} for key, label in predicted.items()],
            torch.from_numpy(target_map),
            [{"id": key, "category_id": label, "iscrowd": int(key in crowd)} for key, label in target.items()],
        )
        images.append((as_sets(predicted_map, predicted), as_sets(target_map, target, crowd)))
    expected = plain_quality(images, [0, 1, 2])
    scores = quality.compute()
    assert num_crowd > 5
    assert all(0.05 < value < 0.95 for value in expected.values()), "the scenes test nothing at the extremes"
    for label, value in expected.items():
        assert scores["per_class"][label]["pq"] == pytest.approx(value, rel=1e-12)
    assert scores["All"]["pq"] == pytest.approx(sum(expected.values()) / 3, rel=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 9)])
def test_overlaps_equal_a_count_of_pixel_pairs(shape):
    rng = np.random.default_rng(0)
    predicted, target = rng.integers(0, 4, shape), rng.integers(0, 3, shape)
    expected = {}
    for row, column in itertools.product(*map(range, shape)):
        key = (int(predicted[row, column]), int(target[row, column]))
        expected[key] = expected.get(key, 0) + 1
    assert count_overlaps(predicted, target) == expected


@pytest.mark.parametrize(
    "ids",
    [
        (np.array([-5, 0, 7]), np.array([2**32 - 1, 0, 3], dtype=np.uint32)),
        (np.array([2**32, 2**32 - 1, 0]), np.array([-(2**63), 0, 2**63 - 1])),
        (np.array([2**64 - 1, 2**63, 0], dtype=np.uint64), np.array([0, 255, 7], dtype=np.uint8)),
    ],
    ids=["negative and 32 bits", "33 and 64 bits", "unsigned 64 bits and bytes"],
)
def test_overlaps_of_ids_of_any_size_equal_a_count_of_pixel_pairs(ids):
    rng = np.random.default_rng(0)
    predicted, target = (values[rng.integers(0, 3, (5, 8))] for values in ids)
    pairs = zip(predicted.ravel().tolist(), target.ravel().tolist(), strict=True)
    assert count_overlaps(predicted, target) == Counter(pairs)
    pairs = zip(target.ravel().tolist(), predicted.ravel().tolist(), strict=True)
    assert count_overlaps(target, predicted) == Counter(pairs)


def test_masks_of_digit_scenes_score_one_against_themselves():
    scenes = DigitScenes("validation", task="panoptic", preset="hard", num_images=8)
    quality = PanopticQuality(scenes.thing_ids, scenes.stuff_ids)
    for row in scenes:
        target_map, segments = panoptic_map_from_masks(row["mask_labels"], row["class_labels"])
        quality.add(row["image_id"], torch.from_numpy(target_map).int(), segments, target_map, segments)
    assert quality.compute()["All"]["pq"] == 1.0


def test_map_of_masks_numbers_the_masks_and_leaves_the_rest_void():
    masks = torch.tensor([[[True, False, False]], [[False, False, True]]])
    ids, segments = panoptic_map_from_masks(masks, torch.tensor([5, 3]))
    assert ids.tolist() == [[1, 0, 2]]
    assert segments == [{"id": 1, "label_id": 5}, {"id": 2, "label_id": 3}]


def test_map_of_no_masks_is_void():
    ids, segments = panoptic_map_from_masks(np.zeros((0, 2, 3), dtype=bool), np.zeros(0, dtype=np.int64))
    assert ids.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert segments == []


ONE = [{"id": 1, "label_id": 0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]], ONE, [[1, 1]], ONE), r"\(1, 2\) in the ground truth and \(1, 1\)"),
        (([[1.0]], ONE, [[1]], ONE), "integer map"),
        (([1], ONE, [[1]], ONE), "integer map"),
        (([[1]], ONE * 2, [[1]], ONE), "prediction of image 'x' lists a segment id twice"),
        (([[-1]], [], [[1]], ONE), "ids below 1"),
        (([[1]], [{"id": 0, "label_id": 0}], [[1]], ONE), "ids below 1"),
        (([[2]], [{"id": 2, "label_id": 9}], [[1]], ONE), "Segment 2 in the prediction of image 'x' has class 9"),
        (([[1]], ONE, [[1]], [{"id": 1, "category_id": 9}]), "ground truth of image 'x' has class 9"),
        (([[1, 2]], ONE, [[1, 1]], ONE), r"ids \[2\] are only in the map"),
        (([[1]], [*ONE, {"id": 3, "label_id": 0}], [[1]], ONE), r"ids \[3\] only in the list"),
        (([[1, 1]], ONE, [[1, 1]], [{"id": 1, "label_id": 0, "area": 1}]), "Leave out `area`"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PanopticQuality([0], []).add("x", *arguments)


def test_an_image_is_added_once_until_reset():
    quality = PanopticQuality([0], [])
    quality.add("x", [[1]], ONE, [[1]], ONE)
    with pytest.raises(ValueError, match="'x' was added before"):
        quality.add("x", [[1]], ONE, [[1]], ONE)
    quality.reset()
    quality.add("x", [[1]], ONE, [[1]], ONE)
    assert len(quality) == 1


def test_overlapping_masks_and_missing_labels_are_errors():
    with pytest.raises(ValueError, match="masks overlap"):
        panoptic_map_from_masks(np.ones((2, 1, 1), dtype=bool), [0, 0])
    with pytest.raises(ValueError, match=r"labels \(1,\)"):
        panoptic_map_from_masks(np.ones((2, 1, 1), dtype=bool), [0])


def test_class_named_twice_and_unequal_classes_in_merge_are_errors():
    with pytest.raises(ValueError, match="named twice"):
        PanopticQuality([0], [0])
    with pytest.raises(ValueError, match=r"same settings.*thing_ids"):
        PanopticQuality([0], []).merge(PanopticQuality([1], []))
