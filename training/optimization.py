"""What is optimised, and how fast: groups of parameters, and the learning rate of each step."""

from collections import defaultdict
from typing import Any

from accelerate import Accelerator
from torch import nn

from training.arguments import TrainingArguments

POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "position_embeddings")


def make_parameter_groups(
    model: nn.Module, arguments: TrainingArguments, num_images: int | None = None
) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate and weight decay.

    Args:
        model: without wrappers.
        arguments: of the training.
        num_images: in a step, for `reference_batch_size`; `None` leaves the learning rate as it is.

    The backbone has a learning rate of its own. Norms, embeddings (`nn.Embedding`) and position tables are not decayed;
    biases, and the level embedding of the pixel decoder, which is a plain parameter, are, as in the original.
    """
    learning_rate = scaled_learning_rate(arguments, num_images)
    backbone_factor = arguments.backbone_factor
    backbone = {id(parameter) for parameter in model.get_submodule("model.pixel_level_module.encoder").parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    seen: set[int] = set()
    for module in model.modules():
        # Backbones bring norms of their own, which are no subclasses of PyTorch's.
        is_exempt = isinstance(module, nn.Embedding) or "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rate = learning_rate * (backbone_factor if id(parameter) in backbone else 1.0)
            decay = 0.0 if is_exempt or name in POSITION_TABLES else arguments.weight_decay
            groups[rate, decay].append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def images_per_step(arguments: TrainingArguments, accelerator: Accelerator) -> int:
    """Images that all processes together take for an optimiser step."""
    return arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes


def scaled_learning_rate(arguments: TrainingArguments, num_images: int | None) -> float:
    """The highest learning rate, for so many images in a step (Goyal et al. 2017: in proportion)."""
    if arguments.reference_batch_size is None or num_images is None:
        return arguments.learning_rate
    return arguments.learning_rate * num_images / arguments.reference_batch_size


def learning_rate_factor(step: int, arguments: TrainingArguments) -> float:
    """Share of the highest learning rate in a step, counted from 0."""
    warmup = min(1.0, (step + 1) / arguments.warmup_steps) if arguments.warmup_steps else 1.0
    if arguments.schedule == "poly":
        return warmup * (1 - step / arguments.max_steps) ** arguments.schedule_power
    milestones_passed = sum(step >= milestone for milestone in arguments.schedule_milestones)
    return warmup * arguments.schedule_factor**milestones_passed
