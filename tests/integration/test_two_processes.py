"""Two processes that train together give the loss and the gradients of one process with the whole batch.

So do several forward passes of one optimiser step (gradient accumulation), in one process and in two.

The processes are started once for all tests of this file, run everything there is to run, and leave their results in a file each.
Points are the same for every row, image and process, and there is no noise, so that results can be compared at all.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpformer_hf import MPFormerForUniversalSegmentation
from mpformer_hf.target_checks import check_targets
from tests.factories import random_batch, tiny_model
from tests.process_groups import needs_gloo, run_processes, same_points_everywhere

NUM_PROCESSES = 2
SIZE = (64, 64)

CONFIGS: dict[str, dict[str, Any]] = {
    "without_piloting": {"mask_piloting": False},
    "two_groups": {"pilot_groups": 2},
    "budget": {"pilot_query_budget": 6},
}
# Segments of four images of one size; the first process has the first two. One model sees them one after the other.
BATCHES: dict[str, tuple[int, ...]] = {
    "even": (2, 1, 3, 2),
    "empty_process": (4, 3, 0, 0),
    "nothing_at_all": (0, 0, 0, 0),
    "uneven": (1, 0, 5, 1),
}
# What is trained in several passes: not all, to save time.
IN_PASSES = [
    (config, batch)
    for config in ("without_piloting", "two_groups")
    for batch in ("empty_process", "nothing_at_all", "uneven")
]
CASES = [pytest.param(config, batch, id=f"{config}-{batch}") for config in CONFIGS for batch in BATCHES]

pytestmark = [pytest.mark.slow, needs_gloo]

Results = dict[str, Any]


# -------------------------------------------------------------------------------------------------- in every process


def make_model(**fields) -> MPFormerForUniversalSegmentation:
    """Without noise, in double precision: no attention mask depends on the rounding of another batch size."""
    model = tiny_model(pilot_mask_noise="none", pilot_label_noise_ratio=0.0, **fields).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # some begin at zero, and then others have no gradient
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def cut_batch(name: str, part: int, num_parts: int) -> Results:
    """The part of a batch that belongs to one of the processes, or to one of the forward passes of all processes."""
    batch = random_batch(BATCHES[name], SIZE)
    own = slice(part * 4 // num_parts, (part + 1) * 4 // num_parts)
    return {key: values[own] for key, values in batch.items()} | {"pixel_values": batch["pixel_values"][own].double()}


def train(model: nn.Module, name: str, rank: int, num_processes: int) -> Results:
    """One step without an update."""
    batch = cut_batch(name, rank, num_processes)
    model.zero_grad()
    with same_points_everywhere():
        outputs = model(**batch, output_auxiliary_logits=True)
    outputs.loss.backward()
    slots = outputs.pilot_class_queries_logits
    parameters = (model.module if isinstance(model, DistributedDataParallel) else model).named_parameters()
    return {
        "loss": outputs.loss.item(),
        "terms": {key: value.item() for key, value in outputs.loss_dict.items()},
        "num_slots": 0 if slots is None else slots.shape[1],
        "gradients": {key: parameter.grad.clone() for key, parameter in parameters if parameter.requires_grad},
    }


def train_in_passes(model: nn.Module, name: str, rank: int, num_processes: int) -> Results:
    """The same with a forward pass for each image, whose gradients are added up."""
    num_passes = 4 // num_processes
    batches = [cut_batch(name, rank * num_passes + index, 4) for index in range(num_passes)]
    is_wrapped = isinstance(model, DistributedDataParallel)
    module = model.module if is_wrapped else model
    counts = module.count_global_batch([batch["class_labels"] for batch in batches])
    model.zero_grad()
    loss, terms = 0.0, {}
    for index, batch in enumerate(batches):
        waits = is_wrapped and index < num_passes - 1
        with same_points_everywhere(), model.no_sync() if waits else nullcontext():
            outputs = model(**batch, global_batch=counts)
            (outputs.loss / num_passes).backward()
        loss += outputs.loss.item() / num_passes
        terms = {key: terms.get(key, 0.0) + value.item() / num_passes for key, value in outputs.loss_dict.items()}
    gradients = {key: parameter.grad.clone() for key, parameter in module.named_parameters() if parameter.requires_grad}
    return {"loss": loss, "terms": terms, "gradients": gradients}


def train_all(rank: int, num_processes: int) -> dict[str, Results]:
    """Every batch of every config, as a whole and in passes. An unused parameter would make DDP fail in the step after."""
    results: dict[str, Results] = {"trained": {}, "trained_in_passes": {}}
    for config, fields in CONFIGS.items():
        model = make_model(**fields).train()
        trained = DistributedDataParallel(model) if num_processes > 1 else model
        for batch in BATCHES:
            results["trained"][config, batch] = train(trained, batch, rank, num_processes)
            if (config, batch) in IN_PASSES:
                results["trained_in_passes"][config, batch] = train_in_passes(trained, batch, rank, num_processes)
    return results


def count_masks(num_masks: int, *, training: bool) -> float:
    """Divisor of the mask losses for one image with that many masks."""
    model = make_model().train(training)
    masks, labels = [torch.zeros(num_masks, *SIZE, dtype=torch.bool)], [torch.zeros(num_masks, dtype=torch.int64)]
    targets = check_targets(torch.zeros(1, 3, *SIZE), None, masks, labels, 3)
    return model.criterion._count_masks(targets, torch.device("cpu")).item()


def count_unequal_passes(rank: int) -> str:
    """What a process is told when one has a batch more than the other."""
    labels = torch.zeros(2, dtype=torch.int64)
    try:
        make_model().count_global_batch([[labels]] * (rank + 1))
    except ValueError as error:
        return str(error)
    return ""


def evaluate(rank: int, *, with_labels: bool) -> float | None:
    batch = cut_batch("even", rank, NUM_PROCESSES)
    if not with_labels:
        batch = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad(), same_points_everywhere():
        loss = make_model().eval()(**batch).loss
    return None if loss is None else loss.item()


def run_process(rank: int, _: Path) -> Results:
    """What each of the two processes does."""
    return {
        **train_all(rank, NUM_PROCESSES),
        "refused": count_unequal_passes(rank),
        "num_masks": count_masks((4, 12)[rank], training=True),
        "num_masks_of_one_segment": count_masks((1, 0)[rank], training=True),
        "num_masks_in_evaluation": count_masks((4, 12)[rank], training=False),
        "evaluated": evaluate(rank, with_labels=rank == 0),
    }


# ------------------------------------------------------------------------------------------------------- in the test


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Results of both processes."""
    return run_processes(run_process, tmp_path_factory.mktemp("two_processes"), NUM_PROCESSES)


