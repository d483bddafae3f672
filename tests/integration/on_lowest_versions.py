"""What `test_lowest_versions.py` has run by a Python that sees the lowest versions; prints what it found as JSON.

python -m tests.integration.on_lowest_versions FOLDER
"""

import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import kernels
import torch
import transformers
from kernels import LayerRepository, LocalLayerRepository, Mode, use_kernel_mapping
from torch import Tensor
from transformers.utils.import_utils import is_kernels_available

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation, MPFormerImageProcessor
from mpformer_hf.deformable_attention import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableSelfAttention,
    ms_deform_attn_reference,
)
from mpformer_hf.hub_kernel import attached_forward
from mpformer_hf.kernel_self_test import examine
from mpformer_hf.ops.hub import HubBackend, find_downloaded
from tests.factories import tiny_model
from tests.kernel_repositories import LAYER, write_repository

PIXELS = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96).sin()


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main(folder: Path) -> dict[str, Any]:
    """Save a tiny model, then load it with kernels of every kind."""
    saved = folder / "model"
    original = tiny_model()
    original.save_pretrained(saved)
    with torch.no_grad():
        expected = original(PIXELS).masks_queries_logits
    found: dict[str, Any] = {
        "versions": [transformers.__version__, kernels.__version__, huggingface_hub.__version__],
        "kernels are available": is_kernels_available(),
        "layer name": getattr(MultiScaleDeformableAttention, "kernel_layer_name", None),
        "absence": HubBackend().explain_absence(torch.device("cpu")),
        "basics": check_basics(saved, expected),
        "without use_kernels": load_and_run(
            saved, expected, LocalLayerRepository(write(folder, "good"), layer_name=LAYER), None
        ),
    }
    for kind in ("good", "wrong", "exiting", "deadly"):
        repository = LocalLayerRepository(
            folder / "kernels" / kind if kind == "good" else write(folder, kind), layer_name=LAYER
        )
        found[kind] = load_and_run(saved, expected, repository, True)
    found["good in bfloat16"] = load_and_run(
        saved, expected, LocalLayerRepository(folder / "kernels" / "good", layer_name=LAYER), True, dtype=torch.bfloat16
    )
    missing = LocalLayerRepository(folder / "kernels" / "missing", layer_name=LAYER)
    found["missing"] = load_and_run(saved, expected, missing, True)
    offline = LayerRepository("kernels-community/deformable-detr", layer_name=LAYER, version=1)
    found["offline"] = load_and_run(saved, expected, offline, True)
    found["doctor"] = check_doctor(folder)
    found["training"] = check_training(saved, LocalLayerRepository(folder / "kernels" / "good", layer_name=LAYER))
    return found


def write(folder: Path, kind: str) -> Path:
    """The repository of a kernel."""
    return write_repository(folder / "kernels", kind)


def check_basics(saved: Path, expected: Tensor) -> dict[str, Any]:
    """Configuration, image processor, and the saved model."""
    model = MPFormerForUniversalSegmentation.from_pretrained(saved)
    with torch.no_grad():
        output = model(PIXELS).masks_queries_logits
    batch = MPFormerImageProcessor(size={"height": 64, "width": 96})(
        [torch.zeros(3, 40, 60, dtype=torch.uint8)], return_tensors="pt"
    )
    return {
        "difference": (output - expected).abs().max().item(),
        "model type": MPFormerConfig.from_pretrained(saved).model_type,
        "pixels": list(batch["pixel_values"].shape),
    }


def check_doctor(folder: Path) -> dict[str, Any]:
    """What the backend for `doctor` finds in an empty cache, and in one that holds a kernel; it runs that."""
    before = find_downloaded()
    home = Path(huggingface_hub.constants.HF_HUB_CACHE, "kernels--kernels-community--deformable-detr", "snapshots")
    home.mkdir(parents=True)
    write(folder / "downloaded", "good").rename(home / ("0123456789" * 4))
    candidate = find_downloaded()
    sizes = (2, 5, 3, 1, 4)
    inputs = (torch.randn(2, 6, 3, 8), ((2, 3),), torch.rand(*sizes, 2), torch.rand(sizes))
    difference = HubBackend().run(*inputs) - ms_deform_attn_reference(*inputs)
    return {
        "before": before,
        "file": str(candidate.arguments["file"]),
        "verdict": asdict(examine(candidate, torch.device("cpu"))),
        "difference": difference.abs().max().item(),
    }


def load_and_run(
    saved: Path, expected: Tensor, repository: Any, use_kernels: bool | None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Load with a kernel for CPU, run, and tell what came of it."""
    messages = Messages()
    logger = logging.getLogger("mpformer_hf.hub_kernel")
    logger.addHandler(messages)
    arguments = {} if use_kernels is None else {"use_kernels": use_kernels}
    values: list[str] = []
    with use_kernel_mapping({LAYER: {"cpu": repository}}):
        model = MPFormerForUniversalSegmentation.from_pretrained(saved, dtype=dtype, **arguments)
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableSelfAttention):
            module.value_proj.register_forward_hook(lambda *given: values.append(str(given[2].dtype)))
            module.output_proj.register_forward_pre_hook(lambda _, given: values.append(str(given[0].dtype)))
    kernel = next(
        (attached_forward(module) for module in model.modules() if isinstance(module, MultiScaleDeformableAttention)),
        None,
    )
    calls = None if kernel is None else kernel.__globals__["CALLS"]
    if calls is not None:
        calls.clear()
    with torch.no_grad():
        output = model(PIXELS.to(dtype)).masks_queries_logits
    logger.removeHandler(messages)
    return {
        "is attached": kernel is not None,
        "calls": calls if calls is None else list(calls),
        "types around": values,
        "difference": ((output.float() - expected).abs().max() / expected.abs().max()).item(),
        "messages": messages.texts,
        "keys": sorted(model.state_dict())
        == sorted(MPFormerForUniversalSegmentation.from_pretrained(saved).state_dict()),
    }


def check_training(saved: Path, repository: Any) -> dict[str, Any]:
    """A step of training with a kernel, which `train()` attaches anew; and the same without."""
    losses, gradients, calls = [], [], 0
    labels = {"mask_labels": [torch.zeros(1, 64, 96)], "class_labels": [torch.tensor([1])]}
    labels["mask_labels"][0][:, :32] = 1
    for use_kernels in (False, True):
        with use_kernel_mapping({LAYER: {"cpu": {Mode.TRAINING: repository}}}):
            model = MPFormerForUniversalSegmentation.from_pretrained(saved, use_kernels=use_kernels).train()
        for module in model.modules():
            if isinstance(module, MultiScaleDeformableAttention) and (kernel := attached_forward(module)) is not None:
                kernel.__globals__["CALLS"].clear()
        torch.manual_seed(0)
        loss = model(PIXELS, **labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(next(p.grad for name, p in model.named_parameters() if name.endswith("value_proj.weight")))
        for module in model.modules():
            if isinstance(module, MultiScaleDeformableAttention) and (kernel := attached_forward(module)) is not None:
                calls += len(kernel.__globals__["CALLS"])
                kernel.__globals__["CALLS"].clear()
    return {
        "losses": losses,
        "difference": ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item(),
        "calls": calls,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    result = main(Path(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
