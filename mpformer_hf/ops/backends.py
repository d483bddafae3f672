"""Which implementation runs, and why the others do not.

In order of preference: a kernel of the kernels hub (only after `use_kernels=True`), deformops (if it is installed and won a timed
self-test), the compiled library of this package, and plain PyTorch.
"""

import abc
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..deformable_attention import BACKENDS, forced_backend, ms_deform_attn_reference
from ..embedding_bag_attention import attend, differentiate
from . import build
from .compiled import CompiledLibrary, Shapes, can_handle


class Kernel(Protocol):
    """What the operator needs of an implementation; arguments as `CompiledLibrary`."""

    def forward(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator."""

    def backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        shapes: Shapes,
        locations: Tensor,
        weights: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of value, locations and weights."""


class Backend(abc.ABC):
    """One implementation, as `doctor` shows it.

    Attributes:
        name: its name in MPFORMER_MSDA_BACKEND.
        is_automatic: False if it is used only where a user asks for it.
    """

    name: str
    is_automatic = True

    @abc.abstractmethod
    def explain_absence(self, device: torch.device) -> str | None:
        """None if it can be used on this device, else one line why not."""

    @abc.abstractmethod
    def run(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator, differentiable; arguments as `deformable_attention.ms_deform_attn`."""


class KernelBackend(Backend):
    """A backend that can serve the operator."""

    @abc.abstractmethod
    def load(self, device: torch.device) -> Kernel:
        """The kernel for a device for which `explain_absence` is None."""

    def run(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator, differentiable."""
        return _KernelAttention.apply(self.load(value.device), value, shapes, locations, weights)


class CompiledBackend(KernelBackend):
    """The library of this package."""

    name = "compiled"

    def explain_absence(self, device: torch.device) -> str | None:
        """The reason why the library is not there or cannot be loaded; builds the CPU's at first use."""
        if device.type not in build.KINDS:
            return f"there are no kernels for devices of type {device.type}"
        return load_library(device.type).absence

    def load(self, device: torch.device) -> Kernel:
        """The library."""
        loaded = load_library(device.type)
        if loaded.library is None:
            raise RuntimeError(loaded.absence)
        return loaded.library


@dataclass(frozen=True)
class LoadedLibrary:
    """A library, or one line why there is none."""

    library: CompiledLibrary | None
    absence: str | None


@functools.cache
def load_library(kind: str) -> LoadedLibrary:
    """The library of a kind of device, "cpu" or "cuda"; the CPU's is built if need be."""
    path = build.ensure_library(kind)
    if path is None:
        return LoadedLibrary(None, build.explain_absence(kind))
    try:
        return LoadedLibrary(CompiledLibrary(path), None)
    except OSError as error:
        return LoadedLibrary(None, f"{path} cannot be loaded: {error}")


class EmbeddingBagBackend(KernelBackend):
    """Plain PyTorch without a graph; the fastest there is on CPU without a compiler."""

    name = "embedding_bag"
    forward = staticmethod(attend)
    backward = staticmethod(differentiate)

    def explain_absence(self, device: torch.device) -> str | None:
        """Always there on CPU."""
        return None if device.type == "cpu" else "made for CPU; elsewhere `reference` is faster"

    def load(self, device: torch.device) -> Kernel:
        """Serves any device."""
        del device
        return self


class ReferenceBackend(Backend):
    """`grid_sample` with PyTorch's own derivative."""

    name = "reference"

    def explain_absence(self, device: torch.device) -> str | None:
        """Always there."""
        del device
        return None

    def run(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator, differentiable."""
        return ms_deform_attn_reference(value, shapes, locations, weights)


class _KernelAttention(torch.autograd.Function):
    """A kernel with its derivative, without the registered operator around it."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        kernel: Kernel,
        value: Tensor,
        shapes: Shapes,
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.kernel, ctx.shapes = kernel, shapes  # type: ignore[attr-defined]
        return kernel.forward(value, shapes, locations, weights)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor
    ) -> tuple[None, Tensor | None, None, Tensor | None, Tensor | None]:
        value, locations, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        needed = [ctx.needs_input_grad[i] for i in (1, 3, 4)]  # type: ignore[attr-defined]
        kernel, shapes = ctx.kernel, ctx.shapes  # type: ignore[attr-defined]
        grads = kernel.backward(grad_output, value, shapes, locations, weights, needed)
        return None, grads[0], None, grads[1], grads[2]


# ------------------------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Choice:
    """The backend in use on a device, why, and one line for each that comes before it why it is not."""

    backend: Backend
    reason: str
    refusals: dict[str, str]


@functools.cache
def backends() -> tuple[Backend, ...]:
    """All of them, in order of preference."""
    from .deformops import DeformopsBackend  # noqa: PLC0415 - these files import this one
    from .hub import HubBackend  # noqa: PLC0415

    available = (HubBackend(), DeformopsBackend(), CompiledBackend(), EmbeddingBagBackend(), ReferenceBackend())
    return tuple(sorted(available, key=lambda backend: BACKENDS.index(backend.name)))


def choose_backend(device: torch.device) -> Choice:
    """The backend that models use on this device.

    Raises:
        ValueError: MPFORMER_MSDA_BACKEND names no backend.
        RuntimeError: it names one that cannot be used here.
    """
    forced = forced_backend()
    refusals: dict[str, str] = {}
    for backend in backends():
        if forced is not None and backend.name != forced:
            refusals[backend.name] = f"MPFORMER_MSDA_BACKEND asks for {forced}"
            continue
        if not backend.is_automatic and forced is None:  # not even looked at: that may take a self-test
            refusals[backend.name] = "used only by models that were loaded with use_kernels=True"
            continue
        absence = backend.explain_absence(device)
        if absence is None:
            reason = "forced by MPFORMER_MSDA_BACKEND" if forced else "the first that can be used"
            return Choice(backend, reason, refusals)
        refusals[backend.name] = absence
    raise RuntimeError(
        f"MPFORMER_MSDA_BACKEND={forced} cannot be used on {device}: {refusals[forced or '']}. "
        "Unset the variable to go on with another backend."
    )


def choose_kernel(value: Tensor, locations: Tensor) -> Kernel:
    """The kernel behind the operator for these tensors."""
    if not can_handle(value, locations):
        return EmbeddingBagBackend()
    return _load_kernel(value.device, os.environ.get("MPFORMER_MSDA_BACKEND"))


@functools.lru_cache(maxsize=32)
def _load_kernel(device: torch.device, forced: str | None) -> Kernel:
    """`forced` is a key of the cache alone: the environment may change while the process runs, as it does in tests."""
    del forced
    backend = choose_backend(device).backend
    if isinstance(backend, KernelBackend):
        return backend.load(device)
    if backend.name == "hub":
        raise RuntimeError(
            "MPFORMER_MSDA_BACKEND=hub replaces a layer of a model, not the operator. Call the model, or unset the variable."
        )
    return EmbeddingBagBackend()