@pytest.fixture(scope="module")
def one_process() -> Results:
    """The whole batch in this process."""
    return train_all(0, 1)


def assert_loss_is_that_of_the_whole_batch(parts: list[Results], whole: Results) -> None:
    assert sum(part["loss"] for part in parts) / len(parts) == pytest.approx(whole["loss"], rel=1e-5)
    for part in parts:
        assert set(part["terms"]) == set(whole["terms"])
    for name, value in whole["terms"].items():
        average = sum(part["terms"][name] for part in parts) / len(parts)
        assert average == pytest.approx(value, rel=1e-4, abs=1e-6), name


def assert_gradients_are_those_of_the_whole_batch(parts: list[Results], whole: Results) -> None:
    for part in parts:
        gradients = part["gradients"]
        assert set(gradients) == set(whole["gradients"])
        for name, expected in whole["gradients"].items():
            scale = max(expected.abs().max().item(), 1e-3)
            torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(("config", "batch"), CASES)
def test_the_average_loss_is_that_of_the_whole_batch(
    config: str, batch: str, two_processes: list[Results], one_process: Results
):
    parts = [results["trained"][config, batch] for results in two_processes]
    assert_loss_is_that_of_the_whole_batch(parts, one_process["trained"][config, batch])


@pytest.mark.parametrize(("config", "batch"), CASES)
def test_gradients_are_those_of_the_whole_batch(
    config: str, batch: str, two_processes: list[Results], one_process: Results
):
    parts = [results["trained"][config, batch] for results in two_processes]
    assert_gradients_are_those_of_the_whole_batch(parts, one_process["trained"][config, batch])


