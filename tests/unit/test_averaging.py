"""Averages of weights, against sums by hand."""

import pytest
import torch
from torch import nn

from training.averaging import WeightAverage


def make_model(*values: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(values, dtype=dtype))
    model.register_buffer("count", torch.tensor(0))
    return model


def set_weight(model: nn.Module, *values: float) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.tensor(values))


def test_each_step_leaves_the_decay_of_the_average_and_adds_the_rest_of_the_weights():
    model = make_model(8.0, 0.0)
    average = WeightAverage(model, decay=0.75)
    set_weight(model, 0.0, 4.0)
    average.update(model, step=1)
    assert average.state_dict()["weight"].tolist() == [6.0, 1.0]
    set_weight(model, 2.0, 1.0)
    average.update(model, step=2)
    assert average.state_dict()["weight"].tolist() == [5.0, 1.0]


def test_the_decay_rises_to_its_value():
    average = WeightAverage(make_model(0.0), decay=0.9, warmup_steps=3)
    assert [average.decay_at(step) for step in (1, 3, 9, 27, 1000)] == [0.25, 0.5, 0.75, 0.9, 0.9]
    assert WeightAverage(make_model(0.0), decay=0.9).decay_at(1) == 0.9


def test_a_warm_up_of_one_step_is_the_mean_of_all_weights_so_far():
    model = make_model(1.0)
    average = WeightAverage(model, decay=0.999, warmup_steps=1)
    for step, value in enumerate([4.0, 7.0, 20.0], start=1):
        set_weight(model, value)
        average.update(model, step)
    assert average.state_dict()["weight"].item() == pytest.approx((1 + 4 + 7 + 20) / 4, rel=1e-6)


@pytest.mark.parametrize(("decay", "warmup"), [(1.0, 0), (-0.1, 0), (0.9, -1)])
def test_values_that_average_nothing_are_refused(decay, warmup):
    with pytest.raises(ValueError, match="must"):
        WeightAverage(make_model(0.0), decay, warmup)
