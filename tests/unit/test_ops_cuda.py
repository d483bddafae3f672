"""The operator `torch.ops.mpformer.ms_deform_attn` on GPUs, with the kernels of this package.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mpformer_hf.deformable_attention import has_operator, ms_deform_attn_reference

pytestmark = pytest.mark.gpu

Shapes = tuple[tuple[int, int], ...]
SMALL: Shapes = ((4, 5), (2, 3), (1, 1))
ENCODER: Shapes = ((16, 16), (32, 32), (64, 64))  # of an image of 512x512; 5376 cells, each of which is a query
# Relative to the largest expected number.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GRADIENT_TOLERANCES = TOLERANCES | {torch.bfloat16: 1e-2, torch.float16: 1e-2}
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operator; all tensors on one device."""

    value: Tensor
    shapes: Shapes
    locations: Tensor
    weights: Tensor

    @property
    def flat_shapes(self) -> list[int]:
        return [side for shape in self.shapes for side in shape]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    def require_grad(self) -> "Inputs":
        value, locations, weights = (tensor.detach().clone().requires_grad_() for tensor in self.leaves)
        return Inputs(value, self.shapes, locations, weights)

    def in_float64(self) -> "Inputs":
        value, locations, weights = (tensor.detach().double() for tensor in self.leaves)
        return Inputs(value, self.shapes, locations, weights)


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_operator("cuda"):
        pytest.skip("needs the CUDA kernels; build them with `python -m mpformer_hf.ops build --cuda`")
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "compiled")


@pytest.fixture
def _free_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def need_memory(gibibytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIBIBYTE
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory; {free:.1f} are free")


def draw_inputs(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 32,
    shapes: Shapes = SMALL,
    batch_size: int = 2,
    num_queries: int = 70,
    num_heads: int = 3,
    num_points: int = 4,
) -> Inputs:
    """Samples lie up to one cell outside, and away from the centres of cells, where rounding could change the derivative."""
    size = (batch_size, num_queries, num_heads, len(shapes), num_points)
    num_cells = sum(height * width for height, width in shapes)
    sampling_type = torch.float64 if dtype == torch.float64 else torch.float32
    sides = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]
    cells = (torch.rand(*size, 2, dtype=torch.float64) * (sides + 2)).floor() - 1.5  # halfway between two centres
    cells = cells + (torch.rand(*size, 2, dtype=torch.float64) - 0.5) * 0.9
    return Inputs(
        value=torch.randn(batch_size, num_cells, num_heads, head_dim).to("cuda", dtype),
        shapes=shapes,
        locations=((cells + 0.5) / sides).to("cuda", sampling_type),
        weights=torch.rand(size).to("cuda", sampling_type),
    )


def operator(inputs: Inputs) -> Tensor:
    return torch.ops.mpformer.ms_deform_attn(inputs.value, inputs.flat_shapes, inputs.locations, inputs.weights)


def reference(inputs: Inputs) -> Tensor:
    """From the same values and the unrounded locations, in float64."""
    exact = inputs.in_float64()
    return ms_deform_attn_reference(exact.value, exact.shapes, exact.locations, exact.weights)


def reference_gradients(inputs: Inputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    exact = inputs.in_float64().require_grad()
    output = ms_deform_attn_reference(exact.value, exact.shapes, exact.locations, exact.weights)
    return torch.autograd.grad(output, exact.leaves, grad_output.double())


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=tolerance * scale)


def assert_right(inputs: Inputs) -> None:
    """Output and gradients equal those of the reference."""
    dtype = inputs.value.dtype
    leaves = inputs.require_grad()
    output = operator(leaves)
    assert output.dtype == dtype
    assert_near(output, reference(inputs), TOLERANCES[dtype])
    grad_output = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves.leaves, grad_output)
    for gradient, expected, leaf in zip(found, reference_gradients(inputs, grad_output), leaves.leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, expected, GRADIENT_TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 20, 32, 64, 96, 127, 128])
def test_every_head_dimension_and_type_equals_the_reference(dtype: torch.dtype, head_dim: int) -> None:
    assert_right(draw_inputs(dtype, head_dim))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_the_kernels_are_not_made_for_runs_on_plain_pytorch(dtype: torch.dtype) -> None:
    assert_right(draw_inputs(dtype, head_dim=136))
    assert_right(draw_inputs(dtype, num_points=9))


