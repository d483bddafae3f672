"""The modules of `evaluate`: equal to the plain classes digit by digit, on one process and on several."""

import json
import threading
from pathlib import Path
from typing import ClassVar

import evaluate
import numpy as np
import pytest
import torch

from mpformer_hf.layer_consistency import image_layer_consistency
from mpformer_hf.mask_encoding import encode_rle
from mpformer_hf.mask_matching import CostWeights
from training.data import DigitScenes
from training.metrics.average_precision import AveragePrecision, segments_from_masks
from training.metrics.consistency import LayerConsistencyScores
from training.metrics.panoptic_quality import PanopticQuality
from training.metrics.semantic_quality import SemanticQuality
from training.targets import instance_targets, panoptic_target, semantic_target

FOLDER = Path(__file__).parents[2] / "training" / "metrics"
NUM_IMAGES = 7
SCENES = {"preset": "hard", "image_size": 96, "num_images": NUM_IMAGES}
VOID = 255


# ---------------------------------------------------------------------------------------------------------------------
# Four metrics, their predictions and the plain classes
# ---------------------------------------------------------------------------------------------------------------------


def with_crowd(row):
    """Turn the first segment of a row into a crowd region, if it has two."""
    masks, classes = row["mask_labels"], row["class_labels"]
    if len(masks) < 2:
        return row
    return {
        **row,
        "mask_labels": masks[1:],
        "class_labels": classes[1:],
        "crowd_masks": masks[:1],
        "crowd_labels": classes[:1],
    }


class PanopticCase:
    name = "panoptic"
    scenes = DigitScenes("validation", task="panoptic", **SCENES)
    options: ClassVar = {"thing_ids": scenes.thing_ids, "stuff_ids": scenes.stuff_ids}
    missing = "thing_ids"

    def rows(self):
        return [with_crowd(row) for row in self.scenes]

    def prediction(self, row):
        """Return the ground truth, moved a little, as the post-processing of a model gives it."""
        ids, segments = panoptic_target(row)
        moved = torch.from_numpy(np.roll(ids, row["image_id"], axis=(0, 1))).int()
        return {"segmentation": moved, "segments_info": [{**segment, "score": 0.9} for segment in segments]}

    def plain(self):
        return PanopticQuality(**self.options)

    def add_plainly(self, scores, row, prediction):
        target = panoptic_target(row)
        scores.add(row["image_id"], prediction["segmentation"], prediction["segments_info"], *target)


class SemanticCase:
    name = "semantic"
    scenes = DigitScenes("validation", task="semantic", **SCENES)
    options: ClassVar = {"class_ids": tuple(scenes.id2label), "boundary": True, "ignore_index": VOID}
    missing = "class_ids"

    def rows(self):
        return [with_crowd(row) for row in self.scenes]

    def prediction(self, row):
        return torch.from_numpy(np.roll(semantic_target(row, VOID), row["image_id"], axis=(0, 1)))

    def plain(self):
        return SemanticQuality(**self.options)

    def add_plainly(self, scores, row, prediction):
        scores.add(row["image_id"], prediction, semantic_target(row, VOID))


class InstanceCase:
    name = "instance"
    scenes = DigitScenes("validation", task="instance", **SCENES)
    options: ClassVar = {"class_ids": tuple(scenes.id2label), "boundary": True}
    missing = "class_ids"

    def rows(self):
        return [with_crowd(row) for row in self.scenes]

    def prediction(self, row):
        masks = torch.from_numpy(np.roll(row["mask_labels"], row["image_id"] % 3, axis=(1, 2)))
        scores = torch.linspace(0.9, 0.1, len(masks)) if len(masks) else torch.zeros(0)
        return {"masks": masks, "labels": torch.from_numpy(row["class_labels"]), "scores": scores}

    def plain(self):
        return AveragePrecision(**self.options)

    def add_plainly(self, scores, row, prediction):
        predictions = segments_from_masks(prediction["masks"], prediction["labels"], prediction["scores"])
        scores.add(row["image_id"], predictions, instance_targets(row), row["mask_labels"].shape[1:])


