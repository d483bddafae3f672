"""Multi-scale deformable attention in plain PyTorch by `embedding_bag`: an output row is a bag of 4 * L * K rows of the value.

Much faster than `grid_sample` on CPU; for where no compiled operator is, and on every device for what its kernels cannot do.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

Shapes = tuple[tuple[int, int], ...]

# The levels get a border of zeros this wide, and locations are clamped into it: then every corner of every sample exists, and
# a sample that lies outside has the value and the derivative zero.
BORDER = 2


class EmbeddingBagAttention(torch.autograd.Function):
    """The operator with its derivative; arguments as `attend`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
    ) -> Tensor:
        """See `attend`."""
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes  # type: ignore[attr-defined]
        return attend(value, shapes, locations, weights)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        """See `differentiate`."""
        value, locations, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        needed = [ctx.needs_input_grad[i] for i in (0, 2, 3)]  # type: ignore[attr-defined]
        grads = differentiate(grad_output, value, ctx.shapes, locations, weights, needed)  # type: ignore[attr-defined]
        return grads[0], None, grads[1], grads[2]


def attend(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator without a graph.

    `embedding_bag` reads contiguous rows of D channels where `grid_sample` strides over channels, and nothing of the size
    (D, Q, L * K) is ever stored.

    Args:
        value: (B, S, N, D), any float type.
        shapes: height and width of each level.
        locations: float32 or float64, (B, Q, N, L, K, 2), (x, y) relative to each level, [0, 1] is inside.
        weights: like the locations without the last axis.

    Returns:
        (B, Q, N, D), in the type of `value`.
    """
    if 0 in locations.shape:
        return value.new_zeros((*locations.shape[:3], value.shape[-1]))
    index, x_fraction, y_fraction = _find_corners(value.shape, shapes, locations)
    corner_weights = _bilinear_weights(x_fraction, y_fraction).mul_(weights[..., None])
    num_bags = math.prod(locations.shape[:3])
    output = nn.functional.embedding_bag(
        index.view(num_bags, -1),
        _pad_levels(value.to(corner_weights.dtype), shapes),
        per_sample_weights=corner_weights.view(num_bags, -1),
        mode="sum",
    )
    return output.view(*locations.shape[:3], -1).to(value.dtype)


def differentiate(
    grad_output: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, locations and weights, those that are `needed`; arguments as `attend`."""
    grad_value = grad_locations = grad_weights = None
    if 0 in locations.shape:
        return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)
    grad_output = grad_output.to(locations.dtype).contiguous()
    if needed[1] or needed[2]:
        index, x_fraction, y_fraction = _find_corners(value.shape, shapes, locations)
        products = _multiply_corners(index, _pad_levels(value.to(grad_output.dtype), shapes), grad_output)
        grad_weights = (products * _bilinear_weights(x_fraction, y_fraction)).sum(-1)
        sizes = locations.new_tensor([(width, height) for height, width in shapes])[:, None, :]
        grad_locations = _differentiate_bilinear(products, x_fraction, y_fraction) * sizes * weights[..., None]
    if needed[0]:
        grad_value = _scatter_samples(value, shapes, locations, weights, grad_output)
    return grad_value, grad_locations, grad_weights


def _pad_levels(value: Tensor, shapes: Shapes) -> Tensor:
    """Put the border of zeros around each level: (B, S, N, D) to (B * S' * N, D)."""
    levels = value.flatten(2).split([height * width for height, width in shapes], dim=1)
    padded = [
        nn.functional.pad(level.unflatten(1, shape), (0, 0, BORDER, BORDER, BORDER, BORDER)).flatten(1, 2)
        for level, shape in zip(levels, shapes, strict=True)
    ]
    return torch.cat(padded, dim=1).view(-1, value.shape[-1])


def _find_corners(value_shape: torch.Size, shapes: Shapes, locations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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

    table = partial(torch.tensor, dtype=index_type, device=locations.device)
    row_length = table([width for _, width in padded])[:, None]  # (L, 1)
    *first_cell, num_cells = itertools.accumulate((height * width for height, width in padded), initial=0)
    image = table(range(batch_size)) * num_cells
    cell = image[:, None, None] + table(first_cell)[:, None] + BORDER * row_length + BORDER  # (B, L, 1)
    first_row = cell[:, None] * num_heads + table(range(num_heads))[:, None, None]  # (B, N, L, 1)
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
    bags = torch.arange(num_bags, dtype=index.dtype, device=index.device)
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


def _scatter_samples(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, grad_output: Tensor) -> Tensor:
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
