"""What is done with a kernel that transformers has attached to the layer; `tests/integration/test_lowest_versions.py` lets it do so."""

import importlib.metadata
import logging
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import import_utils

from mpformer_hf import deformable_attention, hub_kernel
from mpformer_hf.deformable_attention import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableSelfAttention,
    ms_deform_attn,
    ms_deform_attn_reference,
)
from mpformer_hf.hub_kernel import (
    KernelFallback,
    attached_forward,
    describe_kernel,
    divide_batch,
    explain_missing_decorator,
    fingerprint,
    level_sizes,
    level_starts,
)
from tests.kernel_repositories import BODIES, import_kernel, write_repository

SHAPES = ((2, 3), (4, 5), (1, 1))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """The module of the layer of each kind of kernel."""
    folder = tmp_path_factory.mktemp("kernels")
    return {kind: import_kernel(write_repository(folder, kind)) for kind in BODIES}


@pytest.fixture
def attach(kernels: dict[str, ModuleType]) -> Callable[[str], MultiScaleDeformableAttention]:
    """Make a layer with the forward of a kind of kernel, as `kernels.kernelize` does."""

    def make(kind: str) -> MultiScaleDeformableAttention:
        layer = MultiScaleDeformableAttention()
        layer.forward = MethodType(kernels[kind].MultiScaleDeformableAttention.forward, layer)
        kernels[kind].CALLS.clear()
        return layer

    return make


def draw(
    batch_size: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, tuple[tuple[int, int], ...], Tensor, Tensor]:
    value = torch.randn(batch_size, 27, 3, head_dim).to(dtype)
    return value, SHAPES, torch.rand(batch_size, 5, 3, 3, 2, 2) * 1.4 - 0.2, torch.rand(batch_size, 5, 3, 3, 2)


def test_without_a_kernel_no_tensor_is_made_for_one(monkeypatch: pytest.MonkeyPatch):
    for name in ("level_sizes", "level_starts", "run_kernel", "examine"):
        monkeypatch.setattr(hub_kernel, name, lambda *_, name=name: pytest.fail(f"{name} was called."))
    inputs = draw()
    assert torch.equal(MultiScaleDeformableAttention().attend(*inputs), ms_deform_attn(*inputs))


def test_own_forward_takes_the_arguments_of_the_hub_and_joins_the_heads():
    value, shapes, locations, weights = draw()
    output = MultiScaleDeformableAttention()(value, None, shapes, None, locations, weights, None)
    torch.testing.assert_close(output, ms_deform_attn_reference(value, shapes, locations, weights).flatten(2))


def test_layer_adds_no_parameter_to_the_projections():
    module = MultiScaleDeformableSelfAttention(embed_dim=16, num_heads=4, num_levels=2, num_points=3)
    names = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    assert list(module.state_dict()) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_good_kernel_gets_float32_and_its_output_is_cast_back(kernels, attach, dtype: torch.dtype):
    layer, inputs = attach("good"), draw(dtype=dtype)
    output = layer.attend(*inputs)
    assert kernels["good"].CALLS == [["torch.float32"] * 3 + [2, 2]]
    assert output.dtype == dtype
    assert output.shape == (2, 5, 3, 8)
    value, *rest = inputs
    expected = ms_deform_attn_reference(value.double(), rest[0], rest[1].double(), rest[2].double())
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_kernel_gets_float32_under_autocast_too(kernels, attach):
    layer, inputs = attach("good"), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.attend(*inputs)
    assert kernels["good"].CALLS == [["torch.float32"] * 3 + [2, 2]]