class LayerConsistencyCase:
    name = "layer_consistency"
    scenes = DigitScenes("validation", task="panoptic", **SCENES)
    options: ClassVar = {"weights": (2.0, 5.0, 5.0)}
    missing = "weights"

    def rows(self):
        return list(self.scenes)

    def prediction(self, row):
        """Return random logits of three levels and five queries."""
        generator = torch.Generator().manual_seed(row["image_id"])
        return {
            "class_logits": torch.randn((3, 5, len(self.scenes.id2label) + 1), generator=generator),
            "mask_logits": list(torch.randn((3, 5, 24, 24), generator=generator)),
            "valid_size": (96, 90 - row["image_id"]),
        }

    def plain(self):
        return LayerConsistencyScores()

    def add_plainly(self, scores, row, prediction):
        targets = (row["mask_labels"], row["class_labels"], prediction["valid_size"])
        logits = (prediction["class_logits"], prediction["mask_logits"])
        weights = CostWeights(*self.options["weights"])
        scores.add(row["image_id"], image_layer_consistency(*logits, *targets, weights=weights))


CASES = [PanopticCase(), SemanticCase(), InstanceCase(), LayerConsistencyCase()]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def load(tmp_path):
    def load_module(case, **options):
        return evaluate.load(
            str(FOLDER / f"{case.name}.py"), cache_dir=str(tmp_path / "cache"), **{**case.options, **options}
        )

    return load_module


def plain_scores(case, rows):
    scores = case.plain()
    for row in rows:
        case.add_plainly(scores, row, case.prediction(row))
    return scores.compute()


def digits(scores):
    """Write scores so that they are equal only if every digit is; dictionaries keep the order of their keys."""
    return json.dumps(scores)


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


@by_case
def test_images_added_one_by_one_in_batches_or_at_once_score_as_with_the_plain_class(case, load):
    rows = case.rows()
    predictions = [case.prediction(row) for row in rows]
    expected = plain_scores(case, rows)
    metric = load(case)
    for row, prediction in zip(rows, predictions, strict=True):
        assert metric.add(prediction=prediction, reference=row) is None
    one_by_one = metric.compute()
    metric.add_batch(predictions=predictions[4:], references=rows[4:])
    metric.add_batch(predictions=predictions[:4], references=rows[:4])
    in_batches = metric.compute()
    at_once = metric.compute(predictions=predictions, references=rows)
    assert digits(one_by_one) == digits(in_batches) == digits(at_once) == digits(expected)


@by_case
def test_what_the_cases_compare_is_neither_perfect_nor_nothing(case):
    scores = plain_scores(case, case.rows())
    keys = {"panoptic": ["All", "pq"], "semantic": ["mIoU"], "instance": ["AP"], "layer_consistency": ["mIoU_L", 0]}
    for key in keys[case.name]:
        scores = scores[key]
    assert 0.05 < scores < 0.95


@by_case
def test_nothing_but_scores_is_stored_and_nothing_of_it_is_left(case, load, tmp_path):
    rows = case.rows()
    metric = load(case)
    metric.add_batch(predictions=[case.prediction(row) for row in rows], references=rows)
    metric.compute()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_modules_are_copied_to_a_temporary_folder(load):
    module = __import__("sys").modules[type(load(CASES[0])).__module__]
    assert "mpformer_hf_tests_" in module.__file__


@by_case
def test_image_added_twice_is_an_error_until_the_scores_are_computed(case, load):
    row = case.rows()[1]
    metric = load(case)
    batch = {"predictions": [case.prediction(row)], "references": [row]}
    twice = {key: entries * 2 for key, entries in batch.items()}
    with pytest.raises(ValueError, match="Image 1 was added before"):
        metric.add_batch(**twice)
    metric.add_batch(**batch)
    with pytest.raises(ValueError, match="Image 1 was added before"):
        metric.add_batch(**batch)
    assert digits(metric.compute()) == digits(plain_scores(case, [row]))
    assert digits(metric.compute(**batch)) == digits(plain_scores(case, [row]))


@by_case
def test_batch_that_is_refused_adds_nothing(case, load):
    first, second, third = case.rows()[:3]
    metric = load(case)
    metric.add(prediction=case.prediction(first), reference=first)
    with pytest.raises(ValueError, match=r"[Ii]mage 2 "):
        metric.add_batch(predictions=[case.prediction(second), {}], references=[second, third])
    metric.add(prediction=case.prediction(second), reference=second)
    assert digits(metric.compute()) == digits(plain_scores(case, [first, second]))


@by_case
def test_without_images_the_scores_are_those_of_an_empty_collection(case, load):
    metric = load(case)
    assert digits(metric.compute()) == digits(case.plain().compute())
    metric.add_batch(predictions=[], references=[])
    assert digits(metric.compute()) == digits(case.plain().compute())


