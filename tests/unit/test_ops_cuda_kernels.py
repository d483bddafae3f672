"""The CUDA kernels themselves, compiled for the CPU by the emulation in `cuda_emulation/`, and compiled for GPUs by nvcc.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpformer_hf.deformable_attention import ms_deform_attn_reference

EMULATION = Path(__file__).with_name("cuda_emulation")
SOURCES = Path(__file__).parents[2] / "mpformer_hf/ops/csrc"
KERNELS = SOURCES / "ms_deform_attn_cuda.cu"
ARCHITECTURES = [pytest.param(75, id="sm_75"), pytest.param(90, id="sm_90")]  # scalar and vector atomics
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}
# Largest error relative to the largest expected number. Half precision: rounding of the output alone, half a unit in the last place.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BAD_TYPE, BAD_SIZE, INVALID_DEVICE = -1, -2, 101
MAX_SIDES = 8

Shapes = tuple[tuple[int, int], ...]
SHAPES: Shapes = ((4, 5), (2, 3), (1, 1))

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which is not on the PATH")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which is not on the PATH")


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "cells", "heads", "channels", "queries", "levels", "points")),
        ("heights", ctypes.c_int64 * MAX_SIDES),
        ("widths", ctypes.c_int64 * MAX_SIDES),
    )


class Place(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int32), ("device", ctypes.c_int32), ("stream", ctypes.c_void_p))


class Log(ctypes.Structure):
    """What the emulation remembers of launches."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("device", "launches", "device_of_launch")),
        ("stream_of_launch", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operator, in its order."""

    value: Tensor
    shapes: Shapes
    locations: Tensor
    weights: Tensor

    def sizes(self) -> Sizes:
        batch_size, num_cells, num_heads, head_dim = self.value.shape
        _, num_queries, _, num_levels, num_points, _ = self.locations.shape
        sizes = Sizes(batch_size, num_cells, num_heads, head_dim, num_queries, num_levels, num_points)
        for level, (height, width) in enumerate(self.shapes):
            sizes.heights[level], sizes.widths[level] = height, width
        return sizes

    def moved(self, offset: int) -> "Inputs":
        """Equal tensors whose memory starts `offset` numbers behind an aligned address."""
        tensors = (self.value, self.locations, self.weights)
        value, locations, weights = (move(tensor, offset) for tensor in tensors)
        return Inputs(value, self.shapes, locations, weights)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the three tensors; None where nobody asked."""

    value: Tensor | None
    locations: Tensor | None
    weights: Tensor | None


class Library:
    """The C interface of the kernels."""

    def __init__(self, path: Path) -> None:
        self.binary = ctypes.CDLL(str(path))
        self.binary.emulation_log.restype = ctypes.POINTER(Log)
        self.binary.mpformer_explain.restype = ctypes.c_char_p
        self.binary.mpformer_describe.restype = ctypes.c_char_p

    @property
    def log(self) -> Log:
        return self.binary.emulation_log().contents

    def call(self, direction: str, kind: int, sizes: Sizes, place: Place, *tensors: Tensor | None) -> int:
        pointers = [ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None) for tensor in tensors]
        function = getattr(self.binary, f"mpformer_{direction}")
        return function(kind, ctypes.byref(sizes), ctypes.byref(place), *pointers)

    def forward(self, inputs: Inputs, offset: int = 0) -> Tensor:
        value, locations, weights = inputs.value, inputs.locations, inputs.weights
        output = move(torch.full((*locations.shape[:3], value.shape[3]), math.nan, dtype=value.dtype), offset)
        status = self.call("forward", TYPES[value.dtype], inputs.sizes(), Place(), value, locations, weights, output)
        assert status == 0
        return output

    def backward(self, inputs: Inputs, grad_output: Tensor, wanted: str = "vlw", offset: int = 0) -> Gradients:
        value, locations, weights = inputs.value, inputs.locations, inputs.weights
        zeros = torch.zeros(value.shape, dtype=weights.dtype)
        gradients = Gradients(
            value=move(zeros, offset) if "v" in wanted else None,
            locations=move(torch.full_like(locations, math.nan), offset) if "l" in wanted else None,
            weights=move(torch.full_like(weights, math.nan), offset) if "w" in wanted else None,
        )
        status = self.call(
            "backward",
            TYPES[value.dtype],
            inputs.sizes(),
            Place(),
            grad_output,
            value,
            locations,
            weights,
            gradients.value,
            gradients.locations,
            gradients.weights,
        )
        assert status == 0
        return gradients


