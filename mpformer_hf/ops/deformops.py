"""The optional backend deformops (https://github.com/tue-p8n/deformops), used where it is installed, right, and faster than ours.

Its Triton kernels, which compile themselves at first use. Nothing of it is imported before it is asked for.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..deformable_attention import forced_backend
from ..hub_kernel import level_sizes, level_starts
from ..kernel_self_test import Candidate, Trial, Verdict, examine
from . import backends
from .compiled import Shapes

LEAST_PYTHON = (3, 12)
LEAST_CAPABILITY = (7, 0)
# Its configuration whose gradient of the value is added up in float32, like ours.
CONFIGURATION = "msda_query_tiled_fp32acc"


class DeformopsBackend(backends.KernelBackend):
    """deformops' Triton kernels."""

    name = "deformops"

    def explain_absence(self, device: torch.device) -> str | None:
        """Not installed, not for this machine, wrong numbers, or slower than the next backend."""
        absence = explain_environment() or explain_device(device)
        if absence is not None:
            return absence
        verdict = examine(make_candidate(), device)
        if not verdict.is_good:
            return f"its self-test failed: {verdict.reason}"
        is_forced = forced_backend() == self.name
        return None if is_forced else explain_slowness(verdict)

    def load(self, device: torch.device) -> backends.Kernel:
        """Its operators."""
        del device
        return load_kernel()


class DeformopsKernel:
    """deformops' operators below autograd, with the interface of `CompiledLibrary`."""

    def __init__(self, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take the operators.

        Args:
            forward: (value, level sizes, level starts, locations, weights) to (B, Q, N * D).
            backward: the same after the gradient of the output, to the gradients of value, locations and weights.
        """
        self._forward = forward
        self._backward = backward

    def forward(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator."""
        with on_device(value.device):
            output = self._forward(*self._prepare(value, shapes, locations, weights))
        return output.view(*locations.shape[:3], value.shape[3])

    def backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        shapes: Shapes,
        locations: Tensor,
        weights: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of value, locations and weights, those that are `needed`."""
        arguments = self._prepare(value, shapes, locations, weights)
        with on_device(value.device):
            grads = self._backward(grad_output.flatten(2).contiguous(), *arguments)
        given = [
            grad.view(tensor.shape).to(tensor.dtype) if is_needed else None
            for grad, tensor, is_needed in zip(grads, (value, locations, weights), needed, strict=True)
        ]
        return given[0], given[1], given[2]

    @staticmethod
    def _prepare(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        sizes, starts = (table(shapes, value.device).int() for table in (level_sizes, level_starts))
        return value.contiguous(), sizes, starts, locations.contiguous(), weights.contiguous()


def on_device(device: torch.device) -> Any:  # noqa: ANN401 - a context manager
    """Triton launches on the current device, whatever that of the tensors is."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@functools.cache
def load_kernel() -> DeformopsKernel:
    """Import deformops and look up its operators."""
    importlib.import_module(f"deformops.backends.triton.{CONFIGURATION}")  # registers them
    operators = torch.ops.deformops_triton
    return DeformopsKernel(
        getattr(operators, f"{CONFIGURATION}_forward"), getattr(operators, f"{CONFIGURATION}_backward")
    )


def explain_environment() -> str | None:
    """None if it is installed for this Python, else one line why not."""
    if sys.version_info < LEAST_PYTHON:
        return f"it needs Python {'.'.join(map(str, LEAST_PYTHON))} or newer, this is {sys.version.split()[0]}"
    for package in ("deformops", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {package}"
    return None


def explain_device(device: torch.device) -> str | None:
    """None if its kernels are made for this device, else one line why not."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels are made for NVIDIA GPUs, not for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}, the GPU has {capability[0]}.{capability[1]}"
    return None


def explain_slowness(verdict: Verdict) -> str | None:
    """None if it won against the next backend, else both times."""
    mine, others = verdict.milliseconds, verdict.rival_milliseconds
    if mine is None or others is None or mine < others:
        return None
    return (
        f"slower than {verdict.notes.get('rival', 'the next backend')}: {mine:.2f} ms against {others:.2f} ms for forward and "
        "backward at 512x512, 2 images, float32 and bfloat16 together"
    )


# ------------------------------------------------------------------------------------------------------------ its self-test


def make_candidate() -> Candidate:
    """What is tried: this version of deformops, against what would run without it."""
    version = f"{importlib.metadata.version('deformops')} against {describe_rival()}"
    return Candidate("deformops", version, "ops.deformops:open_trial")


def open_trial(arguments: dict[str, Any], device: torch.device) -> Trial:
    """The kernel and its rival for the self-test."""
    del arguments
    rival: backends.Backend = backends.CompiledBackend()
    if rival.explain_absence(device) is not None:
        rival = backends.ReferenceBackend()
    return Trial(DeformopsBackend().run, rival.run, {"rival": rival.name})


def describe_rival() -> str:
    """The file of the compiled library, so that a new one is timed again."""
    library = backends.load_library("cuda").library
    return "the reference" if library is None else f"{library.path} of {library.path.stat().st_mtime_ns}"
