"""The CPU kernels, on every instruction set that this processor has, against loops over the definition and float64."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpformer_hf.deformable_attention import ms_deform_attn_reference
from mpformer_hf.ops import build
from mpformer_hf.ops.compiled import CompiledLibrary, make_place, make_sizes
from tests.unit.test_deformable_attention import Inputs, attend_by_loops, draw_inputs

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
CSRC = Path(build.SOURCES)
EMULATION = Path(__file__).with_name("cuda_emulation")

pytestmark = pytest.mark.skipif(build.find_compiler("cpu") is None, reason="needs a C compiler; there is none")


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build_library("cpu", tmp_path_factory.mktemp("library"))


@pytest.fixture(params=INSTRUCTION_SETS)
def library(request: pytest.FixtureRequest, library_path: Path, tmp_path: Path, monkeypatch) -> CompiledLibrary:
    """A copy of its own, because a library chooses its instruction set once."""
    copy = tmp_path / library_path.name
    shutil.copy(library_path, copy)
    monkeypatch.setenv("MPFORMER_INSTRUCTION_SET", request.param)
    library = CompiledLibrary(copy)
    if library.description != request.param:
        pytest.skip(f"this processor has no {request.param}, only {library.description}")
    return library


def run_in_float64(inputs: Inputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of the reference, computed from the given numbers in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (inputs.value, inputs.locations, inputs.weights)]
    output = ms_deform_attn_reference(leaves[0], inputs.shapes, leaves[1], leaves[2])
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output.double())


def run_compiled(library: CompiledLibrary, inputs: Inputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    output = library.forward(*inputs.arguments)
    grads = library.backward(grad_output.to(output.dtype), *inputs.arguments, (True, True, True))
    return output, *(grad for grad in grads if grad is not None)


def assert_all_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Relative to the length of the expected vector."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("head_dim", [1, 3, 4, 8, 20, 32, 40, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_equal_float64(library: CompiledLibrary, dtype: torch.dtype, head_dim: int):
    shapes = ((5, 7), (9, 3), (16, 16))
    inputs = draw_inputs(shapes, num_queries=70, head_dim=head_dim, num_points=4, dtype=torch.float32)
    grad_output = torch.randn(2, 70, 2, head_dim)
    rounded = replace(inputs, value=inputs.value.to(dtype))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    if dtype == torch.float64:
        rounded = replace(rounded, locations=inputs.locations.double(), weights=inputs.weights.double())
    assert_all_near(run_compiled(library, rounded, grad_output), run_in_float64(inputs, grad_output), tolerance)


@pytest.mark.parametrize("num_levels", [1, 2, 5, 8])
@pytest.mark.parametrize("num_points", [1, 3, 8])
def test_every_number_of_levels_and_points_is_right(library: CompiledLibrary, num_levels: int, num_points: int):
    shapes = tuple((2 + level, 9 - level) for level in range(num_levels))
    inputs = draw_inputs(shapes, num_queries=40, num_heads=3, head_dim=8, num_points=num_points)
    grad_output = torch.randn(2, 40, 3, 8, dtype=torch.float64)
    assert_all_near(run_compiled(library, inputs, grad_output), run_in_float64(inputs, grad_output), 1e-12)


def test_tiny_sizes_equal_loops_over_the_definition(library: CompiledLibrary):
    inputs = draw_inputs()
    torch.testing.assert_close(library.forward(*inputs.arguments), attend_by_loops(*inputs.arguments))


def test_centres_borders_and_beyond_have_values_and_derivatives_of_the_reference(library: CompiledLibrary):
    """The derivative jumps there; sizes are powers of two, so that nothing is rounded and both take the same side."""
    inputs = draw_inputs(((4, 8), (2, 2)), num_queries=200)
    places = torch.randint(-4, 21, inputs.locations.shape).double() / 16
    inputs = replace(inputs, locations=places)
    grad_output = torch.randn(2, 200, 2, 4, dtype=torch.float64)
    assert_all_near(run_compiled(library, inputs, grad_output), run_in_float64(inputs, grad_output), 1e-12)


def test_locations_meant_for_the_centre_of_a_cell_are_taken_there(library: CompiledLibrary):
    """As at the start of training: (column + 0.5) / width is rounded, its product with the width must be rounded back."""
    size = 37
    centres = (torch.arange(size) + 0.5) / size
    columns, rows = torch.meshgrid(centres, centres, indexing="xy")
    locations = torch.stack([columns, rows], dim=-1).view(1, -1, 1, 1, 1, 2)
    inputs = Inputs(torch.randn(1, size**2, 1, 4), ((size, size),), locations, torch.ones(1, size**2, 1, 1, 1))
    exact = (locations * size - 0.5).frac().eq(0)
    assert exact.float().mean() > 0.9
    output = library.forward(*inputs.arguments)[0]
    is_exact = exact.all(-1).flatten()
    assert torch.equal(output[is_exact], inputs.value[0][is_exact])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("head_dim", [3, 32])
def test_a_location_that_is_not_finite_spoils_its_row_and_its_own_gradients_alone(
    library: CompiledLibrary, bad: float, head_dim: int
):
    inputs = draw_inputs(num_queries=50, head_dim=head_dim)
    grad_output = torch.randn(2, 50, 2, head_dim, dtype=torch.float64)
    clean = run_in_float64(inputs, grad_output)
    where = (1, 7, 0, 2, 1)
    locations = inputs.locations.clone()
    locations[(*where, 0)] = bad
    output, grad_value, grad_locations, grad_weights = run_compiled(
        library, replace(inputs, locations=locations), grad_output
    )
    assert output[1, 7, 0].isnan().all()
    assert output.isnan().sum() == head_dim
    assert grad_locations[where].isnan().all()
    assert grad_locations.isnan().sum() == 2
    assert grad_weights[where].isnan()
    assert grad_weights.isnan().sum() == 1
    without = replace(
        inputs, weights=inputs.weights.index_put(tuple(map(torch.tensor, where)), torch.tensor(0.0).double())
    )
    torch.testing.assert_close(grad_value, run_in_float64(without, grad_output)[1])
    torch.testing.assert_close(
        grad_weights.nan_to_num(0), clean[3].index_put(tuple(map(torch.tensor, where)), torch.tensor(0.0).double())
    )


@pytest.mark.parametrize("far", [1e30, -1e30, 3e38, -3e38])
def test_a_location_far_outside_reads_zero(library: CompiledLibrary, far: float):
    inputs = draw_inputs(dtype=torch.float32)
    inputs = replace(inputs, locations=torch.full_like(inputs.locations, far))
    grad_output = torch.randn(2, 3, 2, 4)
    assert all((result == 0).all() for result in run_compiled(library, inputs, grad_output))


def test_cells_that_no_sample_touches_may_hold_anything(library: CompiledLibrary):
    inputs = draw_inputs(((4, 4),), num_queries=1)
    inputs.value.fill_(math.nan)
    inputs.value[:, [5, 6, 9, 10]] = 1.0  # the four cells in the middle
    inputs = replace(inputs, locations=torch.full_like(inputs.locations, 0.5), weights=torch.ones_like(inputs.weights))
    torch.testing.assert_close(library.forward(*inputs.arguments), torch.full((2, 1, 2, 4), 2.0, dtype=torch.float64))


def test_results_are_the_same_bits_for_any_number_of_threads_and_every_time(library: CompiledLibrary):
    inputs = draw_inputs(((24, 30), (12, 15)), num_queries=700, num_heads=4, head_dim=32, dtype=torch.float32)
    grad_output = torch.randn(2, 700, 4, 32)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7, 7):
            torch.set_num_threads(number)
            results.append(run_compiled(library, inputs, grad_output))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_the_number_of_threads_is_that_of_torch():
    assert make_place(torch.device("cpu")).threads == torch.get_num_threads()


def test_work_goes_to_the_threads_of_torch_and_makes_none_of_its_own(library_path: Path):
    """In a process of its own, where nothing else makes or ends threads."""
    code = (
        "import sys, torch; from pathlib import Path; from mpformer_hf.ops.compiled import CompiledLibrary\n"
        "def count(): return len(list(Path('/proc/self/task').iterdir()))\n"
        "library = CompiledLibrary(Path(sys.argv[1])); torch.set_num_threads(2)\n"
        "sizes = (1, 700, 4, 1, 4)\n"
        "inputs = (torch.randn(1, 720, 4, 32), ((24, 30),), torch.rand(*sizes, 2), torch.rand(sizes))\n"
        "torch.randn(2**20).exp(); library.forward(*inputs)\n"
        "before = count(); most = before\n"
        "for _ in range(20): library.forward(*inputs); most = max(most, count())\n"
        "print(most - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(library_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_gradients_that_nobody_wants_are_not_computed(library: CompiledLibrary):
    inputs, grad_output = draw_inputs(), torch.randn(2, 3, 2, 4, dtype=torch.float64)
    everything = library.backward(grad_output, *inputs.arguments, (True, True, True))
    for needed in [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]:
        grads = library.backward(grad_output, *inputs.arguments, needed)
        for grad, full, is_needed in zip(grads, everything, needed, strict=True):
            assert torch.equal(grad, full) if is_needed else grad is None


@pytest.mark.parametrize(
    "change",
    [
        {"levels": 9},
        {"points": 9},
        {"points": 0},
        {"channels": 129},
        {"cells": 27},
        {"heights": (2**25, 1)},
        {"heights": (2**16, 2**16), "cells": 2**32 + 1},
    ],
    ids=str,
)
def test_sizes_beyond_the_kernels_are_refused_before_memory_is_touched(library: CompiledLibrary, change: dict):
    sizes = make_sizes((1, 26, 2, 4), ((5, 5), (1, 1)), 3, 4)
    sizes = type(sizes).from_buffer_copy(sizes)
    for name, number in change.items():
        if name == "heights":
            sizes.heights[0], sizes.widths[0] = number
        else:
            setattr(sizes, name, number)
    place = make_place(torch.device("cpu"))
    nowhere = [ctypes.c_void_p(8)] * 7
    assert library._library.mpformer_forward(0, sizes, place, *nowhere[:4]) == -2
    assert library._library.mpformer_backward(0, sizes, place, *nowhere) == -2
    assert b"1 to 8 levels" in library._library.mpformer_explain(-2)


def test_refused_sizes_become_an_error_that_shows_them(library: CompiledLibrary):
    inputs = draw_inputs(head_dim=130)
    with pytest.raises(RuntimeError, match=r"shape \(2, 27, 2, 130\).*1 to 128 channels a head"):
        library.forward(*inputs.arguments)


def test_unknown_types_are_refused(library: CompiledLibrary):
    sizes, place = make_sizes((1, 26, 2, 4), ((5, 5), (1, 1)), 3, 4), make_place(torch.device("cpu"))
    assert library._library.mpformer_forward(3, sizes, place, *[None] * 4) == -1


def test_a_library_of_another_interface_is_refused(tmp_path: Path):
    source = tmp_path / "old.c"
    source.write_text("int mpformer_abi_version(void) { return 0; }")
    compiler = build.find_compiler("cpu")
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "old.so")], check=True)
    with pytest.raises(OSError, match=r"version 0 of the interface, this package needs 1. Build it again: python -m"):
        CompiledLibrary(tmp_path / "old.so")


@pytest.mark.slow
@pytest.mark.proof
def test_random_shapes_are_right_and_clean_under_sanitizers(tmp_path: Path):
    """Each array is an allocation of its own: a read or write beside it, or one off its alignment, ends the process."""
    if shutil.which("g++") is None or shutil.which("gcc") is None:
        pytest.skip("needs gcc and g++")
    sanitizers = ["-g", "-O1", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    kernels, program = tmp_path / "kernels.o", tmp_path / "fuzz"
    source = CSRC / "ms_deform_attn_cpu.c"
    compiling = ["gcc", "-std=c11", "-ffp-contract=fast", *sanitizers, "-c", str(source), "-o", str(kernels)]
    subprocess.run(compiling, check=True, capture_output=True)
    linking = ["g++", "-std=c++17", *sanitizers, "-DFUZZ_CPU", "-I", str(EMULATION), "-I", str(CSRC)]
    linking += [str(EMULATION / "fuzz.cpp"), str(kernels), "-o", str(program), "-ldl", "-lpthread"]
    build_run = subprocess.run(linking, capture_output=True, text=True, check=False)
    if "cannot find" in build_run.stderr:
        pytest.skip("needs the libraries of AddressSanitizer and UBSan, which g++ does not find")
    assert build_run.returncode == 0, build_run.stderr
    for instruction_set in INSTRUCTION_SETS:
        environment = os.environ | {"MPFORMER_INSTRUCTION_SET": instruction_set}
        run = subprocess.run([program, "0", "40"], capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == 0, run.stderr
        assert run.stdout == "40 shapes\n"