def test_scores_may_be_kept_in_memory(load):
    case = CASES[0]
    rows = case.rows()
    metric = load(case, keep_in_memory=True)
    scores = metric.compute(predictions=[case.prediction(row) for row in rows], references=rows)
    assert digits(scores) == digits(plain_scores(case, rows))


@by_case
def test_missing_and_unknown_options_are_named(case, load):
    options: ClassVar = {name: value for name, value in case.options.items() if name != case.missing}
    with pytest.raises(ValueError, match=rf"`{case.missing}` is missing. Pass it to evaluate\.load"):
        evaluate.load(str(FOLDER / f"{case.name}.py"), **options)
    with pytest.raises(ValueError, match=rf"num_labels: no such option.*{case.missing}"):
        load(case, num_labels=3)


def test_wrong_options_are_refused_when_the_module_is_loaded(load):
    with pytest.raises(ValueError, match="A class id is named twice"):
        load(CASES[0], stuff_ids=CASES[0].options["thing_ids"])
    with pytest.raises(ValueError, match="dilation_ratio must be above 0"):
        load(CASES[1], dilation_ratio=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": [{}], "references": []}, "got 1 predictions and 0 references"),
        ({"references": [{"image_id": 1}]}, "got None predictions and 1 references"),
        ({"predictions": [{}], "references": [None]}, "Expected a reference with `image_id`, got NoneType"),
        (
            {"predictions": [{}], "references": [{"id": 1}]},
            r"Expected a reference with `image_id`, got dict \{'id': 1\}",
        ),
        ({"predictions": [{}], "references": [{"image_id": 1.5}]}, "`image_id` must be an integer or text, got 1.5"),
        ({"predictions": [{}], "references": [{"image_id": None}]}, "`image_id` must be an integer or text, got None"),
    ],
)
@by_case
def test_predictions_that_belong_to_no_image_are_named(case, load, arguments, message):
    metric = load(case)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(**arguments)
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments)


@pytest.mark.parametrize("image_id", [1, np.int64(1), torch.tensor(1)], ids=["int", "numpy", "torch"])
def test_image_ids_of_all_libraries_are_the_same_image(load, image_id):
    row = CASES[1].rows()[1]
    metric = load(CASES[1])
    metric.add(prediction=CASES[1].prediction(row), reference=row)
    with pytest.raises(ValueError, match="Image 1 was added before"):
        metric.add(prediction=CASES[1].prediction(row), reference={**row, "image_id": image_id})


@by_case
def test_prediction_without_its_entries_is_named_with_its_image(case, load):
    row = case.rows()[2]
    entry = {"panoptic": "segmentation", "instance": "masks", "layer_consistency": "mask_logits"}.get(case.name)
    with pytest.raises(ValueError, match=rf"prediction of image 2 must .*{entry or 'integer map'}"):
        load(case).add(prediction={}, reference=row)


def test_reference_that_is_neither_row_nor_map_is_named(load):
    names = {"panoptic": "segmentation, segments_info", "semantic": "segmentation", "instance": "annotations, height"}
    for case in CASES[:3]:
        prediction = case.prediction(case.rows()[2])
        with pytest.raises(ValueError, match=rf"reference of image 2, if it is no row, .*{names[case.name]}"):
            load(case).add(prediction=prediction, reference={"image_id": 2, "labels": []})


def test_logits_that_cannot_be_compared_are_named_with_their_image(load):
    case = CASES[3]
    row = case.rows()[2]
    prediction = {**case.prediction(row), "valid_size": (64, 999)}
    with pytest.raises(ValueError, match="Image 2 cannot be scored: Expected a valid size"):
        load(case).add(prediction=prediction, reference=row)


# ---------------------------------------------------------------------------------------------------------------------
# References and predictions in other forms
# ---------------------------------------------------------------------------------------------------------------------


def test_panoptic_references_may_be_maps_with_their_segments(load):
    case = CASES[0]
    rows = case.rows()
    metric = load(case)
    for row in rows:
        ids, segments = panoptic_target(row)
        official = [
            {"id": segment["id"], "category_id": segment["label_id"], "iscrowd": segment["iscrowd"]}
            for segment in segments
        ]
        reference = {"image_id": row["image_id"], "segmentation": torch.from_numpy(ids), "segments_info": official}
        metric.add(prediction=case.prediction(row), reference=reference)
    assert digits(metric.compute()) == digits(plain_scores(case, rows))


