"""Multi-scale deformable attention (Deformable DETR, section 4.1): the operator in plain PyTorch, and the module around it.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.integrations.hub_kernels import use_kernel_forward_from_hub

from .embedding_bag_attention import EmbeddingBagAttention
from .hub_kernel import find_kernel, run_or_give_up
from .position_embedding import cache_table


class MultiScaleDeformableSelfAttention(nn.Module):
    """Every query looks at K points on each of L feature maps, at places and with weights predicted from the query.

    Parameter names are those of transformers and of Deformable DETR.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.attention = MultiScaleDeformableAttention()

    def forward(
        self, hidden_states: Tensor, position_embeddings: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Self-attention over the cells of all levels.

        Args:
            hidden_states: (B, S, C), cells of all levels, one level after the other.
            position_embeddings: (B, S, C) or (1, S, C), added to the queries but not to the values.
            spatial_shapes: height and width of each level.

        Returns:
            (B, S, C), and the attention weights, float32, (B, S, N, L, K).
        """
        batch_size, num_cells, embed_dim = hidden_states.shape
        queries = hidden_states + position_embeddings
        value = self.value_proj(hidden_states).view(batch_size, num_cells, self.num_heads, -1)
        per_point = (batch_size, num_cells, self.num_heads, self.num_levels, self.num_points)
        # float32 from here on: bfloat16 locations are wrong by whole cells on large maps.
        offsets = self.sampling_offsets(queries).float().view(*per_point, 2)
        weights = self.attention_weights(queries).float().view(*per_point[:3], -1).softmax(-1).view(per_point)
        locations = locate_samples(tuple(spatial_shapes), offsets)
        output = self.attention.attend(value, spatial_shapes, locations, weights)
        return self.output_proj(output.view(batch_size, num_cells, embed_dim)), weights

    @torch.no_grad()
    def initialise_weights(self, gain: float) -> None:
        """Start with uniform weights over points on a ring: head n looks in direction n, point k at radius k."""
        del gain  # the original's Xavier projections have gain 1
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (N, 2)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        radii = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        ring = directions[:, None, None, :] * radii[None, None, :, None]  # (N, 1, K, 2)
        ring = ring.expand(-1, self.num_levels, -1, -1).reshape(-1)
        nn.init.zeros_(self.sampling_offsets.weight)
        if not getattr(
            self.sampling_offsets.bias, "_is_hf_initialized", False
        ):  # transformers' mark of a loaded weight
            self.sampling_offsets.bias.copy_(ring)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)


@use_kernel_forward_from_hub("MultiScaleDeformableAttention")
class MultiScaleDeformableAttention(nn.Module):
    """The operator as a layer without parameters, whose forward transformers replaces after `use_kernels=True`."""

    def attend(
        self, value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
    ) -> Tensor:
        """The operator, on the kernel of the kernels hub if one is attached and works; arguments as `ms_deform_attn`."""
        kernel = find_kernel(self, value, locations)
        if kernel is not None:
            shapes = tuple((height, width) for height, width in spatial_shapes)
            output = run_or_give_up(kernel, self, value, shapes, locations, weights)
            if output is not None:
                return output
        return ms_deform_attn(value, spatial_shapes, locations, weights)

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor | None,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int | None,
    ) -> Tensor:
        """What layers of the hub replace, with their arguments.

        Args:
            value: (B, S, N, D), any float type.
            value_spatial_shapes: not looked at; the hub's layer reads the same from a tensor.
            value_spatial_shapes_list: height and width of each level.
            level_start_index: not looked at.
            sampling_locations: float32 or float64, (B, Q, N, L, K, 2), (x, y) relative to each level, [0, 1] is inside.
            attention_weights: like the locations without the last axis.
            im2col_step: not looked at.

        Returns:
            (B, Q, N * D), in the type of `value`.
        """
        del value_spatial_shapes, level_start_index, im2col_step
        return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights).flatten(2)


def locate_samples(spatial_shapes: tuple[tuple[int, int], ...], offsets: Tensor) -> Tensor:
    """Turn offsets in cells of each level into locations relative to the level.

    Args:
        spatial_shapes: height and width of each level.
        offsets: float32, (B, S, N, L, K, 2), (x, y) in cells.

    Returns:
        float32, (B, S, N, L, K, 2), (x, y); [0, 1] is inside the map.
    """
    centres = cell_centres(spatial_shapes, offsets.device)[:, None, :]  # (S, 1, 2)
    steps = cell_steps(spatial_shapes, offsets.device)  # (L, 1, 2)
    # Long last axes: broadcasting along an axis of two is many times slower on CPU.
    steps = steps.expand(offsets.shape[2:]).flatten(0, 2)  # (N * L * K, 2)
    return torch.addcmul(centres, offsets.flatten(2, 4), steps).view(offsets.shape)


@cache_table
def cell_centres(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Centres of the cells of all levels, float32, (S, 2), (x, y) in [0, 1]."""
    centres = []
    for height, width in spatial_shapes:
        rows = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        columns = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()], dim=-1))
    return torch.cat(centres)


@cache_table
def cell_steps(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Width and height of one cell of each level, relative to the level, float32, (L, 1, 2)."""
    sizes = torch.tensor([(width, height) for height, width in spatial_shapes], dtype=torch.float32, device=device)
    return sizes.reciprocal()[:, None, :]


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The operator: weighted sum of bilinear samples of `value`; cells outside the maps count as zero.

    Runs on the compiled operator where `mpformer_hf.ops` has registered one for the device, else on plain PyTorch.
    `python -m mpformer_hf.ops doctor` explains the choice, the environment variable MPFORMER_MSDA_BACKEND forces one.

    Args:
        value: (B, S, N, D), any float type.
        spatial_shapes: height and width of each level.
        sampling_locations: float32 or float64, (B, Q, N, L, K, 2), (x, y) relative to each level, [0, 1] is inside.
        attention_weights: like the locations without the last axis.

    Returns:
        (B, Q, N, D), in the type of `value`.

    Raises:
        ValueError: sizes do not fit together, or MPFORMER_MSDA_BACKEND names no backend.
        RuntimeError: MPFORMER_MSDA_BACKEND names one that cannot be used.
    """
    shapes = tuple((height, width) for height, width in spatial_shapes)
    num_cells = sum(height * width for height, width in shapes)
    if num_cells != value.shape[1]:
        raise ValueError(
            f"Expected {num_cells} cells for levels of sizes {shapes}, got a value of shape {tuple(value.shape)}. "
            "Pass the flattened cells of all levels, one level after the other."
        )
    implementation = choose_implementation(value.device.type)
    if implementation == "operator":
        flat = [size for shape in shapes for size in shape]
        return torch.ops.mpformer.ms_deform_attn(value, flat, sampling_locations, attention_weights)
    if implementation == "embedding_bag" and not torch.compiler.is_compiling():
        return EmbeddingBagAttention.apply(value, shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)


# The values of MPFORMER_MSDA_BACKEND, in order of preference.
BACKENDS = ("hub", "deformops", "compiled", "embedding_bag", "reference")


@torch.compiler.assume_constant_result
def choose_implementation(device_type: str) -> str:
    """Which of "operator", "embedding_bag" and "reference" serves this kind of device."""
    forced = forced_backend()
    if forced in {"embedding_bag", "reference"}:
        return forced
    if has_operator(device_type):
        return "operator"
    if forced in {"compiled", "deformops"}:
        raise RuntimeError(
            f"MPFORMER_MSDA_BACKEND={forced!r}, but no operator is registered for {device_type}. "
            "`python -m mpformer_hf.ops doctor` says why; unset the variable to go on without."
        )
    return "embedding_bag" if device_type == "cpu" else "reference"


def forced_backend() -> str | None:
    """The name in MPFORMER_MSDA_BACKEND.

    Raises:
        ValueError: it is no backend.
    """
    forced = os.environ.get("MPFORMER_MSDA_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"MPFORMER_MSDA_BACKEND={forced!r} is no backend. Choose one of: {', '.join(BACKENDS)}.")
    return forced


def has_operator(device_type: str) -> bool:
    """Whether `mpformer_hf.ops` has registered the operator for "cpu", "cuda"...; never for Hub users without the package."""
    if not hasattr(torch.ops.mpformer, "ms_deform_attn"):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(  # noqa: SLF001 - torch offers no public question
        "mpformer::ms_deform_attn", device_type.upper()
    )


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The operator by `grid_sample`, level by level; runs on every device. Arguments as `ms_deform_attn`."""
    batch_size, _, num_heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]
    sampling_type = sampling_locations.dtype
    grids = (2 * sampling_locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B * N, Q, K, 2)
    weights = attention_weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, B * N, 1, Q, K)
    output = value.new_zeros((batch_size * num_heads, head_dim, num_queries), dtype=sampling_type)
    levels = value.to(sampling_type).split([height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width), grid, weight in zip(levels, spatial_shapes, grids, weights, strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_dim, height, width)
        samples = nn.functional.grid_sample(maps, grid, align_corners=False)
        output = output + (samples * weight).sum(-1)
    output = output.view(batch_size, num_heads, head_dim, num_queries).permute(0, 3, 1, 2)
    return output.to(value.dtype)
