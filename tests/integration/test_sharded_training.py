"""The training program with weights in parts on two processes (FSDP2): it is stopped, goes on, and one process goes on from there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.integration.test_sharded_weights import make_sharding_accelerator
from tests.integration.test_train_on_formats import stop_after
from tests.integration.test_training import RECIPE
from tests.process_groups import needs_gloo, run_processes
from training import preparation
from training.arguments import parse_arguments
from training.preparation import prepare_run
from training.sharded_weights import is_sharded
from training.stopping import Stopped
from training.train import train

pytestmark = [pytest.mark.slow, needs_gloo]
STEPS = 4


def arguments_for(folder: Path) -> Any:
    recipe = folder / "tiny.yaml"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    settings = {
        "output_dir": folder / "out",
        "max_steps": STEPS,
        "evaluation_steps": 2,
        "save_every": 3,
        "average_decay": 0.5,
        "save_average": "beside",
        "gradient_accumulation_steps": 2,
    }
    return parse_arguments(
        [str(recipe), *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
    )


def train_in_parts(rank: int, folder: Path) -> dict[str, Any]:
    """Stop after the third step, go on to the end."""
    (folder / f"{rank}").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "Accelerator", lambda **options: make_sharding_accelerator(rank))
        run = prepare_run(arguments_for(folder))
        stop_after(run, 3)
        with pytest.raises(Stopped):
            run.train_steps()
        facts = {"is_sharded": is_sharded(run.model), "steps": run.checkpoints.steps()}
        run.accelerator.free_memory()
        AcceleratorState._reset_state()
        results = train(arguments_for(folder))
    return {**facts, "results": results}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    arguments_for(folder)  # writes the recipe
    return folder, run_processes(train_in_parts, folder)


def test_a_run_in_parts_is_stopped_goes_on_and_ends_with_a_whole_model(outcome):
    folder, processes = outcome
    assert [process["is_sharded"] for process in processes] == [True, True]
    assert [process["steps"] for process in processes] == [[3], [3]]
    assert processes[0]["results"]["scores"] == processes[1]["results"]["scores"]
    weights = load_file(folder / "out" / "model.safetensors")
    averages = load_file(folder / "out" / "average" / "model.safetensors")
    assert weights.keys() == averages.keys()
    assert not torch.equal(weights["class_predictor.weight"], averages["class_predictor.weight"])
    assert (folder / "out" / "README.md").exists()
