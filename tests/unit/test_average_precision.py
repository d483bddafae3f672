"""COCO's mask AP: equal to pycocotools on recorded and random scenes, to curves made by hand, and for any order of images."""

import contextlib
import copy
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mpformer_hf.mask_encoding import decode_rle, encode_rle, expand_counts
from training.data import DigitScenes
from training.metrics.average_precision import AveragePrecision, measure_areas, segments_from_masks

GOLDEN = Path(__file__).parent / "metrics_golden"
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CLASSES = (2, 3, 5, 9, 90)  # no object is of the last one
# pycocotools adds 2.2e-16 to the denominators of its precisions, and rounds its means.
TOLERANCE = 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Scenes and references
# ---------------------------------------------------------------------------------------------------------------------


def as_rle(mask):
    return encode_rle(torch.from_numpy(np.ascontiguousarray(mask))[None])[0]


def rectangle(shape, top, left, bottom, right):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return as_rle(mask)


class Scenes:
    """Images, objects and predictions in the official form."""

    def __init__(self, images, truths, predictions, classes=CLASSES):
        self.images, self.truths, self.predictions, self.classes = images, truths, predictions, classes

    def of(self, image, kind):
        return [one for one in getattr(self, kind) if one["image_id"] == image["id"]]

    def add_to(self, precision, order=slice(None)):
        for image in self.images[order]:
            size = (image["height"], image["width"])
            precision.add(image["id"], self.of(image, "predictions"), self.of(image, "truths"), size)
        return precision

    def scores(self, order=slice(None), **options):
        return self.add_to(AveragePrecision(self.classes, **options), order).compute()

    def official_scores(self, evaluation=COCOeval, classes=None):
        """What pycocotools computes."""
        truth, results = COCO(), COCO()
        categories = [{"id": class_id} for class_id in self.classes]
        with contextlib.redirect_stdout(io.StringIO()):
            truth.dataset = {
                "images": self.images,
                "annotations": copy.deepcopy(self.truths),
                "categories": categories,
            }
            truth.createIndex()
            if self.predictions:
                results = truth.loadRes(copy.deepcopy(self.predictions))
            else:  # loadRes refuses an empty list
                results.dataset = {"images": self.images, "annotations": [], "categories": categories}
                results.createIndex()
            official = evaluation(truth, results, "segm")
            official.params.catIds = list(classes or self.classes)
            official.evaluate()
            official.accumulate()
            official.summarize()
        return dict(zip(NUMBERS, official.stats.tolist(), strict=True))


def golden_scenes(predictions=None):
    truth = json.loads((GOLDEN / "instances_gt.json").read_text())
    predictions = predictions or json.loads((GOLDEN / "instances_pred.json").read_text())
    return Scenes(
        truth["images"], truth["annotations"], predictions, [category["id"] for category in truth["categories"]]
    )


def random_scenes(seed, side=12, num_images=8, crowded=False):
    """Rectangles with and without holes. Small sides make IoUs of exactly 0.5, 0.6, ... and tied ranks frequent."""
    rng = np.random.default_rng(seed)
    images, truths, predictions = [], [], []
    for number in range(num_images):
        height, width = (int(length) for length in rng.integers(side // 2, side, 2))
        image_id = 7 * number + 3
        images.append({"id": image_id, "height": height, "width": width})
        for _ in range(rng.integers(0, 8)):
            mask = np.zeros((height, width), dtype=bool)
            top, left = rng.integers(0, height - 1), rng.integers(0, width - 1)
            mask[top : top + rng.integers(1, height), left : left + rng.integers(1, width)] = True
            mask &= rng.random(mask.shape) < rng.choice([1, 0.97])
            class_id = int(rng.choice(CLASSES[:-1]))
            on_a_limit = rng.random() < 0.3
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": image_id,
                    "category_id": class_id,
                    "iscrowd": int(rng.random() < 0.15),
                    "area": float(rng.choice([1023.5, 1024, 9216, 9217, 1e10 + 1]) if on_a_limit else mask.sum()),
                    "segmentation": as_rle(mask),
                }
            )
            for _ in range(rng.integers(0, 40 if crowded else 4)):
                moved = np.roll(mask, rng.integers(-1, 2, 2), axis=(0, 1)) if rng.random() < 0.7 else mask
                predictions.append(
                    {
                        "image_id": image_id,
                        "category_id": class_id if rng.random() < 0.85 else int(rng.choice(CLASSES)),
                        "score": float(rng.choice([0.1, 0.2, 0.5, 1.0]) if rng.random() < 0.6 else rng.random()),
                        "segmentation": as_rle(moved),
                    }
                )
        if crowded and number % 2:
            false = {"image_id": image_id, "category_id": 2, "segmentation": rectangle((height, width), 0, 0, 1, 1)}
            predictions.extend({**false, "score": float(score)} for score in rng.choice([0.3, 0.5, 0.7], 120))
    return Scenes(images, truths, [predictions[place] for place in rng.permutation(len(predictions))])


