"""A frozen batch norm is nn.BatchNorm2d in evaluation mode, without keeping its input."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mpformer_hf.frozen_batch_norm import FrozenBatchNorm2d
from tests.factories import tiny_model


def trained_norm(num_channels: int = 5) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(num_channels, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm(torch.randn(8, num_channels, 6, 7) * 3 + 1)
    return norm.eval()


@pytest.fixture
def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sequential(trained_norm(), nn.ReLU()))


@pytest.mark.parametrize("is_training", [True, False])
def test_outputs_and_gradients_are_those_of_a_batch_norm_in_evaluation_mode(network: nn.Sequential, is_training: bool):
    frozen = copy.deepcopy(network)
    FrozenBatchNorm2d.replace_in(frozen)
    frozen.train(is_training)
    maps = torch.randn(2, 3, 4, 9)
    results = []
    for model in (frozen, network.eval()):
        leaf = maps.clone().requires_grad_()
        output = model(leaf)
        results.append((output, *torch.autograd.grad(output.square().sum(), [leaf, *model.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(frozen(maps), network(maps))


def test_training_changes_no_statistics(network: nn.Sequential):
    FrozenBatchNorm2d.replace_in(network)
    before = copy.deepcopy(network.state_dict())
    network.train()(torch.randn(2, 3, 4, 9))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_state_dict_keeps_its_names_and_its_tensors(network: nn.Sequential):
    before = network.state_dict(keep_vars=True)
    FrozenBatchNorm2d.replace_in(network)
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not network[1][0].training


def test_classes_of_others_are_left_alone():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, maps: Tensor) -> Tensor:
            return super().forward(maps).relu()

    network = nn.Sequential(WithActivation(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    FrozenBatchNorm2d.replace_in(network)
    assert [type(module) for module in network] == [WithActivation, nn.BatchNorm2d, FrozenBatchNorm2d]


def test_the_backward_keeps_no_map(network: nn.Sequential):
    FrozenBatchNorm2d.replace_in(network)
    network.requires_grad_(False)
    kept: list[torch.Size] = []
    maps = torch.randn(2, 5, 64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        network[1][0](maps).sum().backward()
    assert kept
    assert all(shape.numel() <= 5 for shape in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_precision(network: nn.Sequential, dtype: torch.dtype):
    FrozenBatchNorm2d.replace_in(network)
    maps = torch.randn(2, 5, 4, 9, dtype=dtype, requires_grad=True)
    assert network[1][0](maps).dtype == dtype


@pytest.mark.parametrize("is_frozen", [True, False])
def test_models_have_them_when_the_configuration_says_so(is_frozen: bool):
    model = tiny_model(freeze_backbone_norm=is_frozen)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {isinstance(norm, FrozenBatchNorm2d) for norm in norms} == {is_frozen}