def test_semantic_references_may_be_maps(load):
    case = CASES[1]
    rows = case.rows()
    metric = load(case)
    for row in rows:
        target = torch.from_numpy(semantic_target(row, VOID))
        metric.add(prediction=case.prediction(row), reference={"image_id": row["image_id"], "segmentation": target})
    assert digits(metric.compute()) == digits(plain_scores(case, rows))


def test_instance_references_and_predictions_may_be_in_the_form_of_coco(load):
    case = CASES[2]
    rows = case.rows()
    metric = load(case)
    for row in rows:
        prediction = case.prediction(row)
        results = [
            {"category_id": int(label), "score": float(score), "segmentation": rle}
            for label, score, rle in zip(
                prediction["labels"], prediction["scores"], encode_rle(prediction["masks"]), strict=True
            )
        ]
        height, width = row["mask_labels"].shape[1:]
        annotations = [
            {"category_id": truth["label_id"], "segmentation": truth["segmentation"], "iscrowd": truth["iscrowd"]}
            for truth in instance_targets(row)
        ]
        reference = {"image_id": row["image_id"], "annotations": annotations, "height": height, "width": width}
        metric.add(prediction=results, reference=reference)
    assert digits(metric.compute()) == digits(plain_scores(case, rows))


def test_rows_may_hold_tensors(load):
    for case in CASES:
        rows = case.rows()
        tensors = [
            {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in row.items()}
            for row in rows
        ]
        scores = load(case).compute(predictions=[case.prediction(row) for row in rows], references=tensors)
        assert digits(scores) == digits(plain_scores(case, rows))


def test_crowd_of_a_row_is_of_effect(load):
    for case in CASES[:3]:
        rows = case.rows()
        assert sum("crowd_masks" in row for row in rows) > NUM_IMAGES / 2
        blind = [{key: value for key, value in row.items() if not key.startswith("crowd")} for row in rows]
        predictions = [case.prediction(row) for row in rows]
        with_it, without_it = (load(case).compute(predictions=predictions, references=part) for part in (rows, blind))
        # In instance scores a crowd is of effect only where something is predicted in it.
        assert (digits(with_it) != digits(without_it)) == (case.name != "instance")


def test_crowd_of_a_row_excuses_instances_that_are_predicted_in_it(load):
    case = CASES[2]
    row = next(row for row in case.rows() if "crowd_masks" in row)
    masks = torch.from_numpy(np.concatenate([row["mask_labels"], row["crowd_masks"]]))
    labels = torch.from_numpy(np.concatenate([row["class_labels"], row["crowd_labels"]]))
    # The crowd has the highest score; as a false positive of a class with an object it would take precision.
    labels[:] = row["class_labels"][0]
    row = {**row, "class_labels": labels[:-1].numpy(), "crowd_labels": labels[-1:].numpy()}
    prediction = {"masks": masks, "labels": labels, "scores": torch.linspace(0.1, 0.9, len(masks))}
    excused = load(case).compute(predictions=[prediction], references=[row])
    blind = {key: value for key, value in row.items() if not key.startswith("crowd")}
    wrong = load(case).compute(predictions=[prediction], references=[blind])
    assert excused["AP"] == pytest.approx(1.0, abs=1e-9)
    assert wrong["AP"] < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@by_case
def test_number_of_processes_does_not_change_a_digit(case, load, num_processes):
    """Threads stand for processes: the locks of `evaluate` are those of files, which exclude threads as well."""
    rows = case.rows()
    # Of two processes the second repeats an image, as samplers do; of three one has none.
    shares = {1: [rows], 2: [rows[::2], [*rows[1::2], rows[0]]], 3: [rows[1::2], [], rows[::2]]}[num_processes]
    results, errors = {}, []

    def score(rank):
        try:
            metric = load(case, num_process=num_processes, process_id=rank, experiment_id="one", timeout=30)
            for row in shares[rank]:
                metric.add(prediction=case.prediction(row), reference=row)
            results[rank] = metric.compute()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=score, args=(rank,)) for rank in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert digits(results[0]) == digits(plain_scores(case, rows))
    assert [results[rank] for rank in range(1, num_processes)] == [None] * (num_processes - 1)
