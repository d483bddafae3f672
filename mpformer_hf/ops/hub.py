"""The kernels hub as a backend that `doctor` can ask about; models use it through `hub_kernel.py`, after `use_kernels=True`.

Here only what is already in the local cache is looked at: nothing is downloaded.
"""

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor

from ..deformable_attention import MultiScaleDeformableAttention
from ..hub_kernel import explain_missing_decorator, load_layer, make_candidate
from ..kernel_self_test import Candidate, describe, examine
from . import backends
from .compiled import Shapes

REPOSITORY = "kernels-community/deformable-detr"
PACKAGE = "mpformer_hub_kernel"  # any name; the kernel's own imports are relative


class HubBackend(backends.Backend):
    """transformers' kernel for deformable attention."""

    name = "hub"
    is_automatic = False

    def explain_absence(self, device: torch.device) -> str | None:
        """Not for this version of transformers, not downloaded, not for this machine, or its numbers are wrong."""
        absence = explain_missing_decorator(MultiScaleDeformableAttention)
        if absence is not None:
            return absence
        if device.type != "cuda":
            return f"{REPOSITORY} is made for CUDA, not for {device.type}"
        candidate = find_downloaded()
        if isinstance(candidate, str):
            return candidate
        verdict = examine(candidate, device)
        return None if verdict.is_good else f"its self-test failed: {verdict.reason}"

    def run(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator, differentiable."""
        return load_downloaded()(value, shapes, locations, weights)


def find_downloaded() -> Candidate | str:
    """The kernel in the local cache that fits this torch and GPU, or one line why there is none."""
    revisions = downloaded_revisions()
    if not revisions:
        return f"{REPOSITORY} is not in the local cache; from_pretrained(..., use_kernels=True) downloads it"
    reason = ""
    for revision in revisions:
        try:
            install = importlib.import_module("kernels.utils").install_kernel
            folder = Path(install(REPOSITORY, revision=revision, local_files_only=True))
        except Exception as error:  # whatever kernels has to say
            reason = describe(error)
            continue
        if (folder / "__init__.py").is_file():
            module = f"{PACKAGE}.layers"
            return make_candidate(PACKAGE, folder / "__init__.py", module, MultiScaleDeformableAttention.__name__)
        reason = f"{folder} holds no Python package"
    return f"{REPOSITORY} in the local cache cannot be used: {reason}"


def downloaded_revisions() -> list[str]:
    """Commits of the repository in the local cache, the newest first."""
    home = Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE)
    folders = [home / f"{kind}--{REPOSITORY.replace('/', '--')}" / "snapshots" for kind in ("kernels", "models")]
    snapshots = [snapshot for folder in folders if folder.is_dir() for snapshot in folder.iterdir()]
    return [snapshot.name for snapshot in sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)]


@functools.cache
def load_downloaded() -> Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]:
    """The kernel in the local cache as a differentiable function.

    Raises:
        RuntimeError: there is none.
    """
    candidate = find_downloaded()
    if isinstance(candidate, str):
        raise RuntimeError(candidate)  # noqa: TRY004 - a reason, not an argument
    return load_layer(**candidate.arguments)
