"""What a real model says about itself, and which card and licence go with its weights when it is loaded and pushed again."""

import dataclasses

import pytest
import torch
import yaml

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from mpformer_hf.model_card import attach_card, card_for_model, is_by_a_person, render_card, training_card
from mpformer_hf.model_facts import LICENCES, Conversion, OriginalFiles, TrainingRecord
from mpformer_hf.model_inspection import converted_facts, digest_weights, facts_of_model, name_of_model
from tests.factories import BACKBONE_KINDS, tiny_model
from tests.unit.test_model_facts import make_facts

CONVERSION = Conversion(command="python -m conversion.convert_detectron2 model.pth", file_name="model.pth")
RECORD = TrainingRecord(
    command="python -m training.train recipe.yaml",
    dataset="digit_scenes",
    task="panoptic",
    settings={"seed": 7, "max_steps": 40},
    num_train_images=1000,
    num_validation_images=1,
    steps=40,
    images_per_step=8,
    seconds=150.0,
    hardware="2 x NVIDIA H200",
    versions={"mpformer_hf": "0.1.0"},
    final_losses={"loss": 12.3456},
    scores={"pq": 0.51874, "sq": 0.8},
)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def save(model, folder):
    model.save_pretrained(folder)
    return folder


# What it says about itself


@pytest.mark.parametrize("kind", BACKBONE_KINDS)
def test_facts_of_a_model_are_counted_in_it(kind):
    model = tiny_model(kind, id2label={0: "cat", 1: "dog", 2: "sky"})
    facts = facts_of_model(model, tasks=("instance",), name="cats")
    assert facts.classes == ("cat", "dog", "sky")
    assert (facts.num_labels, facts.num_queries, facts.task) == (3, 6, "instance")
    assert facts.num_parameters == sum(len(parameter.flatten()) for parameter in model.parameters())
    assert {"resnet": "resnet", "swin": "swin", "convnext": "convnext", "timm": "test_resnet (timm)"}[
        kind
    ] in facts.backbone


def test_the_order_of_the_classes_is_that_of_their_ids():
    model = tiny_model(id2label={2: "sky", 0: "cat", 1: "dog"})
    assert facts_of_model(model).classes == ("cat", "dog", "sky")


def test_thresholds_and_piloting_are_on_the_card():
    processor = MPFormerImageProcessor(score_threshold=0.7, size={"shortest_edge": 64, "longest_edge": 96})
    text = str(render_card(facts_of_model(tiny_model(pilot_groups=2, pilot_layers=1), processor)))
    assert "| Stored thresholds | score 0.7, mask 0.5, overlap 0.8, instances at most 100 |" in text
    assert "| Size of images | shorter side 64, longer side at most 96 |" in text
    assert "groups: 2, the first 1 layers, point noise of masks 0.2, noise of labels 0.2" in text
    off = str(render_card(facts_of_model(tiny_model(mask_piloting=False, query_position_embedding=False))))
    assert "off: trains as Mask2Former" in off
    assert "6, without a position embedding" in off


@pytest.mark.parametrize(
    ("start", "name"),
    [("owner/cats-v2", "cats-v2"), ("", "mpformer"), ("my folder/é~x y/", "x-y"), ("a/" + "b" * 200, "b" * 96)],
)
def test_a_name_is_the_last_part_of_where_the_model_came_from(start, name):
    model = tiny_model()
    model.name_or_path = start
    assert name_of_model(model) == name


def test_the_digest_is_that_of_the_weights_whatever_their_file_and_nothing_else(tmp_path):
    for kind in ("resnet", "swin"):  # files of Swin have other names than the model
        model = tiny_model(kind)
        loaded = MPFormerForUniversalSegmentation.from_pretrained(save(model, tmp_path / kind))
        assert digest_weights(loaded) == digest_weights(model)
        assert digest_weights(model.to(torch.bfloat16)) != digest_weights(loaded)
        with torch.no_grad():
            loaded.class_predictor.bias[0] += 1e-3
        assert digest_weights(loaded) != digest_weights(tiny_model(kind))


# A card for a push


def test_a_model_from_nowhere_gets_a_card_of_what_it_says():
    text = card_for_model(tiny_model())
    assert not is_by_a_person(text)
    data = front_matter(text)
    assert "license" not in data
    assert "base_model" not in data
    assert "Nobody has chosen a licence" in text
    assert "This card does not know how the model was trained." in text


def test_a_model_that_was_loaded_and_not_changed_keeps_the_card_of_its_folder(tmp_path):
    model = tiny_model()
    card = training_card(model, None, RECORD, name="digits")
    attach_card(save(model, tmp_path / "digits"), card)
    loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path / "digits")
    assert card_for_model(loaded) == str(card)


def test_a_model_that_was_changed_keeps_the_licence_but_no_score_of_its_folder(tmp_path):
    model = tiny_model()
    facts = facts_of_model(model, name="released")
    released = dataclasses.replace(facts, origin="mpformer", licence=LICENCES["mpformer"], conversion=CONVERSION)
    folder = save(model, tmp_path / "secret-place" / "released")
    attach_card(folder, render_card(released))
    loaded = MPFormerForUniversalSegmentation.from_pretrained(folder)
    with torch.no_grad():
        loaded.class_predictor.bias.zero_()
    text = card_for_model(loaded)
    assert front_matter(text)["license"] == "cc-by-nc-4.0"
    assert "The weights began as those of `released`, whose card says `cc-by-nc-4.0`." in text
    assert "How it was made" not in text
    assert "secret-place" not in text
    assert "base_model" not in front_matter(text)


