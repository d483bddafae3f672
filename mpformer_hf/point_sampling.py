"""Losses at points instead of whole masks (Mask2Former, section 3.3; PointRend): drawing points and reading values there.

Points are (x, y) in [0, 1] of the padded image, (0, 0) its top left corner. Axes: R rows (masks), T segments of one image,
P points, h w size of a map.
"""

import torch
from torch import Tensor, nn


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps bilinearly; outside of them is zero.

    Args:
        maps: (R, C, h, w).
        points: (R, P, 2).

    Returns:
        (R, C, P).
    """
    return nn.functional.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


def sample_masks(masks: Tensor, mask_index: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Read ground-truth masks bilinearly, straight from their stored type.

    Args:
        masks: (T, h, w), bool, uint8 or float in [0, 1]. A mask smaller than the padded image lies in its top left corner;
            the rest is background.
        mask_index: int64, (R,). Which mask each row reads.
        points: (R, P, 2), or (1, P, 2) for the same points in every row.
        padded_size: height and width of the padded image.

    Returns:
        float32, (R, P), in [0, 1].
    """
    height, width = masks.shape[1:]
    scale = points.new_tensor((padded_size[1], padded_size[0]))
    position = points * scale - 0.5
    low = position.floor()
    x_fraction, y_fraction = (position - low).unbind(-1)
    x_low, y_low = low.long().unbind(-1)
    first = mask_index[:, None] * (height * width)
    stored = masks.reshape(-1)
    values = points.new_zeros(())
    for y, y_weight in ((y_low, 1 - y_fraction), (y_low + 1, y_fraction)):
        for x, x_weight in ((x_low, 1 - x_fraction), (x_low + 1, x_fraction)):
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            cell = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            values = values + stored[first + cell].to(points.dtype) * (x_weight * y_weight * inside)
    return values


@torch.no_grad()
def choose_points(
    mask_logits: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float
) -> Tensor:
    """Prefer points where a mask is uncertain, that is, where its logit is near zero.

    Of `oversample_ratio * num_points` random candidates, the `importance_sample_ratio * num_points` most uncertain are kept; the
    rest is drawn afresh.

    Args:
        mask_logits: (R, 1, h, w).
        num_points: P, of the result.
        oversample_ratio: >= 1.
        importance_sample_ratio: in [0, 1].

    Returns:
        (R, P, 2), in the type of the logits.
    """
    num_rows, device, dtype = mask_logits.shape[0], mask_logits.device, mask_logits.dtype
    num_uncertain = int(importance_sample_ratio * num_points)
    candidates = torch.rand(num_rows, int(num_points * oversample_ratio), 2, device=device, dtype=dtype)
    certainty = sample_maps(mask_logits, candidates)[:, 0].abs()
    index = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, index[:, :, None].expand(-1, -1, 2))
    return torch.cat(
        [uncertain, torch.rand(num_rows, num_points - num_uncertain, 2, device=device, dtype=dtype)], dim=1
    )
