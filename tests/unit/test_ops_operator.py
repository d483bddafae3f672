"""The registered operator: schema, shapes without data, derivative, autocast, refusals. Values: test_deformable_attention.py."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpformer_hf.deformable_attention import ms_deform_attn_reference
from mpformer_hf.ops import backends, operator, register
from mpformer_hf.ops.compiled import MAX_CHANNELS

SHAPES = [2, 4, 1, 3]
PAIRS = ((2, 4), (1, 3))
forward = torch.ops.mpformer.ms_deform_attn
backward = torch.ops.mpformer.ms_deform_attn_backward


def draw(
    dtype: torch.dtype = torch.float64, head_dim: int = 5, num_points: int = 2, *, needs_grad: bool = True
) -> tuple[Tensor, list[int], Tensor, Tensor]:
    real_type = torch.float64 if dtype == torch.float64 else torch.float32
    size = (2, 3, 2, 2, num_points)
    value = torch.randn(2, 11, 2, head_dim, dtype=dtype).requires_grad_(needs_grad)
    locations = (torch.rand(*size, 2, dtype=real_type) * 1.2 - 0.1).requires_grad_(needs_grad)
    return value, SHAPES, locations, torch.rand(size, dtype=real_type).requires_grad_(needs_grad)


@pytest.fixture(params=["compiled", "embedding_bag"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs behind the operator."""
    if request.param == "compiled" and backends.CompiledBackend().explain_absence(torch.device("cpu")) is not None:
        pytest.skip("needs the compiled library; python -m mpformer_hf.ops doctor says why it is not there")
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", request.param)
    return request.param


def test_the_package_registers_it_when_it_is_imported():
    assert register() is None
    schema = str(forward.default._schema)
    assert schema == (
        "mpformer::ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
        "Tensor attention_weights) -> Tensor"
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_finds_nothing_wrong_with_it(kernel: str, dtype: torch.dtype):
    report = torch.library.opcheck(forward, draw(dtype))
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("needed", [[True] * 3, [True, False, False], [False, True, True]], ids=str)
def test_torch_finds_nothing_wrong_with_its_backward(kernel: str, needed: list[bool]):
    value, shapes, locations, weights = draw(needs_grad=False)
    grad_output = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    report = torch.library.opcheck(backward, (grad_output, value, shapes, locations, weights, needed))
    assert set(report.values()) == {"SUCCESS"}


def test_gradients_equal_finite_differences(kernel: str):
    value, shapes, locations, weights = draw()
    assert torch.autograd.gradcheck(
        lambda *tensors: forward(tensors[0], shapes, *tensors[1:]), (value, locations, weights)
    )


def test_what_needs_no_gradient_gets_none(kernel: str):
    value, shapes, locations, weights = draw(needs_grad=False)
    value.requires_grad_()
    forward(value, shapes, locations, weights).sum().backward()
    assert value.grad.shape == value.shape
    assert locations.grad is weights.grad is None


@pytest.mark.parametrize("change", [{"head_dim": MAX_CHANNELS + 1}, {"num_points": 9}], ids=str)
def test_sizes_beyond_the_compiled_kernels_run_on_plain_pytorch(change: dict[str, int]):
    value, shapes, locations, weights = draw(**change)
    output = forward(value, shapes, locations, weights)
    torch.testing.assert_close(output, ms_deform_attn_reference(value, PAIRS, locations, weights))
    output.sum().backward()
    assert value.grad.isfinite().all()


def test_a_second_derivative_is_refused_with_the_way_to_get_it():
    value, shapes, locations, weights = draw()
    (grad,) = torch.autograd.grad(forward(value, shapes, locations, weights).square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="MPFORMER_MSDA_BACKEND=reference"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_type_of_the_value_and_float32_locations(dtype: torch.dtype):
    value, shapes, locations, weights = draw(dtype)
    expected = forward(value, shapes, locations, weights)
    with torch.autocast("cpu", dtype=dtype):
        output = forward(value, shapes, locations, weights)
        # A softmax or a linear layer under autocast may have made half-precision weights of them.
        from_half = forward(value, shapes, locations, weights.to(dtype))
    assert torch.equal(output, expected)
    assert output.dtype == from_half.dtype == dtype
    assert torch.equal(from_half, forward(value, shapes, locations, weights.to(dtype).float()))


def test_it_runs_inside_of_a_compiled_function_whose_sizes_change():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def attend(value: Tensor, locations: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
        return 2 * forward(value, [height, width], locations, weights)

    for height, width in [(3, 5), (4, 7), (6, 6)]:
        value = torch.randn(1, height * width, 2, 4, requires_grad=True)
        locations, weights = torch.rand(1, 9, 2, 1, 3, 2), torch.rand(1, 9, 2, 1, 3)
        output = attend(value, locations, weights, height, width)
        torch.testing.assert_close(
            output, 2 * ms_deform_attn_reference(value, ((height, width),), locations, weights), rtol=1e-5, atol=1e-6
        )
        output.sum().backward()
        assert value.grad.isfinite().all()


def test_inductor_compiles_it(kernel: str):
    value, shapes, locations, weights = draw(torch.float32)

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return forward(value * 2, shapes, locations, weights.softmax(-1)).relu()

    torch.compiler.reset()
    expected = attend(value, locations, weights)
    output = torch.compile(attend, fullgraph=True)(value, locations, weights)
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output.sum(), (value, locations, weights))
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), (value, locations, weights)), strict=True):
        torch.testing.assert_close(grad, wanted)