def test_gradients_pass_through_a_kernel(attach):
    value, shapes, locations, weights = draw(dtype=torch.bfloat16)
    results = []
    for run in (attach("good").attend, ms_deform_attn_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
        output = run(leaves[0], shapes, *leaves[1:])
        results.append(torch.autograd.grad(output.float().square().sum(), leaves))
    for given, expected in zip(*results, strict=True):
        assert given.dtype == expected.dtype
        torch.testing.assert_close(given, expected, rtol=2e-2, atol=2e-2)


def test_module_uses_the_attached_kernel(kernels, attach):
    module = MultiScaleDeformableSelfAttention(embed_dim=24, num_heads=3, num_levels=3, num_points=2)
    cells, positions = torch.randn(2, 27, 24), torch.randn(1, 27, 24)
    expected, _ = module(cells, positions, SHAPES)
    module.attention = attach("good")
    output, _ = module(cells, positions, SHAPES)
    assert len(kernels["good"].CALLS) == 1
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("wrong", "off by"), ("exiting", "exit status 3")],
)
def test_a_bad_kernel_is_not_called_and_the_reason_is_said_once(kernels, attach, caplog, kind: str, reason: str):
    layer, inputs = attach(kind), draw()
    with caplog.at_level(logging.WARNING):
        outputs = [layer.attend(*inputs) for _ in range(3)] + [attach(kind).attend(*inputs)]
    assert kernels[kind].CALLS == []
    assert all(torch.equal(output, ms_deform_attn(*inputs)) for output in outputs)
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    assert "goes on with its own" in caplog.messages[0]


def test_a_kernel_that_cannot_be_loaded_by_another_process_is_not_called(caplog):
    class Local(nn.Module):
        def forward(self, *_):
            pytest.fail("It was called.")

    layer, inputs = MultiScaleDeformableAttention(), draw()
    layer.forward = MethodType(Local.forward, layer)
    assert torch.equal(layer.attend(*inputs), ms_deform_attn(*inputs))
    assert "no file that another process could load" in caplog.text