@pytest.mark.parametrize(("config", "batch"), IN_PASSES)
def test_two_passes_on_each_of_two_processes_are_the_step_of_the_whole_batch(
    config: str, batch: str, two_processes: list[Results], one_process: Results
):
    parts = [results["trained_in_passes"][config, batch] for results in two_processes]
    assert_loss_is_that_of_the_whole_batch(parts, one_process["trained"][config, batch])
    assert_gradients_are_those_of_the_whole_batch(parts, one_process["trained"][config, batch])


@pytest.mark.parametrize(("config", "batch"), IN_PASSES)
def test_four_passes_on_one_process_are_the_step_of_the_whole_batch(config: str, batch: str, one_process: Results):
    parts = [one_process["trained_in_passes"][config, batch]]
    assert_loss_is_that_of_the_whole_batch(parts, one_process["trained"][config, batch])
    assert_gradients_are_those_of_the_whole_batch(parts, one_process["trained"][config, batch])


def test_processes_with_different_numbers_of_passes_are_told_so_together(two_processes: list[Results]):
    for results in two_processes:
        assert "equally many forward passes on every process, got 1, 2" in results["refused"]


@pytest.mark.parametrize("batch", [batch for batch in BATCHES if batch != "nothing_at_all"])
def test_gradients_are_not_zero(batch: str, one_process: Results):
    """Otherwise the comparison above would say nothing."""
    for config in CONFIGS:
        zero = [name for name, grad in one_process["trained"][config, batch]["gradients"].items() if not grad.any()]
        assert zero == []


def test_the_number_of_masks_is_summed_over_processes_and_divided_once(two_processes: list[Results]):
    """transformers' Mask2Former divides 4 and 12 masks by the number of processes twice: 4."""
    assert [results["num_masks"] for results in two_processes] == [8.0, 8.0]


def test_a_single_segment_is_divided_by_one_and_not_by_its_half(two_processes: list[Results]):
    assert [results["num_masks_of_one_segment"] for results in two_processes] == [1.0, 1.0]


def test_evaluation_counts_its_own_masks(two_processes: list[Results]):
    assert [results["num_masks_in_evaluation"] for results in two_processes] == [4.0, 12.0]


def test_both_processes_have_the_slots_of_the_image_with_the_most_segments(
    two_processes: list[Results], one_process: Results
):
    """Six queries of budget are 6 // 3 groups of 3, 6 // 4 of 4 and 6 // 5 of 5."""
    expected = {
        "without_piloting": {"even": 0, "empty_process": 0, "nothing_at_all": 0, "uneven": 0},
        "two_groups": {"even": 6, "empty_process": 8, "nothing_at_all": 0, "uneven": 10},
        "budget": {"even": 6, "empty_process": 4, "nothing_at_all": 0, "uneven": 5},
    }
    for results in (one_process, *two_processes):
        assert {
            config: {batch: results["trained"][config, batch]["num_slots"] for batch in BATCHES} for config in CONFIGS
        } == expected


def test_evaluation_with_labels_on_one_process_waits_for_nobody(two_processes: list[Results]):
    """That both processes came to an end says that nothing hung; the loss is that of a process alone."""
    alone = evaluate(0, with_labels=True)
    assert two_processes[0]["evaluated"] == pytest.approx(alone, rel=1e-5)
    assert two_processes[1]["evaluated"] is None
