"""DeepSpeed, ZeRO stages 1 and 2: weights are whole on each process; gradients and the optimiser's state lie in parts.

DeepSpeed accumulates and clips gradients itself, and lays the parameters of a group one after another into a flat tensor, of which
each process updates a part. Here its settings come from the recipe, and the parts of the optimiser's state become whole tensors by
the names of parameters, as `training.sharded_weights` describes them, and parts again: a checkpoint is the same with and without it.

Gathering parts is work of all processes: each must call these functions, in the same order. DeepSpeed itself is imported only here,
and only when it is in use.
"""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from training.arguments import RecipeError, TrainingArguments

LAST_STAGE = 2
Engine = Any  # deepspeed.DeepSpeedEngine, which need not be installed
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW; they have the shape of their parameter


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether Accelerate is configured for DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure_deepspeed(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Give DeepSpeed the settings of the recipe, whatever the file of Accelerate says about them.

    Weights stay float32; with `mixed_precision: bf16` the forward pass runs under autocast, as without DeepSpeed.

    Raises:
        RecipeError: it is configured for what this program cannot save or has not been tried with.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    way_out = "Use `--config_file training/accelerate/deepspeed_zero2.yaml`, or `fsdp.yaml` where weights must lie in parts too."
    if not 1 <= zero["stage"] <= LAST_STAGE:
        raise RecipeError(
            f"This program trains with stages 1 and 2 of ZeRO, and `zero_stage` is {zero['stage']}. {way_out}"
        )
    if any((zero.get(f"offload_{kind}") or {}).get("device") in ("cpu", "nvme") for kind in ("optimizer", "param")):
        raise RecipeError(f"This program cannot save what DeepSpeed offloads from the accelerator. {way_out}")
    if arguments.mixed_precision == "fp16":
        raise RecipeError("With DeepSpeed, `mixed_precision` must be bf16 or no, got fp16.")
    config["train_micro_batch_size_per_gpu"] = arguments.batch_size
    config["gradient_accumulation_steps"] = arguments.gradient_accumulation_steps
    config["gradient_clipping"] = arguments.max_gradient_norm or 0.0  # 0 is: not at all
    config["fp16"] = {"enabled": False}
    config["bf16"] = {"enabled": False}  # it would round the weights
    if arguments.mixed_precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def refresh_optimizer(engine: Engine) -> None:
    """Let the optimiser go on from the weights of the model, which were loaded; it has a copy of its part."""
    engine.optimizer.refresh_fp32_params()


def gather_optimizer_state(engine: Engine, accelerator: Accelerator) -> dict[str, Any]:
    """Whole state of the optimiser, on the CPU of the first process; nothing on the others."""
    _begin_state(engine)
    state: dict[str, dict[str, Tensor]] = {}
    groups = []
    for group, own_part, parameters in _groups(engine):
        step = engine.optimizer.optimizer.state[own_part]["step"]
        for name, parameter in parameters.items():
            moments = {moment: _library().safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if accelerator.is_main_process:
                state[name] = {"step": step.clone().cpu(), **{key: value.cpu() for key, value in moments.items()}}
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": list(parameters)})
    return {"state": state, "param_groups": groups} if accelerator.is_main_process else {}


def load_optimizer_parts(engine: Engine, state: Mapping[str, Any]) -> None:
    """Set the optimiser's state; each process takes its parts.

    Args:
        engine: the model as prepared by the accelerator.
        state: of an optimiser whose groups hold the same parameters, the same on every process.

    Raises:
        KeyError: a parameter has no state.
        ValueError: the groups hold other parameters.
    """
    _begin_state(engine)
    for (group, own_part, parameters), saved in zip(_groups(engine), state["param_groups"], strict=True):
        if set(saved["params"]) != set(parameters):
            raise ValueError("the optimiser's groups hold other parameters")
        group |= {
            key: tuple(value) if isinstance(group.get(key), tuple) else value
            for key, value in saved.items()
            if key != "params"
        }
        for name, parameter in parameters.items():
            for moment in MOMENTS:
                value = state["state"][name][moment].to(parameter.device, torch.float32)
                _library().safe_set_full_optimizer_state(parameter, value, moment)
        steps = {float(state["state"][name]["step"]) for name in parameters}
        engine.optimizer.optimizer.state[own_part]["step"].fill_(max(steps))


def _groups(engine: Engine) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, nn.Parameter]]]:
    """For each group: its settings, this process's part of the flat tensor, and its parameters by name."""
    optimizer = engine.optimizer
    for group, own_part, members in zip(
        optimizer.param_groups, optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
    ):
        own = {id(parameter) for parameter in members}
        parameters = {name: weight for name, weight in engine.module.named_parameters() if id(weight) in own}
        yield group, own_part, parameters


def _begin_state(engine: Engine) -> None:
    """Let DeepSpeed find the state of each parameter, that in which AdamW begins if it has made no step yet."""
    inner: Optimizer = engine.optimizer.optimizer
    for _, own_part, parameters in _groups(engine):
        if not inner.state[own_part]:
            inner.state[own_part] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{moment: torch.zeros_like(own_part) for moment in MOMENTS},
            }
        # DeepSpeed itself does this after the step of the first group, when the others have no state.
        _library().lazy_init_hp_params_optimizer_state(list(parameters.values()), own_part, inner.state)


def _library() -> ModuleType:
    import deepspeed.utils  # noqa: PLC0415 - need not be installed, and takes seconds

    return deepspeed.utils
