"""The operator's implementations against loops over its definition, and the module around it.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mpformer_hf import deformable_attention
from mpformer_hf.deformable_attention import (
    MultiScaleDeformableSelfAttention,
    cell_centres,
    choose_implementation,
    locate_samples,
    ms_deform_attn,
    ms_deform_attn_reference,
)
from mpformer_hf.embedding_bag_attention import EmbeddingBagAttention, attend, differentiate

Shapes = tuple[tuple[int, int], ...]
SHAPES: Shapes = ((2, 3), (4, 5), (1, 1))
IMPLEMENTATIONS = [
    pytest.param(ms_deform_attn, id="operator"),
    pytest.param(EmbeddingBagAttention.apply, id="embedding_bag"),
    pytest.param(ms_deform_attn_reference, id="grid_sample"),
]


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operator, in its order."""

    value: Tensor
    shapes: Shapes
    locations: Tensor
    weights: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Shapes, Tensor, Tensor]:
        return self.value, self.shapes, self.locations, self.weights

    def require_grad(self) -> "Inputs":
        tensors = (self.value, self.locations, self.weights)
        value, locations, weights = (tensor.clone().requires_grad_() for tensor in tensors)
        return Inputs(value, self.shapes, locations, weights)


def draw_inputs(
    shapes: Shapes = SHAPES,
    batch_size: int = 2,
    num_queries: int = 3,
    num_heads: int = 2,
    head_dim: int = 4,
    num_points: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Locations reach from -0.3 to 1.3: some lie outside, some between a border and the centres next to it."""
    size = (batch_size, num_queries, num_heads, len(shapes), num_points)
    num_cells = sum(height * width for height, width in shapes)
    return Inputs(
        value=torch.randn(batch_size, num_cells, num_heads, head_dim, dtype=dtype),
        shapes=shapes,
        locations=torch.rand(*size, 2, dtype=dtype) * 1.6 - 0.3,
        weights=torch.rand(size, dtype=dtype),
    )


def read_level(value: Tensor, height: int, width: int, x: float, y: float) -> Tensor:
    """Bilinear sample of one level of one head, (height * width, D), at (x, y) relative to the level: (D,)."""
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    total = value.new_zeros(value.shape[1])
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                total = total + value[i * width + j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def attend_by_loops(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator, by its definition: (B, Q, N, D)."""
    batch_size, num_queries, num_heads, _, num_points, _ = locations.shape
    output = value.new_zeros(batch_size, num_queries, num_heads, value.shape[-1])
    for image in range(batch_size):
        for query in range(num_queries):
            for head in range(num_heads):
                first = 0
                for level, (height, width) in enumerate(shapes):
                    cells = value[image, first : first + height * width, head]
                    first += height * width
                    for point in range(num_points):
                        where = (image, query, head, level, point)
                        x, y = locations[where].tolist()
                        output[image, query, head] += weights[where] * read_level(cells, height, width, x, y)
    return output


def run_with_gradients(operator: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Output, and the gradients of a fixed weighted sum of it with respect to value, locations and weights."""
    leaves = inputs.require_grad()
    output = operator(*leaves.arguments)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * direction).sum(), (leaves.value, leaves.locations, leaves.weights))
    return output, *gradients


def assert_same_results(one: Sequence[Tensor], other: Sequence[Tensor], rtol: float, atol: float) -> None:
    names = ("output", "gradient of value", "gradient of locations", "gradient of weights")
    for name, left, right in zip(names, one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch_size": 1, "num_heads": 1, "num_points": 1, "head_dim": 1},
        {"shapes": ((3, 2),), "num_heads": 3, "head_dim": 5},
        {"shapes": ((1, 4), (4, 1)), "num_points": 3},
    ],
    ids=str,
)
def test_operator_equals_loops_over_its_definition(operator: Callable[..., Tensor], sizes: dict):
    inputs = draw_inputs(**sizes)
    torch.testing.assert_close(operator(*inputs.arguments), attend_by_loops(*inputs.arguments), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "place",
    [0.0, 1.0, 0.5, 0.125, 0.875, -0.125, 1.125, -0.25, 1.25, -3.0, 1e6],
    ids=lambda place: f"at {place}",
)
def test_special_places_are_read_as_defined(operator: Callable[..., Tensor], place: float):
    """On 4 cells the borders are at 0 and 1, centres at 0.125 and 0.875, and what is beyond -0.125 or 1.125 reads zero."""
    inputs = draw_inputs(shapes=((4, 4), (4, 4)))
    locations = inputs.locations.clone()
    locations[:, 0] = place
    locations[:, 1, ..., 0] = place
    locations[:, 2, ..., 1] = place
    inputs = replace(inputs, locations=locations)
    torch.testing.assert_close(operator(*inputs.arguments), attend_by_loops(*inputs.arguments), rtol=1e-10, atol=1e-12)


def test_embedding_bag_stays_on_the_device_of_its_arguments():
    """The operator comes here on GPUs too, for what its kernels are not made for. Fake tensors check devices without one."""
    inputs = draw_inputs()
    with FakeTensorMode() as mode:
        value, locations, weights = (mode.from_tensor(one) for one in (inputs.value, inputs.locations, inputs.weights))
        value, locations, weights = (torch.empty_like(one, device="cuda") for one in (value, locations, weights))
        output = attend(value, inputs.shapes, locations, weights)
        gradients = differentiate(output, value, inputs.shapes, locations, weights, [True] * 3)
    assert {result.device.type for result in (output, *gradients)} == {"cuda"}


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
def test_a_point_on_the_centre_of_a_cell_reads_that_cell(operator: Callable[..., Tensor]):
    shapes = ((2, 4), (4, 8))
    value = torch.randn(1, 40, 1, 3)
    centres = cell_centres(shapes, torch.device("cpu"))
    locations = centres.view(1, 40, 1, 1, 1, 2).expand(1, 40, 1, 2, 1, 2).contiguous()
    weights = torch.zeros(1, 40, 1, 2, 1)
    weights[:, :8, :, 0] = 1.0  # cells of the first level read the first level
    weights[:, 8:, :, 1] = 1.0
    torch.testing.assert_close(operator(value, shapes, locations, weights), value)


def test_implementations_agree_on_larger_maps():
    inputs = draw_inputs(((7, 11), (14, 22), (28, 43)), num_queries=300, num_heads=4, head_dim=8, num_points=4)
    *others, reference = [run_with_gradients(operator.values[0], inputs) for operator in IMPLEMENTATIONS]
    for result in others:
        assert_same_results(result, reference, rtol=1e-10, atol=1e-10)


def test_implementations_agree_in_single_precision():
    inputs = draw_inputs(
        ((8, 10), (16, 20)), num_queries=200, num_heads=4, head_dim=8, num_points=4, dtype=torch.float32
    )
    *others, reference = [run_with_gradients(operator.values[0], inputs) for operator in IMPLEMENTATIONS]
    for result in others:
        assert_same_results(result, reference, rtol=1e-3, atol=1e-4)


def test_implementations_agree_on_borders_and_centres():
    """There the derivative with respect to the location jumps; sizes are powers of two, so that nothing is rounded."""
    inputs = draw_inputs(((4, 8), (2, 2)), num_queries=64)
    eighths = torch.randint(-4, 21, inputs.locations.shape) / 16
    inputs = replace(inputs, locations=eighths.double())
    *others, reference = [run_with_gradients(operator.values[0], inputs) for operator in IMPLEMENTATIONS]
    for result in others:
        assert_same_results(result, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
def test_gradients_equal_finite_differences(operator: Callable[..., Tensor]):
    """Locations keep away from the centres of cells, between which the operator is smooth."""
    inputs = draw_inputs(shapes=((2, 3), (3, 2)), batch_size=2, num_queries=2, head_dim=2, num_points=2)
    sizes = torch.tensor([(width, height) for height, width in inputs.shapes], dtype=torch.float64)[:, None]
    cells = torch.randint(-2, 3, inputs.locations.shape) + 0.1 + 0.8 * torch.rand(inputs.locations.shape)
    leaves = replace(inputs, locations=(cells.double() + 0.5) / sizes).require_grad()

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return operator(value, inputs.shapes, locations, weights)

    assert torch.autograd.gradcheck(run, (leaves.value, leaves.locations, leaves.weights), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("needed", ["value", "locations", "weights"])
def test_each_gradient_can_be_asked_for_alone(operator: Callable[..., Tensor], needed: str):
    inputs = draw_inputs()
    _, *expected = run_with_gradients(operator, inputs)
    alone = getattr(inputs, needed).clone().requires_grad_()
    output = operator(*replace(inputs, **{needed: alone}).arguments)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (gradient,) = torch.autograd.grad((output * direction).sum(), alone)
    torch.testing.assert_close(gradient, expected[("value", "locations", "weights").index(needed)], rtol=1e-12, atol=0)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_added_up_in_float32(operator: Callable[..., Tensor], dtype: torch.dtype):
    inputs = draw_inputs(((5, 6), (10, 12)), num_queries=50, head_dim=8, num_points=4, dtype=torch.float32)
    rounded = replace(inputs, value=inputs.value.to(dtype))
    output, grad_value, grad_locations, grad_weights = run_with_gradients(operator, rounded)

    assert output.dtype == grad_value.dtype == dtype
    assert grad_locations.dtype == grad_weights.dtype == torch.float32
    exact = operator(*replace(rounded, value=rounded.value.float()).arguments)
    assert torch.equal(output, exact.to(dtype))  # one rounding, at the end


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch_size", "num_queries"), [(0, 3), (2, 0), (0, 0)])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(
    operator: Callable[..., Tensor], batch_size: int, num_queries: int
):
    inputs = draw_inputs(batch_size=batch_size, num_queries=num_queries)
    output, *gradients = run_with_gradients(operator, inputs)
    assert output.shape == (batch_size, num_queries, 2, 4)
    assert [gradient.shape for gradient in gradients] == [
        inputs.value.shape,
        inputs.locations.shape,
        inputs.weights.shape,
    ]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
def test_inputs_need_not_be_contiguous(operator: Callable[..., Tensor]):
    inputs = draw_inputs(num_queries=5)
    expected = run_with_gradients(operator, inputs)

    def scatter(tensor: Tensor) -> Tensor:
        """Equal values in reversed memory order."""
        return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))

    leaves = [scatter(tensor).detach().requires_grad_() for tensor in (inputs.value, inputs.locations, inputs.weights)]
    assert not any(leaf.is_contiguous() for leaf in leaves)
    output = operator(leaves[0], inputs.shapes, leaves[1], leaves[2])
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    results = (output, *torch.autograd.grad((output * scatter(direction)).sum(), leaves))
    assert_same_results(results, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_heads", [1, 2, 3, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_location_that_is_not_finite_spoils_its_own_query_alone(
    operator: Callable[..., Tensor], num_heads: int, bad: float
):
    """Training that diverges must reach the criterion, which counts such steps, instead of reading outside of memory."""
    inputs = draw_inputs(num_heads=num_heads)
    clean = operator(*inputs.arguments)
    locations = inputs.locations.clone()
    locations[0, 1, 0, 0, 0, 0] = bad
    output, *gradients = run_with_gradients(operator, replace(inputs, locations=locations))
    assert not output[0, 1, 0].isfinite().any()
    is_elsewhere = torch.ones(output.shape[:3], dtype=torch.bool)
    is_elsewhere[0, 1, 0] = False
    torch.testing.assert_close(output[is_elsewhere], clean[is_elsewhere], rtol=1e-12, atol=0)
    assert gradients[2][0, 0].isfinite().all()


def test_a_wrong_number_of_cells_is_explained():
    inputs = draw_inputs()
    with pytest.raises(
        ValueError, match=r"Expected 27 cells for levels of sizes .* got a value of shape \(2, 26, 2, 4\)"
    ):
        ms_deform_attn(inputs.value[:, 1:], inputs.shapes, inputs.locations, inputs.weights)


# ------------------------------------------------------------------------------------------------------------ the module


@pytest.fixture
def module() -> MultiScaleDeformableSelfAttention:
    """4 heads of 4 channels, 2 levels, 3 points; offsets and weights depend on the queries."""
    return MultiScaleDeformableSelfAttention(embed_dim=16, num_heads=4, num_levels=2, num_points=3)


def test_module_follows_its_definition(module: MultiScaleDeformableSelfAttention):
    module.double()
    shapes = ((2, 3), (3, 5))
    cells, positions = torch.randn(2, 21, 16, dtype=torch.float64), torch.randn(1, 21, 16, dtype=torch.float64)
    queries = cells + positions
    offsets = module.sampling_offsets(queries).view(2, 21, 4, 2, 3, 2)
    weights = torch.empty(2, 21, 4, 2, 3, dtype=torch.float64)
    locations = torch.empty(2, 21, 4, 2, 3, 2, dtype=torch.float64)
    raw_weights = module.attention_weights(queries).view(2, 21, 4, 6)
    centres = [((j + 0.5) / w, (i + 0.5) / h) for h, w in shapes for i in range(h) for j in range(w)]
    for cell, (x, y) in enumerate(centres):
        weights[:, cell] = raw_weights[:, cell].softmax(-1).view(2, 4, 2, 3)  # over all levels and points together
        for level, (height, width) in enumerate(shapes):
            locations[:, cell, :, level, :, 0] = x + offsets[:, cell, :, level, :, 0] / width
            locations[:, cell, :, level, :, 1] = y + offsets[:, cell, :, level, :, 1] / height
    value = module.value_proj(cells).view(2, 21, 4, 4)  # positions are not in the values
    expected = module.output_proj(attend_by_loops(value, shapes, locations, weights).view(2, 21, 16))

    output, returned_weights = module(cells, positions, shapes)

    # Locations and weights are float32 also in a module of float64.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(returned_weights.double(), weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_locations_and_weights_stay_float32_in_half_precision(
    module: MultiScaleDeformableSelfAttention, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def recorded(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        seen.append((value.dtype, locations.dtype, weights.dtype))
        return ms_deform_attn(value, shapes, locations, weights)

    monkeypatch.setattr(deformable_attention, "ms_deform_attn", recorded)
    output, weights = module.to(dtype)(
        torch.randn(1, 26, 16, dtype=dtype), torch.zeros(1, 26, 16, dtype=dtype), SHAPES[:2]
    )
    assert seen == [(dtype, torch.float32, torch.float32)]
    assert output.dtype == dtype
    assert weights.dtype == torch.float32


def test_locations_keep_their_precision_on_large_maps():
    """In bfloat16 neighbouring cells of a map 168 wide would coincide."""
    locations = locate_samples(((100, 168),), torch.zeros(1, 16800, 1, 1, 1, 2))
    columns = (locations[0, :, 0, 0, 0, 0] * 168 - 0.5).view(100, 168)
    torch.testing.assert_close(columns, torch.arange(168.0).expand(100, -1), rtol=0, atol=1e-4)


def test_centres_are_listed_level_by_level_and_row_by_row():
    expected = [((j + 0.5) / w, (i + 0.5) / h) for h, w in SHAPES for i in range(h) for j in range(w)]
    torch.testing.assert_close(cell_centres(SHAPES, torch.device("cpu")), torch.tensor(expected))


def test_offsets_start_on_a_ring_with_equal_weights():
    module = MultiScaleDeformableSelfAttention(embed_dim=32, num_heads=8, num_levels=3, num_points=4)
    module.initialise_weights(gain=1.0)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]  # on a square, as the original
    expected = [[[[x * k, y * k] for k in (1, 2, 3, 4)] for _ in range(3)] for x, y in directions]
    offsets = module.sampling_offsets(torch.randn(5, 32)).view(5, 8, 3, 4, 2)
    torch.testing.assert_close(offsets, torch.tensor(expected).float().expand(5, -1, -1, -1, -1), rtol=0, atol=1e-5)

    _, weights = module(torch.randn(1, 6, 32), torch.randn(1, 6, 32), ((1, 2), (1, 2), (1, 2)))
    torch.testing.assert_close(weights, torch.full((1, 6, 8, 3, 4), 1 / 12))


def test_a_loaded_ring_is_kept():
    """transformers marks weights that it has loaded and initialises the rest."""
    module = MultiScaleDeformableSelfAttention(embed_dim=16, num_heads=4, num_levels=2, num_points=3)
    loaded = module.sampling_offsets.bias.detach().clone()
    module.sampling_offsets.bias._is_hf_initialized = True
    module.initialise_weights(gain=1.0)
    assert torch.equal(module.sampling_offsets.bias, loaded)


# ----------------------------------------------------------------------------------------------------- compile and export


@pytest.fixture(params=["operator", "embedding_bag", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose what runs in eager mode."""
    if request.param != "operator":
        monkeypatch.setenv("MPFORMER_MSDA_BACKEND", request.param)
    return request.param


def names_of_operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def test_the_choice_is_what_the_environment_says(implementation: str):
    assert choose_implementation("cpu") == implementation


def test_without_the_package_the_cpu_runs_on_embedding_bag_and_other_devices_on_the_reference(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(deformable_attention, "has_operator", lambda device_type: False)
    assert choose_implementation("cpu") == "embedding_bag"
    assert choose_implementation("cuda") == choose_implementation("mps") == "reference"


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "fast")
    with pytest.raises(
        ValueError, match=r"'fast' is no backend. Choose one of: hub, deformops, compiled, embedding_bag,"
    ):
        ms_deform_attn(*draw_inputs().arguments)


def test_a_forced_backend_that_is_not_there_is_an_error_with_the_way_to_find_out_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "compiled")
    with pytest.raises(RuntimeError, match=r"no operator is registered for mps.*doctor"):
        choose_implementation("mps")


def test_compiled_module_equals_the_eager_one_without_a_graph_break(
    module: MultiScaleDeformableSelfAttention, implementation: str
):
    cells, positions, shapes = torch.randn(2, 26, 16), torch.randn(1, 26, 16), SHAPES[:2]
    expected, _ = module(cells, positions, shapes)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    torch.compiler.reset()

    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    output, _ = compiled(cells, positions, shapes)
    gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))

    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


def test_exported_module_holds_the_operator_or_plain_pytorch_and_equals_the_eager_one(
    module: MultiScaleDeformableSelfAttention, implementation: str
):
    cells, positions, shapes = torch.randn(2, 26, 16), torch.randn(1, 26, 16), SHAPES[:2]
    expected, _ = module(cells, positions, shapes)
    program = torch.export.export(module, (cells, positions, shapes))
    names = names_of_operators(program.graph)
    if implementation == "operator":
        assert "mpformer.ms_deform_attn.default" in names
    else:
        assert any("grid_sampl" in name for name in names)
        assert not any("embedding_bag" in name or "mpformer" in name for name in names)
    output, _ = program.module()(cells, positions, shapes)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
