"""Counts of an optimiser step of several forward passes, by hand; equal losses are for test_two_processes.py."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mpformer_hf.global_batch import GlobalBatch
from tests.factories import random_batch, tiny_model
from tests.process_groups import same_points_everywhere

WEIGHTS = torch.tensor([1.0, 2.0, 4.0, 0.5])  # of three classes and "no object"


def labels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def count(*passes: list[Tensor], num_queries: int = 4) -> GlobalBatch:
    return GlobalBatch.count(passes, num_labels=3, num_queries=num_queries)


def test_all_passes_are_counted():
    counts = count([labels(0, 2), labels()], [labels(2, 2, 1)])
    assert (counts.num_passes, counts.num_processes, counts.num_parts) == (2, 1, 2)
    assert (counts.num_images, counts.num_segments, counts.num_matched, counts.max_segments) == (3, 5, 5, 3)
    assert counts.class_counts.tolist() == [1, 1, 3]


def test_mask_losses_are_divided_by_the_segments_of_a_part_but_by_one_at_least():
    assert count([labels(0, 2), labels()], [labels(2, 2, 1)]).divide_masks() == 2.5
    assert count([labels(0)], [labels()], [labels()]).divide_masks() == 1.0
    assert count([labels()]).divide_masks() == 1.0


def test_weights_of_matched_queries_are_those_of_all_segments_and_of_the_queries_without_one():
    """Classes 0, 2, 2, 2 and 1 weigh 1 + 3 * 4 + 2; of 3 * 4 queries, 7 have no object."""
    counts = count([labels(0, 2), labels()], [labels(2, 2, 1)])
    assert counts.weigh_matched_labels(WEIGHTS, 4).item() == 15 + 7 * 0.5


def test_segments_without_a_query_are_left_out_at_the_mean_weight():
    """Five segments that weigh 1 + 2 + 3 * 4 for two queries, beside one that weighs 1: 3 of 6 are matched, of 4 queries."""
    counts = count([labels(0, 1, 2, 2, 2), labels(0)], num_queries=2)
    assert (counts.num_segments, counts.num_matched) == (6, 3)
    assert counts.weigh_matched_labels(WEIGHTS, 2).item() == 16 / 2 + 0.5


def test_weights_of_pilot_slots_are_those_of_every_group_empty_slots_included():
    """Three images have as many slots as the largest one has segments: 9, of which 4 are empty."""
    counts = count([labels(0, 2), labels()], [labels(2, 2, 1)])
    assert counts.weigh_pilot_labels(WEIGHTS, 2).item() == 2 * (15 + 4 * 0.5)


def test_a_step_without_any_segment_has_weights_of_no_object_alone():
    counts = count([labels()], [labels()])
    assert counts.weigh_matched_labels(WEIGHTS, 4).item() == 8 * 0.5
    assert counts.weigh_pilot_labels(WEIGHTS, 2).item() == 0


def test_a_step_without_a_pass_is_refused():
    with pytest.raises(ValueError, match="at least one forward pass, got none"):
        count()


def test_labels_out_of_range_are_refused_by_the_forward_pass_and_not_by_the_count():
    batch = random_batch([2], (64, 64))
    batch["class_labels"] = [labels(-1, 7)]
    model = tiny_model().train()
    counts = model.count_global_batch([batch["class_labels"]])
    assert counts.class_counts.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="Expected class labels from 0 to 2, got -1 to 7 in image 0"):
        model(**batch, global_batch=counts)


def test_a_batch_with_more_segments_than_were_counted_is_refused():
    model = tiny_model().train()
    counts = model.count_global_batch([[labels(0, 1)]])
    with pytest.raises(ValueError, match="at most 2 segments, as `global_batch` has counted, got 3 in image 1"):
        model(**random_batch([2, 3], (64, 64)), global_batch=counts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fields", [{}, {"mask_piloting": False}, {"pilot_query_budget": 4}], ids=str)
def test_a_step_of_one_pass_has_the_loss_that_it_has_without_counts(fields: dict[str, Any], training: bool):
    model, batch = tiny_model(**fields).train(training), random_batch([2, 0, 3], (64, 64))
    model.criterion.empty_weight[:3] = WEIGHTS[:3]
    losses = []
    for counts in (None, model.count_global_batch([batch["class_labels"]])):
        torch.manual_seed(0)
        losses.append(model(**batch, global_batch=counts).loss_dict)
    assert losses[0].keys() == losses[1].keys()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("surplus", [False, True])
def test_class_weights_and_passes_of_different_sizes_give_the_loss_of_one_batch(surplus: bool):
    """Segments without a query are no exception while all classes weigh the same."""
    model = tiny_model(pilot_groups=2, pilot_mask_noise="none", pilot_label_noise_ratio=0.0).double().train()
    if not surplus:
        model.criterion.empty_weight[:3] = WEIGHTS[:3]
    whole = random_batch([8 if surplus else 2, 0, 3], (64, 64))
    whole["pixel_values"] = whole["pixel_values"].double()
    parts = [{name: values[part] for name, values in whole.items()} for part in (slice(0, 1), slice(1, 3))]
    with same_points_everywhere():
        expected = model(**whole).loss
        counts = model.count_global_batch([part["class_labels"] for part in parts])
        losses = [model(**part, global_batch=counts).loss for part in parts]
        without_counts = [model(**part).loss for part in parts]
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-6, atol=0)
    assert (torch.stack(without_counts).mean() - expected).abs() > 1e-4 * expected


class TrainerOfWholeSteps(Trainer):
    """Transformers' Trainer with the counts of each step."""

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> tuple[list[dict[str, Any]], Any]:
        batches, rest = super().get_batch_samples(*arguments, **keywords)
        counts = self.model.count_global_batch([batch["class_labels"] for batch in batches])
        return [{**batch, "global_batch": counts} for batch in batches], rest


def test_a_trainer_can_pass_the_counts_of_its_steps(tmp_path):
    batch = random_batch([2, 0, 3, 1], (64, 64))
    scenes = [{name: values[index] for name, values in batch.items()} for index in range(4)]

    def collate(some: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: [scene[name] for scene in some] for name in batch}
        return columns | {"pixel_values": torch.stack(columns["pixel_values"])}

    settings = {
        "max_steps": 1,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    model = tiny_model(pilot_mask_noise="none", pilot_label_noise_ratio=0.0)
    trained = []
    for size, trainer_class in ((4, Trainer), (1, TrainerOfWholeSteps)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        arguments = TrainingArguments(str(tmp_path), **settings, **quiet, **sizes)
        trainer = trainer_class(copy.deepcopy(model), arguments, collate, scenes)
        with same_points_everywhere():
            trainer.train()
        trained.append(dict(trainer.model.named_parameters()))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=1e-3, atol=1e-6, msg=name)
