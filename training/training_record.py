"""What is written down about a training: scores with all that they depend on, and the facts of the model card."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import transformers
from accelerate import Accelerator

import mpformer_hf
from mpformer_hf.model_facts import METRICS, TrainingRecord
from training.evaluation import headlines, name_classes
from training.folders import RECIPE_FILE
from training.optimization import images_per_step

if TYPE_CHECKING:
    from training.loop import TrainingRun


def summarise(
    run: "TrainingRun", scores: Mapping[str, Any], scores_of_average: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Collect the scores, as fractions, with all that they depend on."""
    assert run.validation_data is not None  # it was scored
    names = run.validation_data.id2label
    average = {} if scores_of_average is None else {"scores_of_average": name_classes(scores_of_average, names)}
    return {
        "dataset": run.arguments.dataset,
        "split": "validation",
        "num_images": len(run.validation_data),
        "task": run.arguments.task,
        "scores": name_classes(scores, names),
        **average,
        "steps": run.step,
        "weights_of_step": run.best_step or run.step,
        "training_seconds": round(run.seconds, 1),
        "num_processes": run.accelerator.num_processes,
        "device": run.accelerator.device.type,
        "settings": run.arguments.to_dict(),
        "versions": name_versions(),
    }


def name_versions() -> dict[str, str]:
    """Versions of everything that the result depends on."""
    return {
        "mpformer_hf": mpformer_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def record_training(run: "TrainingRun", seconds: float, scores: Mapping[str, Any] | None = None) -> TrainingRecord:
    """Collect for the model card what was set and measured; without `scores`, nothing is said about quality."""
    arguments, accelerator = run.arguments, run.accelerator
    last = next((line for line in reversed(run.log) if "loss" in line), None)
    return TrainingRecord(
        command=command_for(accelerator.num_processes),
        dataset=arguments.dataset,
        task=arguments.task,
        settings=hide_folders({k: v for k, v in arguments.to_dict().items() if k not in STATED_ELSEWHERE}),
        num_train_images=run.num_train_images,
        num_validation_images=0 if run.validation_data is None else len(run.validation_data),
        steps=run.step,
        images_per_step=images_per_step(arguments, accelerator),
        seconds=seconds,
        hardware=name_hardware(accelerator),
        versions=name_versions(),
        final_losses={} if last is None else {kind: last[kind] for kind in ("loss", *last["levels"])},
        scores={} if scores is None else metrics_of_card(headlines(arguments.task, scores)),
        start=arguments.model_name_or_path or "",
        backbone_start=arguments.backbone or "",
    )


STATED_ELSEWHERE = (
    "output_dir",
    "model_name_or_path",
    "backbone",
    # These change no weight.
    "save_every",
    "keep_checkpoints",
    "resume",
    "trackers",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "validation_pictures",
)


def hide_folders(settings: Any) -> Any:  # noqa: ANN401 - whatever a recipe may hold
    """Leave the last part of absolute paths: a card is for others, and how this machine is laid out is not."""
    if isinstance(settings, Mapping):
        return {name: hide_folders(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [hide_folders(value) for value in settings]
    return Path(settings).name if isinstance(settings, str) and Path(settings).is_absolute() else settings


def command_for(num_processes: int) -> str:
    """Command that repeats the training with the recipe that is saved beside the model."""
    if num_processes == 1:
        return f"python -m training.train {RECIPE_FILE}"
    return f"accelerate launch --num_processes {num_processes} training/train.py {RECIPE_FILE}"


def name_hardware(accelerator: Accelerator) -> str:
    """Say on how many of what the training ran."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    return f"{accelerator.num_processes} x {accelerator.device.type}, threads of PyTorch: {torch.get_num_threads()}"


def metrics_of_card(scores: Mapping[str, float]) -> dict[str, float]:
    """Name scores as model cards do, and leave out those that cards do not have."""
    named = {name.lower().replace(" ", "_"): value for name, value in scores.items()}
    return {name: value for name, value in named.items() if name in METRICS and value >= 0}
