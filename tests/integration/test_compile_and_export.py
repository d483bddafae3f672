"""`torch.compile` and `torch.export`: one graph in evaluation, equal results, and few graphs in training.

Backend "eager" runs the captured graphs as they are: what could break is the capture, and compilers are not ours to test.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.factories import random_batch, random_images, tiny_model

# Compiled code takes the plain operator, which sums in another order than the one for CPUs.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
SMALL = {"decoder_layers": 3}


@pytest.fixture(autouse=True)
def _no_graphs_left() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A compiler that counts the graphs it gets and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@torch.no_grad()
def assert_predictions_close(actual: Callable[..., Any], expected: nn.Module, images: Tensor) -> None:
    outputs, expected_outputs = actual(images), expected(images)
    assert outputs.keys() == expected_outputs.keys()
    for name in outputs:
        torch.testing.assert_close(outputs[name], expected_outputs[name], **ROUNDING)


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_evaluation_compiles_to_one_graph(backbone: str):
    model, graphs = tiny_model(backbone, **SMALL), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    assert_predictions_close(compiled, model, random_images(2, (64, 96)))
    assert graphs.count == 1
    assert_predictions_close(compiled, model, random_images(2, (64, 96), seed=1))
    assert graphs.count == 1


def test_one_graph_can_return_everything_that_can_be_asked_for():
    model = tiny_model(output_hidden_states=True, output_attentions=True, output_auxiliary_logits=True, **SMALL)
    compiled = torch.compile(model, fullgraph=True, backend=Graphs())
    assert_predictions_close(compiled, model, random_images(1, (64, 64)))


# The compiler itself looks at the gradient of a tensor that has none, at the seam between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_compiled_training_has_equal_losses_and_gradients_without_a_graph_for_every_number_of_segments():
    plain, graphs = tiny_model(**SMALL).train(), Graphs()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "sampling_offsets" in name:
                weight.add_(0.1 * torch.randn_like(weight))  # at first samples lie on cells, where gradients jump
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend=graphs)
    counts = []
    for num_segments in ([2, 3], [4, 2], [3, 4], [5, 3], [2, 6]):
        batch = random_batch(num_segments, (64, 64))
        passes = [batch["class_labels"]] * num_segments[0]
        options = {
            "global_batch": plain.count_global_batch(passes),
            "ignore_masks": [None, torch.rand(64, 64) < 0.1],
        }
        outputs = []
        for one in (plain, compiled):
            one.zero_grad()
            torch.manual_seed(0)
            outputs.append(one(**batch, **options))
            outputs[-1].loss.backward()
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, **ROUNDING)
        assert outputs[1].loss_dict.keys() == outputs[0].loss_dict.keys()
        counts.append(graphs.count)
    for (name, weight), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            weight.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Fixed sizes in the first step, any size in the second; after that nothing is left to compile.
    assert counts[1] == counts[-1]


@pytest.mark.parametrize(("backbone", "strict"), [("resnet", True), ("swin", False)])
def test_an_exported_model_predicts_the_same_after_saving_and_loading(backbone: str, strict: bool, tmp_path):
    model, images = tiny_model(backbone, **SMALL), random_images(1, (64, 64))
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for seed in range(2):
        assert_predictions_close(loaded, model, random_images(1, (64, 64), seed=seed))
    assert not find_data_dependent_values(program)


def find_data_dependent_values(program: torch.export.ExportedProgram) -> set[str]:
    """Names of values whose size the export could not know; it calls them u0, u1, ..."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    return {str(size) for size in [*sizes, *values] if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool)}