def move(tensor: Tensor, offset: int) -> Tensor:
    memory = torch.full((offset + tensor.numel(),), math.nan, dtype=tensor.dtype)
    return memory[offset:].view(tensor.shape).copy_(tensor)


def compile_emulation(folder: Path, architecture: int, *flags: str) -> Path:
    path = folder / f"kernels_{architecture}.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-gnu-unique", f"-D__CUDA_ARCH__={architecture}0"]
    command += [*flags, "-I", str(EMULATION), "-x", "c++", str(KERNELS), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Library]:
    folder = tmp_path_factory.mktemp("cuda_emulation")
    return {architecture: Library(compile_emulation(folder, architecture)) for architecture in (75, 90)}


@pytest.fixture(scope="module")
def library(libraries: dict[int, Library]) -> Library:
    return libraries[90]


def draw_inputs(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 8,
    shapes: Shapes = SHAPES,
    batch_size: int = 2,
    num_queries: int = 5,
    num_heads: int = 2,
    num_points: int = 2,
) -> Inputs:
    """Locations reach from -0.3 to 1.3: some lie outside, some between a border and the centres next to it."""
    size = (batch_size, num_queries, num_heads, len(shapes), num_points)
    num_cells = sum(height * width for height, width in shapes)
    sampling_type = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        value=torch.randn(batch_size, num_cells, num_heads, head_dim).to(dtype),
        shapes=shapes,
        locations=torch.rand(*size, 2, dtype=sampling_type) * 1.6 - 0.3,
        weights=torch.rand(size, dtype=sampling_type),
    )


def place_at(inputs: Inputs, cells: list[tuple[float, float]]) -> Inputs:
    """Put the samples of each row, all of them on the first level, at these (x, y) in cells; float32 has them exactly."""
    height, width = inputs.shapes[0]
    assert len(inputs.shapes) == 1
    assert {math.frexp(side)[0] for side in (height, width)} == {0.5}, "a side that is no power of two rounds"
    locations = torch.tensor([((x + 0.5) / width, (y + 0.5) / height) for x, y in cells])
    return Inputs(inputs.value, inputs.shapes, locations.expand(inputs.locations.shape).contiguous(), inputs.weights)


def reference(inputs: Inputs) -> Tensor:
    return ms_deform_attn_reference(
        inputs.value.double(), inputs.shapes, inputs.locations.double(), inputs.weights.double()
    )


def reference_gradients(inputs: Inputs, grad_output: Tensor) -> Gradients:
    leaves = [tensor.double().requires_grad_() for tensor in (inputs.value, inputs.locations, inputs.weights)]
    output = ms_deform_attn_reference(leaves[0], inputs.shapes, leaves[1], leaves[2])
    return Gradients(*torch.autograd.grad(output, leaves, grad_output.double()))


def loop_over_corners(inputs: Inputs, visit: Callable[[tuple[int, ...], int, float, float], None]) -> None:
    """Call `visit` with the sample, the cell and the distances from it (right, down) of each corner inside."""
    for sample in torch.cartesian_prod(*(torch.arange(size) for size in inputs.weights.shape)).tolist():
        level = sample[3]
        height, width = inputs.shapes[level]
        first_cell = sum(h * w for h, w in inputs.shapes[:level])
        u, v = inputs.locations[tuple(sample)].tolist()
        x, y = u * width - 0.5, v * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    visit(tuple(sample), first_cell + row * width + column, x - column, y - row)


def loops(inputs: Inputs) -> Tensor:
    """The definition, word for word."""
    output = torch.zeros(*inputs.locations.shape[:3], inputs.value.shape[3], dtype=torch.float64)

    def visit(sample: tuple[int, ...], cell: int, right: float, down: float) -> None:
        image, query, head = sample[:3]
        share = (1 - abs(right)) * (1 - abs(down)) * inputs.weights[sample].item()
        output[image, query, head] += share * inputs.value[image, cell, head].double()

    loop_over_corners(inputs, visit)
    return output