def one_class(truths, predictions, **options):
    """Score images of (truths, predictions) of class 1; predictions are (score, rle)."""
    precision = AveragePrecision([1], **options)
    for number, (true, predicted) in enumerate(zip(truths, predictions, strict=True)):
        precision.add(
            number,
            [{"category_id": 1, "score": score, "segmentation": rle} for score, rle in predicted],
            [{"category_id": 1, "segmentation": rle} for rle in true],
            (10, 10),
        )
    return precision.compute()


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the official tool
# ---------------------------------------------------------------------------------------------------------------------


def test_scores_equal_the_recorded_ones_of_the_official_tool():
    expected = json.loads((GOLDEN / "expected.json").read_text())["coco_segm"]
    scores = golden_scenes().scores()
    assert scores.keys() == {*expected, "per_class"}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=0, abs=TOLERANCE), name


@pytest.mark.parametrize("side", [12, 160])
@pytest.mark.parametrize("seed", range(8))
def test_random_scenes_score_as_in_pycocotools(seed, side):
    scenes = random_scenes(seed, side)
    expected, scores = scenes.official_scores(), scenes.scores()
    assert 0 < expected["AP"] < 0.9
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=0, abs=TOLERANCE), name


@pytest.mark.parametrize("seed", range(2))
def test_more_than_a_hundred_tied_predictions_of_an_image_score_as_in_pycocotools(seed):
    scenes = random_scenes(seed, num_images=4, crowded=True)
    expected, scores = scenes.official_scores(), scenes.scores()
    of_class = [[one["category_id"] for one in scenes.of(image, "predictions")].count(2) for image in scenes.images]
    assert max(of_class) > 100
    assert expected["AR100"] > expected["AR1"] > 0
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=0, abs=TOLERANCE), name


def test_random_scenes_hold_the_special_cases():
    scenes = [random_scenes(seed) for seed in range(8)]
    truths = [one for some in scenes for one in some.truths]
    assert sum(one["iscrowd"] for one in truths) > 10
    assert sum(one["area"] in {1024, 9216} for one in truths) > 10
    assert {one["category_id"] for one in truths} == set(CLASSES[:-1])
    assert {one["category_id"] for some in scenes for one in some.predictions} == set(CLASSES)
    for kind in ("truths", "predictions"):
        assert sum(not some.of(image, kind) for some in scenes for image in some.images) > 3
    ranks = [
        (seed, one["image_id"], one["category_id"], one["score"])
        for seed, some in enumerate(scenes)
        for one in some.predictions
    ]
    assert len(ranks) - len(set(ranks)) > 20


def test_scores_of_a_class_are_those_of_pycocotools_for_this_class_alone():
    scenes = random_scenes(1, side=160)
    per_class = scenes.scores()["per_class"]
    assert tuple(per_class) == CLASSES
    for class_id in CLASSES:
        expected = scenes.official_scores(classes=[class_id])
        assert per_class[class_id] == pytest.approx(expected, rel=0, abs=TOLERANCE)
    assert set(per_class[90].values()) == {-1.0}


def test_without_predictions_the_scores_are_those_of_pycocotools():
    scenes = golden_scenes()
    scenes.predictions = []
    expected, scores = scenes.official_scores(), scenes.scores()
    assert {name: scores[name] for name in NUMBERS} == expected
    assert set(expected.values()) == {0.0, -1.0}


def test_without_objects_all_scores_are_undefined_as_in_pycocotools():
    scenes = golden_scenes()
    scenes.truths = []
    scores = scenes.scores()
    assert {name: scores[name] for name in NUMBERS} == scenes.official_scores() == dict.fromkeys(NUMBERS, -1.0)