REFUSALS = {
    "value of other cells": (
        lambda v, s, p, w: (v[:, 1:], s, p, w),
        r"value of shape \(B, 11, N, D\) .* got \(2, 10, 2, 5\)",
    ),
    "value of three axes": (lambda v, s, p, w: (v.flatten(2), s, p, w), r"value of shape \(B, 11, N, D\)"),
    "locations of another batch": (lambda v, s, p, w: (v, s, p[:1], w), r"\(B, Q, N, L, K, 2\) = \(2, Q, 2, 2, K, 2\)"),
    "locations of too few levels": (lambda v, s, p, w: (v, s, p[:, :, :, :1], w), r"got \(2, 3, 2, 1, 2, 2\)"),
    "weights of another shape": (
        lambda v, s, p, w: (v, s, p, w[..., :1]),
        r"attention weights of shape \(2, 3, 2, 2, 2\)",
    ),
    "bfloat16 locations": (
        lambda v, s, p, w: (v, s, p.bfloat16(), w.bfloat16()),
        "half precision is wrong by whole cells",
    ),
    "mixed types": (lambda v, s, p, w: (v, s, p, w.float()), "of one type, float32 or float64"),
    "integer value": (lambda v, s, p, w: (v.detach().long(), s, p, w), r"value of a float type, got torch.int64"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_arguments_that_do_not_fit_are_explained(name: str):
    change: Callable[..., tuple] = REFUSALS[name][0]
    with pytest.raises(ValueError, match=REFUSALS[name][1]):
        forward(*change(*draw()))


def test_registration_that_fails_leaves_a_package_that_works():
    """As with a torch that refuses something; in a process of its own, because registration happens once."""
    code = (
        "import torch, torchvision\n"  # which registers operators of its own
        "def refuse(*_, **__): raise RuntimeError('not in this version')\n"
        "torch.library.define = refuse\n"
        "import mpformer_hf.deformable_attention as d\n"
        "from mpformer_hf.ops import register\n"
        "print(register()); print(d.choose_implementation('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "registration with torch failed: RuntimeError: not in this version",
        "embedding_bag",
    ]


def test_the_choice_says_why_the_others_are_not_used(kernel: str):
    choice = backends.choose_backend(torch.device("cpu"))
    assert (choice.backend.name, choice.reason) == (kernel, "forced by MPFORMER_MSDA_BACKEND")
    before = [backend.name for backend in backends.backends()]
    before = before[: before.index(kernel)]
    assert list(choice.refusals) == before
    assert all(kernel in reason for reason in choice.refusals.values())


def test_without_being_forced_the_first_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MPFORMER_MSDA_BACKEND", raising=False)
    monkeypatch.setattr(backends.CompiledBackend, "explain_absence", lambda self, device: "it rains")
    choice = backends.choose_backend(torch.device("cpu"))
    assert choice.backend.name == "embedding_bag"
    assert choice.refusals["compiled"] == "it rains"


def test_a_forced_backend_that_cannot_be_used_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "compiled")
    monkeypatch.setattr(backends.CompiledBackend, "explain_absence", lambda self, device: "it rains")
    with pytest.raises(RuntimeError, match=r"MPFORMER_MSDA_BACKEND=compiled cannot be used on cpu: it rains. Unset"):
        backends.choose_backend(torch.device("cpu"))


def test_every_name_that_the_environment_may_say_is_a_backend():
    assert tuple(backend.name for backend in backends.backends()) == backends.BACKENDS


def test_operators_are_defined_once():
    assert operator.FORWARD == "mpformer::ms_deform_attn"
    with pytest.raises(RuntimeError, match="multiple times"):
        operator.define()