def loops_backward(inputs: Inputs, grad_output: Tensor) -> Gradients:
    """The derivative, word for word; at a cell's centre that to the right and below."""
    value, locations, weights = (
        torch.zeros(tensor.shape, dtype=torch.float64) for tensor in (inputs.value, inputs.locations, inputs.weights)
    )

    def visit(sample: tuple[int, ...], cell: int, right: float, down: float) -> None:
        image, query, head = sample[:3]
        height, width = inputs.shapes[sample[3]]
        weight = inputs.weights[sample].item()
        gradient = grad_output[image, query, head].double()
        product = (gradient @ inputs.value[image, cell, head].double()).item()
        value[image, cell, head] += weight * (1 - abs(right)) * (1 - abs(down)) * gradient
        weights[sample] += (1 - abs(right)) * (1 - abs(down)) * product
        locations[sample][0] += weight * (1 - abs(down)) * width * (-product if right >= 0 else product)
        locations[sample][1] += weight * (1 - abs(right)) * height * (-product if down >= 0 else product)

    loop_over_corners(inputs, visit)
    return Gradients(value, locations, weights)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=tolerance * scale)


def assert_gradients_near(found: Gradients, expected: Gradients, tolerance: float) -> None:
    for name in ("value", "locations", "weights"):
        assert_near(getattr(found, name), getattr(expected, name), tolerance)


def gradient_tolerance(dtype: torch.dtype) -> float:
    """Gradients are float32 sums, or float64 ones, also those of half-precision values."""
    return 1e-12 if dtype == torch.float64 else 1e-5


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 20, 32, 64, 96, 128])
def test_forward_equals_the_reference(library: Library, dtype: torch.dtype, head_dim: int) -> None:
    inputs = draw_inputs(dtype, head_dim)
    assert_near(library.forward(inputs), reference(inputs), TOLERANCES[dtype])


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 20, 32, 64, 96, 128])
def test_gradients_equal_those_of_the_reference(
    libraries: dict[int, Library], architecture: int, dtype: torch.dtype, head_dim: int
) -> None:
    inputs = draw_inputs(dtype, head_dim)
    grad_output = torch.randn(2, 5, 2, head_dim).to(dtype)
    found = libraries[architecture].backward(inputs, grad_output)
    assert_gradients_near(found, reference_gradients(inputs, grad_output), gradient_tolerance(dtype))


