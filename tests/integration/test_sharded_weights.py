"""Weights in parts on two processes (FSDP2) train, are saved and are loaded like whole ones on one process.

The processes are started once for all tests of this file. Accelerate shards on accelerators alone, so its state is told that there
are some; all that follows, gloo and CPU included, is real.
"""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.factories import random_batch, random_images, tiny_model
from tests.process_groups import needs_gloo, run_processes, same_points_everywhere
from training.averaging import WeightAverage
from training.sharded_weights import (
    full_model_state,
    full_optimizer_state,
    full_tensors,
    is_sharded,
    load_model_state,
    load_optimizer_state,
    load_tensors,
    plain_model,
)

NUM_PROCESSES = 2
SIZE = (64, 64)
STEPS = ((1, 0, 5, 1), (4, 3, 0, 0))  # segments of the four images of each step; the first process has the first two
LEAVES = ["Embedding", "CrossAttention", "LayerNorm"]
TRAINED = ("class_predictor.weight", "model.transformer_module.queries_features.weight")
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}  # losses are in single precision

pytestmark = [pytest.mark.slow, pytest.mark.proof, needs_gloo]

State = dict[str, Any]


def copy_of(state: Any) -> Any:
    """What a state is now: tensors that need not be gathered are those of the model and the optimiser."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: copy_of(value) for key, value in state.items()}
    return [copy_of(value) for value in state] if isinstance(state, list) else state


class Training:
    """A model, two groups of parameters, averages, and steps that are the same on one process and on several."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        model = tiny_model(pilot_groups=2, pilot_mask_noise="none", pilot_label_noise_ratio=0.0).double().train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained[0::2], "initial_lr": 0.01}, {"params": trained[1::2], "weight_decay": 0.0}]
        # With a small epsilon, the sign of gradients that are zero but for rounding would decide.
        self.model, self.optimizer = accelerator.prepare(model, AdamW(groups, lr=0.01, eps=0.1))
        self.average = WeightAverage(accelerator.unwrap_model(self.model), 0.9)

    def step(self, index: int, num_passes: int = 1) -> None:
        """Take a step with this process's images, cut into several forward passes."""
        accelerator, num_processes = self.accelerator, self.accelerator.num_processes
        whole = random_batch(STEPS[index], SIZE, seed=index)
        whole["pixel_values"] = whole["pixel_values"].double()
        num_parts = num_processes * num_passes
        parts = [
            slice(part * 4 // num_parts, (part + 1) * 4 // num_parts)
            for part in range(num_passes * accelerator.process_index, num_passes * (accelerator.process_index + 1))
        ]
        batches = [{name: values[part] for name, values in whole.items()} for part in parts]
        counts = accelerator.unwrap_model(self.model).count_global_batch([batch["class_labels"] for batch in batches])
        for number, batch in enumerate(batches):
            waits = number < num_passes - 1
            with same_points_everywhere(), accelerator.no_sync(self.model) if waits else nullcontext():
                loss = self.model(**batch, global_batch=counts if num_parts > 1 else None).loss
                accelerator.backward(loss / num_passes)
        accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(accelerator.unwrap_model(self.model), index + 1)

    def gather(self) -> State:
        """Everything that a checkpoint needs, whole."""
        return copy_of(
            {
                "model": full_model_state(self.model, self.accelerator),
                "optimizer": full_optimizer_state(self.model, self.optimizer, self.accelerator),
                "average": full_tensors(self.average.state_dict(), self.accelerator),
            }
        )

    def load(self, state: State) -> None:
        load_model_state(self.model, state["model"], self.accelerator)
        load_optimizer_state(self.model, self.optimizer, state["optimizer"], self.accelerator)
        load_tensors(self.average.state_dict(), state["average"])


# -------------------------------------------------------------------------------------------------- in every process


def make_sharding_accelerator(rank: int) -> Accelerator:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_PROCESSES),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # asked for, and not used: the group is there
    }
    PartialState(cpu=True)
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    return Accelerator(cpu=True, fsdp_plugin=divide_into(None))


