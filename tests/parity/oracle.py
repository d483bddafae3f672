"""transformers' Mask2Former with random weights under which every part of the network matters: the oracle of the parity tests.

A freshly initialised model is a poor oracle: its mask logits are all of one sign and its queries nearly equal, so attention masks
block nothing or everything. Here all weights, biases and statistics are drawn so that signals keep their size through the layers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from mpformer_hf import MPFormerConfig, MPFormerForUniversalSegmentation
from tests.factories import random_images, tiny_config

LABEL_EMBEDDING = "model.transformer_module.pilot_label_embedder.weight"


def oracle_config(backbone: str, **fields: Any) -> Mask2FormerConfig:
    """Make the Mask2Former config with the sizes of `tiny_config`, and 10 levels, so that each feature level is seen thrice."""
    config = tiny_config(backbone, **{"decoder_layers": 10, "encoder_layers": 2, **fields})
    shared = {name: getattr(config, name) for name in Mask2FormerConfig.__annotations__ if hasattr(config, name)}
    return Mask2FormerConfig(**shared, num_labels=config.num_labels)


@cache
def make_oracle(backbone: str, **fields: Any) -> Mask2FormerForUniversalSegmentation:
    """Make the oracle, in evaluation mode. It is shared between tests: do not change it."""
    oracle = Mask2FormerForUniversalSegmentation(oracle_config(backbone, **fields)).eval()
    randomise(oracle, torch.Generator().manual_seed(1))
    standardise_pixel_embedding(oracle, random_images(4, seed=100))
    return oracle


def make_twin(
    oracle: Mask2FormerForUniversalSegmentation, **fields: Any
) -> tuple[MPFormerForUniversalSegmentation, set[str], set[str]]:
    """Make our model with the weights of the oracle; also returns names that were missing and names that were unexpected."""
    shared = {name: getattr(oracle.config, name) for name in Mask2FormerConfig.__annotations__}
    config = MPFormerConfig(**{**shared, "num_labels": oracle.config.num_labels, **fields})
    twin = MPFormerForUniversalSegmentation(config).eval()
    missing, unexpected = twin.load_state_dict(oracle.state_dict(), strict=False)
    return twin, set(missing), set(unexpected)


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every floating-point parameter and statistic of a model; matrices keep the variance of what they multiply."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name == "criterion.empty_weight":
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.5 * noise.tanh())
        elif name.endswith("sampling_offsets.bias"):
            tensor.add_(0.3 * noise)  # around the ring
        elif tensor.ndim == 1:
            center = 1.0 if name.endswith("weight") else 0.0
            tensor.copy_(center + 0.1 * noise)
        elif "embedder.weight" in name or "queries_features" in name or "level_embed" in name:
            tensor.copy_(noise)
        else:
            # Half of what the decoder's layers add: they would make all queries alike.
            gain = (
                0.5
                if "transformer_module.decoder.layers" in name and name.endswith(("out_proj.weight", "fc2.weight"))
                else 1
            )
            tensor.copy_(gain * noise / math.sqrt(tensor[0].numel()))


@torch.no_grad()
def standardise_pixel_embedding(oracle: Mask2FormerForUniversalSegmentation, images: Tensor) -> None:
    """Give each channel of the per-pixel embedding mean 0 and variance 1, so that mask logits have both signs."""
    embedding = oracle.model(images).pixel_decoder_last_hidden_state
    mean, std = embedding.mean(dim=(0, 2, 3)), embedding.std(dim=(0, 2, 3))
    projection = oracle.model.pixel_level_module.decoder.mask_projection
    projection.weight.div_(std[:, None, None, None])
    projection.bias.sub_(mean).div_(std)


def resize_masks(mask_logits: list[Tensor], image_size: tuple[int, int]) -> list[Tensor]:
    """What each decoder layer thresholds at 0: level i resized to stride 32, 16, 8, 32, ... (the last level is never used)."""
    sizes = [tuple(math.ceil(length / stride) for length in image_size) for stride in (32, 16, 8)]
    return [
        nn.functional.interpolate(logits, size=sizes[layer % 3], mode="bilinear", align_corners=False)
        for layer, logits in enumerate(mask_logits[:-1])
    ]


def fixed_points(num_points: int, seed: int = 0) -> Callable[..., Tensor]:
    """Make a stand-in for `torch.rand`: any call for (..., m, 2) numbers gets the first m rows of one table."""
    table = torch.rand(num_points, 2, generator=torch.Generator().manual_seed(seed))
    real_rand = torch.rand

    def rand(*size: Any, **keywords: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if len(shape) < 2 or shape[-1] != 2:
            return real_rand(*size, **keywords)
        return table[: shape[-2]].expand(shape).clone()

    return rand


@contextmanager
def same_points(num_points: int) -> Iterator[None]:
    """Give every model the same random points for matching and losses."""
    with mock.patch("torch.rand", fixed_points(num_points)):
        yield


__all__ = [
    "LABEL_EMBEDDING",
    "make_oracle",
    "make_twin",
    "oracle_config",
    "randomise",
    "resize_masks",
    "same_points",
]
