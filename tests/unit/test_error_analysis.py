"""Error analysis: each reason in a case by hand, and random scenes against loops that follow the definitions word for word."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from training.error_analysis import (
    Confusion,
    ErrorAnalysis,
    ErrorCounts,
    RecommendedThreshold,
    calibrate,
    recommend_threshold,
)

CLASSES = [0, 1, 2]


def analyse(predictions, true, ious, *, crowd=None, ignored=None):
    """Analyse one image; predictions are (class, score)."""
    analysis = ErrorAnalysis(CLASSES)
    analysis.add(
        "image",
        predicted_classes=[class_id for class_id, _ in predictions],
        scores=[score for _, score in predictions],
        true_classes=true,
        ious=ious,
        is_crowd=crowd,
        ignored=ignored,
    )
    return analysis


def counts_of(*arguments, threshold=0.0, **keywords):
    return analyse(*arguments, **keywords).compute(threshold=threshold).total


# ---------------------------------------------------------------------------------------------------------------------
# Reasons
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_id", "iou", "expected"),
    [
        (0, 0.5, ErrorCounts(objects=1, correct=1)),
        (0, 0.49, ErrorCounts(objects=1, localisation=1)),
        (0, 0.1, ErrorCounts(objects=1, localisation=1)),
        (0, 0.09, ErrorCounts(objects=1, background=1, missed=1)),
        (1, 0.5, ErrorCounts(objects=1, wrong_class=1)),
        (1, 0.49, ErrorCounts(objects=1, background=1, missed=1)),
    ],
)
def test_class_and_iou_with_the_only_segment_decide(class_id, iou, expected):
    assert counts_of([(class_id, 0.9)], [0], [[iou]]) == expected


def test_a_second_prediction_of_a_taken_segment_is_a_duplicate():
    assert counts_of([(0, 0.6), (0, 0.9)], [0], [[0.9], [0.5]]) == ErrorCounts(objects=1, correct=1, duplicate=1)


def test_a_duplicate_that_also_fits_another_class_stays_a_duplicate():
    expected = ErrorCounts(objects=2, correct=1, duplicate=1, missed=1)
    assert counts_of([(0, 0.9), (0, 0.6)], [0, 1], [[0.9, 0.0], [0.5, 0.8]]) == expected


def test_the_higher_score_chooses_first_and_takes_the_best_segment():
    # The second prediction goes first and takes segment 0, so the first takes segment 1, although 0 fits better.
    analysis = analyse([(0, 0.5), (0, 0.9)], [0, 0], [[0.8, 0.6], [0.9, 0.7]])
    assert analysis.compute(threshold=0.0).total == ErrorCounts(objects=2, correct=2)
    assert analysis.summarise("image", threshold=0.0).quality == pytest.approx((0.9 + 0.6) / 2)


def test_predictions_with_equal_scores_and_without_scores_choose_in_the_order_given():
    for scores in (None, [0.7, 0.7]):
        analysis = ErrorAnalysis(CLASSES)
        analysis.add("image", predicted_classes=[0, 0], scores=scores, true_classes=[0], ious=[[0.6], [0.9]])
        summary = analysis.summarise("image")
        assert summary.quality == pytest.approx(0.6 / 1.5)
        assert summary.counts == ErrorCounts(objects=1, correct=1, duplicate=1)


def test_a_segment_at_which_an_error_points_is_not_missed_as_well():
    # Both errors point at the segment of their highest IoU, so of four segments, two are missed.
    ious = [[0.3, 0.2, 0.0, 0.0], [0.0, 0.0, 0.6, 0.5]]
    expected = ErrorCounts(objects=4, wrong_class=1, localisation=1, missed=2)
    assert counts_of([(0, 0.9), (0, 0.8)], [0, 0, 1, 1], ious) == expected


def test_a_prediction_mostly_on_a_crowd_of_its_class_is_ignored():
    expected = ErrorCounts(ignored=1)
    assert counts_of([(0, 0.9)], [0], [[0.51]], crowd=[True]) == expected
    assert counts_of([(0, 0.9)], [0], [[0.5]], crowd=[True]) == ErrorCounts(background=1)
    assert counts_of([(1, 0.9)], [0], [[1.0]], crowd=[True]) == ErrorCounts(background=1)


def test_a_prediction_on_void_is_ignored_unless_it_matches():
    assert counts_of([(0, 0.9)], [], np.zeros((1, 0)), ignored=[True]) == ErrorCounts(ignored=1)
    assert counts_of([(0, 0.9)], [0], [[0.7]], ignored=[True]) == ErrorCounts(objects=1, correct=1)
    assert counts_of([(0, 0.9)], [1], [[0.7]], ignored=[True]) == ErrorCounts(objects=1, ignored=1, missed=1)


def test_a_match_goes_before_a_crowd_and_positions_skip_crowds():
    analysis = analyse([(0, 0.9), (1, 0.8)], [0, 0, 2], [[1.0, 0.7, 0.0], [0.0, 0.0, 0.9]], crowd=[True, False, False])
    summary = analysis.compute(threshold=0.0)
    assert summary.total == ErrorCounts(objects=2, correct=1, wrong_class=1)
    assert summary.confusions == (Confusion(predicted_class=1, true_class=2, count=1),)


def test_errors_count_for_the_predicted_class_and_missed_segments_for_the_true_one():
    summary = analyse([(1, 0.9)], [0, 2], [[0.8, 0.0]]).compute(threshold=0.0)
    assert summary.per_class == {
        0: ErrorCounts(objects=1),
        1: ErrorCounts(wrong_class=1),
        2: ErrorCounts(objects=1, missed=1),
    }
    assert summary.total.errors == 2


def test_the_threshold_leaves_lower_scores_out_and_keeps_equal_ones():
    arguments = [(0, 0.9), (0, 0.5)], [0, 0], [[0.8, 0.0], [0.0, 0.3]]
    assert counts_of(*arguments, threshold=0.5) == ErrorCounts(objects=2, correct=1, localisation=1)
    assert counts_of(*arguments, threshold=0.51) == ErrorCounts(objects=2, correct=1, missed=1)


# ---------------------------------------------------------------------------------------------------------------------
# Against plain loops
# ---------------------------------------------------------------------------------------------------------------------


def plain_outcomes(image, threshold):
    """List (reason, class, IoU, true position) of an image's predictions, and the positions that are missed."""
    predicted = [entry for entry in range(len(image["scores"])) if image["scores"][entry] >= threshold]
    taken, outcomes, explained = {}, [], set()
    for p in sorted(predicted, key=lambda entry: -image["scores"][entry]):
        own, other, crowds = {}, {}, []
        for t, true_class in enumerate(image["true"]):
            iou, is_same = image["ious"][p][t], true_class == image["predicted"][p]
            if image["crowd"][t]:
                crowds += [iou] if is_same else []
            else:
                (own if is_same else other)[t] = iou
        free = {t: iou for t, iou in own.items() if t not in taken and iou >= 0.5}
        if free:
            target = max(free, key=free.get)
            taken[target] = p
            outcomes.append(("correct", image["predicted"][p], free[target], target))
            explained.add(target)
        elif image["ignored"][p] or any(iou > 0.5 for iou in crowds):
            outcomes.append(("ignored", image["predicted"][p], None, None))
        elif any(iou >= 0.5 for iou in own.values()):
            outcomes.append(("duplicate", image["predicted"][p], None, None))
        elif any(iou >= 0.5 for iou in other.values()):
            explained.add(max(other, key=other.get))
            outcomes.append(("wrong_class", image["predicted"][p], None, None))
        elif any(iou >= 0.1 for iou in own.values()):
            explained.add(max(own, key=own.get))
            outcomes.append(("localisation", image["predicted"][p], None, None))
        else:
            outcomes.append(("background", image["predicted"][p], None, None))
    objects = [t for t in range(len(image["true"])) if not image["crowd"][t]]
    return outcomes, [t for t in objects if t not in explained], objects


