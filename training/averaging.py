"""Exponential moving averages of weights, which often score better than the weights of the last step.

    average = decay * average + (1 - decay) * weights      after each optimiser step

At the beginning the decay is lower, so that random first weights are soon forgotten.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The averages of all parameters of a model, in float32 or more precise.

    Buffers, such as the statistics of batch norms, are not averaged: a model that takes the averages keeps its own.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_steps: int = 0) -> None:
        """Begin with the weights as they are.

        Args:
            model: without wrappers; later calls get one with parameters of the same names.
            decay: share of the average that a step leaves, in [0, 1).
            warmup_steps: the decay of step t, counted from 1, is at most t / (t + warmup_steps).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}. 0.999 averages about 1000 steps.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}.")
        self.decay = decay
        self.warmup_steps = warmup_steps
        self._averages = {name: _widen(parameter).clone() for name, parameter in model.named_parameters()}

    def decay_at(self, step: int) -> float:
        """Decay of a step, counted from 1."""
        return min(self.decay, step / (step + self.warmup_steps))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        parameters = dict(model.named_parameters())
        weights = [_widen(parameters[name]) for name in self._averages]
        get_ema_multi_avg_fn(self.decay_at(step))(list(self._averages.values()), weights, None)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights with their averages."""
        _copy(self._averages, model)

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """In this block the model has the averages; afterwards its weights again, bit by bit."""
        with other_weights(model, self._averages):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the parameters, not copied."""
        return dict(self._averages)


@contextmanager
def other_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In this block the model has these weights, by the names of its parameters; afterwards its own again, bit by bit."""
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        _copy(weights, model)
        yield
    finally:
        _copy(own, model)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def _widen(parameter: Tensor) -> Tensor:
    """A small part of a weight of few bits would vanish in its average."""
    parameter = parameter.detach()
    return parameter.float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter
