"""Masked-attention transformer decoder (Mask2Former, section 3.2): queries look only at the segment they predict so far.

Level 0 is the prediction from the queries before the first layer; level i the one after layer i - 1. Layer i attends to the
features of level i mod 3 (strides 32, 16, 8), inside the mask that level i predicts.

Axes: B images, P pilot slots (in mask-piloted training, else 0), Q matched queries, N = P + Q, M cells of a feature level, C
channels, D channels of the per-pixel embedding, A attention heads. Parameter names are those of transformers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class DecoderFeatures:
    """What the queries look at.

    Attributes:
        values: per feature level, (B, M, C), strides 32, 16, 8.
        positions: per feature level, (M, C), added to the keys.
        sizes: per feature level, height and width.
        pixel_embedding: (B, D, H / 4, W / 4).
    """

    values: Sequence[Tensor]
    positions: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]]
    pixel_embedding: Tensor


class DrawsAttentionMasks(Protocol):
    """Ground-truth attention masks of the pilot slots, with fresh noise at every call."""

    def draw_attention_mask(self, level: int) -> Tensor:
        """bool, (B, 1 or A, P, M). True forbids the slot to attend to the cell; no row is True everywhere."""


@dataclass(frozen=True)
class Pilot:
    """The mask-piloted part of a training step (MP-Former, section 3).

    Attributes:
        queries: (B, P, C), contents of the pilot slots.
        self_attention_mask: bool, (N, N). True forbids row to attend to column.
        masks: source of the ground-truth attention masks.
        num_layers: the first layers whose cross-attention is piloted; later ones use the slots' own predictions.
    """

    queries: Tensor
    self_attention_mask: Tensor
    masks: DrawsAttentionMasks
    num_layers: int


@dataclass(frozen=True)
class DecoderOutput:
    """All levels of the decoder, pilot slots first.

    Attributes:
        hidden_states: per level, (B, N, C), as they leave the layers.
        normed_states: per level, (B, N, C), after the final layer norm; the class head reads these.
        mask_embeddings: per level, (B, N, D).
        attentions: per layer, (B, A, N, N), self-attention weights; `None` unless asked for.
    """

    hidden_states: tuple[Tensor, ...]
    normed_states: tuple[Tensor, ...]
    mask_embeddings: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...] | None


class MaskedAttentionDecoder(nn.Module):
    """The decoder and its mask head. The learnable queries and the class head live in the model."""

    def __init__(
        self,
        *,
        hidden_dim: int,
        mask_feature_size: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        activation: str,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MaskedAttentionDecoderLayer(
                hidden_dim, num_heads, feedforward_dim, dropout=dropout, activation=activation, pre_norm=pre_norm
            )
            for _ in range(num_layers)
        )
        self.layernorm = nn.LayerNorm(hidden_dim)
        self.mask_predictor = MaskPredictor(hidden_dim, mask_feature_size)
        # Of the last training step, per layer, bool (B, Q). Kept as they are: reading them would wait for the device.
        self._empty_masks: list[Tensor] = []

    @property
    def last_blocked_share(self) -> Tensor | None:
        """Share of matched queries whose predicted mask was empty, so that they could attend to nothing and were let see all.

        Of the last training step (forward pass), per layer: float32, (layers,), on the device. It costs nothing until it is read, and
        only looking at its values waits for the device. `None` before the first step; compiled layers do not record it.
        """
        return torch.stack(self._empty_masks).float().mean(dim=(1, 2)) if self._empty_masks else None

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor | None,
        features: DecoderFeatures,
        *,
        pilot: Pilot | None = None,
        output_attentions: bool = False,
        use_sdpa: bool = True,
    ) -> DecoderOutput:
        """Decode.

        Args:
            queries: (B, Q, C), contents of the matched queries.
            query_positions: (Q, C), or `None` for queries without position embedding. Pilot slots never have one.
            features: what the queries look at.
            pilot: the mask-piloted part, in training.
            output_attentions: return the self-attention weights.
            use_sdpa: use `scaled_dot_product_attention` where weights are not asked for.
        """
        num_slots = 0 if pilot is None else pilot.queries.shape[1]
        if pilot is not None:
            queries = torch.cat([pilot.queries.to(queries.dtype), queries], dim=1)
            if query_positions is not None:
                query_positions = nn.functional.pad(query_positions, (0, 0, num_slots, 0))
        self_attention_mask = None if pilot is None else pilot.self_attention_mask[None, None]
        keys = [value + position for value, position in zip(features.values, features.positions, strict=True)]
        level_embeddings = resize_to_levels(features.pixel_embedding, features.sizes)

        if self.training and not torch.compiler.is_compiling():
            self._empty_masks = []
        hidden_states, normed_states, mask_embeddings, attentions = [queries], [], [], []
        for index, layer in enumerate(self.layers):
            normed, mask_embedding = self._predict(hidden_states[-1])
            normed_states.append(normed)
            mask_embeddings.append(mask_embedding)
            level = index % len(keys)
            piloted = pilot if pilot is not None and index < pilot.num_layers else None
            # Noise is drawn here, outside of the layer: gradient checkpointing runs the layer a second time.
            attention_mask = mask_attention(
                mask_embedding, level_embeddings[level], level, num_slots, piloted, self._record_empty_masks
            )
            queries, weights = layer(
                hidden_states[-1],
                query_positions,
                keys[level],
                features.values[level],
                attention_mask,
                self_attention_mask,
                output_attentions,
                use_sdpa,
            )
            hidden_states.append(queries)
            attentions.append(weights)
        normed, mask_embedding = self._predict(hidden_states[-1])
        return DecoderOutput(
            hidden_states=tuple(hidden_states),
            normed_states=(*normed_states, normed),
            mask_embeddings=(*mask_embeddings, mask_embedding),
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _record_empty_masks(self, is_empty: Tensor) -> None:
        if self.training and not torch.compiler.is_compiling():
            self._empty_masks.append(is_empty)

    def _predict(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.layernorm(queries)
        return normed, self.mask_predictor(normed)


def resize_to_levels(pixel_embedding: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Resize the per-pixel embedding to each feature level, without gradient.

    Bilinear resizing is linear, so resizing the embedding once gives the same masks as resizing every query's mask at every
    layer, up to rounding. Attention masks carry no gradient (Mask2Former, section 3.2.1).

    Returns:
        Per level, (B, D, M).
    """
    embedding = pixel_embedding.detach()
    return [
        nn.functional.interpolate(embedding, size=size, mode="bilinear", align_corners=False).flatten(2)
        for size in sizes
    ]


@torch.no_grad()
def mask_attention(
    mask_embedding: Tensor,
    level_embedding: Tensor,
    level: int,
    num_slots: int,
    piloted: Pilot | None,
    record: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Forbid every query to attend outside of the mask it predicts; pilot slots, outside of the ground truth.

    Args:
        mask_embedding: (B, N, D).
        level_embedding: (B, D, M), the per-pixel embedding at the size of the feature level.
        level: feature level.
        num_slots: P.
        piloted: the pilot, in layers piloted by the ground truth; `None` in all others.
        record: called with bool, (B, Q): which matched queries predict an empty mask.

    Returns:
        bool, (B, 1 or A, N, M). True forbids the query to attend to the cell. No row is True everywhere: a query that would
        see nothing sees everything.
    """
    own = mask_embedding if piloted is None else mask_embedding[:, num_slots:]
    blocked = (own @ level_embedding < 0)[:, None]  # sigmoid(x) < 0.5
    is_empty = blocked.all(dim=-1, keepdim=True)
    if record is not None:
        record(is_empty[:, 0, num_slots if piloted is None else 0 :, 0])
    blocked = blocked & ~is_empty
    if piloted is None:
        return blocked
    drawn = piloted.masks.draw_attention_mask(level)
    return torch.cat([drawn, blocked.expand(-1, drawn.shape[1], -1, -1)], dim=2)


class MaskPredictor(nn.Module):
    """Three linear layers from a query to its mask embedding."""

    def __init__(self, hidden_dim: int, mask_feature_size: int) -> None:
        super().__init__()
        self.mask_embedder = nn.Sequential(
            nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden_dim, mask_feature_size)),
        )

    def forward(self, queries: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        return self.mask_embedder(queries)


class MaskedAttentionDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention, feed-forward network; each with a residual connection and a layer norm."""

    def __init__(
        self, hidden_dim: int, num_heads: int, feedforward_dim: int, *, dropout: float, activation: str, pre_norm: bool
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.cross_attn = CrossAttention(hidden_dim, num_heads, dropout)
        self.cross_attn_layer_norm = nn.LayerNorm(hidden_dim)
        self.self_attn = SelfAttention(hidden_dim, num_heads, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_dim)
        self.fc1 = nn.Linear(hidden_dim, feedforward_dim)
        self.fc2 = nn.Linear(feedforward_dim, hidden_dim)
        self.final_layer_norm = nn.LayerNorm(hidden_dim)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)

    def initialise_weights(self, gain: float) -> None:
        """Xavier for the feed-forward network."""
        nn.init.xavier_uniform_(self.fc1.weight, gain=gain)
        nn.init.xavier_uniform_(self.fc2.weight, gain=gain)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor | None,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor,
        self_attention_mask: Tensor | None,
        output_attentions: bool,
        use_sdpa: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Update the queries.

        Args:
            queries: (B, N, C).
            query_positions: (N, C) or `None`; added to queries and, in self-attention, to keys; never to values.
            keys: (B, M, C), positions added.
            values: (B, M, C).
            attention_mask: bool, (B, 1 or A, N, M). True forbids.
            self_attention_mask: bool, (1, 1, N, N) or `None`. True forbids.
            output_attentions: return the self-attention weights.
            use_sdpa: use `scaled_dot_product_attention` where weights are not asked for.

        Returns:
            Queries (B, N, C) and self-attention weights (B, A, N, N) or `None`.
        """
        normed = self.cross_attn_layer_norm(queries) if self.pre_norm else queries
        attended = self.cross_attn(add(normed, query_positions), keys, values, attention_mask, use_sdpa)
        queries = queries + self.dropout(attended)
        if not self.pre_norm:
            queries = self.cross_attn_layer_norm(queries)

        normed = self.self_attn_layer_norm(queries) if self.pre_norm else queries
        attended, weights = self.self_attn(normed, query_positions, self_attention_mask, output_attentions, use_sdpa)
        queries = queries + self.dropout(attended)
        if not self.pre_norm:
            queries = self.self_attn_layer_norm(queries)

        normed = self.final_layer_norm(queries) if self.pre_norm else queries
        hidden = self.fc2(self.dropout(self.activation(self.fc1(normed))))
        queries = queries + self.dropout(hidden)
        if not self.pre_norm:
            queries = self.final_layer_norm(queries)
        return queries, weights


class CrossAttention(nn.Module):
    """Multi-head attention with one joint input projection; parameter names of `nn.MultiheadAttention`."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)

    def initialise_weights(self, gain: float) -> None:
        """Xavier and zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight, gain=gain)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=gain)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor, use_sdpa: bool) -> Tensor:
        """Attend from queries (B, N, C) to M cells; `attention_mask` is bool, (B, 1 or A, N, M), True forbids."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            nn.functional.linear(states, weight, bias)
            for states, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        output, _ = attend(
            query, key, value, self.num_heads, attention_mask, dropout=dropout, need_weights=not use_sdpa
        )
        return self.out_proj(output)


class SelfAttention(nn.Module):
    """Multi-head attention among the queries, with separate projections."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_dim, hidden_dim)
        self.k_proj = nn.Linear(hidden_dim, hidden_dim)
        self.v_proj = nn.Linear(hidden_dim, hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)

    def initialise_weights(self, gain: float) -> None:
        """Xavier and zero biases."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            # The original has one (3 C, C) matrix; its Xavier bound is that of a (C, C) matrix divided by sqrt(2).
            nn.init.xavier_uniform_(projection.weight, gain=gain / math.sqrt(2))
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=gain)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor | None,
        attention_mask: Tensor | None,
        output_attentions: bool,
        use_sdpa: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend among queries (B, N, C); `attention_mask` is bool, broadcastable to (B, A, N, N), True forbids."""
        positioned = add(queries, query_positions)
        output, weights = attend(
            self.q_proj(positioned),
            self.k_proj(positioned),
            self.v_proj(queries),
            self.num_heads,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            need_weights=output_attentions or not use_sdpa,
        )
        return self.out_proj(output), weights if output_attentions else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over heads.

    Args:
        query: (B, N, C), projected.
        key: (B, M, C), projected.
        value: (B, M, C), projected.
        num_heads: A.
        attention_mask: bool, broadcastable to (B, A, N, M). True forbids; no row may be True everywhere.
        dropout: probability for the attention weights.
        need_weights: compute and return the weights.

    Returns:
        (B, N, C), and (B, A, N, M) or `None`.
    """
    query, key, value = (states.unflatten(-1, (num_heads, -1)).transpose(1, 2) for states in (query, key, value))
    if need_weights:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask, float("-inf"))
        weights = scores.softmax(-1)
        output = nn.functional.dropout(weights, dropout) @ value
    else:
        weights = None
        allowed = None if attention_mask is None else ~attention_mask
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
    return output.transpose(1, 2).flatten(2), weights


def add(states: Tensor, positions: Tensor | None) -> Tensor:
    """Add position embeddings, where there are any."""
    return states if positions is None else states + positions
