"""Models and batches that are tiny and random, for tests: everything here takes less than a second on one core."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ConvNextConfig, PreTrainedConfig, ResNetConfig, SwinConfig, TimmBackboneConfig

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONE_KINDS = ("resnet", "swin", "convnext", "timm")


def tiny_backbone_config(kind: str = "resnet") -> PreTrainedConfig:
    """Make the config of a backbone with maps of strides 4, 8, 16 and 32.

    Args:
        kind: "resnet" (the only one with batch norms of transformers), "swin", "convnext", or "timm" (a residual network too).
    """
    match kind:
        case "resnet":
            return ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 24, 32],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_features=STAGES,
            )
        case "swin":
            return SwinConfig(
                image_size=64,
                embed_dim=8,
                depths=[1, 2, 1, 1],
                num_heads=[1, 2, 2, 2],
                window_size=4,
                mlp_ratio=2.0,
                drop_path_rate=0.0,
                out_features=STAGES,
            )
        case "convnext":
            return ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES)
        case "timm":
            return TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4], features_only=True)
    raise ValueError(f"Expected one of {', '.join(BACKBONE_KINDS)}, got {kind!r}.")


def tiny_config(backbone: str = "resnet", **fields: Any) -> MPFormerConfig:
    """Make a small config: 3 classes, 6 queries, 4 supervised levels, one layer in the pixel decoder.

    Args:
        backbone: see `tiny_backbone_config`.
        **fields: of `MPFormerConfig`; they win.
    """
    small = {
        "num_labels": 3,
        "feature_size": 32,
        "mask_feature_size": 16,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "dim_feedforward": 32,
        "encoder_layers": 1,
        "decoder_layers": 4,
        "num_attention_heads": 4,
        "num_queries": 6,
        "train_num_points": 64,
    }
    if "id2label" in fields:
        del small["num_labels"]
    backbone_config = fields.pop("backbone_config", None) or tiny_backbone_config(backbone)
    return MPFormerConfig(**{**small, "backbone_config": backbone_config, **fields})


def tiny_model(backbone: str = "resnet", **fields: Any) -> MPFormerForUniversalSegmentation:
    """Make a small model, initialised with seed 0 (the global random state is untouched), in evaluation mode.

    Args:
        backbone: see `tiny_backbone_config`.
        **fields: of `MPFormerConfig`, on top of `tiny_config`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MPFormerForUniversalSegmentation(tiny_config(backbone, **fields)).eval()


def random_images(batch_size: int = 2, size: tuple[int, int] = (64, 96), seed: int = 0) -> Tensor:
    """Draw normalised images, (batch_size, 3, *size)."""
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(seed))


def random_targets(
    num_segments: Sequence[int] = (2, 0, 3), size: tuple[int, int] = (64, 96), num_labels: int = 3, seed: int = 0
) -> dict[str, list[Tensor]]:
    """Draw ground truth: every segment is a rectangle of its own, segments overlap.

    Args:
        num_segments: of each image.
        size: height and width of the masks.
        num_labels: labels are drawn from [0, num_labels).
        seed: of the draw.

    Returns:
        `mask_labels`, per image bool (segments, *size), and `class_labels`, per image int64 (segments,).
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size

    def draw_interval(length: int) -> slice:
        start, extent = torch.rand(2, generator=generator).tolist()
        first = int(start * length * 0.6)
        return slice(first, first + max(1, int(length * (0.1 + 0.3 * extent))))

    mask_labels = [torch.zeros(count, height, width, dtype=torch.bool) for count in num_segments]
    for masks in mask_labels:
        for mask in masks:
            mask[draw_interval(height), draw_interval(width)] = True
    class_labels = [torch.randint(num_labels, (count,), generator=generator) for count in num_segments]
    return {"mask_labels": mask_labels, "class_labels": class_labels}


def random_batch(
    num_segments: Sequence[int] = (2, 0, 3), size: tuple[int, int] = (64, 96), num_labels: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Draw images and their ground truth: the keyword arguments of a training step."""
    return {"pixel_values": random_images(len(num_segments), size, seed)} | random_targets(
        num_segments, size, num_labels, seed
    )
