"""Time and memory of MP-Former beside transformers' Mask2Former, in one run: `python -m benchmarks.model_speed --help`.

Both models have the same weights. Repeats are interleaved and the minimum counts, because other work on the machine can only make a
run slower. Memory is the peak resident set of a child process of its own, minus the resident set before the measured step.

Measured:
    inference  eval forward, batch 1
    training   forward and backward, batch 2, given number of segments an image, piloting off in ours
    piloting   the same with one pilot group, against ours without
    decoder    transformer decoder, heads and losses alone, on given features, forward and backward: memory
    bound      inference and training with the deformable attention replaced by a copy
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from benchmarks.measuring import measure_added_memory, measure_times, write_report
from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation
from mpformer_hf.deformable_attention import MultiScaleDeformableAttention

BOUND = "mpformer_bound"  # deformable attention replaced by a copy: as fast as it could be
MODELS = ("transformers", "mpformer", "mpformer_piloted", BOUND)


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    image_size: int = 512
    batch_size: int = 2
    num_segments: int = 10
    num_labels: int = 80
    threads: int = 2
    device: str = "cpu"


def make_backbone_config() -> ResNetConfig:
    """ResNet-50 as the original has it."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return ResNetConfig(out_features=stages, downsample_in_bottleneck=False)


def make_model(name: str, setting: Setting) -> nn.Module:
    """One of `MODELS`, with the weights of seed 0; batch norms frozen in all."""
    torch.manual_seed(0)
    theirs = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=make_backbone_config(), num_labels=setting.num_labels)
    )
    freeze_batch_norms(theirs)
    if name == "transformers":
        return theirs.to(setting.device)
    config = MPFormerConfig(
        backbone_config=make_backbone_config(),
        num_labels=setting.num_labels,
        mask_piloting=name == "mpformer_piloted",
    )
    ours = MPFormerForUniversalSegmentation(config)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    if name == BOUND:
        replace_operator_by_copy(ours)
    return ours.to(setting.device)


def replace_operator_by_copy(model: nn.Module) -> None:
    """The same model with an operator that returns its value: what is left when deformable attention costs nothing."""
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.attend = lambda value, *_: value.clone()