def plain_counts(images, threshold):
    """Count reasons by class with dictionaries."""
    counts = {class_id: dict.fromkeys(ErrorCounts.__dataclass_fields__, 0) for class_id in CLASSES}
    for image in images.values():
        outcomes, missed, objects = plain_outcomes(image, threshold)
        for reason, class_id, _, _ in outcomes:
            counts[class_id][reason] += 1
        for reason, positions in (("missed", missed), ("objects", objects)):
            for position in positions:
                counts[image["true"][position]][reason] += 1
    return counts


def plain_quality(image, threshold):
    outcomes, _, objects = plain_outcomes(image, threshold)
    ious = [iou for reason, _, iou, _ in outcomes if reason == "correct"]
    wrong = sum(reason not in {"correct", "ignored"} for reason, _, _, _ in outcomes)
    denominator = len(ious) + wrong / 2 + (len(objects) - len(ious)) / 2
    return math.fsum(ious) / denominator if denominator else None


def plain_recommendation(predictions, num_objects, precision):
    """Try every score as a threshold, in exact fractions."""
    best = RecommendedThreshold()
    for threshold in sorted({score for score, _ in predictions}, reverse=True):
        kept = [is_correct for score, is_correct in predictions if score >= threshold]
        if Fraction(sum(kept), len(kept)) >= Fraction(str(precision)):
            best = RecommendedThreshold(threshold, sum(kept) / len(kept), sum(kept) / num_objects)
    return best


