"""Two processes that train together give the loss and the gradients of one process with the whole batch.

The processes are started once for all tests of this file, run everything there is to run, and leave their results in a file each.
Points are the same for every row, image and process, and there is no noise, so that results can be compared at all.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from mpformer_hf import MPFormerForUniversalSegmentation
from mpformer_hf.target_checks import check_targets
from tests.factories import random_batch, tiny_model

NUM_PROCESSES = 2
SECONDS_TO_WAIT = 200
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
CASES = [pytest.param(config, batch, id=f"{config}-{batch}") for config in CONFIGS for batch in BATCHES]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs the gloo backend of torch.distributed"),
]

Results = dict[str, Any]


# -------------------------------------------------------------------------------------------------- in every process


@contextmanager
def same_points_everywhere() -> Iterator[None]:
    """`torch.rand` gives every row the same points, whatever the number of rows."""
    draw = torch.rand

    def repeated(num_rows: int, num_points: int, two: int, **keywords) -> Tensor:
        points = draw(1, num_points, two, generator=torch.Generator().manual_seed(num_points), **keywords)
        return points.expand(num_rows, -1, -1).clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", repeated)
        yield


def make_model(**fields) -> MPFormerForUniversalSegmentation:
    """Without noise, in double precision: no attention mask depends on the rounding of another batch size."""
    model = tiny_model(pilot_mask_noise="none", pilot_label_noise_ratio=0.0, **fields).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # some begin at zero, and then others have no gradient
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def cut_batch(name: str, rank: int, num_processes: int) -> Results:
    """The part of a batch that belongs to one of the processes."""
    batch = random_batch(BATCHES[name], SIZE)
    own = slice(rank * 4 // num_processes, (rank + 1) * 4 // num_processes)
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


def train_all(rank: int, num_processes: int) -> Results:
    """Every batch of every config. An unused parameter would make DDP fail in the step after."""
    results = {}
    for config, fields in CONFIGS.items():
        model = make_model(**fields).train()
        trained = DistributedDataParallel(model) if num_processes > 1 else model
        for batch in BATCHES:
            results[config, batch] = train(trained, batch, rank, num_processes)
    return results


def count_masks(num_masks: int, *, training: bool) -> float:
    """Divisor of the mask losses for one image with that many masks."""
    model = make_model().train(training)
    masks, labels = [torch.zeros(num_masks, *SIZE, dtype=torch.bool)], [torch.zeros(num_masks, dtype=torch.int64)]
    targets = check_targets(torch.zeros(1, 3, *SIZE), None, masks, labels, 3)
    return model.criterion._count_masks(targets, torch.device("cpu")).item()


def evaluate(rank: int, *, with_labels: bool) -> float | None:
    batch = cut_batch("even", rank, NUM_PROCESSES)
    if not with_labels:
        batch = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad(), same_points_everywhere():
        loss = make_model().eval()(**batch).loss
    return None if loss is None else loss.item()


def run_process(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine need not resolve
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=timedelta(seconds=SECONDS_TO_WAIT // 2),
    )
    results = {
        "trained": train_all(rank, NUM_PROCESSES),
        "num_masks": count_masks((4, 12)[rank], training=True),
        "num_masks_of_one_segment": count_masks((1, 0)[rank], training=True),
        "num_masks_in_evaluation": count_masks((4, 12)[rank], training=False),
        "evaluated": evaluate(rank, with_labels=rank == 0),
    }
    distributed.barrier()
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- in the test


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Results of both processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    processes = multiprocessing.spawn(run_process, args=(folder,), nprocs=NUM_PROCESSES, join=False)
    end = time.monotonic() + SECONDS_TO_WAIT
    try:
        while not processes.join(timeout=1.0):  # raises what a process has raised
            assert time.monotonic() < end, f"Two processes did not finish within {SECONDS_TO_WAIT} seconds."
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.fixture(scope="module")
def one_process() -> Results:
    """The whole batch in this process."""
    return train_all(0, 1)


@pytest.mark.parametrize(("config", "batch"), CASES)
def test_the_average_loss_is_that_of_the_whole_batch(
    config: str, batch: str, two_processes: list[Results], one_process: Results
):
    whole = one_process[config, batch]
    parts = [results["trained"][config, batch] for results in two_processes]
    assert sum(part["loss"] for part in parts) / NUM_PROCESSES == pytest.approx(whole["loss"], rel=1e-5)
    for part in parts:
        assert set(part["terms"]) == set(whole["terms"])
    for name, value in whole["terms"].items():
        average = sum(part["terms"][name] for part in parts) / NUM_PROCESSES
        assert average == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("config", "batch"), CASES)
def test_gradients_are_those_of_the_whole_batch(
    config: str, batch: str, two_processes: list[Results], one_process: Results
):
    whole = one_process[config, batch]["gradients"]
    for results in two_processes:
        gradients = results["trained"][config, batch]["gradients"]
        assert set(gradients) == set(whole)
        for name, expected in whole.items():
            scale = max(expected.abs().max().item(), 1e-3)
            torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("batch", [batch for batch in BATCHES if batch != "nothing_at_all"])
def test_gradients_are_not_zero(batch: str, one_process: Results):
    """Otherwise the comparison above would say nothing."""
    for config in CONFIGS:
        zero = [name for name, grad in one_process[config, batch]["gradients"].items() if not grad.any()]
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
    for results in (one_process, *(results["trained"] for results in two_processes)):
        assert {
            config: {batch: results[config, batch]["num_slots"] for batch in BATCHES} for config in CONFIGS
        } == expected


def test_evaluation_with_labels_on_one_process_waits_for_nobody(two_processes: list[Results]):
    """That both processes came to an end says that nothing hung; the loss is that of a process alone."""
    alone = evaluate(0, with_labels=True)
    assert two_processes[0]["evaluated"] == pytest.approx(alone, rel=1e-5)
    assert two_processes[1]["evaluated"] is None