@pytest.fixture
def passed(kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have passed their self-tests, as far as is known."""
    forwards = [module.MultiScaleDeformableAttention.forward for module in kernels.values()]
    monkeypatch.setattr(hub_kernel, "_refusals", {(forward, torch.device("cpu")): None for forward in forwards})


def test_a_kernel_that_fails_later_is_given_up(passed: None, attach, caplog):
    layer, inputs = attach("unreliable"), draw(head_dim=4)
    outputs = [layer.attend(*inputs) for _ in range(3)]
    assert all(torch.equal(output, ms_deform_attn(*inputs)) for output in outputs)
    assert [message.count("head dimension 4") for message in caplog.messages] == [1]


def test_lack_of_memory_is_no_reason_to_give_a_kernel_up(passed: None, attach):
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        attach("starving").attend(*draw(head_dim=4))


@pytest.mark.parametrize("case", ["float64", "no image", "no query", "too large"])
def test_what_a_kernel_cannot_do_stays_with_the_own_implementation(
    kernels, attach, case: str, monkeypatch: pytest.MonkeyPatch
):
    layer = attach("good")
    value, shapes, locations, weights = draw(batch_size=0 if case == "no image" else 2)
    if case == "float64":
        value, locations, weights = value.double(), locations.double(), weights.double()
    if case == "no query":
        locations, weights = locations[:, :0], weights[:, :0]
    if case == "too large":
        monkeypatch.setattr(hub_kernel, "MOST_ELEMENTS", value.numel())
    output = layer.attend(value, shapes, locations, weights)
    assert kernels["good"].CALLS == []
    assert torch.equal(output, ms_deform_attn(value, shapes, locations, weights))


@pytest.mark.parametrize(("batch_size", "step"), [(1, 1), (5, 5), (64, 64), (66, 33), (67, 1), (130, 26)])
def test_batches_are_split_into_equal_parts_of_at_most_64(kernels, attach, batch_size: int, step: int):
    assert divide_batch(batch_size) == step
    layer, inputs = attach("good"), draw(batch_size)
    torch.testing.assert_close(layer.attend(*inputs), ms_deform_attn_reference(*inputs))
    (call,) = kernels["good"].CALLS
    assert call == ["torch.float32"] * 3 + [batch_size, step]


def test_levels_are_described_as_the_kernels_read_them():
    device = torch.device("cpu")
    assert level_sizes(SHAPES, device).tolist() == [[2, 3], [4, 5], [1, 1]]
    assert level_starts(SHAPES, device).tolist() == [0, 6, 26]


# ------------------------------------------------------------------------------------------------------ MPFORMER_MSDA_BACKEND


def test_another_backend_that_is_forced_wins_over_an_attached_kernel(kernels, attach, monkeypatch: pytest.MonkeyPatch):
    layer, inputs = attach("good"), draw()
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "reference")
    assert torch.equal(layer.attend(*inputs), ms_deform_attn_reference(*inputs))
    assert kernels["good"].CALLS == []


def test_a_name_that_is_no_backend_is_refused_with_a_kernel_too(attach, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="'fastest' is no backend"):
        attach("good").attend(*draw())


def test_a_kernel_that_is_forced_runs(kernels, attach, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "hub")
    attach("good").attend(*draw())
    assert len(kernels["good"].CALLS) == 1


def test_forcing_a_kernel_where_none_is_attached_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "hub")
    with pytest.raises(RuntimeError, match=r"use_kernels=True"):
        MultiScaleDeformableAttention().attend(*draw())


def test_forcing_a_bad_kernel_says_what_is_wrong_with_it(attach, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "hub")
    with pytest.raises(RuntimeError, match=r"exit status 3"):
        attach("exiting").attend(*draw())


def test_forcing_a_kernel_that_raises_shows_its_error(passed: None, attach, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPFORMER_MSDA_BACKEND", "hub")
    with pytest.raises(RuntimeError, match="The kernel of the kernels hub failed: RuntimeError: head dimension 4"):
        attach("unreliable").attend(*draw(head_dim=4))


# -------------------------------------------------------------------------------------------------------- compile and export


@pytest.mark.parametrize("kind", [None, "good"])
def test_module_compiles_without_a_graph_break(kernels, attach, kind: str | None):
    """A kernel that is attached stays out of the graph."""
    module = MultiScaleDeformableSelfAttention(embed_dim=24, num_heads=3, num_levels=3, num_points=2)
    cells, positions = torch.randn(2, 27, 24), torch.randn(1, 27, 24)
    expected, _ = module(cells, positions, SHAPES)
    kernels["good"].CALLS.clear()
    if kind is not None:
        module.attention = attach(kind)
    output, _ = torch.compile(module, backend="aot_eager", fullgraph=True)(cells, positions, SHAPES)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert kernels["good"].CALLS == []


def test_module_with_a_kernel_is_exported_without_it(kernels, attach):
    module = MultiScaleDeformableSelfAttention(embed_dim=24, num_heads=3, num_levels=3, num_points=2)
    cells, positions = torch.randn(2, 27, 24), torch.randn(1, 27, 24)
    expected, _ = module(cells, positions, SHAPES)
    module.attention = attach("good")
    output, _ = torch.export.export(module, (cells, positions, SHAPES)).module()(cells, positions, SHAPES)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert kernels["good"].CALLS == []


# ------------------------------------------------------------------------------------------------- what is attached, and where


def test_own_forward_put_back_by_transformers_is_no_kernel():
    """`kernelize` does that where it has no kernel for the device or the mode."""
    layer = MultiScaleDeformableAttention()
    assert attached_forward(layer) is None
    layer.forward = MethodType(MultiScaleDeformableAttention.forward, layer)
    assert attached_forward(layer) is None


def test_a_kernel_is_found_behind_a_hook_of_accelerate(attach):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate, which is not installed")
    layer = attach("good")
    kernel = attached_forward(layer)
    assert kernel is not None
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert attached_forward(layer) is kernel
    plain = MultiScaleDeformableAttention()
    hooks.add_hook_to_module(plain, hooks.ModelHook())
    assert attached_forward(plain) is None


def test_a_kernel_is_described_by_its_files(kernels, attach):
    candidate = describe_kernel(attached_forward(attach("good")))
    file = Path(kernels["good"].__file__).with_name("__init__.py")
    assert candidate.arguments == {
        "root": kernels["good"].__package__,
        "file": str(file),
        "module": kernels["good"].__name__,
        "layer": "MultiScaleDeformableAttention",
    }


def test_fingerprint_changes_with_any_file_of_the_package(tmp_path: Path):
    file = write_repository(tmp_path, "good") / "build" / "torch-universal" / "__init__.py"
    before = fingerprint(file)
    (file.parent / "__pycache__").mkdir()
    (file.parent / "__pycache__" / "layers.pyc").write_text("compiled")
    assert fingerprint(file) == before
    with file.with_name("layers.py").open("a") as layers:
        layers.write("# changed\n")
    assert fingerprint(file) != before


# ------------------------------------------------------------------------------------------------------------ why there is none


@pytest.mark.parametrize("installed", ["0.17.2", None])
def test_a_missing_decorator_is_explained_by_the_versions(installed: str | None, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        assert name == "kernels"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    monkeypatch.setattr(import_utils, "KERNELS_MAX_VERSION", "0.19.0")
    found = f"kernels {installed} is installed" if installed else "kernels is not installed"
    assert explain_missing_decorator(nn.Linear) == (
        f"transformers {transformers.__version__} attaches kernels only with 0.18.2 <= kernels < 0.19.0, and {found}"
    )


def test_the_switch_of_transformers_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("USE_HUB_KERNELS", "NO")
    assert "USE_HUB_KERNELS=NO" in explain_missing_decorator(nn.Linear)


def test_nothing_is_explained_where_the_decorator_is():
    class Decorated(nn.Module):
        kernel_layer_name = "MultiScaleDeformableAttention"

    assert explain_missing_decorator(Decorated) is None


def test_decorator_attached_exactly_where_transformers_has_fitting_kernels():
    assert hasattr(MultiScaleDeformableAttention, "kernel_layer_name") == import_utils.is_kernels_available()
    assert not hasattr(deformable_attention.MultiScaleDeformableSelfAttention, "kernel_layer_name")


# ---------------------------------------------------------------------------------------------------------- loading a model


class Replaceable(nn.Module):
    """A layer that `kernels` may replace."""

    kernel_layer_name = "MultiScaleDeformableAttention"


class Attaching(nn.Module):
    """Stands where `PreTrainedModel` is among the bases: attaching fails as it does offline."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Replaceable()

    def set_use_kernels(self, use_kernels: bool, kernel_config: object = None, mode: object = None) -> None:
        self.asked = (use_kernels, kernel_config, mode)
        if use_kernels and any(hasattr(type(module), "kernel_layer_name") for module in self.modules()):
            raise FileNotFoundError("Cannot find a local snapshot")


class Model(KernelFallback, Attaching):
    """A model."""


def test_a_kernel_that_cannot_be_had_does_not_stop_a_model(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: True)
    model = Model()
    model.set_use_kernels(True, mode="training")
    assert model.asked == (True, None, "training")  # again, so that other layers get their kernels
    assert Replaceable.kernel_layer_name == "MultiScaleDeformableAttention"
    assert "Cannot find a local snapshot" in caplog.text


def test_what_transformers_says_about_the_version_of_kernels_is_passed_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(FileNotFoundError):
        Model().set_use_kernels(True)


def test_mistakes_in_the_configuration_of_kernels_are_passed_on(monkeypatch: pytest.MonkeyPatch):
    class Config:
        def sanitize_kernel_mapping(self, model: object) -> None:
            raise ValueError("Layer X is not registered in the model")

    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: True)
    with pytest.raises(ValueError, match="Layer X"):
        Model().set_use_kernels(True, Config())