@pytest.fixture(scope="module")
def images():
    """Random images; scores are coarse, so that many are equal."""
    rng = np.random.default_rng(7)
    images = {}
    for number in range(60):
        num_predicted, num_true = int(rng.integers(0, 8)), int(rng.integers(0, 6))
        images[number if number % 3 else f"name {number}"] = {
            "predicted": rng.integers(0, 3, num_predicted).tolist(),
            "scores": (rng.integers(0, 21, num_predicted) / 20).tolist(),
            "true": rng.integers(0, 3, num_true).tolist(),
            "ious": (rng.random((num_predicted, num_true)) ** 1.5).tolist(),
            "crowd": (rng.random(num_true) < 0.15).tolist(),
            "ignored": (rng.random(num_predicted) < 0.1).tolist(),
        }
    return images


def collect(images, order=None):
    analysis = ErrorAnalysis(CLASSES)
    for image_id in order or images:
        image = images[image_id]
        analysis.add(
            image_id,
            predicted_classes=torch.tensor(image["predicted"], dtype=torch.int64),
            scores=torch.tensor(image["scores"], dtype=torch.float64),
            true_classes=np.array(image["true"], dtype=np.int64),
            ious=np.array(image["ious"]).reshape(len(image["predicted"]), len(image["true"])),
            is_crowd=image["crowd"],
            ignored=image["ignored"],
        )
    return analysis


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_counts_of_random_images_equal_those_of_plain_loops(images, threshold):
    summary, expected = collect(images).compute(threshold=threshold), plain_counts(images, threshold)
    assert {class_id: dataclasses.asdict(counts) for class_id, counts in summary.per_class.items()} == expected
    assert dataclasses.asdict(summary.total) == {
        name: sum(counts[name] for counts in expected.values()) for name in expected[0]
    }
    if threshold == 0.0:
        assert min(dataclasses.asdict(summary.total).values()) > 5, "the scenes must show every reason"


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_ranks_of_random_images_equal_those_of_plain_loops(images, threshold):
    def place(entry):
        image_id, _ = entry
        return isinstance(image_id, str), image_id

    qualities = {image_id: plain_quality(image, threshold) for image_id, image in images.items()}
    ranked = sorted([entry for entry in qualities.items() if entry[1] is not None], key=place)
    analysis = collect(images)
    assert (
        analysis.worst(40, threshold=threshold) == [key for key, _ in sorted(ranked, key=lambda entry: entry[1])][:40]
    )
    assert analysis.best(5, threshold=threshold) == [key for key, _ in sorted(ranked, key=lambda entry: -entry[1])][:5]
    for image_id, quality in qualities.items():
        assert analysis.summarise(image_id, threshold=threshold).quality == quality


