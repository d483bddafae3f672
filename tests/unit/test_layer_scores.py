"""Layer consistency of every kind of model, on rows of a data set."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mpformer_hf.layer_consistency import image_layer_consistency
from mpformer_hf.mask_matching import CostWeights
from tests.checkpoints import NAMES, save_checkpoint
from training.layer_scores import LayerScoring
from training.metrics.consistency import LayerConsistencyScores
from training.predictor import LabelMap, Predictor, PredictorError

# Classes in another order than the model's, and one that it lacks.
DATASET = SimpleNamespace(id2label={0: "sky", 1: "tree", 2: "cat"}, thing_ids=(2,), stuff_ids=(0, 1))
# Predictions before the first decoder layer and after each; for MaskFormer the decoder's input and its one layer.
LEVELS = {"mpformer": 4, "mask2former": 3, "maskformer": 2, "oneformer": 4}


def make_row(image_id: str, size: tuple[int, int] = (64, 96), seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    masks = np.zeros((3, *size), bool)
    masks[0, :20], masks[1, 20:40], masks[2, 40:, 30:] = True, True, True
    pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    return {
        "image_id": image_id,
        "image": Image.fromarray(pixels),
        "mask_labels": masks,
        "class_labels": np.array([0, 1, 2]),
    }


ROWS = [make_row("a"), make_row("b", (64, 64), seed=1)]


def make_scoring(kind: str, folder) -> LayerScoring:
    predictor = Predictor.load(str(save_checkpoint(kind, folder / kind)), "panoptic")
    return LayerScoring(predictor, LabelMap.by_name(NAMES, DATASET))


@pytest.mark.parametrize("kind", LEVELS)
def test_all_levels_are_compared_whoever_the_model_is(kind, tmp_path):
    scoring = make_scoring(kind, tmp_path)
    outputs = scoring.predictor.run([row["image"] for row in ROWS], **scoring.inputs)
    lines = scoring.score(outputs, ROWS)
    assert [json.loads(line)[0] for line in lines] == ["a", "b"]
    scores = LayerConsistencyScores()
    scores.load(lines)
    computed = scores.compute()
    assert computed["levels"] == LEVELS[kind]
    assert computed["num_images_matched"] == 2
    assert any(0 < value < 1 for value in computed["mIoU_L"])


def test_numbers_are_those_of_the_classes_that_the_model_has(tmp_path):
    scoring = make_scoring("mpformer", tmp_path)
    outputs = scoring.predictor.run([row["image"] for row in ROWS], **scoring.inputs)
    lines = [json.loads(line)[1] for line in scoring.score(outputs, ROWS)]
    config = scoring.predictor.model.config
    weights = CostWeights(label=config.class_weight, mask=config.mask_weight, dice=config.dice_weight)
    auxiliary = outputs.auxiliary_logits
    for number, (row, line) in enumerate(zip(ROWS, lines, strict=True)):
        # Sky is class 2 of the model and cat its class 0; it has no tree.
        expected = image_layer_consistency(
            [level["class_queries_logits"][number] for level in auxiliary] + [outputs.class_queries_logits[number]],
            [level["masks_queries_logits"][number] for level in auxiliary] + [outputs.masks_queries_logits[number]],
            row["mask_labels"][[0, 2]],
            [2, 0],
            [64, row["image"].width],
            weights=weights,
        )
        assert line["mean_iou"] == pytest.approx(expected.mean_iou)
        assert line["utilisation"] == pytest.approx(expected.utilisation)
        assert len(np.unique(expected.matches[-1])) == 3  # two segments, and queries without any


def test_an_image_without_segments_has_numbers_of_all_queries_alone(tmp_path):
    scoring = make_scoring("mpformer", tmp_path)
    row = {**ROWS[0], "mask_labels": np.zeros((0, 64, 96), bool), "class_labels": np.zeros(0, np.int64)}
    [line] = scoring.score(scoring.predictor.run([row["image"]], **scoring.inputs), [row])
    score = json.loads(line)[1]
    assert len(score["mean_iou"]) == 3
    assert score["utilisation"] is None


def test_the_picture_shows_every_level_of_a_query(tmp_path):
    scoring = make_scoring("mask2former", tmp_path)
    picture = scoring.draw(ROWS[0], "a tiny model")
    assert picture.mode == "RGB"
    assert picture.width > LEVELS["mask2former"] * 96


@pytest.mark.parametrize(("kind", "model_type"), [("eomt", "eomt"), ("detr", "detr")])
def test_a_model_of_one_level_is_refused(kind, model_type, tmp_path):
    scoring = make_scoring(kind, tmp_path)
    with torch.no_grad():
        outputs = scoring.predictor.run([ROWS[0]["image"]], **scoring.inputs)
    expected = f"--layer-consistency cannot be measured for this {model_type} model: .* holds one level of predictions"
    with pytest.raises(PredictorError, match=expected):
        scoring.score(outputs, ROWS[:1])
