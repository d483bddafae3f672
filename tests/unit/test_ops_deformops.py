"""The optional backend deformops: when it is used, why not, and that it is handed what its operators expect.

Its operators need Python 3.12 and, outside of Triton's interpreter, a GPU; where they cannot run, functions of the same interface stand
in for them.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpformer_hf import kernel_self_test
from mpformer_hf.deformable_attention import ms_deform_attn_reference
from mpformer_hf.kernel_self_test import Verdict
from mpformer_hf.ops import backends, deformops
from mpformer_hf.ops.deformops import DeformopsBackend, DeformopsKernel, explain_device, explain_environment

ROOT = Path(__file__).parents[2]
SHAPES = ((2, 3), (4, 5), (1, 1))
GPU = torch.device("cuda", 0)
is_installed = pytest.mark.skipif(
    sys.version_info < (3, 12) or importlib.util.find_spec("deformops") is None,
    reason="needs deformops, which needs Python 3.12",
)


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[tuple[int, int], ...], Tensor, Tensor]:
    value = torch.randn(2, 27, 3, 8).to(dtype)
    return value, SHAPES, torch.rand(2, 5, 3, 3, 2, 2) * 1.4 - 0.2, torch.rand(2, 5, 3, 3, 2)


# ------------------------------------------------------------------------------------------------------------- the interface


def forward(value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Stands for deformops' forward operator: (B, Q, N * D), levels as int32 tensors, everything contiguous."""
    assert sizes.dtype == starts.dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in (value, sizes, starts, locations, weights))
    levels = [tuple(size) for size in sizes.tolist()]
    assert starts.tolist() == [sum(h * w for h, w in levels[:level]) for level in range(len(levels))]
    return ms_deform_attn_reference(value, levels, locations, weights).flatten(2)


def backward(grad_output: Tensor, value: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for deformops' backward operator, which gives all gradients in the type of the value."""
    assert grad_output.is_contiguous()
    sizes, starts, locations, weights = arguments
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        output = forward(leaves[0], sizes, starts, *leaves[1:])
    assert grad_output.shape == output.shape
    given = torch.autograd.grad(output, leaves, grad_output)
    return given[0].to(value.dtype), given[1].to(value.dtype), given[2].to(value.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_get_what_they_expect_and_give_what_is_expected_of_a_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deformops, "load_kernel", lambda: DeformopsKernel(forward, backward))
    value, shapes, locations, weights = draw(dtype)
    results = []
    for run in (DeformopsBackend().run, ms_deform_attn_reference):
        turned = value.transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous
        leaves = [tensor.clone().requires_grad_() for tensor in (turned, locations, weights)]
        output = run(leaves[0], shapes, *leaves[1:])
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    for given, expected in zip(*results, strict=True):
        assert given.dtype == expected.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


def test_gradients_that_are_not_needed_are_not_given():
    value, shapes, locations, weights = draw()
    grads = DeformopsKernel(forward, backward).backward(
        torch.ones(2, 5, 3, 8), value, shapes, locations, weights, (False, True, False)
    )
    assert grads[0] is None
    assert grads[1].shape == locations.shape
    assert grads[2] is None


# ------------------------------------------------------------------------------------------------------------- why it is not used


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    assert explain_environment().startswith("it needs Python 3.12 or newer, this is ")


@pytest.mark.parametrize("missing", ["deformops", "triton"])
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    assert explain_environment() == f"{missing} is not installed: pip install {missing}"


def test_other_devices_are_refused():
    assert explain_device(torch.device("cpu")) == "its kernels are made for NVIDIA GPUs, not for cpu"


@pytest.mark.parametrize(("capability", "is_refused"), [((6, 1), True), ((7, 0), False), ((12, 0), False)])
def test_an_old_gpu_is_refused(capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    expected = "it needs compute capability 7.0, the GPU has 6.1" if is_refused else None
    assert explain_device(GPU) == expected


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch):
    """Make the self-test, which needs a GPU, end with a verdict."""
    monkeypatch.setattr(deformops, "explain_environment", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.0.1")
    monkeypatch.setattr(backends, "load_library", lambda _: namedtuple("Loaded", "library")(None))

    def set_verdict(verdict: Verdict) -> None:
        monkeypatch.setattr(deformops, "examine", lambda *_: verdict)

    return set_verdict


def test_it_is_used_where_it_is_right_and_faster(judged):
    judged(Verdict(is_good=True, milliseconds=1.0, rival_milliseconds=1.5))
    assert DeformopsBackend().explain_absence(GPU) is None


def test_both_times_are_told_where_it_is_slower(judged):
    judged(Verdict(is_good=True, milliseconds=1.5, rival_milliseconds=1.0, notes={"rival": "compiled"}))
    reason = DeformopsBackend().explain_absence(GPU)
    assert reason.startswith("slower than compiled: 1.50 ms against 1.00 ms for forward and backward")


def test_it_can_be_forced_where_it_is_slower_but_not_where_it_is_wrong(judged, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "deformops")
    judged(Verdict(is_good=True, milliseconds=1.5, rival_milliseconds=1.0))
    assert DeformopsBackend().explain_absence(GPU) is None
    judged(Verdict(is_good=False, reason="wrong numbers"))
    assert DeformopsBackend().explain_absence(GPU) == "its self-test failed: wrong numbers"


def test_a_new_library_of_ours_is_timed_against_anew(judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    judged(Verdict(is_good=True))
    versions = [deformops.make_candidate().version]
    library = tmp_path / "library.so"
    for build in range(2):
        library.write_text("built")
        os.utime(library, (build, build))
        loaded = namedtuple("Loaded", "library")(namedtuple("Library", "path")(library))
        monkeypatch.setattr(backends, "load_library", lambda _, loaded=loaded: loaded)
        versions.append(deformops.make_candidate().version)
    assert len(set(versions)) == 3


def test_it_comes_before_the_compiled_library_and_after_the_hub():
    names = [backend.name for backend in backends.backends()]
    assert names == ["hub", "deformops", "compiled", "embedding_bag", "reference"]


def test_it_is_not_imported_with_the_package(tmp_path: Path):
    """Even where it is installed: here one that cannot be imported."""
    package = tmp_path / "deformops"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('deformops was imported')")
    code = "import mpformer_hf, sys; sys.exit('deformops' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


# ----------------------------------------------------------------------------------------------------------------- the real one


@is_installed
def test_its_kernels_are_right_in_tritons_interpreter():
    code = (
        "import torch\n"
        "from mpformer_hf.kernel_self_test import SMALL, draw_inputs, run_with_gradients\n"
        "from mpformer_hf.deformable_attention import ms_deform_attn_reference\n"
        "from mpformer_hf.ops.deformops import DeformopsBackend\n"
        "for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):\n"
        "    inputs = draw_inputs(SMALL, 1, 20, dtype, torch.device('cpu'))\n"
        "    given = run_with_gradients(DeformopsBackend().run, inputs)\n"
        "    expected = run_with_gradients(ms_deform_attn_reference, inputs, torch.float64)\n"
        "    for one, other in zip(given, expected):\n"
        "        assert (one.double() - other).abs().max() < limit * other.abs().max(), (dtype, one, other)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]


@is_installed
@pytest.mark.gpu
def test_its_self_test_ends_with_numbers_that_are_right_and_two_times():
    verdict = kernel_self_test.examine(deformops.make_candidate(), GPU)
    assert verdict.is_good, verdict.reason
    assert verdict.milliseconds > 0
    assert verdict.rival_milliseconds > 0
    absence = DeformopsBackend().explain_absence(GPU)
    assert absence is None or absence.startswith("slower than")
