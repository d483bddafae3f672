"""Two processes with DeepSpeed (ZeRO stage 2) train, save and go on like two without it.

All runs are made once, by the same two processes. Accelerate takes DeepSpeed on accelerators alone, so its state is told that there are some;
all that follows, gloo and CPU included, is real.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, is_deepspeed_available

from tests.integration.test_training import RECIPE
from tests.process_groups import needs_gloo, run_processes
from training.arguments import RecipeError, parse_arguments
from training.checkpoints import CheckpointFolder
from training.preparation import prepare_run
from training.progress import MEASURED
from training.sharded_weights import full_model_state, full_optimizer_state

NUM_PROCESSES = 2
HALF, STEPS = 2, 4
SETTINGS = (
    *("--max_steps", str(STEPS), "--save_every", str(HALF), "--keep_checkpoints", "2", "--logging_steps", "1"),
    *("--gradient_accumulation_steps", "2", "--max_gradient_norm", "0.5"),
    *("--average_decay", "0.9", "--evaluate", "false"),
)
ROUNDING = {"rtol": 2e-3, "atol": 2e-5}  # sums in another order, in single precision
# Biases in front of a norm have no gradient but rounding, which Adam follows as fast as others; a step is up to 1e-3.
NOISE = 3e-4

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
    pytest.mark.skipif(not is_deepspeed_available(), reason="needs deepspeed: pip install deepspeed"),
]

State = dict[str, Any]


# -------------------------------------------------------------------------------------------------- in every process


def choose(kind: DistributedType, stage: int = 2) -> None:
    """Let the next run be distributed in this way, with the numbers of other recipes in the configuration."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    is_deepspeed = kind == DistributedType.DEEPSPEED
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": str(is_deepspeed).lower(),
        "ACCELERATE_USE_CPU": str(not is_deepspeed).lower(),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_GRADIENT_CLIPPING": "7.0",
    }
    PartialState(cpu=True)
    PartialState._shared_state |= {"distributed_type": kind, "device": torch.device("cpu")}


def train_in(folder: Path, *words: str) -> State:
    """Train, or go on; returns what a checkpoint would hold at the end, and the log."""
    run = prepare_run(
        parse_arguments([str(folder.parent / "tiny.yaml"), "--output_dir", str(folder), *SETTINGS, *words])
    )
    run.train_steps()
    network = run.accelerator.unwrap_model(run.model)
    state = {
        "wrapper": type(run.model).__name__,
        "model": full_model_state(run.model, run.accelerator),
        "optimizer": full_optimizer_state(run.model, run._optimizer, run.accelerator),
        "average": run._average.state_dict(),
        "own": {name: weight.detach().clone() for name, weight in network.named_parameters()},
        "log": [{key: value for key, value in line.items() if key not in MEASURED} for line in run.log],
        "began_at": 0 if run.checkpoint is None else run.checkpoint.progress.step,
    }
    run.accelerator.wait_for_everyone()
    return state


def go_on_from_half(folder: Path, rank: int, name: str) -> State:
    """Go on, in another folder, from the first checkpoint of a run."""
    copied = CheckpointFolder(folder / name).path
    if rank == 0:
        step = f"step-{HALF:08d}"
        shutil.copytree(CheckpointFolder(folder / name.split("_", maxsplit=1)[0]).path / step, copied / step)
    torch.distributed.barrier()
    return train_in(folder / name)


