"""Multi-scale deformable attention (Deformable DETR, section 4.1): the operator in plain PyTorch, and the module around it.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .position_embedding import cache_table


class MultiScaleDeformableAttention(nn.Module):
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
        output = ms_deform_attn(value, spatial_shapes, locations, weights)
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


def locate_samples(spatial_shapes: tuple[tuple[int, int], ...], offsets: Tensor) -> Tensor:
    """Turn offsets in cells of each level into locations relative to the level.

    Args:
        spatial_shapes: height and width of each level.
        offsets: float32, (B, S, N, L, K, 2), (x, y) in cells.

    Returns:
        float32, (B, S, N, L, K, 2), (x, y); [0, 1] is inside the map.
    """
    reference_points = cell_centres(spatial_shapes, offsets.device)
    sizes = level_sizes(spatial_shapes, offsets.device)
    return reference_points[None, :, None, None, None, :] + offsets / sizes[:, None, :]


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
def level_sizes(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Width and height of the levels, float32, (L, 2)."""
    return torch.tensor([(width, height) for height, width in spatial_shapes], dtype=torch.float32, device=device)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The operator: weighted sum of bilinear samples of `value`; cells outside the maps count as zero.

    Args:
        value: (B, S, N, D), any float type.
        spatial_shapes: height and width of each level.
        sampling_locations: float32 or float64, (B, Q, N, L, K, 2), (x, y) relative to each level, [0, 1] is inside.
        attention_weights: like the locations without the last axis.

    Returns:
        (B, Q, N, D), in the type of `value`.
    """
    shapes = tuple((int(height), int(width)) for height, width in spatial_shapes)
    num_cells = sum(height * width for height, width in shapes)
    if num_cells != value.shape[1]:
        raise ValueError(
            f"Expected {num_cells} cells for levels of sizes {shapes}, got a value of shape {tuple(value.shape)}. "
            "Pass the flattened cells of all levels, one level after the other."
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and 0 not in sampling_locations.shape:
        return _EmbeddingBagAttention.apply(value, shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)


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


# The levels get a border of zeros this wide, and locations are clamped into it: then every corner of every sample exists, and
# a sample that lies outside has the value and the derivative zero.
BORDER = 2


class _EmbeddingBagAttention(torch.autograd.Function):
    """The operator on CPU: each output row is a bag of 4 * L * K weighted rows of `value`.

    `embedding_bag` reads contiguous rows of D channels where `grid_sample` strides over channels, and nothing of the size
    (D, Q, L * K) is ever stored.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        value: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> Tensor:
        index, x_fraction, y_fraction = _find_corners(value.shape, spatial_shapes, sampling_locations)
        weights = _bilinear_weights(x_fraction, y_fraction).mul_(attention_weights[..., None])
        num_bags = math.prod(sampling_locations.shape[:3])
        output = nn.functional.embedding_bag(
            index.view(num_bags, -1),
            _pad_levels(value.to(weights.dtype), spatial_shapes),
            per_sample_weights=weights.view(num_bags, -1),
            mode="sum",
        )
        ctx.save_for_backward(value, sampling_locations, attention_weights, index, x_fraction, y_fraction)
        ctx.spatial_shapes = spatial_shapes  # type: ignore[attr-defined]
        return output.view(*sampling_locations.shape[:3], -1).to(value.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        value, locations, weights, index, x_fraction, y_fraction = ctx.saved_tensors  # type: ignore[attr-defined]
        shapes = ctx.spatial_shapes  # type: ignore[attr-defined]
        grad_value = grad_locations = grad_weights = None
        grad_output = grad_output.to(locations.dtype).contiguous()
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
            products = _multiply_corners(index, _pad_levels(value.to(grad_output.dtype), shapes), grad_output)
            grad_weights = (products * _bilinear_weights(x_fraction, y_fraction)).sum(-1)
            sizes = locations.new_tensor([(width, height) for height, width in shapes])[:, None, :]
            grad_locations = _differentiate_bilinear(products, x_fraction, y_fraction) * sizes * weights[..., None]
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_value = _scatter_samples(value, shapes, locations, weights, grad_output)
        return grad_value, None, grad_locations, grad_weights


def _pad_levels(value: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Put the border of zeros around each level: (B, S, N, D) to (B * S' * N, D)."""
    levels = value.flatten(2).split([height * width for height, width in shapes], dim=1)
    padded = [
        nn.functional.pad(level.unflatten(1, shape), (0, 0, BORDER, BORDER, BORDER, BORDER)).flatten(1, 2)
        for level, shape in zip(levels, shapes, strict=True)
    ]
    return torch.cat(padded, dim=1).view(-1, value.shape[-1])


def _find_corners(
    value_shape: torch.Size, shapes: tuple[tuple[int, int], ...], locations: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the rows of `_pad_levels` around each location, and where it lies between them.

    Returns:
        Indices, int32 or int64, (B, Q, N, L, K, 4), corners in the order (low y, low x), (low y, high x), (high y, low x), (high
        y, high x); and fractions in [0, 1) along x and y, (B, Q, N, L, K).
    """
    batch_size, _, num_heads, head_dim = value_shape
    padded = [(height + 2 * BORDER, width + 2 * BORDER) for height, width in shapes]
    num_rows = batch_size * sum(height * width for height, width in padded) * num_heads
    index_type = torch.int32 if num_rows * head_dim < 2**31 else torch.int64
    sizes = locations.new_tensor([(width, height) for height, width in shapes])[:, None, :]  # (L, 1, 2)
    locations = locations.contiguous()
    position = locations * sizes - 0.5
    inside = torch.minimum(position.clamp(min=-BORDER), sizes)
    low = inside.floor()
    # What is not finite has no place in a table. The sample becomes NaN all the same, by its fractions.
    x_fraction, y_fraction = (inside - low).add_(position.mul_(0)).unbind(-1)
    x_low, y_low = low.nan_to_num_().to(index_type).unbind(-1)

    row_length = torch.tensor([width for _, width in padded], dtype=index_type)[:, None]  # (L, 1)
    first_cell = torch.tensor([0, *itertools.accumulate(height * width for height, width in padded)], dtype=index_type)
    image = torch.arange(batch_size, dtype=index_type) * first_cell[-1]
    first_cell = image[:, None, None] + first_cell[:-1, None] + BORDER * row_length + BORDER  # (B, L, 1)
    head = torch.arange(num_heads, dtype=index_type)
    first_row = first_cell[:, None] * num_heads + head[:, None, None]  # (B, N, L, 1)
    top_left = (y_low * row_length + x_low) * num_heads + first_row[:, None]
    below = row_length * num_heads
    steps = torch.stack([below * 0, below * 0 + num_heads, below, below + num_heads], dim=-1)  # (L, 1, 4)
    return top_left[..., None] + steps, x_fraction, y_fraction


def _bilinear_weights(x_fraction: Tensor, y_fraction: Tensor) -> Tensor:
    """Weights of the four corners, (..., 4)."""
    bottom_right = x_fraction * y_fraction
    top_right, bottom_left = x_fraction - bottom_right, y_fraction - bottom_right
    return torch.stack([1 - x_fraction - bottom_left, top_right, bottom_left, bottom_right], dim=-1)


def _multiply_corners(index: Tensor, rows: Tensor, grad_output: Tensor) -> Tensor:
    """Dot product of each corner's row with the gradient of the output that it is part of, (B, Q, N, L, K, 4)."""
    num_bags, bag_size = math.prod(index.shape[:3]), math.prod(index.shape[3:])
    bags = torch.arange(num_bags, dtype=index.dtype)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(  # noqa: SLF001 - operators are named so
        grad_output.view(num_bags, -1),
        rows,
        index.view(-1),
        bags * bag_size,
        bags.repeat_interleave(bag_size),
        0,  # mode "sum"
    )
    return products.view(index.shape)


def _differentiate_bilinear(products: Tensor, x_fraction: Tensor, y_fraction: Tensor) -> Tensor:
    """Derivatives along x and y of an interpolation between four corners, (..., 2)."""
    top_left, top_right, bottom_left, bottom_right = products.unbind(-1)
    along_top, along_left = top_right - top_left, bottom_left - top_left
    twist = bottom_right - bottom_left - along_top
    return torch.stack([along_top + twist * y_fraction, along_left + twist * x_fraction], dim=-1)


def _scatter_samples(
    value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor, grad_output: Tensor
) -> Tensor:
    """Gradient of the value: `grid_sample`'s own scatter, the fastest that PyTorch has on CPU."""
    batch_size, _, num_heads, head_dim = value.shape
    num_queries, num_points = locations.shape[1], locations.shape[4]
    grad_columns = grad_output.permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_dim, num_queries, 1)
    grads = []
    for level, (height, width) in enumerate(shapes):
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B * N, Q, K, 2)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch_size * num_heads, 1, num_queries, num_points)
        grad_samples = grad_columns * weight
        maps = grad_samples.new_empty(1).expand(
            batch_size * num_heads, head_dim, height, width
        )  # only its shape is read
        grad_maps, _ = torch.ops.aten.grid_sampler_2d_backward(grad_samples, maps, grid, 0, 0, False, [True, False])
        grads.append(grad_maps.view(batch_size, num_heads, head_dim, height * width).permute(0, 3, 1, 2))
    return torch.cat(grads, dim=1).to(value.dtype)
