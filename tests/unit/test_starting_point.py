"""Weights that a model takes over from one for other classes and with other queries; weights of classes; frozen parts."""

import pytest
import torch

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.factories import tiny_model
from training.arguments import PARTS, RecipeError, TrainingArguments
from training.digit_scenes import DigitScenes
from training.starting_point import build_model, freeze, take_over, weigh_classes

QUERIES = "model.transformer_module.queries_features.weight"
LABELS = "model.transformer_module.pilot_label_embedder.weight"


def model_for(names, **fields):
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: key for key, name in enumerate(names)}}
    return tiny_model("resnet", **labels, **fields)


def test_classes_of_the_same_name_keep_their_rows_wherever_they_are():
    start, model = model_for(["cat", "dog", "Fire-Hydrant"]), model_for(["fire hydrant", "bird", "cat", "fish"])
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    kept = take_over(model, start)
    assert (set(kept.classes), kept.new_classes) == ({"fire hydrant", "cat"}, ("bird", "fish"))
    old, new = start.state_dict(), model.state_dict()
    for name in ("class_predictor.weight", "class_predictor.bias"):
        assert new[name][[0, 2, 4]].equal(old[name][[2, 0, 3]])  # the last is "no object"
        assert new[name][[1, 3]].equal(before[name][[1, 3]])
    assert new[LABELS][[0, 2]].equal(old[LABELS][[2, 0]])
    assert new[LABELS][[1, 3]].equal(before[LABELS][[1, 3]])
    assert "2 classes keep their weights, 2 begin at random (bird, fish)" in kept.describe()


@pytest.mark.parametrize(("known", "wanted"), [(4, 7), (7, 4)])
def test_queries_that_both_have_are_kept(known, wanted):
    start, model = model_for(["cat"], num_queries=known), model_for(["cat"], num_queries=wanted)
    before = model.state_dict()[QUERIES].clone()
    kept = take_over(model, start)
    both = min(known, wanted)
    assert model.state_dict()[QUERIES][:both].equal(start.state_dict()[QUERIES][:both])
    assert model.state_dict()[QUERIES][both:].equal(before[both:])
    assert (kept.queries, kept.new_queries) == (both, wanted - both)


def test_everything_else_is_kept_and_what_does_not_fit_is_named():
    start, model = model_for(["cat"]), model_for(["cat"])
    assert take_over(model, start).describe() == ""
    trained = start.state_dict()
    assert all(weights.equal(trained[name]) for name, weights in model.state_dict().items())
    deeper = model_for(["cat"], decoder_layers=start.config.decoder_layers + 1)
    kept = take_over(deeper, start)
    assert kept.random
    assert all(".decoder.layers." in name for name in kept.random)
    assert f"{len(kept.random)} other weights begin at random" in kept.describe()


def test_training_begins_with_the_classes_that_a_saved_model_knows(tmp_path):
    model_for(["digit", "china", "cloud"], num_queries=5).save_pretrained(tmp_path)
    scenes = DigitScenes("train", num_images=1, tell_digits_apart=False)  # digit, china, flower
    settings = {"output_dir": "out", "max_steps": 10, "model_name_or_path": str(tmp_path)}
    model, note = build_model(
        TrainingArguments(**settings, model={"num_queries": 6}, class_weights={"China": 3}), scenes
    )
    start = MPFormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert model.class_predictor.weight[:2].equal(start.class_predictor.weight[:2])
    assert model.config.id2label == scenes.id2label
    assert model.criterion.empty_weight.tolist() == [1.0, 3.0, 1.0, pytest.approx(0.1)]
    assert "2 classes keep their weights, 1 begin at random (flower); 5 queries keep theirs, 1 begin at random" in note


def test_a_class_weight_for_no_class_is_refused():
    with pytest.raises(RecipeError, match=r"`class_weights.dog` is no class of the data set. Classes: cat\."):
        weigh_classes(model_for(["cat"]), {"dog": 2.0})


def test_class_weights_change_the_loss():
    model = model_for(["cat", "dog"], mask_piloting=False).train()
    images, masks = torch.zeros(1, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :20], masks[1, 30:] = True, True
    losses = []
    for weights in ({}, {"dog": 50.0}):
        weigh_classes(model, weights)
        torch.manual_seed(0)
        losses.append(model(images, mask_labels=[masks], class_labels=[torch.tensor([0, 1])]).loss_dict)
    assert losses[0]["loss_cross_entropy"] != losses[1]["loss_cross_entropy"]
    assert losses[0]["loss_mask"] == losses[1]["loss_mask"]


def test_frozen_parts_are_not_trained():
    model = tiny_model("resnet", freeze_backbone_norm=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze(model, PARTS, ["backbone", "class_predictor"])
    left = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained - left == {name for name in trained if name.startswith((PARTS["backbone"], "class_predictor."))}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["decoder"], "no parameter's name begins so. Use backbone, pixel_decoder, transformer_decoder, or"),
        (["model", "class_predictor"], r"`frozen` \(model, class_predictor\) leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(names, sentence):
    with pytest.raises(RecipeError, match=sentence):
        freeze(tiny_model("resnet", freeze_backbone_norm=True), PARTS, names)


def test_batch_norms_that_would_go_on_counting_cannot_be_frozen():
    with pytest.raises(RecipeError, match=r"Set `model\.freeze_backbone_norm: true`"):
        freeze(tiny_model("resnet", freeze_backbone_norm=False), PARTS, ["backbone"])