def test_a_readme_that_a_person_wrote_passes_on_its_licence_too(tmp_path):
    folder = save(tiny_model(), tmp_path / "mine")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: house-rules\nlicense_link: https://x.org\n---\n# Mine\n"
    )
    data = front_matter(card_for_model(MPFormerForUniversalSegmentation.from_pretrained(folder)))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "house-rules", "https://x.org")


@pytest.mark.parametrize(
    "text", ["# No front matter\n", "---\nlicense: [a, b]\n---\n", "---\ntags: 3\n---\n", "---\na: [\n---\n", ""]
)
def test_a_readme_without_a_licence_passes_on_none(tmp_path, text):
    folder = save(tiny_model(), tmp_path / "mine")
    (folder / "README.md").write_text(text)
    assert "license" not in front_matter(card_for_model(MPFormerForUniversalSegmentation.from_pretrained(folder)))


# A card of a training


def test_the_card_of_a_training_has_its_scores_in_percent_and_what_they_depend_on():
    text = str(training_card(tiny_model(), None, RECORD, name="digits"))
    metrics = front_matter(text)["model-index"][0]["results"][0]["metrics"]
    assert [(metric["type"], metric["value"]) for metric in metrics] == [("pq", 51.874), ("sq", 80.0)]
    for part in (
        "| digit_scenes validation | panoptic | PQ | 51.87 | measured here: `python -m training.train recipe.yaml` |",
        "| Data set | digit_scenes, panoptic: 1,000 images |",
        "| Steps | 40, of 8 images |",
        "| Seed | 7 |",
        "| Time of the steps | 2.5 min |",
        "| Hardware | 2 x NVIDIA H200 |",
        "| Began as | random weights |",
        "| Losses at the end | loss 12.346 |",
        "Measured on 1 image,",
    ):
        assert part in text


def test_a_training_without_scores_claims_none():
    text = str(training_card(tiny_model(), None, dataclasses.replace(RECORD, scores={}), name="digits"))
    assert "model-index" not in front_matter(text)
    assert "has not been scored" in text


@pytest.mark.parametrize(("seconds", "words"), [(4.84, "4.8 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_durations_have_the_unit_that_suits_them(seconds, words):
    text = str(training_card(tiny_model(), None, dataclasses.replace(RECORD, seconds=seconds), name="digits"))
    assert f"| Time of the steps | {words} |" in text


def test_a_training_that_began_with_a_licensed_model_stays_under_its_licence(tmp_path):
    start = save(tiny_model(), tmp_path / "start")
    facts = make_facts(origin="mpformer", licence=LICENCES["mpformer"])
    attach_card(start, render_card(facts))
    text = str(training_card(tiny_model(), None, dataclasses.replace(RECORD, start=str(start)), name="digits"))
    assert front_matter(text)["license"] == "cc-by-nc-4.0"
    assert "| Began as | `start` |" in text
    assert str(tmp_path) not in text


# A card of a conversion


def convert(model, **arguments):
    basic = {"origin": "mpformer", "label_embedding_is_fresh": False, "tasks": ("instance",), "name": "converted"}
    return converted_facts(model, None, CONVERSION, **{**basic, **arguments})


@pytest.mark.parametrize(("origin", "licence"), [("mpformer", "cc-by-nc-4.0"), ("mask2former", "mit")])
def test_converted_weights_have_the_licence_of_the_code_that_trained_them(origin, licence):
    facts = convert(tiny_model(), origin=origin)
    text = str(render_card(facts))
    assert front_matter(text)["license"] == licence
    assert CONVERSION.command in text
    assert facts.weights_digest in text


def test_the_card_says_whether_the_label_embedding_was_kept():
    assert convert(tiny_model(), label_embedding_is_fresh=False).label_embedding == "kept"
    assert convert(tiny_model(), label_embedding_is_fresh=True).label_embedding == "fresh"
    assert convert(tiny_model(mask_piloting=False), label_embedding_is_fresh=True).label_embedding == "none"


def published_facts(**fields):
    original = OriginalFiles(
        weights="https://example.org/model_final_abcdef.pkl", repository="https://example.org", config="a.yaml"
    )
    fields = {"num_labels": 3, "num_queries": 6, "original": original, "licence": LICENCES["mask2former-zoo"], **fields}
    return make_facts(name="published", origin="mask2former-zoo", **fields)


def test_a_published_checkpoint_keeps_its_facts_and_gains_what_was_counted():
    model = tiny_model(id2label={0: "cat", 1: "dog", 2: "sky"})
    facts = convert(model, published=published_facts(), label_embedding_is_fresh=True)
    assert (facts.name, facts.origin, facts.licence) == ("published", "mask2former-zoo", LICENCES["mask2former-zoo"])
    assert facts.classes == ("cat", "dog", "sky")
    assert facts.weights_digest == digest_weights(model)
    assert facts.conversion is CONVERSION
    assert "Layers" in [detail.name for detail in facts.details]


@pytest.mark.parametrize("difference", [{"num_labels": 4}, {"num_queries": 7}, {"query_position_embedding": False}])
def test_a_model_that_cannot_be_the_published_one_is_refused(difference):
    with pytest.raises(ValueError, match=f"The converted model is not published: `{next(iter(difference))}` is"):
        convert(tiny_model(), published=published_facts(**difference))
