"""Whole weights of models that lie in parts on several processes (FSDP2, `torch.distributed.fsdp.fully_shard`), and back.

All functions serve plain models, and models within DDP, too, and give the same form: what two processes with sharded weights have
written, one process with a plain model can read, and the other way round. Parameters are called by their names in the plain model;
an optimiser's state is {"state": {name: {...}}, "param_groups": [{"params": [names], ...}]}, which `torch.load` reads with
`weights_only=True`. What need not be gathered is not copied: on the CPU, it changes with the next step.

Gathering parts is work of all processes: each must call these functions, in the same order.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from training.deepspeed_state import gather_optimizer_state, is_deepspeed, load_optimizer_parts, refresh_optimizer

WHOLE_ON_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
WHOLE_ON_EACH = StateDictOptions(full_state_dict=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of the model lie in parts on several processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------------- gathering


def full_model_state(model: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """Whole weights and buffers, on the CPU of the first process; nothing on the others."""
    return get_model_state_dict(accelerator.unwrap_model(model), options=WHOLE_ON_FIRST)


def full_optimizer_state(
    model: nn.Module, optimizer: Optimizer | AcceleratedOptimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """Whole state of an optimiser, on the CPU of the first process; nothing on the others.

    One that has made no step yet gets the state in which it begins.
    """
    if is_deepspeed(accelerator):
        return gather_optimizer_state(model, accelerator)
    network = accelerator.unwrap_model(model)
    return get_optimizer_state_dict(network, _unwrap_optimizer(optimizer), options=WHOLE_ON_FIRST)


def full_tensors(tensors: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Whole tensors, such as averages of weights, on the CPU of the first process; nothing on the others."""
    whole = {}
    for name, tensor in tensors.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if accelerator.is_main_process:
            whole[name] = gathered.detach().cpu()
    return whole


def plain_model(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model without wrappers and with whole weights, on every process and its device.

    A sharded model must run on all processes at once; this one runs alone, for as many images as a process has, and can be saved. It
    takes the memory of one more model. A model that is not sharded is returned itself.
    """
    network = accelerator.unwrap_model(model)
    if not is_sharded(network):
        return network
    weights = get_model_state_dict(network, options=WHOLE_ON_EACH)
    plain_class = next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn at random, and replaced
        plain = plain_class(copy.deepcopy(network.config)).to(accelerator.device, network.dtype)
    plain.load_state_dict(weights, assign=True)
    return plain.train(network.training)


# ---------------------------------------------------------------------------------------------------------------- loading


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Set weights and buffers.

    Args:
        model: as prepared by the accelerator.
        state: whole tensors, the same on every process.
        accelerator: of this run.

    Raises:
        RuntimeError: names or shapes are those of another model.
    """
    set_model_state_dict(accelerator.unwrap_model(model), dict(state), options=WHOLE_ON_EACH)
    if is_deepspeed(accelerator):
        refresh_optimizer(model)


def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer | AcceleratedOptimizer, state: dict[str, Any], accelerator: Accelerator
) -> None:
    """Set the state of an optimiser, whose groups hold the same parameters; as of `load_model_state`."""
    if is_deepspeed(accelerator):
        load_optimizer_parts(model, state)
        return
    optimizer = _unwrap_optimizer(optimizer)
    tuples = {key for key, value in optimizer.param_groups[0].items() if isinstance(value, tuple)}
    set_optimizer_state_dict(accelerator.unwrap_model(model), optimizer, state, options=WHOLE_ON_EACH)
    for group in optimizer.param_groups:
        group |= {key: tuple(group[key]) for key in tuples}  # PyTorch makes lists of them


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, the same on every process, into tensors of the same names, which may lie in parts."""
    for name, tensor in tensors.items():
        whole = state[name].to(tensor.device, tensor.dtype)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
        tensor.copy_(whole)


def _unwrap_optimizer(optimizer: Optimizer | AcceleratedOptimizer) -> Optimizer:
    """The optimiser itself: its wrapper leaves out steps while gradients are accumulated."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