def test_without_images_all_scores_are_undefined():
    scores = AveragePrecision([4, 1]).compute()
    undefined = dict.fromkeys(NUMBERS, -1.0)
    assert scores == {**undefined, "per_class": {1: undefined, 4: undefined}}


def test_ground_truth_as_prediction_is_one_although_it_holds_crowd():
    truths = golden_scenes().truths
    assert any(one["iscrowd"] for one in truths)
    scenes = golden_scenes([{key: one[key] for key in ("image_id", "category_id", "segmentation")} for one in truths])
    for one in scenes.predictions:
        one["score"] = 0.5
    scores = scenes.scores()
    for name in set(NUMBERS) - {"AR1", "AR10"}:  # with the best prediction only, recall is less where there are two
        assert scores[name] == pytest.approx(1.0, rel=0, abs=1e-9) or scores[name] == -1.0
    assert scores["AP"] != -1.0
    assert scores["AR10"] <= 1.0
    expected = scenes.official_scores()
    assert {name: scores[name] for name in NUMBERS} == pytest.approx(expected, rel=0, abs=TOLERANCE)


def test_area_of_the_annotation_decides_the_size_and_otherwise_the_pixels_do():
    rle = rectangle((40, 40), 0, 0, 40, 40)  # 1600 pixels: medium
    for area, large in (({}, -1.0), ({"area": 96**2}, 1.0)):
        precision = AveragePrecision([1])
        prediction = {"category_id": 1, "score": 1.0, "segmentation": rle}
        precision.add(0, [prediction], [{"category_id": 1, "segmentation": rle, **area}], (40, 40))
        scores = precision.compute()
        assert scores["APl"] == scores["ARl"] == large
        assert scores["APs"] == scores["ARs"] == -1.0


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------

LEFT, RIGHT = rectangle((10, 10), 0, 0, 10, 4), rectangle((10, 10), 0, 6, 10, 10)


def test_one_object_of_two_gives_precision_one_up_to_recall_one_half():
    scores = one_class([[LEFT, RIGHT]], [[(0.9, LEFT)]])
    # Of the recalls 0.00, 0.01, ..., 1.00 those up to 0.50 are reached.
    assert scores["AP"] == pytest.approx(51 / 101, rel=1e-12)
    assert scores["AR100"] == 0.5


def test_false_prediction_that_ranks_first_halves_the_precision_and_one_that_ranks_last_does_nothing():
    assert one_class([[LEFT], []], [[(0.4, LEFT)], [(0.9, LEFT)]])["AP"] == pytest.approx(0.5, rel=1e-12)
    assert one_class([[LEFT], []], [[(0.4, LEFT)], [(0.1, LEFT)]])["AP"] == pytest.approx(1.0, rel=1e-12)


def test_tied_scores_rank_in_the_order_of_image_and_list():
    assert one_class([[LEFT], []], [[(0.4, LEFT)], [(0.4, LEFT)]])["AP"] == pytest.approx(1.0, rel=1e-12)
    assert one_class([[], [LEFT]], [[(0.4, LEFT)], [(0.4, LEFT)]])["AP"] == pytest.approx(0.5, rel=1e-12)
    assert one_class([[LEFT]], [[(0.4, LEFT), (0.4, RIGHT)]])["AR1"] == 1.0
    assert one_class([[LEFT]], [[(0.4, RIGHT), (0.4, LEFT)]])["AR1"] == 0.0


def test_the_hundredth_prediction_counts_and_the_next_one_does_not():
    assert one_class([[LEFT]], [[(0.9, RIGHT)] * 99 + [(0.1, LEFT)]])["AR100"] == 1.0
    assert one_class([[LEFT]], [[(0.9, RIGHT)] * 100 + [(0.1, LEFT)]])["AR100"] == 0.0