@pytest.mark.parametrize(("num_levels", "num_points"), [(1, 1), (8, 1), (1, 8), (5, 7), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_levels_and_points_equals_the_reference(
    dtype: torch.dtype, num_levels: int, num_points: int
) -> None:
    shapes = ((2, 3), (1, 4), (3, 1), (2, 2), (5, 2), (1, 1), (2, 5), (3, 3))[:num_levels]
    assert_right(draw_inputs(dtype, shapes=shapes, num_points=num_points))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_encoder_of_a_real_image_equals_the_reference(dtype: torch.dtype) -> None:
    assert_right(draw_inputs(dtype, shapes=ENCODER, num_queries=5376, num_heads=8))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_that_nobody_needs_change_none_of_the_others(needed: tuple[int, ...]) -> None:
    inputs = draw_inputs()
    leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(inputs.leaves)]
    output = operator(Inputs(leaves[0], inputs.shapes, leaves[1], leaves[2]))
    grad_output = torch.randn_like(output)
    found = torch.autograd.grad(output, [leaves[index] for index in needed], grad_output)
    expected = reference_gradients(inputs, grad_output)
    for index, gradient in zip(needed, found, strict=True):
        assert_near(gradient, expected[index], 1e-5)


def test_inputs_that_are_not_contiguous_equal_contiguous_ones() -> None:
    inputs = draw_inputs()
    expected = operator(inputs)
    strided = Inputs(
        value=inputs.value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        shapes=inputs.shapes,
        locations=inputs.locations.transpose(1, 2).contiguous().transpose(1, 2),
        weights=torch.stack([inputs.weights, inputs.weights], dim=-1)[..., 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided.leaves)
    assert torch.equal(operator(strided), expected)

    leaves = strided.require_grad()
    grad_output = torch.randn(3, device="cuda")[:, None].expand_as(expected)  # broadcast: strides of zero
    found = torch.autograd.grad(operator(leaves), leaves.leaves, grad_output)
    for gradient, exact in zip(found, reference_gradients(inputs, grad_output), strict=True):
        assert_near(gradient, exact, 1e-5)


@pytest.mark.parametrize("head_dim", [32, 20])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_may_start_at_any_number(head_dim: int, offset: int) -> None:
    inputs = draw_inputs(torch.float16, head_dim)
    memory = torch.empty(inputs.value.numel() + offset, dtype=torch.float16, device="cuda")
    moved = memory[offset:].view_as(inputs.value).copy_(inputs.value)
    assert moved.data_ptr() % 16 == 2 * offset
    found = operator(Inputs(moved, inputs.shapes, inputs.locations, inputs.weights))
    assert_near(found, reference(inputs), 1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_location_that_is_not_finite_spoils_its_row_and_its_own_gradients_alone(dtype: torch.dtype, bad: float) -> None:
    inputs, sample = draw_inputs(dtype), (1, 3, 0, 2, 1)
    inputs.locations[sample] = -5.0  # outside: adds nothing to anything, and neither may the bad location
    good = inputs.require_grad()
    expected = operator(good)
    grad_output = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, good.leaves, grad_output)

    inputs.locations[(*sample, 0)] = bad
    leaves = inputs.require_grad()
    output = operator(leaves)
    gradients = torch.autograd.grad(output, leaves.leaves, grad_output)
    is_nan = torch.zeros_like(output, dtype=torch.bool)
    is_nan[sample[:3]] = True
    assert torch.equal(output.isnan(), is_nan)
    assert torch.equal(output[~is_nan], expected[~is_nan])
    assert gradients[1][sample].isnan().all()
    assert gradients[2][sample].isnan()
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        is_finite = found.isfinite()
        assert (~is_finite).sum() <= 2
        assert_near(found.where(is_finite, 0), wanted.where(is_finite, 0), GRADIENT_TOLERANCES[dtype])


@pytest.mark.parametrize("far", [1e30, -1e30, 3e38])
def test_location_far_outside_adds_nothing(far: float) -> None:
    inputs = draw_inputs()
    inputs.locations.fill_(far)
    leaves = inputs.require_grad()
    output = operator(leaves)
    assert torch.count_nonzero(output) == 0
    for gradient in torch.autograd.grad(output.sum(), leaves.leaves):
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("axis", ["batch_size", "num_queries"])
def test_empty_sizes_give_empty_outputs_and_zero_gradients(axis: str) -> None:
    leaves = draw_inputs(**{axis: 0}).require_grad()
    output = operator(leaves)
    assert output.numel() == 0
    gradients = torch.autograd.grad(output.sum(), leaves.leaves)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves.leaves]
    assert torch.count_nonzero(gradients[0]) == 0


def test_operator_waits_for_what_its_own_stream_does() -> None:
    inputs = draw_inputs(shapes=ENCODER, num_queries=500, num_heads=8)
    late = inputs.require_grad()
    expected = reference(inputs)
    grad_output = torch.randn_like(inputs.value[:, :500])
    expected_gradients = reference_gradients(inputs, grad_output)
    with torch.no_grad():
        late.value.fill_(math.nan)
    torch.cuda.synchronize()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds
        with torch.no_grad():
            late.value.copy_(inputs.value)
        output = operator(late)
        gradients = torch.autograd.grad(output, late.leaves, grad_output)
    stream.synchronize()
    assert_near(output, expected, 1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_near(found, wanted, 1e-5)


def test_forward_and_backward_can_be_captured_in_a_graph() -> None:
    leaves, fresh = draw_inputs().require_grad(), draw_inputs()
    grad_output = torch.randn_like(operator(fresh))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # modules are loaded at their first use, which a capture does not allow
        torch.autograd.grad(operator(leaves), leaves.leaves, grad_output)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operator(leaves)
        gradients = torch.autograd.grad(output, leaves.leaves, grad_output)
    with torch.no_grad():
        for leaf, tensor in zip(leaves.leaves, fresh.leaves, strict=True):
            leaf.copy_(tensor)
    for _ in range(2):  # a second time: nothing may add up from replay to replay
        graph.replay()
        torch.cuda.synchronize()
        assert_near(output, reference(fresh), 1e-5)
        for found, expected in zip(gradients, reference_gradients(fresh, grad_output), strict=True):
            assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_locations_in_float32(dtype: torch.dtype) -> None:
    inputs = draw_inputs(dtype, shapes=((128, 256),), num_heads=8)
    exact = operator(inputs)
    with torch.autocast("cuda", dtype):
        output = operator(inputs)
        halved = Inputs(inputs.value, inputs.shapes, inputs.locations, inputs.weights.to(dtype))
        from_halved_weights = operator(halved)
    assert output.dtype == dtype
    assert torch.equal(output, exact)
    assert from_halved_weights.dtype == dtype
    assert_near(from_halved_weights, exact, 1e-2)


def test_operator_compiles_without_graph_breaks() -> None:
    inputs = draw_inputs()
    flat_shapes = inputs.flat_shapes

    def scaled(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.mpformer.ms_deform_attn(2 * value, flat_shapes, locations, weights).sin()

    eager, compiled = inputs.require_grad(), inputs.require_grad()
    expected = scaled(*eager.leaves)
    output = torch.compile(scaled, fullgraph=True)(*compiled.leaves)
    grad_output = torch.randn_like(expected)
    assert_near(output, expected, 1e-5)
    expected_gradients = torch.autograd.grad(expected, eager.leaves, grad_output)
    for found, wanted in zip(
        torch.autograd.grad(output, compiled.leaves, grad_output), expected_gradients, strict=True
    ):
        assert_near(found, wanted, 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # looked at by torch itself
def test_operator_passes_the_checks_of_torch() -> None:
    inputs = draw_inputs(head_dim=8, num_queries=5).require_grad()
    arguments = (inputs.value, inputs.flat_shapes, inputs.locations, inputs.weights)
    torch.library.opcheck(torch.ops.mpformer.ms_deform_attn.default, arguments)


def test_gradients_pass_gradcheck_in_float64() -> None:
    inputs = draw_inputs(torch.float64, head_dim=3, num_queries=3, num_heads=2, num_points=2, batch_size=1)
    leaves, flat_shapes = inputs.require_grad().leaves, inputs.flat_shapes

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.mpformer.ms_deform_attn(value, flat_shapes, locations, weights)

    # The order of atomic additions changes from run to run.
    assert torch.autograd.gradcheck(run, leaves, nondet_tol=1e-12)


def test_memory_in_use_is_that_of_the_results() -> None:
    leaves = draw_inputs(torch.bfloat16, shapes=ENCODER, num_queries=5376, num_heads=8).require_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = operator(leaves)
    allowance = 2**20  # the allocator rounds
    assert torch.cuda.max_memory_allocated() - before <= output.nbytes + allowance

    grad_output = torch.randn_like(output)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(output, leaves.leaves, grad_output)
    in_float32 = 2 * gradients[0].nbytes  # where the gradient of a bfloat16 value is summed
    results = sum(gradient.nbytes for gradient in gradients)
    assert torch.cuda.max_memory_allocated() - before <= results + in_float32 + allowance


@pytest.mark.usefixtures("_free_memory")
def test_value_of_more_than_two_to_the_31_numbers_is_read_in_the_right_places() -> None:
    need_memory(10)
    shapes = ((1700, 1700),)
    inputs = draw_inputs(torch.float16, shapes=((2, 2),), batch_size=3, num_queries=100, num_heads=8)
    value = torch.empty(3, 1700 * 1700, 8, 32, dtype=torch.float16, device="cuda")
    for image in value:  # each by itself, so that no function of torch has to do with so many numbers
        image.normal_()
    assert value.numel() > 2**31
    output = operator(Inputs(value, shapes, inputs.locations, inputs.weights))
    for image in range(3):
        one = slice(image, image + 1)
        for head in range(8):
            part = Inputs(
                value[one, :, head : head + 1],
                shapes,
                inputs.locations[one, :, head : head + 1],
                inputs.weights[one, :, head : head + 1],
            )
            assert_near(output[one, :, head : head + 1], reference(part), 1e-2)


@pytest.mark.usefixtures("_free_memory")
def test_output_of_more_than_two_to_the_31_numbers_is_written_in_the_right_places() -> None:
    need_memory(12)
    num_queries, last = 2**21 + 100, 200
    few = draw_inputs(torch.float16, 128, shapes=((4, 5),), batch_size=1, num_queries=last, num_heads=8, num_points=1)
    locations = few.locations.new_full((1, num_queries, 8, 1, 1, 2), 0.5)
    weights = few.weights.new_ones(1, num_queries, 8, 1, 1)
    locations[:, -last:], weights[:, -last:] = few.locations, few.weights
    output = operator(Inputs(few.value, few.shapes, locations, weights))
    assert output.numel() > 2**31
    assert_near(output[:, -last:], reference(few), 1e-2)
    first = Inputs(few.value, few.shapes, locations[:, :last], weights[:, :last])
    assert_near(output[:, :last], reference(first), 1e-2)


@pytest.mark.usefixtures("_free_memory")
def test_locations_of_more_than_two_to_the_31_numbers_are_read_and_get_their_gradients() -> None:
    need_memory(40)
    num_queries, last = 2**21 + 100, 200
    shapes = ((2, 3), (1, 4), (3, 1), (2, 2), (5, 2), (1, 1), (2, 5), (3, 3))
    few = draw_inputs(torch.float16, 8, shapes=shapes, batch_size=1, num_queries=last, num_heads=8, num_points=8)
    locations = few.locations.new_full((1, num_queries, 8, 8, 8, 2), -5.0)  # outside, except for the last
    weights = few.weights.new_ones(1, num_queries, 8, 8, 8)
    locations[:, -last:], weights[:, -last:] = few.locations, few.weights
    assert locations.numel() > 2**31
    leaves = (few.value.clone().requires_grad_(), locations.requires_grad_(), weights.requires_grad_())
    output = torch.ops.mpformer.ms_deform_attn(leaves[0], few.flat_shapes, leaves[1], leaves[2])
    assert_near(output[:, -last:], reference(few), 1e-2)
    assert torch.count_nonzero(output[:, :-last]) == 0

    grad_output = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, grad_output)
    expected = reference_gradients(few, grad_output[:, -last:])
    assert_near(found[0], expected[0], 1e-2)
    assert_near(found[1][:, -last:], expected[1], 1e-2)
    assert_near(found[2][:, -last:], expected[2], 1e-2)
    assert not found[1][:, :last].any()


@pytest.mark.usefixtures("_free_memory")
def test_image_beyond_32_bit_distances_is_refused_or_right() -> None:
    need_memory(12)
    shapes = ((2100, 2100),)
    inputs = draw_inputs(shapes=((2, 2),), batch_size=1, num_queries=100, num_heads=8)
    value = torch.randn(1, 2100 * 2100, 8, 32, device="cuda")
    assert value.nbytes > 2**32
    try:
        output = operator(Inputs(value, shapes, inputs.locations, inputs.weights))
    except RuntimeError as error:
        assert "shape" in str(error)  # noqa: PT017 - either outcome is right
        return
    for head in range(8):
        one = slice(head, head + 1)
        part = Inputs(value[:, :, one], shapes, inputs.locations[:, :, one], inputs.weights[:, :, one])
        assert_near(output[:, :, one], reference(part), 1e-5)


@pytest.mark.multi_gpu
def test_second_device_is_used_and_the_current_one_stays() -> None:
    inputs = draw_inputs()
    second = Inputs(
        inputs.value.to("cuda:1"), inputs.shapes, inputs.locations.to("cuda:1"), inputs.weights.to("cuda:1")
    )
    assert torch.cuda.current_device() == 0
    assert_right(second)
    assert torch.cuda.current_device() == 0
    assert operator(second).device == torch.device("cuda:1")