def freeze_batch_norms(model: nn.Module) -> None:
    """Frozen batch norms for transformers' model, which has no switch for them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False).fill_(1.0)
            module.bias.requires_grad_(False)
            module.eval()


def set_training(model: nn.Module) -> None:
    """Training mode with frozen batch norms."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def make_targets(name: str, setting: Setting) -> dict[str, list[Tensor]]:
    """Overlapping rectangles, in the type that each model's image processor returns: float, and bool for ours."""
    generator = torch.Generator().manual_seed(1)
    size, masks, labels = setting.image_size, [], []
    for _ in range(setting.batch_size):
        image = torch.zeros(setting.num_segments, size, size)
        corners = (torch.rand(setting.num_segments, 2, generator=generator) * size * 0.7).long().tolist()
        for mask, (top, left) in zip(image, corners, strict=True):
            mask[top : top + size // 4, left : left + size // 4] = 1
        masks.append((image if name == "transformers" else image.bool()).to(setting.device))
        labels.append(
            torch.randint(setting.num_labels, (setting.num_segments,), generator=generator).to(setting.device)
        )
    return {"mask_labels": masks, "class_labels": labels}


# ------------------------------------------------------------------------------------------------------------------- tasks


def make_inference(name: str, setting: Setting) -> Callable[[], None]:
    """Eval forward of one image."""
    model = make_model(name, setting).eval()
    images = torch.randn(1, 3, setting.image_size, setting.image_size, device=setting.device)

    @torch.no_grad()
    def run() -> None:
        model(images)

    return run


def make_training(name: str, setting: Setting) -> Callable[[], None]:
    """Forward and backward of a batch."""
    model = make_model(name, setting)
    set_training(model)
    targets = make_targets(name, setting)
    images = torch.randn(setting.batch_size, 3, setting.image_size, setting.image_size, device=setting.device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(images, **targets).loss.backward()

    return run


def make_decoder(name: str, setting: Setting) -> Callable[[], None]:
    """Decoder, heads and losses on given features, forward and backward; gradients of the features included."""
    model = make_model(name, setting)
    set_training(model)
    targets = make_targets(name, setting)
    size, batch, channels = setting.image_size, setting.batch_size, model.config.feature_size
    features = [
        torch.randn(batch, channels, size // stride, size // stride, device=setting.device, requires_grad=True)
        for stride in (32, 16, 8)
    ]
    pixels = torch.randn(batch, channels, size // 4, size // 4, device=setting.device, requires_grad=True)
    images = torch.zeros(batch, 3, size, size, device=setting.device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        if isinstance(model, MPFormerForUniversalSegmentation):
            loss = run_our_decoder(model, features, pixels, images, targets)
        else:
            loss = run_their_decoder(model, features, pixels, targets)
        loss.backward()

    return run


def run_our_decoder(model: Any, features: list[Tensor], pixels: Tensor, images: Tensor, targets: dict) -> Tensor:  # noqa: ANN401
    """Loss of our decoder."""

    class Features(nn.Module):
        def forward(self, _: Tensor) -> tuple:
            return (pixels,), pixels, tuple(features)

    whole, model.model.pixel_level_module = model.model.pixel_level_module, Features()
    try:
        return model(images, **targets).loss
    finally:
        model.model.pixel_level_module = whole


def run_their_decoder(model: Any, features: list[Tensor], pixels: Tensor, targets: dict) -> Tensor:  # noqa: ANN401
    """Loss of transformers' decoder."""
    decoded = model.model.transformer_module(
        multi_scale_features=features, mask_features=pixels, output_hidden_states=True
    )
    classes = [model.class_predictor(level.transpose(0, 1)) for level in decoded.intermediate_hidden_states]
    masks = decoded.masks_queries_logits
    terms = model.get_loss_dict(
        masks_queries_logits=masks[-1],
        class_queries_logits=classes[-1],
        auxiliary_predictions=model.get_auxiliary_logits(classes, masks),
        **targets,
    )
    return model.get_loss(terms)


TASKS = {"inference": make_inference, "training": make_training, "decoder": make_decoder}


# --------------------------------------------------------------------------------------------------------------- measuring


def measure_models(task: str, models: tuple[str, ...], setting: Setting, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each model, interleaved; minimum and median."""
    runs = {name: TASKS[task](name, setting) for name in models}
    return measure_times(runs, repeats, setting.device, task)


def measure_memory(task: str, name: str, setting: Setting) -> float:
    """MiB that one run adds at its peak, in a process of its own."""
    arguments = ["--child", task, name, json.dumps(asdict(setting))]
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.model_speed", *arguments], capture_output=True, text=True, check=True
    )
    return float(output.stdout.strip().splitlines()[-1])


def run_child(task: str, name: str, setting: Setting) -> None:
    """Print the MiB that the first run adds at its peak."""
    torch.set_num_threads(setting.threads)
    run = TASKS[task](name, setting)
    print(measure_added_memory(run, setting.device))


def measure(setting: Setting, repeats: int, decoder_segments: int) -> dict[str, Any]:
    """Everything that the module's docstring names."""
    pair = ("transformers", "mpformer", BOUND)
    dense = Setting(**{**asdict(setting), "num_segments": decoder_segments})
    times = {
        "inference": measure_models("inference", pair, setting, repeats),
        "training": measure_models("training", MODELS, setting, repeats),
    }
    memory = {
        "training": {name: measure_memory("training", name, dense) for name in tqdm(MODELS, desc="memory")},
        "decoder": {name: measure_memory("decoder", name, dense) for name in tqdm(MODELS[:-1], desc="decoder memory")},
    }
    training = {name: entry["min"] for name, entry in times["training"].items()}
    inference = {name: entry["min"] for name, entry in times["inference"].items()}
    ratios = {
        "inference speed-up": inference["transformers"] / inference["mpformer"],
        "training speed-up": training["transformers"] / training["mpformer"],
        "cost of piloting": training["mpformer_piloted"] / training["mpformer"] - 1,
        "inference, share of the bound's speed": inference[BOUND] / inference["mpformer"],
        "training, share of the bound's speed": training[BOUND] / training["mpformer"],
        f"training memory, {decoder_segments} segments": memory["training"]["mpformer"]
        / memory["training"]["transformers"],
        f"decoder and loss memory, {decoder_segments} segments": memory["decoder"]["mpformer"]
        / memory["decoder"]["transformers"],
        f"the same with piloting, {decoder_segments} segments": memory["decoder"]["mpformer_piloted"]
        / memory["decoder"]["transformers"],
    }
    return {"setting": asdict(setting), "repeats": repeats, "seconds": times, "MiB": memory, "ratios": ratios}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--segments", type=int, default=10, help="segments an image in the training step")
    parser.add_argument("--decoder-segments", type=int, default=50, help="segments an image where memory is measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, name, setting = arguments.child
        run_child(task, name, Setting(**json.loads(setting)))
        return
    torch.set_num_threads(arguments.threads)
    setting = Setting(
        image_size=arguments.image_size,
        num_segments=arguments.segments,
        threads=arguments.threads,
        device=arguments.device,
    )
    result = measure(setting, arguments.repeats, arguments.decoder_segments)
    print(json.dumps(result, indent=2))
    write_report(arguments.output, "model_speed", result)


if __name__ == "__main__":
    main()