def test_iou_on_a_threshold_reaches_it():
    # 30 of 40 pixels: 0.50, 0.55, 0.60, 0.65, 0.70 and 0.75 of ten thresholds.
    scores = one_class([[LEFT]], [[(0.9, rectangle((10, 10), 0, 0, 10, 3))]])
    assert scores["AP75"] == 1.0
    assert scores["AR100"] == pytest.approx(0.6, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Boundary AP
# ---------------------------------------------------------------------------------------------------------------------


class PlainBoundaryEvaluation(COCOeval):
    """pycocotools with the smaller one of mask IoU and boundary IoU, counted pixel by pixel."""

    def computeIoU(self, imgId, catId):  # noqa: N802, N803
        truths = self._gts[imgId, catId]
        found = sorted(self._dts[imgId, catId], key=lambda one: -one["score"])[:100]
        if not truths or not found:
            return []
        return np.array([[self.iou_of(one, true) for true in truths] for one in found])

    def iou_of(self, found, true):
        masks = [decode_rle(one["segmentation"]).numpy() for one in (found, true)]
        if true["iscrowd"]:
            return (masks[0] & masks[1]).sum() / max(1, masks[0].sum())
        distance = max(1, round(0.1 * np.sqrt(np.square(masks[0].shape).sum())))
        return min(plain_iou(*masks), plain_iou(*(plain_boundary(mask, distance) for mask in masks)))


def plain_iou(first, second):
    return (first & second).sum() / max(1, (first | second).sum())


def plain_boundary(mask, distance):
    """Pixels with background, or the outside of the image, in reach."""
    padded = np.pad(mask, distance)
    reach = range(2 * distance + 1)
    inner = np.logical_and.reduce(
        [padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y in reach for x in reach],
    )
    return mask & ~inner


@pytest.mark.parametrize("seed", range(3))
def test_boundary_scores_are_those_of_pycocotools_with_boundary_ious(seed):
    scenes = random_scenes(seed, side=40)
    expected = scenes.official_scores(PlainBoundaryEvaluation)
    scores = scenes.scores(boundary=True, dilation_ratio=0.1)
    assert scores["AP"] < scenes.scores()["AP"]
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=0, abs=TOLERANCE), name


# ---------------------------------------------------------------------------------------------------------------------
# Order, parts, form
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [False, True])
def test_order_of_images_does_not_change_a_digit(boundary):
    scenes = golden_scenes()
    assert scenes.scores(slice(None, None, -1), boundary=boundary) == scenes.scores(boundary=boundary)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_merged_parts_that_share_an_image_equal_the_whole(num_processes):
    scenes = random_scenes(3)
    merged = scenes.add_to(AveragePrecision(CLASSES), slice(0, 1))  # an image that a sampler repeated
    for rank in range(num_processes):
        part = scenes.add_to(AveragePrecision(CLASSES), slice(rank, None, num_processes))
        if rank % 2:
            merged.load(part.dump())
        else:
            merged.merge(part)
    assert len(merged) == len(scenes.images)
    assert merged.compute() == scenes.scores()


def test_computing_twice_gives_the_same():
    precision = golden_scenes().add_to(AveragePrecision((1, 2, 3, 5), boundary=True))
    assert precision.compute() == precision.compute()


def test_collections_of_unequal_kind_cannot_be_merged():
    for other in (
        AveragePrecision([2]),
        AveragePrecision([1], boundary=True),
        AveragePrecision([1], dilation_ratio=0.01),
    ):
        with pytest.raises(ValueError, match="same settings"):
            AveragePrecision([1]).merge(other)


def test_scores_are_a_json_object_of_numbers():
    scores = golden_scenes().scores()
    assert json.loads(json.dumps(scores))["AP"] == scores["AP"]
    assert {type(scores[name]) for name in NUMBERS} == {float}


def test_nothing_is_printed_or_logged(capsys, caplog):
    with caplog.at_level(logging.INFO):
        golden_scenes().scores()
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == []


def test_polygons_and_uncompressed_run_lengths_are_read_as_pycocotools_reads_them():
    polygons = [[1.0, 1.5, 7.2, 2.0, 6.0, 8.9, 0.5, 7.0], [8, 0, 13.5, 0, 8, 4]]  # one corner is outside of the image
    rle = coco_masks.merge(coco_masks.frPyObjects(polygons, 10, 12))
    compressed = {"size": [10, 12], "counts": rle["counts"].decode()}
    uncompressed = {"size": [10, 12], "counts": expand_counts(rle["counts"]).tolist()}
    in_bytes = {"size": (10, 12), "counts": rle["counts"]}
    lines = set()
    for form in (polygons, compressed, uncompressed, in_bytes):
        precision = AveragePrecision([1])
        prediction = {"category_id": 1, "score": 1.0, "segmentation": compressed}
        precision.add(0, [prediction], [{"category_id": 1, "segmentation": form}], (10, 12))
        lines.update(precision.dump())
        assert precision.compute()["AP"] == pytest.approx(1.0, rel=0, abs=1e-9)
    assert len(lines) == 1


