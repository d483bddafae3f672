"""Scores of semantic maps: definitions by hand, a plain count with loops, PQ^St by hand, boundary IoU by brute force."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from training.metrics.boundaries import boundary_distance
from training.metrics.panoptic_quality import PanopticQuality
from training.metrics.semantic_quality import SemanticQuality, mean_of_known, semantic_map_from_masks

VOID = 255


def score(predicted, target, class_ids=(0, 1, 2), **options):
    """Score one image given as two lists, its only row."""
    quality = SemanticQuality(class_ids, **options)
    quality.add("image", np.array([predicted]), np.array([target]))
    return quality.compute()


# ---------------------------------------------------------------------------------------------------------------------
# Definitions by hand
# ---------------------------------------------------------------------------------------------------------------------


def test_iou_is_intersection_over_union_and_its_mean_is_over_the_classes_of_the_ground_truth():
    # Class 0: 2 of 4 pixels in both, 1: 1 of 3. Class 2 is predicted, but never true.
    scores = score(predicted=[0, 0, 1, 1, 2], target=[0, 0, 0, 1, 1])
    assert scores["per_class_IoU"] == {0: 2 / 3, 1: 1 / 3, 2: None}
    assert scores["mIoU"] == 0.5


def test_accuracies_are_shares_of_pixels_of_all_classes_and_of_each():
    scores = score(predicted=[0, 0, 0, 1, 1], target=[0, 0, 0, 0, 1])
    assert scores["pixel_accuracy"] == 4 / 5
    assert scores["per_class_accuracy"] == {0: 3 / 4, 1: 1.0, 2: None}
    assert scores["mean_accuracy"] == 7 / 8


def test_frequency_weighted_iou_weighs_by_true_pixels():
    # IoU 3/4 with 4 true pixels, 1/2 with 1.
    scores = score(predicted=[0, 0, 0, 1, 1], target=[0, 0, 0, 0, 1])
    assert scores["fwIoU"] == pytest.approx((3 / 4 * 4 + 1 / 2 * 1) / 5, rel=1e-15)


def test_void_of_the_ground_truth_counts_nowhere():
    with_void = score(predicted=[0, 1, 1, 2, 2], target=[0, 1, 0, VOID, VOID])
    assert with_void == score(predicted=[0, 1, 1], target=[0, 1, 0])


@pytest.mark.parametrize("nothing", [VOID, -1])
def test_pixel_without_prediction_is_a_wrong_one_but_no_false_positive(nothing):
    scores = score(predicted=[0, nothing, 1], target=[0, 0, 1])
    assert scores["per_class_IoU"] == {0: 1 / 2, 1: 1.0, 2: None}
    assert scores["pixel_accuracy"] == 2 / 3


def test_iou_is_of_all_pixels_of_all_images_and_no_mean_over_images():
    quality = SemanticQuality([0, 1])
    quality.add(1, np.array([[0]]), np.array([[0]]))
    quality.add(2, np.array([[1, 1, 1]]), np.array([[0, 0, 0]]))
    assert quality.compute()["per_class_IoU"] == {0: 1 / 4, 1: None}


def test_ground_truth_as_prediction_is_exactly_one():
    rng = np.random.default_rng(0)
    quality = SemanticQuality(range(50), boundary=True)
    for number in range(5):
        target = np.kron(rng.choice([*range(50), VOID], (5, 7)), np.ones((6, 6), dtype=int))
        quality.add(number, target, target)
    scores = quality.compute()
    for key in ("mIoU", "fwIoU", "pixel_accuracy", "mean_accuracy", "boundary_mIoU"):
        assert scores[key] == 1.0, key
    assert scores["PQ_St"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 50}


@pytest.mark.parametrize("target", [[VOID, VOID], []], ids=["void", "no pixels"])
def test_nothing_true_gives_zeros_and_no_class(target):
    target = np.array(target, dtype=int)
    scores = score(predicted=np.zeros_like(target), target=target, boundary=True)
    assert scores["per_class_IoU"] == scores["per_class_accuracy"] == scores["per_class_boundary_IoU"]
    assert scores["per_class_IoU"] == {0: None, 1: None, 2: None}
    assert {scores[key] for key in ("mIoU", "fwIoU", "pixel_accuracy", "mean_accuracy", "boundary_mIoU")} == {0.0}
    assert scores["PQ_St"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}
    assert SemanticQuality([0]).compute()["mIoU"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Against a plain count
# ---------------------------------------------------------------------------------------------------------------------


def random_maps(class_ids, num_images=4, *, rng_seed=0):
    """Yield (id, prediction, ground truth): blocks, half of the prediction right, with void and holes."""
    rng = np.random.default_rng(rng_seed)
    for number in range(num_images):
        blocks = rng.choice([*class_ids, VOID], (4, 5))
        guesses = np.where(rng.random(blocks.shape) < 0.6, blocks, rng.choice([*class_ids, VOID, -1], blocks.shape))
        target, predicted = (np.kron(values, np.ones((4, 3), dtype=np.int64)) for values in (blocks, guesses))
        yield number, np.roll(predicted, rng.integers(0, 2, 2), (0, 1)), target


def collect(images, *arguments, **options):
    quality = SemanticQuality(*arguments, **options)
    for image in images:
        quality.add(*image)
    return quality


def plain_scores(images, class_ids):
    """The definitions, pixel by pixel."""
    both, true, found = (dict.fromkeys(class_ids, 0) for _ in range(3))
    for _, predicted, target in images:
        for place in itertools.product(*map(range, target.shape)):
            guess, truth = int(predicted[place]), int(target[place])
            if truth == VOID:
                continue
            true[truth] += 1
            if guess in found:
                found[guess] += 1
            both[truth] += guess == truth
    shown = [key for key in class_ids if true[key]]
    ious = {key: both[key] / (true[key] + found[key] - both[key]) if true[key] else None for key in class_ids}
    accuracies = {key: both[key] / true[key] if true[key] else None for key in class_ids}
    total = sum(true.values())
    return {
        "mIoU": sum(ious[key] for key in shown) / len(shown),
        "per_class_IoU": ious,
        "pixel_accuracy": sum(both.values()) / total,
        "mean_accuracy": sum(accuracies[key] for key in shown) / len(shown),
        "per_class_accuracy": accuracies,
        "fwIoU": sum(ious[key] * true[key] for key in shown) / total,
    }


@pytest.mark.parametrize(
    "class_ids", [range(4), [3, 17, 256, 65535]], ids=["classes from 0", "classes up to 16 bits with gaps"]
)
def test_random_maps_equal_a_plain_count(class_ids):
    images = list(random_maps(class_ids))
    expected = plain_scores(images, class_ids)
    assert 0.2 < expected["mIoU"] < 0.9
    scores = collect(images, class_ids).compute()
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, rel=1e-14), key


def test_unknown_list_of_classes_takes_every_value_for_one():
    class_ids = [0, 40, 300, 65535]
    images = [*random_maps(class_ids), (9, np.array([[7, 7]]), np.array([[VOID, VOID]]))]
    known = collect(images, [*class_ids, 7]).compute()
    assert collect(images, None).compute() == known
    assert set(known["per_class_IoU"]) == {*class_ids, 7}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint64, torch.uint8, torch.int64])
def test_maps_may_have_any_integer_type(dtype):
    images = [(key, np.where(guess < 0, VOID, guess), truth) for key, guess, truth in random_maps(range(3))]
    expected = collect(images, range(3)).compute()
    cast = torch.as_tensor if isinstance(dtype, torch.dtype) else np.asarray
    assert collect([(key, cast(a, dtype=dtype), cast(b, dtype=dtype)) for key, a, b in images], range(3)).compute() == (
        expected
    )


def test_void_may_have_another_number():
    images = list(random_maps(range(3)))
    expected = collect(images, range(3)).compute()
    moved = [(key, np.where(a == VOID, -1, a), np.where(b == VOID, -1, b)) for key, a, b in images]
    assert collect(moved, range(3), ignore_index=-1).compute() == expected


# ---------------------------------------------------------------------------------------------------------------------
# PQ^St
# ---------------------------------------------------------------------------------------------------------------------


def test_panoptic_quality_of_stuff_takes_the_pixels_of_a_class_in_an_image_for_one_segment():
    # Image 1: class 0 has IoU 3/4, class 1 has 1/2 (no match: one missed, one false). Image 2: class 0 has IoU 1.
    quality = SemanticQuality([0, 1, 2])
    quality.add(1, np.array([[0, 1, 0, 0, 1, 1]]), np.array([[0, 0, 0, 0, 1, 1]]))
    quality.add(2, np.array([[0, 0]]), np.array([[0, 0]]))
    per_class = quality.panoptic_quality().compute()["per_class"]
    assert per_class[0] == {"pq": 7 / 8, "sq": 7 / 8, "rq": 1.0}
    assert per_class[1] == {"pq": 2 / 3, "sq": 2 / 3, "rq": 1.0}
    assert quality.compute()["PQ_St"]["n"] == 2


def test_panoptic_quality_of_stuff_excuses_a_class_that_is_predicted_mostly_over_void():
    excused = score(predicted=[0, 1, 1, 1], target=[0, 0, VOID, VOID])
    wrong = score(predicted=[0, 1, 1, 0], target=[0, 0, VOID, VOID])
    # 2 of 3 pixels of class 1 are on void; then 1 of 2, which is not more than half.
    assert excused["PQ_St"]["n"] == 1
    assert wrong["PQ_St"]["n"] == 2


def test_panoptic_quality_of_stuff_leaves_predicted_pixels_over_void_out_of_the_union():
    # Class 0: 2 pixels in both; the union has 3, and not the one on void.
    scores = score(predicted=[0, 0, 1, 0], target=[0, 0, 0, VOID], class_ids=[0, 1])
    assert scores["PQ_St"] == {"pq": 1 / 3, "sq": 1 / 3, "rq": 1 / 2, "n": 2}


def test_panoptic_quality_of_stuff_equals_panoptic_quality_of_maps_made_by_hand():
    class_ids = [0, 2, 5, 254]
    images = list(random_maps(class_ids, num_images=6))
    plain = PanopticQuality([], class_ids)
    for number, *maps in images:
        arguments = []
        for values in maps:
            present = [key for key in class_ids if (values == key).any()]
            ids = np.zeros(values.shape, dtype=int)
            for segment_id, class_id in enumerate(present, start=1):
                ids[values == class_id] = segment_id
            arguments += [ids, [{"id": key, "label_id": label} for key, label in enumerate(present, start=1)]]
        plain.add(number, *arguments)
    quality = collect(images, class_ids)
    assert 0.1 < plain.compute()["All"]["pq"] < 0.9
    assert quality.panoptic_quality().compute() == plain.compute()
    assert quality.compute()["PQ_St"] == plain.compute()["All"]


# ---------------------------------------------------------------------------------------------------------------------
# Boundary IoU
# ---------------------------------------------------------------------------------------------------------------------


def plain_boundary(region, distance):
    """Pixels of a region with a pixel outside of it, or of the image, at most `distance` away in rows and columns."""
    height, width = region.shape
    boundary = np.zeros_like(region)
    for row, column in itertools.product(range(height), range(width)):
        around = itertools.product(
            range(row - distance, row + distance + 1), range(column - distance, column + distance + 1)
        )
        boundary[row, column] = region[row, column] and any(
            not (0 <= y < height and 0 <= x < width and region[y, x]) for y, x in around
        )
    return boundary


def test_boundary_iou_equals_a_brute_force_over_all_images():
    class_ids = range(3)
    # Blocks of 12 x 9 pixels, so that a region has an inner part.
    images = [(key, np.kron(a, np.ones((3, 3), int)), np.kron(b, np.ones((3, 3), int)))
              for key, a, b in random_maps(class_ids, num_images=2)]  # fmt: skip
    only_predicted = np.zeros(images[0][1].shape, dtype=int)
    only_predicted[10:25, 10:25] = 2
    images.append((2, only_predicted, np.zeros_like(only_predicted)))
    expected = {}
    for class_id in class_ids:
        both = either = 0
        for _, predicted, target in images:
            distance = boundary_distance(target.shape, 0.03)
            valid = target != VOID
            true = plain_boundary(target == class_id, distance)
            found = plain_boundary((predicted == class_id) & valid, distance)
            both, either = both + (true & found).sum(), either + (true | found).sum()
        expected[class_id] = both / either
    assert distance == 2
    assert all(0.05 < value < 0.95 for value in expected.values())
    scores = collect(images, class_ids, boundary=True, dilation_ratio=0.03).compute()
    assert scores["per_class_boundary_IoU"] == pytest.approx(expected, rel=1e-14)
    assert scores["boundary_mIoU"] == pytest.approx(sum(expected.values()) / 3, rel=1e-14)
    assert scores["per_class_boundary_IoU"] != pytest.approx(scores["per_class_IoU"], abs=0.01)


def test_boundary_iou_is_blind_to_what_is_predicted_over_void():
    target = np.full((12, 12), VOID)
    target[:, :8] = 0
    ends_with_it, reaches_into_void = target.copy(), np.zeros_like(target)
    for predicted in (ends_with_it, reaches_into_void):
        quality = collect([(1, predicted, target)], [0], boundary=True)
        assert quality.compute()["boundary_mIoU"] == 1.0


def test_boundary_iou_is_there_only_when_asked_for():
    assert not {"boundary_mIoU", "per_class_boundary_IoU"} & set(score([0], [0]))


# ---------------------------------------------------------------------------------------------------------------------
# Order, parts, other processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_parts_in_any_order_give_every_digit_of_the_whole(num_parts):
    images = list(random_maps(range(7), num_images=9))
    options = {"class_ids": range(7), "boundary": True}
    whole = collect(images, **options).compute()
    parts = [collect(images[::-1][rank::num_parts], **options) for rank in range(num_parts)]
    parts.append(collect(images[:1], **options))  # an image that a sampler repeated
    merged, loaded = SemanticQuality(**options), SemanticQuality(**options)
    for part in parts:
        merged.merge(part)
        loaded.load(part.dump())
    assert len(merged) == len(loaded) == 9
    assert json.dumps(merged.compute()) == json.dumps(loaded.compute()) == json.dumps(whole)


def test_mean_is_summed_exactly():
    assert mean_of_known([1e16, 1.0, None, -1e16]) == 1 / 3
    assert mean_of_known([None]) == 0.0
    assert mean_of_known(iter([0.1] * 10)) == math.fsum([0.1] * 10) / 10


@pytest.mark.parametrize(
    "options", [{"class_ids": [0]}, {"boundary": True}, {"dilation_ratio": 0.1}, {"ignore_index": -1}]
)
def test_collections_of_other_settings_are_not_merged(options):
    with pytest.raises(ValueError, match=f"same settings.*{next(iter(options))}"):
        SemanticQuality([0, 1]).merge(SemanticQuality(**{"class_ids": [0, 1], **options}))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        ([[0]], [[0, 0]], r"'x' is \(1, 2\) in the ground truth and \(1, 1\) in the prediction"),
        ([[0.0]], [[0]], r"prediction of image 'x' must be an integer map \(H, W\), got float64 \(1, 1\)"),
        ([[0]], [[True]], r"ground truth of image 'x' must be an integer map \(H, W\), got bool \(1, 1\)"),
        ([0], [[0]], r"prediction of image 'x' must be an integer map \(H, W\), got int64 \(1,\)"),
        ([[7]], [[0]], r"prediction of image 'x' holds 7. Class ids are 0, 1, 2. .* ignore_index 255"),
        ([[7]], [[VOID]], "prediction of image 'x' holds 7"),
        ([[0]], [[7]], "ground truth of image 'x' holds 7"),
        ([[0]], [[-1]], "ground truth of image 'x' holds -1"),
        ([range(20)], [[0] * 20], r"holds 3, 4, 5, 6, 7, \.\.\.\. Class ids"),
    ],
)
def test_bad_maps_are_named(predicted, target, message):
    quality = SemanticQuality([0, 1, 2])
    with pytest.raises(ValueError, match=message):
        quality.add("x", np.array(predicted), np.array(target))
    assert len(quality) == 0


def test_negative_values_are_no_classes_where_every_other_value_is():
    with pytest.raises(ValueError, match=r"holds -5\. Class ids are at least 0"):
        SemanticQuality(None).add("x", np.array([[-5]]), np.array([[0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_ids": [0, 1, 0]}, "named twice"),
        ({"class_ids": [-1, 0]}, "must not be negative, got -1"),
        ({"class_ids": range(256)}, "255 is a class and ignore_index too"),
        ({"class_ids": [0], "boundary": True, "dilation_ratio": 0.0}, "dilation_ratio must be above 0"),
        ({"class_ids": [0], "boundary": True, "dilation_ratio": math.nan}, "dilation_ratio must be above 0"),
    ],
)
def test_bad_settings_are_named_before_the_first_image(options, message):
    with pytest.raises(ValueError, match=message):
        SemanticQuality(**options)


def test_an_image_is_added_once_until_reset():
    quality = SemanticQuality([0])
    quality.add(3, np.array([[0]]), np.array([[0]]))
    with pytest.raises(ValueError, match="3 was added before"):
        quality.add(3, np.array([[0]]), np.array([[0]]))
    quality.reset()
    quality.add(3, np.array([[0]]), np.array([[0]]))
    assert len(quality) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Maps of masks
# ---------------------------------------------------------------------------------------------------------------------


def test_map_of_masks_has_the_class_of_each_mask_and_void_elsewhere():
    masks = torch.tensor([[[True, False, False]], [[False, False, True]]])
    assert semantic_map_from_masks(masks, torch.tensor([5, 3])).tolist() == [[5, VOID, 3]]
    assert semantic_map_from_masks(np.zeros((0, 1, 2), bool), np.zeros(0, int), -1).tolist() == [[-1, -1]]


def test_masks_of_one_class_may_overlap_those_of_two_may_not():
    masks = np.array([[[1, 1, 0]], [[0, 1, 1]]], dtype=bool)
    assert semantic_map_from_masks(masks, [4, 4]).tolist() == [[4, 4, 4]]
    with pytest.raises(ValueError, match="class 5 overlaps a mask of another class"):
        semantic_map_from_masks(masks, [4, 5])


def test_masks_without_labels_are_an_error():
    with pytest.raises(ValueError, match=r"masks \(2, 1, 1\) and labels \(1,\)"):
        semantic_map_from_masks(np.ones((2, 1, 1), dtype=bool), [0])