@pytest.mark.parametrize("precision", [0.2, 0.5, 0.9, 1.0])
def test_recommended_thresholds_of_random_images_equal_a_trial_of_every_score(images, precision):
    summary = collect(images).compute(precision=precision)
    all_predictions, num_objects = [], 0
    for class_id in CLASSES:
        predictions, objects = [], 0
        for image in images.values():
            # At a threshold of 0, outcomes are in the order of falling score.
            outcomes, _, true = plain_outcomes(image, 0.0)
            scores = sorted(image["scores"], reverse=True)
            predictions += [
                (score, reason == "correct")
                for score, (reason, predicted, _, _) in zip(scores, outcomes, strict=True)
                if predicted == class_id and reason != "ignored"
            ]
            objects += sum(image["true"][position] == class_id for position in true)
        assert summary.recommended_per_class[class_id] == plain_recommendation(predictions, objects, precision)
        all_predictions, num_objects = all_predictions + predictions, num_objects + objects
    assert summary.recommended == plain_recommendation(all_predictions, num_objects, precision)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def test_the_lowest_score_that_meets_the_precision_is_recommended_although_one_above_it_does_not():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    is_correct = np.array([True, False, True, True, False])  # precision 1, 1/2, 2/3, 3/4, 3/5
    assert recommend_threshold(scores, is_correct, 4, 0.75) == RecommendedThreshold(0.6, 0.75, 0.75)
    assert recommend_threshold(scores, is_correct, 4, 0.8) == RecommendedThreshold(0.9, 1.0, 0.25)
    assert recommend_threshold(scores, ~is_correct, 4, 0.8) == RecommendedThreshold()
    assert recommend_threshold(np.zeros(0), np.zeros(0, dtype=bool), 0, 0.5) == RecommendedThreshold()


def test_equal_scores_are_kept_or_left_out_together():
    scores, is_correct = np.array([0.8, 0.8, 0.3]), np.array([True, False, False])
    assert recommend_threshold(scores, is_correct, 1, 0.9) == RecommendedThreshold()
    assert recommend_threshold(scores, is_correct, 1, 0.5) == RecommendedThreshold(0.8, 0.5, 1.0)


def test_calibration_error_is_the_weighed_gap_of_the_bins():
    # Two predictions in the bin from 0.6, one in the last, which holds 1.0 as well, one on the edge at 0.3.
    scores = np.array([0.62, 0.68, 1.0, 0.3])
    calibration = calibrate(scores, np.array([True, False, True, True]))
    assert [entry.count for entry in calibration.bins] == [0, 0, 0, 1, 0, 0, 2, 0, 0, 1]
    assert calibration.bins[6].mean_score == pytest.approx(0.65)
    assert calibration.bins[6].share_correct == 0.5
    assert calibration.bins[0].mean_score is None
    assert calibration.expected_error == pytest.approx((2 * 0.15 + 1 * 0.0 + 1 * 0.7) / 4)
    assert calibration.count == 4


def test_ignored_predictions_are_in_no_bin():
    summary = analyse([(0, 0.9), (0, 0.8)], [0], [[0.7], [0.0]], ignored=[False, True]).compute(threshold=0.85)
    assert summary.calibration.count == 1
    assert summary.calibration.expected_error == pytest.approx(0.1)


def test_without_scores_there_is_no_threshold_and_no_calibration():
    analysis = ErrorAnalysis(CLASSES)
    analysis.add("map", predicted_classes=[0, 1], scores=None, true_classes=[0, 2], ious=[[0.9, 0], [0, 0.6]])
    summary = analysis.compute(threshold=1.0)
    assert (summary.threshold, summary.calibration, summary.recommended, summary.recommended_per_class) == (None,) * 4
    assert summary.total == ErrorCounts(objects=2, correct=1, wrong_class=1)
    assert analysis.worst(1) == ["map"]


def test_nothing_at_all_is_no_error():
    for summary in (ErrorAnalysis(CLASSES).compute(), analyse([], [], []).compute()):
        assert summary.total == ErrorCounts()
    assert analyse([], [], []).worst(3) == []
    assert analyse([], [], []).summarise("image").quality is None
    assert analyse([], [], []).compute().calibration.expected_error is None
    assert analyse([], [0], []).compute().total == ErrorCounts(objects=1, missed=1)


# ---------------------------------------------------------------------------------------------------------------------
# Collections
# ---------------------------------------------------------------------------------------------------------------------


def everything(analysis):
    return analysis.compute(threshold=0.3), analysis.worst(60, threshold=0.3), analysis.best(60, threshold=0.3)


