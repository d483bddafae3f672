"""The example for `transformers.Trainer` runs as it stands, and does what its comments say."""

import json

import pytest
from accelerate import Accelerator

from mpformer_hf import MPFormerForUniversalSegmentation, MPFormerImageProcessor
from training.data import load_segmentation_dataset
from training.evaluation import evaluate_model
from training.examples.transformers_trainer import main, make_trainer, parse_options

STEPS, IMAGES, SIZE = 24, 16, 64


def options(folder):
    words = {"output-dir": folder, "steps": STEPS, "images": IMAGES, "image-size": SIZE, "batch-size": 2}
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder and scores of one run."""
    folder = tmp_path_factory.mktemp("trainer")
    return folder, main(options(folder))


def test_the_loss_falls(run):
    folder, _ = run
    history = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    third = len(losses) // 3
    assert third > 1
    assert sum(losses[-third:]) < sum(losses[:third])


def test_the_scores_are_those_of_the_saved_model(run):
    folder, metrics = run
    model = MPFormerForUniversalSegmentation.from_pretrained(folder)
    processor = MPFormerImageProcessor.from_pretrained(folder)
    scenes = load_segmentation_dataset(
        "digit_scenes", "validation", num_images=IMAGES // 4, image_size=SIZE, tell_digits_apart=False
    )
    assert model.config.id2label == scenes.id2label
    scores = evaluate_model(model, processor, scenes, Accelerator(cpu=True), "panoptic", batch_size=2)
    names = {"eval_pq": "All", "eval_pq_things": "Things", "eval_pq_stuff": "Stuff"}
    assert scores["All"]["pq"] > 0
    assert metrics == {key: pytest.approx(scores[name]["pq"]) for key, name in names.items()} | {"epoch": 3.0}


def test_checkpoints_hold_a_model_that_can_be_loaded(run):
    folder, _ = run
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{STEPS // 2}", f"checkpoint-{STEPS}"}
    MPFormerForUniversalSegmentation.from_pretrained(folder / f"checkpoint-{STEPS}")


def test_the_backbone_has_a_learning_rate_of_its_own_and_norms_are_not_decayed(tmp_path):
    trainer = make_trainer(parse_options(options(tmp_path)))
    groups = trainer.create_optimizer().param_groups
    of_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        group = of_parameter[id(parameter)]
        assert group["lr"] == (5e-4 if ".encoder." in name and "pixel_level_module.encoder" in name else 1e-3), name
        if "normalization" in name or "layer_norm" in name or "layernorm" in name or "embedder.weight" in name:
            assert group["weight_decay"] == 0, name
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