def test_masks_of_digit_scenes_score_one_against_themselves():
    scenes = DigitScenes("validation", task="instance", preset="hard", num_images=4)
    precision = AveragePrecision(scenes.thing_ids)
    for row in scenes:
        truths = segments_from_masks(row["mask_labels"], row["class_labels"])
        predictions = segments_from_masks(
            torch.as_tensor(row["mask_labels"]), row["class_labels"], torch.rand(len(truths))
        )
        precision.add(row["image_id"], predictions, truths, row["mask_labels"].shape[1:])
    assert precision.compute()["AP"] == pytest.approx(1.0, rel=0, abs=1e-9)


def test_masks_become_predictions_with_their_labels_and_scores():
    masks = torch.tensor([[[True, False], [True, False]], [[False, False], [False, False]]])
    first, second = segments_from_masks(masks, torch.tensor([5, 3]), [0.5, 0.25])
    assert first == {"label_id": 5, "score": 0.5, "segmentation": {"size": [2, 2], "counts": "022"}}
    assert (second["label_id"], second["score"]) == (3, 0.25)
    assert segments_from_masks(np.zeros((0, 2, 2), dtype=bool), [], []) == []
    with pytest.raises(ValueError, match="one label and one score each"):
        segments_from_masks(masks, [1], [0.5, 0.25])


def test_an_image_takes_the_memory_of_its_run_lengths_and_of_a_hundred_predictions_a_class():
    precision = AveragePrecision([1])
    rle = rectangle((3000, 4000), 10, 10, 2000, 2000)
    predictions = [{"category_id": 1, "score": 0.5, "segmentation": rle}] * 1000
    precision.add(0, predictions, [{"category_id": 1, "segmentation": rle}] * 300, (3000, 4000))
    runs = len(json.dumps(rle["counts"]))
    assert len(precision.dump()[0]) < 400 * (runs + 30)


# ---------------------------------------------------------------------------------------------------------------------
# Run lengths of many masks at once
# ---------------------------------------------------------------------------------------------------------------------


def noisy_counts(rng, num_masks, shape):
    densities = rng.choice([0.0, 0.05, 0.5, 0.95, 1.0], num_masks)
    return [as_rle(rng.random(shape) < density)["counts"] for density in densities]


def test_areas_are_those_of_the_decoded_masks():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (40, 60)):
        counts = noisy_counts(rng, 30, shape)
        expected = [int(decode_rle({"size": shape, "counts": text}).sum()) for text in counts]
        assert measure_areas(counts, shape[0] * shape[1]) == expected
    assert measure_areas([], 4) == []


def test_runs_that_are_longer_than_a_few_characters_are_read():
    shape = (3000, 4000)
    mask = np.zeros(shape, dtype=bool)
    mask[5:2900, 7:3900] = True
    assert measure_areas([as_rle(mask)["counts"], as_rle(~mask)["counts"]], mask.size) == [mask.sum(), (~mask).sum()]


def test_changed_characters_are_found_whenever_the_decoder_of_single_masks_finds_them():
    rng = np.random.default_rng(1)
    shape = (6, 7)
    damaged = 0
    for _ in range(400):
        counts = noisy_counts(rng, 4, shape)
        victim = int(rng.integers(4))
        place = int(rng.integers(len(counts[victim])))
        character = rng.choice(["", chr(int(rng.integers(35, 130))), "00"])
        counts[victim] = counts[victim][:place] + character + counts[victim][place + 1 :]
        try:
            expected = [int(decode_rle({"size": shape, "counts": text}).sum()) for text in counts]
        except ValueError:
            expected = None
            damaged += 1
        assert measure_areas(counts, 42) == expected
    assert 100 < damaged < 400


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