def test_order_of_images_changes_nothing(images):
    assert everything(collect(images, list(reversed(images)))) == everything(collect(images))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_merged_parts_that_share_images_equal_the_whole(images, num_processes):
    ids = list(images)
    parts = [collect(images, ids[rank::num_processes] + ids[:1] * bool(rank)) for rank in range(num_processes)]
    for part in parts[1:]:
        parts[0].merge(part)
    assert len(parts[0]) == len(images)
    assert everything(parts[0]) == everything(collect(images))


def test_dumped_images_load_digit_by_digit(images):
    loaded = ErrorAnalysis(CLASSES)
    loaded.load(collect(images).dump())
    assert everything(loaded) == everything(collect(images))


def test_the_summary_is_json(images):
    text = json.dumps(dataclasses.asdict(collect(images).compute()), allow_nan=False)
    assert json.loads(text)["num_images"] == len(images)


def test_an_image_of_a_hundred_predictions_keeps_little():
    rng = np.random.default_rng(0)
    analysis = ErrorAnalysis(range(80))
    analysis.add(
        1,
        predicted_classes=rng.integers(0, 80, 100),
        scores=rng.random(100).astype(np.float32),
        true_classes=rng.integers(0, 80, 20),
        ious=rng.random((100, 20)),
    )
    assert len(analysis.dump()[0]) < 4000


def test_equal_images_rank_in_the_order_of_their_ids():
    analysis = ErrorAnalysis(CLASSES)
    for image_id in (10, "b", 9, "a"):
        analysis.add(image_id, predicted_classes=[0], scores=[0.9], true_classes=[0], ious=[[0.8]])
    assert analysis.worst(4) == analysis.best(4) == [9, 10, "a", "b"]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

GOOD = {"predicted_classes": [0], "scores": [0.5], "true_classes": [0, 1], "ious": [[0.5, 0.0]]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"predicted_classes": [7]}, "image 'x' has class 7"),
        ({"true_classes": [0, 7]}, "image 'x' has class 7"),
        ({"predicted_classes": [0.5]}, "must be integers"),
        ({"scores": [0.5, 0.5]}, r"scores of image 'x' to be \(1,\).*got \(2,\)"),
        ({"scores": [1.5]}, r"scores of image 'x' in \[0, 1\], got 1.5"),
        ({"scores": [math.nan]}, "scores of image 'x'"),
        ({"ious": [[0.5]]}, r"IoUs of image 'x' to be \(1, 2\).*got \(1, 1\)"),
        ({"ious": [[0.5, -1.0]]}, "IoUs of image 'x'"),
        ({"is_crowd": [True]}, "is_crowd of image 'x'"),
        ({"ignored": [True, False]}, "ignored of image 'x'"),
    ],
)
def test_bad_input_is_named_and_not_kept(changed, message):
    analysis = ErrorAnalysis(CLASSES)
    with pytest.raises(ValueError, match=message):
        analysis.add("x", **(GOOD | changed))
    assert "x" not in analysis


def test_an_image_is_added_once_and_only_known_ones_are_summarised():
    analysis = ErrorAnalysis(CLASSES)
    analysis.add("x", **GOOD)
    with pytest.raises(ValueError, match="'x' was added before"):
        analysis.add("x", **GOOD)
    with pytest.raises(ValueError, match="'y' was not added"):
        analysis.summarise("y")


def test_scores_for_some_images_only_are_an_error():
    analysis = ErrorAnalysis(CLASSES)
    analysis.add("x", **GOOD)
    analysis.add("y", **(GOOD | {"scores": None}))
    with pytest.raises(ValueError, match="'x' has scores and image 'y' has none"):
        analysis.compute()


def test_thresholds_and_precisions_are_fractions():
    analysis = ErrorAnalysis(CLASSES)
    for settings in ({"threshold": 50}, {"precision": 90}, {"precision": 0.0}, {"threshold": math.nan}):
        with pytest.raises(ValueError, match=r"0, 1\], got"):
            analysis.compute(**settings)


def test_rounding_of_float32_is_no_error():
    analysis = ErrorAnalysis(CLASSES)
    scores = torch.tensor([1.0000001])
    analysis.add("x", predicted_classes=[0], scores=scores, true_classes=[0], ious=[[1.0]])
    assert analysis.compute().calibration.expected_error == 0.0