def run_process(rank: int, folder: Path) -> State:
    """What each of the two processes does."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_PROCESSES),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # asked for, and not used: the group is there
        "DS_ACCELERATOR": "cpu",
    }
    import deepspeed.ops  # noqa: PLC0415 - need not be installed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    results: State = {}
    choose(DistributedType.MULTI_CPU)
    results["ddp"] = train_in(folder / "ddp")
    choose(DistributedType.DEEPSPEED)
    results["zero"] = train_in(folder / "zero")
    choose(DistributedType.DEEPSPEED)
    results["zero_zero"] = go_on_from_half(folder, rank, "zero_zero")
    choose(DistributedType.DEEPSPEED)
    results["ddp_zero"] = go_on_from_half(folder, rank, "ddp_zero")
    choose(DistributedType.MULTI_CPU)
    results["zero_ddp"] = go_on_from_half(folder, rank, "zero_ddp")
    choose(DistributedType.DEEPSPEED)
    results["bf16"] = train_in(folder / "bf16", "--mixed_precision", "bf16")
    for name, stage, words in (("stage_3", 3, ()), ("fp16", 2, ("--mixed_precision", "fp16"))):
        choose(DistributedType.DEEPSPEED, stage)
        try:
            train_in(folder / name, *words)
        except RecipeError as error:
            results[name] = str(error)
    return results


# ------------------------------------------------------------------------------------------------------- in the test


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[State]:
    """What each process has returned."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "tiny.yaml").write_text(RECIPE)
    return run_processes(run_process, folder, NUM_PROCESSES)


def assert_same(state: State, expected: State, **tolerances: float) -> None:
    """Weights, averages, the optimiser's state and the log; equal without tolerances."""
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    assert state["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    for part in ("model", "average"):
        torch.testing.assert_close(
            state[part], expected[part], rtol=tolerances["rtol"], atol=NOISE if tolerances["atol"] else 0
        )
    torch.testing.assert_close(state["optimizer"]["state"], expected["optimizer"]["state"], **tolerances)
    for group, other in zip(state["optimizer"]["param_groups"], expected["optimizer"]["param_groups"], strict=True):
        assert set(group["params"]) == set(other["params"])
        for key in ("lr", "initial_lr", "weight_decay", "betas"):
            assert group[key] == other[key]
    assert len(state["log"]) == len(expected["log"]) == STEPS
    for line, other in zip(state["log"], expected["log"], strict=True):
        assert line.keys() == other.keys()
        for key in ("loss", "gradient_norm", "learning_rate"):
            assert line[key] == pytest.approx(other[key], rel=tolerances["rtol"], abs=tolerances["atol"])


def test_it_trains_clips_and_accumulates_like_processes_with_whole_optimisers(runs: list[State]):
    first = runs[0]
    assert (first["zero"]["wrapper"], first["ddp"]["wrapper"]) == ("DeepSpeedEngine", "DistributedDataParallel")
    assert_same(first["zero"], first["ddp"], **ROUNDING)
    assert all(line["gradient_norm"] > 0.5 for line in first["zero"]["log"])  # all were clipped


def test_a_run_goes_on_bit_by_bit_as_if_it_had_not_stopped(runs: list[State]):
    assert runs[0]["zero_zero"]["began_at"] == HALF
    assert_same(runs[0]["zero_zero"], runs[0]["zero"])


@pytest.mark.parametrize("name", ["ddp_zero", "zero_ddp"])
def test_a_run_may_go_on_with_it_or_without_it(runs: list[State], name: str):
    assert runs[0][name]["began_at"] == HALF
    assert_same(runs[0][name], runs[0]["ddp"], **ROUNDING)


def test_all_processes_have_the_same_weights(runs: list[State]):
    for name in ("zero", "zero_zero", "ddp_zero", "bf16"):
        for weight, other in zip(*(run[name]["own"].values() for run in runs), strict=True):
            assert torch.equal(weight, other)


def test_in_bfloat16_weights_stay_precise_and_the_forward_pass_does_not(runs: list[State]):
    bf16, zero = runs[0]["bf16"], runs[0]["zero"]
    assert all(weight.dtype == torch.float32 for weight in bf16["own"].values())
    assert bf16["log"][0]["loss"] != zero["log"][0]["loss"]
    assert bf16["log"][0]["loss"] == pytest.approx(zero["log"][0]["loss"], rel=0.02)


def test_what_was_not_tried_is_refused(runs: list[State]):
    assert "`zero_stage` is 3" in runs[0]["stage_3"]
    assert "must be bf16 or no" in runs[0]["fp16"]