GOOD = {"category_id": 1, "score": 0.5, "segmentation": LEFT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 7}, "has class 7"),
        ({"label_id": None}, "has class None"),
        ({"label_id": [1]}, r"has class \[1\]"),
        ({"segmentation": {"size": [10, 9], "counts": LEFT["counts"]}}, r"size \[10, 9\]. The image is \[10, 10\]"),
        ({"segmentation": {"size": None, "counts": LEFT["counts"]}}, "size None"),
        ({"segmentation": {"size": [10, 10]}}, "Pass COCO run lengths or polygons"),
        ({"segmentation": None}, "segmentation None"),
        ({"segmentation": {"size": [10, 10], "counts": LEFT["counts"] + "1"}}, "is damaged. .* add up to 141"),
        ({"segmentation": {"size": [10, 10], "counts": "é"}}, "is damaged. .*consist of the characters"),
        ({"segmentation": {"size": [10, 10], "counts": ""}}, "is damaged"),
        ({"segmentation": {"size": [10, 10], "counts": "P"}}, "end in the middle of a number"),
        ({"segmentation": {"size": [10, 10], "counts": [50, -50, 100]}}, "is damaged"),
        ({"segmentation": {"size": [10, 10], "counts": []}}, "list of integers"),
        ({"segmentation": {"size": [10, 10], "counts": [50, 49]}}, "is damaged. .* add up to 99"),
        ({"segmentation": {"size": [10, 10], "counts": [50.5, 49.5]}}, "list of integers"),
        ({"segmentation": {"size": [10, 10], "counts": 3}}, "list of integers"),
        ({"segmentation": []}, "has no polygon"),
        ({"segmentation": [[0, 0, 1, 1]]}, r"polygon \[0, 0, 1, 1\]"),
        ({"segmentation": [[0, 0, 1, 1, 2, 2, 3]]}, "has the polygon"),
        ({"segmentation": [[0, 0, 1, 1, 2, float("nan")]]}, "has the polygon"),
        ({"segmentation": [[0, 0, 1, 1, 2, 1e9]]}, "has the polygon"),
        ({"segmentation": [0, 0, 5, 5, 0, 5]}, "has the polygon 0"),
        ({"segmentation": [["a"] * 6]}, "has the polygon"),
    ],
)
@pytest.mark.parametrize("kind", ["Prediction", "True segment"])
def test_bad_segment_is_named_with_its_image(kind, changes, message):
    segments = [GOOD, {**GOOD, **changes}]
    precision = AveragePrecision([1])
    with pytest.raises(ValueError, match=rf"^{kind} 1 of image 'x' .*{message}"):
        precision.add("x", *([segments, []] if kind == "Prediction" else [[], segments]), (10, 10))
    assert len(precision) == 0


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "high", [0.5]])
def test_score_that_is_no_finite_number_is_named(score):
    with pytest.raises(ValueError, match=r"^Prediction 0 of image 3 has the score .*finite"):
        AveragePrecision([1]).add(3, [{**GOOD, "score": score}], [], (10, 10))


def test_missing_score_and_bad_area_are_named():
    without = {key: value for key, value in GOOD.items() if key != "score"}
    with pytest.raises(ValueError, match="Prediction 1 of image 3 has the score None"):
        AveragePrecision([1]).add(3, [GOOD, without], [], (10, 10))
    with pytest.raises(ValueError, match="True segment 0 of image 3 has the area nan"):
        AveragePrecision([1]).add(3, [], [{**GOOD, "area": float("nan")}], (10, 10))


def test_entry_that_is_no_segment_is_named():
    for entry in ({"category_id": 1}, 3, "text"):
        with pytest.raises(ValueError, match=r"True segment 0 of image 'x' is .*Pass a dictionary"):
            AveragePrecision([1]).add("x", [], [entry], (10, 10))


def test_an_image_is_added_once():
    precision = AveragePrecision([1])
    precision.add("x", [], [], (10, 10))
    with pytest.raises(ValueError, match="'x' was added before"):
        precision.add("x", [], [], (10, 10))


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_image_without_pixels_is_an_error(size):
    with pytest.raises(ValueError, match="Image 'x' has the size"):
        AveragePrecision([1]).add("x", [], [], size)


@pytest.mark.parametrize("class_ids", [[], [1, 1]])
def test_no_class_and_class_named_twice_are_errors(class_ids):
    with pytest.raises(ValueError, match="at least one class id, and each one once"):
        AveragePrecision(class_ids)


def test_dilation_ratio_must_be_positive():
    with pytest.raises(ValueError, match="dilation_ratio must be above 0"):
        AveragePrecision([1], boundary=True, dilation_ratio=0)