def divide_into(kinds: list[str] | None) -> FullyShardedDataParallelPlugin:
    """Modules of these classes are gathered one by one; `None` leaves the choice to the model."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=kinds
    )


def describe(model: nn.Module, plain: nn.Module, rank: int) -> State:
    """What the plain model of a sharded one is and predicts; the first process runs it alone."""
    images = random_images(2, SIZE).double()
    with torch.no_grad():
        sharded = model.eval()(images).masks_queries_logits
        alone = plain.eval()(images).masks_queries_logits if rank == 0 else sharded
    model.train()
    return {"class": type(plain), "is_sharded": is_sharded(plain), "difference": (alone - sharded).abs().max().item()}


def run_process(rank: int, folder: Path) -> State:
    """What each of the two processes does."""
    accelerator = make_sharding_accelerator(rank)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, NUM_PROCESSES)
    accelerator.state.fsdp_plugin = divide_into(LEAVES)
    training = Training(accelerator)
    results: State = {"class": type(training.model).__name__, "is_sharded": is_sharded(training.model)}
    results["parts"] = sum(isinstance(module, FSDPModule) for module in training.model.modules())
    training.step(0, num_passes=2)
    results["after_first"] = training.gather()
    training.step(1)
    results["after_second"] = training.gather()
    random_state = torch.get_rng_state()
    with training.average.used_by(accelerator.unwrap_model(training.model)):
        results["with_average"] = copy_of(full_model_state(training.model, accelerator))
    plain = plain_model(training.model, accelerator)
    results["drew_random_numbers"] = not torch.equal(torch.get_rng_state(), random_state)
    results["plain"] = describe(training.model, plain, rank)

    accelerator.free_memory()  # it compares the gradients of all models that it knows
    accelerator.state.fsdp_plugin = divide_into(None)
    other = Training(accelerator)
    results["other_parts"] = sum(isinstance(module, FSDPModule) for module in other.model.modules())
    other.load(torch.load(folder / "one_process.pt", weights_only=True))
    results["loaded"] = other.gather()
    other.step(1)
    results["loaded_after_second"] = other.gather()
    return results


# ------------------------------------------------------------------------------------------------------- in the test


def make_training() -> Training:
    return Training(Accelerator(cpu=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded_weights")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> list[State]:
    """After each step, with whole weights and the whole batch."""
    training, states = make_training(), []
    for index in range(len(STEPS)):
        training.step(index)
        states.append(training.gather())
    torch.save(states[0], folder / "one_process.pt")
    return states


@pytest.fixture(scope="module")
def two_processes(folder: Path, one_process: list[State]) -> list[State]:
    assert one_process  # its file is there
    return run_processes(run_process, folder, NUM_PROCESSES)


def assert_same(state: State, expected: State, **tolerances: float) -> None:
    """Tensors are close, or equal without tolerances; all other values, and all names, are equal."""
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    assert state["model"].keys() == expected["model"].keys()
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    torch.testing.assert_close(state["model"], expected["model"], **tolerances)
    torch.testing.assert_close(state["optimizer"]["state"], expected["optimizer"]["state"], **tolerances)
    torch.testing.assert_close(state["average"], expected["average"], **tolerances)


def test_the_model_really_lies_in_parts(two_processes: list[State]):
    for results in two_processes:
        assert results["class"] == "FSDPMPFormerForUniversalSegmentation"
        assert results["is_sharded"]
        assert results["parts"] > 15  # leaves too: their weights are not used outside of the call of their module
        assert results["other_parts"] == 3  # backbone with pixel decoder, transformer decoder, the rest


def test_two_processes_with_parts_train_like_one_with_whole_weights(
    one_process: list[State], two_processes: list[State]
):
    for index, name in enumerate(("after_first", "after_second")):
        assert_same(two_processes[0][name], one_process[index], **ROUNDING)
    moved = one_process[1]["model"], tiny_model(pilot_groups=2).double().state_dict()
    assert not torch.equal(*(state["class_predictor.weight"] for state in moved))


def test_what_one_process_has_saved_is_loaded_into_parts_bit_by_bit(
    one_process: list[State], two_processes: list[State]
):
    assert_same(two_processes[0]["loaded"], one_process[0])
    assert_same(two_processes[0]["loaded_after_second"], one_process[1], **ROUNDING)


def test_what_two_processes_have_saved_is_loaded_into_whole_weights_bit_by_bit(two_processes: list[State]):
    training = make_training()
    training.load(two_processes[0]["after_first"])
    assert_same(training.gather(), two_processes[0]["after_first"])
    training.step(1)
    assert_same(training.gather(), two_processes[0]["after_second"], **ROUNDING)


def test_averages_take_the_place_of_weights_in_parts(two_processes: list[State]):
    results = two_processes[0]
    for name, average in results["after_second"]["average"].items():
        assert torch.equal(results["with_average"][name], average)
        assert name not in TRAINED or not torch.equal(average, results["after_second"]["model"][name])


def test_only_the_first_process_holds_the_whole(two_processes: list[State]):
    assert two_processes[0]["after_first"]["model"]
    for name in ("after_first", "after_second", "loaded"):
        assert two_processes[1][name] == {"model": {}, "optimizer": {}, "average": {}}


def test_the_plain_model_of_a_sharded_one_runs_alone_and_predicts_the_same(two_processes: list[State]):
    for results in two_processes:
        plain = results["plain"]
        assert plain["class"] is MPFormerForUniversalSegmentation
        assert not plain["is_sharded"]
        assert plain["difference"] < 1e-9
        assert not results["drew_random_numbers"]


def test_a_model_that_is_not_sharded_is_its_own_plain_model():
    training = make_training()
    assert not is_sharded(training.model)
    assert plain_model(training.model, training.accelerator) is training.model
