"""`transformers.Trainer` trains, evaluates, saves and resumes the model like one of its own."""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.factories import random_batch, tiny_model

NUM_SEGMENTS = (2, 0, 3, 1, 4)
SIZE = (64, 64)

Scene = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_complaints(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test whose libraries log a warning; Python's own warnings are errors everywhere."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    yield
    complaints = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    assert not complaints


def make_scenes() -> list[Scene]:
    batch = random_batch(NUM_SEGMENTS, SIZE)
    return [{name: values[index] for name, values in batch.items()} for index in range(len(NUM_SEGMENTS))]


def collate(scenes: list[Scene]) -> dict[str, Any]:
    """Stack images; ground truth stays a list, since every image has its own number of segments."""
    return {
        "pixel_values": torch.stack([scene["pixel_values"] for scene in scenes]),
        "mask_labels": [scene["mask_labels"] for scene in scenes],
        "class_labels": [scene["class_labels"] for scene in scenes],
    }


def make_trainer(
    folder: Path, model: MPFormerForUniversalSegmentation | None = None, compute_metrics: Any = None, **arguments: Any
) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "label_names": ["mask_labels", "class_labels"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_scenes(),
        eval_dataset=make_scenes(),
        data_collator=collate,
        compute_metrics=compute_metrics,
    )


def seed_every_forward(model: MPFormerForUniversalSegmentation) -> list[dict[str, Any]]:
    """Make the n-th forward draw the same noise and points in every loop; returns the list that its inputs go to."""
    calls: list[dict[str, Any]] = []

    def seed(_: torch.nn.Module, __: tuple, inputs: dict[str, Any]) -> None:
        torch.manual_seed(len(calls))
        calls.append(inputs)

    model.register_forward_pre_hook(seed, with_kwargs=True)
    return calls


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def split_into_batches(scenes: list[Scene], size: int) -> list[dict[str, Any]]:
    return [collate(scenes[start : start + size]) for start in range(0, len(scenes), size)]


def test_three_steps_train_what_is_not_frozen(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(logged_losses(trainer)) == 3
    assert np.isfinite(logged_losses(trainer)).all()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_steps_equal_those_of_a_plain_loop_with_gradient_accumulation(tmp_path):
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    model = copy.deepcopy(trainer.model)
    calls = seed_every_forward(trainer.model)
    trainer.train()
    batches = list(calls)
    steps = [batches[:2], batches[2:3], batches[3:]]  # an epoch has three batches, its second step but one
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 1, 2, 2]

    seed_every_forward(model.train())
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    for step in steps:
        optimizer.zero_grad()
        for batch in step:
            (model(**batch).loss / len(step)).backward()
        optimizer.step()
    for (name, trained), parameter in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            trained, parameter, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_evaluation_loss_is_the_mean_over_images(tmp_path):
    trainer = make_trainer(tmp_path, prediction_loss_only=True)
    model = copy.deepcopy(trainer.model)
    seed_every_forward(trainer.model)
    measured = trainer.evaluate()["eval_loss"]

    seed_every_forward(model)
    batches = split_into_batches(make_scenes(), 2)
    with torch.no_grad():
        total = sum(len(batch["pixel_values"]) * model(**batch).loss.item() for batch in batches)
    assert measured == pytest.approx(total / len(NUM_SEGMENTS), rel=1e-6)


def test_metrics_see_the_logits_and_the_ground_truth_of_every_image(tmp_path):
    seen: list[EvalPrediction] = []

    def keep(evaluated: EvalPrediction) -> dict[str, float]:
        seen.append(evaluated)
        return {"batches": len(evaluated.predictions)}

    trainer = make_trainer(tmp_path, compute_metrics=keep, eval_do_concat_batches=False)
    # In a smaller last batch the Trainer would cut every label, a tensor of segments, to the number of images.
    scenes = make_scenes()[:4]
    metrics = trainer.evaluate(scenes)
    batches = split_into_batches(scenes, 2)
    assert metrics["eval_batches"] == len(batches)
    (evaluated,) = seen
    for batch, predictions, (mask_labels, class_labels) in zip(
        batches, evaluated.predictions, evaluated.label_ids, strict=True
    ):
        with torch.no_grad():
            outputs = trainer.model(batch["pixel_values"])
        class_logits, mask_logits = predictions
        np.testing.assert_allclose(class_logits, outputs.class_queries_logits.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mask_logits, outputs.masks_queries_logits.numpy(), rtol=1e-5, atol=1e-6)
        for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
            for came, expected in zip(labels, batch[name], strict=True):
                np.testing.assert_array_equal(came, expected.numpy())


def test_prediction_joins_the_logits_of_all_images(tmp_path):
    trainer = make_trainer(tmp_path)
    class_logits, mask_logits = trainer.predict(make_scenes()).predictions
    assert class_logits.shape == (5, 6, 4)
    assert mask_logits.shape == (5, 6, 16, 16)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **arguments)
    torch.rand(5)  # the checkpoint brings the random state with it
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert logged_losses(resumed) == logged_losses(whole)
    for (name, parameter), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_a_saved_model_predicts_what_the_trained_one_does(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = MPFormerForUniversalSegmentation.from_pretrained(tmp_path / "saved")
    images = collate(make_scenes())["pixel_values"]
    with torch.no_grad():
        expected, outputs = trainer.model.eval()(images), loaded(images)
    assert torch.equal(outputs.class_queries_logits, expected.class_queries_logits)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)


def test_bfloat16_and_gradient_checkpointing_change_the_loss_by_rounding_only(tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    economical = make_trainer(tmp_path, bf16=True, **{checkpointing: True})
    economical.train()
    np.testing.assert_allclose(logged_losses(economical), logged_losses(plain), rtol=0.02)
    assert logged_losses(economical) != logged_losses(plain)
