"""Multi-scale deformable pixel decoder (Mask2Former, section 4.1).

Backbone features in, multi-scale features and a per-pixel embedding out.

Axes: B images, C channels, S cells of the levels 1/32, 1/16 and 1/8. Parameter names are those of transformers.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mpformer import NUM_GROUP_NORM_GROUPS
from .deformable_attention import MultiScaleDeformableSelfAttention
from .position_embedding import sine_position_embedding

NUM_LEVELS = 3
NUM_POINTS = 4
ROWS_IN_CACHE = 4096  # 16 MiB of hidden activations


class PixelDecoder(nn.Module):
    """Deformable attention among the three coarse levels, then one step of a feature pyramid up to stride 4.

    Padding takes part like any other pixel, as in the original: there is no padding mask, and results depend on the amount of
    padding slightly.
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        *,
        feature_size: int,
        mask_feature_size: int,
        num_heads: int,
        num_layers: int,
        feedforward_dim: int,
        dropout: float,
    ) -> None:
        """Build it.

        Args:
            feature_channels: channels of the backbone's outputs, strides 4, 8, 16 and 32.
            feature_size: channels inside the decoder and of the multi-scale features.
            mask_feature_size: channels of the per-pixel embedding.
            num_heads: heads of the deformable attention.
            num_layers: deformable attention layers.
            feedforward_dim: width of their feed-forward networks.
            dropout: probability, in [0, 1].
        """
        super().__init__()
        fine_channels, *coarse_channels = feature_channels
        self.level_embed = nn.Parameter(torch.empty(NUM_LEVELS, feature_size))
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, feature_size, kernel_size=1), group_norm(feature_size))
            for channels in reversed(coarse_channels)
        )
        self.encoder = PixelDecoderEncoder(
            PixelDecoderEncoderLayer(feature_size, num_heads, feedforward_dim, dropout) for _ in range(num_layers)
        )
        self.mask_projection = nn.Conv2d(feature_size, mask_feature_size, kernel_size=1)
        self.adapter_1 = nn.Sequential(
            nn.Conv2d(fine_channels, feature_size, kernel_size=1, bias=False), group_norm(feature_size)
        )
        self.layer_1 = nn.Sequential(
            nn.Conv2d(feature_size, feature_size, kernel_size=3, padding=1, bias=False),
            group_norm(feature_size),
            nn.ReLU(),
        )

    def initialise_weights(self, gain: float) -> None:
        """Xavier in front of the deformable attention, Kaiming in the feature pyramid, N(0, 1) for the levels."""
        nn.init.normal_(self.level_embed)
        for convolution in self.modules():
            if isinstance(convolution, nn.Conv2d):
                initialise_convolution(convolution)
        for convolution in self.input_projections.modules():
            if isinstance(convolution, nn.Conv2d):
                nn.init.xavier_uniform_(convolution.weight, gain=gain)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decode.

        Args:
            features: maps (B, channels, h, w) of strides 4, 8, 16 and 32.

        Returns:
            The per-pixel embedding, (B, mask_feature_size, H / 4, W / 4), and the multi-scale features (B, feature_size, h, w)
            of strides 32, 16 and 8.
        """
        fine, *coarse = features
        maps = [project(level) for project, level in zip(self.input_projections, reversed(coarse), strict=True)]
        shapes = [(level.shape[2], level.shape[3]) for level in maps]
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)  # (B, S, C)
        cells = self.encoder(cells, self._embed_positions(shapes, cells), shapes)

        levels = cells.split([height * width for height, width in shapes], dim=1)
        maps = [level.transpose(1, 2).unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
        lateral = self.adapter_1(fine)
        # The original says nearest in a comment but resizes bilinearly.
        upsampled = nn.functional.interpolate(maps[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        pixel_embedding = self.mask_projection(self.layer_1(lateral + upsampled))
        return pixel_embedding, tuple(maps)

    def _embed_positions(self, shapes: Sequence[tuple[int, int]], cells: Tensor) -> Tensor:
        """Sine embedding plus the learnable embedding of the level, (1, S, C)."""
        size = self.level_embed.shape[1]
        embeddings = [
            sine_position_embedding(*shape, size, cells.dtype, cells.device) + self.level_embed[level]
            for level, shape in enumerate(shapes)
        ]
        return torch.cat(embeddings)[None]


class PixelDecoderEncoder(nn.Module):
    """The deformable attention layers, one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, cells: Tensor, positions: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Update cells (B, S, C) of all levels."""
        for layer in self.layers:
            cells = layer(cells, positions, shapes)
        return cells


class PixelDecoderEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and a feed-forward network, each with a layer norm after the sum."""

    def __init__(self, feature_size: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableSelfAttention(feature_size, num_heads, NUM_LEVELS, NUM_POINTS)
        self.self_attn_layer_norm = nn.LayerNorm(feature_size)
        self.fc1 = nn.Linear(feature_size, feedforward_dim)
        self.fc2 = nn.Linear(feedforward_dim, feature_size)
        self.final_layer_norm = nn.LayerNorm(feature_size)
        self.dropout = nn.Dropout(dropout)

    def initialise_weights(self, gain: float) -> None:
        """Xavier for the feed-forward network."""
        nn.init.xavier_uniform_(self.fc1.weight, gain=gain)
        nn.init.xavier_uniform_(self.fc2.weight, gain=gain)

    def forward(self, cells: Tensor, positions: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Update cells (B, S, C) of all levels."""
        attended, _ = self.self_attn(cells, positions, shapes)
        if cells.device.type != "cpu":
            return self._feed_forward(cells, attended)
        # Row by row the same, but what is in between stays in the processor's cache.
        rows = [tensor.flatten(0, 1).split(ROWS_IN_CACHE) for tensor in (cells, attended)]
        return torch.cat([self._feed_forward(*part) for part in zip(*rows, strict=True)]).view(cells.shape)

    def _feed_forward(self, cells: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention; cells (..., C) are treated one by one."""
        cells = self.self_attn_layer_norm(cells + self.dropout(attended))
        hidden = self.fc2(self.dropout(nn.functional.relu(self.fc1(cells), inplace=True)))
        # In place, on the fresh output of a linear layer: new memory costs more than the sum.
        return self.final_layer_norm(self.dropout(hidden).add_(cells))


def group_norm(num_channels: int) -> nn.GroupNorm:
    """The group norm of the whole pixel decoder."""
    return nn.GroupNorm(NUM_GROUP_NORM_GROUPS, num_channels)


def initialise_convolution(convolution: nn.Conv2d) -> None:
    """Kaiming uniform for a linear activation (the original calls it Caffe2's Xavier fill), zero bias."""
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