@needs_compiler
@pytest.mark.parametrize(("num_levels", "num_points"), [(1, 1), (1, 8), (8, 1), (3, 4), (4, 4), (5, 7), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_levels_and_points_is_right(
    library: Library, dtype: torch.dtype, num_levels: int, num_points: int
) -> None:
    shapes = ((2, 3), (1, 4), (3, 1), (2, 2), (5, 2), (1, 1), (2, 5), (3, 3))[:num_levels]
    inputs = draw_inputs(dtype, 32, shapes, batch_size=1, num_queries=3, num_points=num_points)
    grad_output = torch.randn(1, 3, 2, 32).to(dtype)
    assert_near(library.forward(inputs), reference(inputs), TOLERANCES[dtype])
    found = library.backward(inputs, grad_output)
    assert_gradients_near(found, reference_gradients(inputs, grad_output), 1e-5)


@needs_compiler
@pytest.mark.parametrize("head_dim", [2, 16, 32])
def test_rows_of_many_blocks_keep_their_places(library: Library, head_dim: int) -> None:
    inputs = draw_inputs(torch.float16, head_dim, batch_size=3, num_queries=130, num_heads=3, num_points=1)
    grad_output = torch.randn(3, 130, 3, head_dim).half()
    assert_near(library.forward(inputs), reference(inputs), TOLERANCES[torch.float16])
    found = library.backward(inputs, grad_output)
    assert_gradients_near(found, reference_gradients(inputs, grad_output), 1e-5)


@needs_compiler
def test_tiny_sizes_equal_loops_over_the_definition(library: Library) -> None:
    inputs = draw_inputs(torch.float64, head_dim=3)
    grad_output = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    assert_near(library.forward(inputs), loops(inputs), 1e-12)
    assert_gradients_near(library.backward(inputs, grad_output), loops_backward(inputs, grad_output), 1e-12)


@needs_compiler
def test_centres_and_borders_have_the_derivative_to_the_right_and_below(library: Library) -> None:
    inputs = draw_inputs(shapes=((4, 8),), num_points=8)
    cells = [(0, 0), (7, 3), (-0.5, 3.5), (7.5, -0.5), (-1, 2), (3, -1), (8, 1), (2.5, 4)]
    inputs = place_at(inputs, cells)
    grad_output = torch.randn(2, 5, 2, 8)
    assert_near(library.forward(inputs), loops(inputs), 1e-6)
    assert_gradients_near(library.backward(inputs, grad_output), loops_backward(inputs, grad_output), 1e-6)


@needs_compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_location_that_is_not_finite_spoils_its_row_and_its_own_gradients_alone(
    library: Library, dtype: torch.dtype, bad: float, axis: int
) -> None:
    inputs = draw_inputs(dtype, head_dim=20)
    grad_output = torch.randn(2, 5, 2, 20).to(dtype)
    sample = (1, 3, 0, 2, 1)
    outside = inputs.locations.clone()
    outside[sample] = -5.0  # adds nothing to anything, and neither may the bad location
    without = Inputs(inputs.value, inputs.shapes, outside, inputs.weights)
    expected, expected_gradients = library.forward(without), library.backward(without, grad_output)
    inputs.locations[(*sample, axis)] = bad
    output, gradients = library.forward(inputs), library.backward(inputs, grad_output)

    expected[1, 3, 0] = math.nan
    expected_gradients.locations[sample] = math.nan
    expected_gradients.weights[sample] = math.nan
    torch.testing.assert_close(output, expected, rtol=0.0, atol=0.0, equal_nan=True)
    for name in ("value", "locations", "weights"):
        torch.testing.assert_close(
            getattr(gradients, name), getattr(expected_gradients, name), rtol=0.0, atol=1e-6, equal_nan=True
        )


@needs_compiler
@pytest.mark.parametrize("far", [1e30, -1e30, 3e38, -3e38])
def test_location_far_outside_adds_nothing(library: Library, far: float) -> None:
    inputs = draw_inputs()
    inputs.locations.fill_(far)
    gradients = library.backward(inputs, torch.randn(2, 5, 2, 8))
    for found in (library.forward(inputs), gradients.value, gradients.locations, gradients.weights):
        assert torch.count_nonzero(found) == 0


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cells_that_no_sample_touches_may_hold_anything(library: Library, dtype: torch.dtype) -> None:
    inputs = place_at(draw_inputs(dtype, head_dim=32, shapes=((4, 4),)), [(-0.75, -0.75), (3.5, 1.25)])
    touched = torch.zeros(16, dtype=torch.bool)
    touched[[0, 7, 11]] = True
    expected = loops(inputs)
    inputs.value[:, ~touched] = math.nan
    assert_near(library.forward(inputs), expected, TOLERANCES[dtype])
    gradients = library.backward(inputs, torch.ones(2, 5, 2, 32, dtype=dtype))
    assert gradients.locations.isfinite().all()
    assert gradients.weights.isfinite().all()
    assert torch.equal(gradients.value.ne(0).any(dim=(0, 2, 3)), touched)


@needs_compiler
def test_infinite_cell_next_to_the_border_stays_infinite(library: Library) -> None:
    inputs = place_at(draw_inputs(shapes=((4, 4),), num_points=1), [(-0.75, -0.75)])
    inputs.value[:, 0] = math.inf
    assert library.forward(inputs).eq(math.inf).all()


@needs_compiler
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weight_that_is_not_finite_spoils_its_row_also_where_the_sample_is_outside(
    library: Library, weight: float
) -> None:
    inputs = draw_inputs()
    inputs.locations[0, 0, 0, 0, 0] = 7.0
    inputs.weights[0, 0, 0, 0, 0] = weight
    is_nan = library.forward(inputs).isnan()
    assert is_nan[0, 0, 0].all()
    assert is_nan.sum() == is_nan[0, 0, 0].sum()


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("wanted", ["v", "l", "w", "vl", "lw", "vw"])
@pytest.mark.parametrize("head_dim", [32, 20])
def test_gradients_that_nobody_wants_change_none_of_the_others(
    libraries: dict[int, Library], architecture: int, wanted: str, head_dim: int
) -> None:
    inputs, grad_output = draw_inputs(head_dim=head_dim), torch.randn(2, 5, 2, head_dim)
    found = libraries[architecture].backward(inputs, grad_output, wanted)
    expected = reference_gradients(inputs, grad_output)
    for name in ("value", "locations", "weights"):
        if name[0] in wanted:
            assert_near(getattr(found, name), getattr(expected, name), 1e-5)


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_memory_may_start_at_any_number(
    libraries: dict[int, Library], architecture: int, dtype: torch.dtype, offset: int
) -> None:
    inputs = draw_inputs(dtype, head_dim=32)
    moved = inputs.moved(offset)
    assert moved.value.data_ptr() % 16 == offset * dtype.itemsize % 16
    grad_output = torch.randn(2, 5, 2, 32).to(dtype)
    expected = reference_gradients(inputs, grad_output)
    library = libraries[architecture]
    assert_near(library.forward(moved, offset), reference(inputs), TOLERANCES[dtype])
    found = library.backward(moved, move(grad_output, offset), offset=offset)
    assert_gradients_near(found, expected, gradient_tolerance(dtype))
    # The gradient of `value` alone off its alignment.
    found = library.backward(inputs, grad_output, offset=offset)
    assert_gradients_near(found, expected, gradient_tolerance(dtype))


@needs_compiler
@pytest.mark.parametrize("axis", ["batch_size", "num_queries", "num_heads"])
def test_empty_sizes_launch_nothing(library: Library, axis: str) -> None:
    inputs = draw_inputs(**{axis: 0})
    launches = library.log.launches
    output = library.forward(inputs)
    assert output.numel() == 0
    gradients = library.backward(inputs, output)
    assert torch.count_nonzero(gradients.value) == 0
    assert library.log.launches == launches


@needs_compiler
def test_nothing_wanted_launches_nothing(library: Library) -> None:
    launches = library.log.launches
    library.backward(draw_inputs(), torch.randn(2, 5, 2, 8), wanted="")
    assert library.log.launches == launches


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_levels_without_cells_count_as_outside(library: Library, dtype: torch.dtype) -> None:
    inputs = draw_inputs(dtype, shapes=((0, 3), (2, 3), (4, 0)))
    inside = Inputs(inputs.value, ((2, 3),), inputs.locations[:, :, :, 1:2], inputs.weights[:, :, :, 1:2])
    assert_near(library.forward(inputs), loops(inside), TOLERANCES[dtype])
    gradients = library.backward(inputs, torch.randn(2, 5, 2, 8).to(dtype))
    assert torch.count_nonzero(gradients.weights[:, :, :, [0, 2]]) == 0
    assert torch.count_nonzero(gradients.weights[:, :, :, 1]) > 0


REFUSED = [
    pytest.param({"levels": 0}, id="no_levels"),
    pytest.param({"levels": 9}, id="too_many_levels"),
    pytest.param({"points": 0}, id="no_points"),
    pytest.param({"points": 9}, id="too_many_points"),
    pytest.param({"channels": 0}, id="no_channels"),
    pytest.param({"channels": 129}, id="too_many_channels"),
    pytest.param({"images": -1}, id="negative_images"),
    pytest.param({"queries": -1}, id="negative_queries"),
    pytest.param({"heads": -1}, id="negative_heads"),
    pytest.param({"images": 65536}, id="more_images_than_the_grid_has"),
    pytest.param({"queries": 2**40}, id="more_blocks_than_the_grid_has"),
    pytest.param({"queries": 2**63 - 1}, id="queries_that_overflow"),
    pytest.param({"heads": 2**40}, id="heads_that_overflow"),
    pytest.param({"heads": 2**31 - 1, "queries": 2**62}, id="heads_and_queries_that_overflow"),
    pytest.param({"cells": 28}, id="cells_that_are_not_those_of_the_levels"),
    pytest.param({"cells": 2**25, "levels": 1, "sides": (1, 2**25)}, id="side_beyond_exact_positions"),
    pytest.param({"cells": 2**30, "levels": 1, "sides": (2**15, 2**15)}, id="map_beyond_32_bits"),
    pytest.param({"cells": 2**48, "levels": 1, "sides": (2**24, 2**24)}, id="cells_beyond_32_bits"),
]


@needs_compiler
@pytest.mark.parametrize("changes", REFUSED)
def test_sizes_beyond_the_kernels_are_refused(library: Library, changes: dict[str, int | tuple[int, int]]) -> None:
    inputs, launches = draw_inputs(), library.log.launches
    sizes = inputs.sizes()
    for name, size in changes.items():
        if name == "sides":
            sizes.heights[0], sizes.widths[0] = size
        else:
            setattr(sizes, name, size)
    tensors = [inputs.value, inputs.locations, inputs.weights]
    assert library.call("forward", 0, sizes, Place(), *tensors, torch.empty(1)) == BAD_SIZE
    gradients = [torch.empty(1)] * 3
    assert library.call("backward", 0, sizes, Place(), torch.empty(1), *tensors, *gradients) == BAD_SIZE
    assert library.log.launches == launches
    assert b"1 to 8 levels" in library.binary.mpformer_explain(BAD_SIZE)


@needs_compiler
@pytest.mark.parametrize("kind", [-1, 4])
def test_unknown_types_are_refused(library: Library, kind: int) -> None:
    inputs = draw_inputs()
    tensors = (inputs.value, inputs.locations, inputs.weights, torch.empty(1))
    assert library.call("forward", kind, inputs.sizes(), Place(), *tensors) == BAD_TYPE
    assert b"float32" in library.binary.mpformer_explain(BAD_TYPE)


@needs_compiler
def test_launch_is_on_the_given_device_and_stream_and_restores_the_current_device(library: Library) -> None:
    inputs = draw_inputs()
    output = torch.empty(2, 5, 2, 8)
    place = Place(device=1, stream=0x1234)
    tensors = (inputs.value, inputs.locations, inputs.weights, output)
    assert library.call("forward", 0, inputs.sizes(), place, *tensors) == 0
    assert (library.log.device_of_launch, library.log.stream_of_launch) == (1, 0x1234)
    assert library.log.device == 0


@needs_compiler
def test_error_of_cuda_is_returned_and_explained(library: Library) -> None:
    inputs, launches = draw_inputs(), library.log.launches
    tensors = (inputs.value, inputs.locations, inputs.weights, torch.empty(2, 5, 2, 8))
    assert library.call("forward", 0, inputs.sizes(), Place(device=7), *tensors) == INVALID_DEVICE
    assert library.binary.mpformer_explain(INVALID_DEVICE) == b"invalid device ordinal"
    assert (library.log.launches, library.log.device) == (launches, 0)


@needs_compiler
def test_library_says_which_interface_and_architectures_it_has(library: Library) -> None:
    version = re.search(r"MPFORMER_ABI_VERSION (\d+)", (SOURCES / "ms_deform_attn.h").read_text())
    assert version is not None
    assert library.binary.mpformer_abi_version() == int(version[1])
    assert library.binary.mpformer_describe() == b"CUDA, compiled for architectures emulated"


@needs_compiler
def test_emulation_notices_missing_barriers(tmp_path: Path) -> None:
    broken = Library(compile_emulation(tmp_path, 90, "-DEMULATION_WITHOUT_BARRIERS"))
    inputs = draw_inputs(head_dim=32)
    with pytest.raises(AssertionError):
        assert_near(broken.forward(inputs), reference(inputs), 1e-5)


@needs_compiler
@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_shapes_are_right_and_clean_under_sanitizers(tmp_path: Path, architecture: int) -> None:
    """Each array is an allocation of its own: a read or write beside it, or one off its alignment, ends the process."""
    program = tmp_path / "fuzz"
    sanitizers = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    command = ["g++", "-std=c++17", "-O1", "-g", *sanitizers, f"-D__CUDA_ARCH__={architecture}0"]
    command += ["-I", str(EMULATION), "-I", str(SOURCES), str(EMULATION / "fuzz.cpp"), "-o", str(program)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in build.stderr:
        pytest.skip("needs the libraries of AddressSanitizer and UBSan, which g++ does not find")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([program, str(architecture), "12"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "12 shapes\n"


@dataclass(frozen=True)
class Build:
    """What nvcc made, and what it said."""

    path: Path
    report: str


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    path = tmp_path_factory.mktemp("nvcc") / "kernels.so"
    command = ["nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    for architecture in (75, 90):
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-Xptxas", "-v,-warn-spills", str(KERNELS), "-o", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return Build(path, run.stdout + run.stderr)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_usual_kernels_keep_everything_in_registers(build: Build, architecture: int) -> None:
    kernels = re.findall(
        rf"Compiling entry function '(\w+)' for 'sm_{architecture}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores",
        build.report,
        re.DOTALL,
    )
    # The mangled name ends its template arguments with the channels a lane and the lanes of a row; 0 is the general kernel.
    usual = {name: (int(stack), int(spills)) for name, stack, spills in kernels if not re.search(r"Li0EE", name)}
    assert len(usual) == 12  # two directions, three types, heads of 32 and of 64 channels
    assert set(usual.values()) == {(0, 0)}, usual


@needs_nvcc
@pytest.mark.slow
def test_library_of_nvcc_loads_and_explains_itself_without_a_gpu(build: Build) -> None:
    binary = ctypes.CDLL(str(build.path))
    for function in (binary.mpformer_explain, binary.mpformer_describe):
        function.restype = ctypes.c_char_p
    assert binary.mpformer_describe() == b"CUDA, compiled for architectures 750,900"
    assert binary.mpformer_explain(INVALID_DEVICE) == b"invalid device ordinal"
