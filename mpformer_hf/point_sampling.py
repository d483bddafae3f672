"""Losses at points instead of whole masks (Mask2Former, section 3.3; PointRend): drawing points and reading values there.

Points are (x, y) in [0, 1] of the padded image, (0, 0) its top left corner. Axes: R rows (masks), T segments of one image,
P points, h w size of a map.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .deformable_attention import ms_deform_attn

HEAD_DIM = 32  # channels that are read together; the deformable attention is compiled specially for this number


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps bilinearly; outside of them is zero.

    Args:
        maps: (R, C, h, w).
        points: (R, P, 2).

    Returns:
        (R, C, P).
    """
    if maps.device.type == "cpu" and maps.shape[1] % HEAD_DIM == 0:
        return _sample_channels_last(maps, points)
    return nn.functional.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


def _sample_channels_last(maps: Tensor, points: Tensor) -> Tensor:
    """`sample_maps` as a deformable attention that looks at one point.

    Once the channels of a pixel lie together, reading them is many times faster than `grid_sample`, which jumps from one to the
    next.
    """
    num_rows, num_channels, height, width = maps.shape
    num_heads = num_channels // HEAD_DIM
    value = maps.flatten(2).transpose(1, 2).reshape(num_rows, height * width, num_heads, HEAD_DIM)
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    locations = points[:, :, None, None, None].expand(-1, -1, num_heads, -1, -1, -1)
    samples = ms_deform_attn(value, [(height, width)], locations, locations.new_ones(locations.shape[:-1]))
    return samples.flatten(2).transpose(1, 2)


def sample_masks(masks: Tensor, mask_index: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Read ground-truth masks bilinearly, once; see `MaskReader`."""
    return MaskReader(masks, padded_size).read(mask_index, points)


class MaskReader:
    """Ground-truth masks of one image, ready to be read bilinearly at many points.

    A bilinear value needs four neighbouring pixels. Where they are 0 or 1, one byte holds all four, so that a point costs one
    access to memory instead of four; with a border of zeros around the mask, none of them needs a check.
    """

    def __init__(self, masks: Tensor, padded_size: tuple[int, int]) -> None:
        """Prepare.

        Args:
            masks: (T, h, w), bool, uint8 (anything but 0 is 1) or float in [0, 1]. A mask smaller than the padded image lies in
                its top left corner; the rest is background.
            padded_size: height and width of the padded image.
        """
        self.height, self.width = masks.shape[1:]
        self.padded_size = padded_size
        self.is_binary = not masks.is_floating_point()
        if self.is_binary:
            is_set = masks if masks.dtype == torch.bool else masks != 0
            pixels = nn.functional.pad(is_set.view(torch.uint8), (1, 2, 1, 2))
            pairs = pixels[:, :, :-1] | (pixels[:, :, 1:] << 1)
            table = pairs[:, :-1] | (pairs[:, 1:] << 2)
        else:
            table = nn.functional.pad(masks, (1, 3, 1, 3))
        self.row_length, self.mask_length = table.shape[2], table.shape[1] * table.shape[2]
        self.table = table.flatten()

    def read(self, mask_index: Tensor, points: Tensor) -> Tensor:
        """Read.

        Args:
            mask_index: int64, (R,), in [0, T). Which mask each row reads.
            points: (R, P, 2), or (1, P, 2) for the same points in every row.

        Returns:
            (R, P), in [0, 1], in the type of the points.
        """
        # Plain numbers, not a tensor of them: copying that to an accelerator would wait for it.
        x = (points[..., 0] * self.padded_size[1] - 0.5).clamp(-1, self.width)
        y = (points[..., 1] * self.padded_size[0] - 0.5).clamp(-1, self.height)
        x_low, y_low = x.floor(), y.floor()
        right, bottom = x - x_low, y - y_low
        left, top = 1 - right, 1 - bottom
        corner = (y_low.long() + 1) * self.row_length + x_low.long() + (mask_index[:, None] * self.mask_length + 1)
        top_left, top_right, bottom_left, bottom_right = self._read_corners(corner)
        return top * (left * top_left + right * top_right) + bottom * (left * bottom_left + right * bottom_right)

    def _read_corners(self, corner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values of four pixels, given the index of the top left one."""
        if self.is_binary:
            codes = self.table[corner]
            return codes & 1, (codes >> 1) & 1, (codes >> 2) & 1, codes >> 3
        below = corner + self.row_length
        return self.table[corner], self.table[corner + 1], self.table[below], self.table[below + 1]


class IgnoredPixels:
    """Pixels of one image whose label is unknown.

    A point is ignored when any pixel that a bilinear value there depends on is unknown: what a mask says about such pixels
    then changes nothing.
    """

    def __init__(self, ignore_mask: Tensor, padded_size: tuple[int, int]) -> None:
        """Prepare.

        Args:
            ignore_mask: bool, (h, w), True where the label is unknown. Where it is smaller than the padded image it lies in its
                top left corner; the rest is known.
            padded_size: height and width of the padded image.
        """
        self._reader = MaskReader(ignore_mask[None], padded_size)

    def at(self, points: Tensor) -> Tensor:
        """Which points are ignored: (R, P, 2) to bool (R, P)."""
        return self._reader.read(torch.zeros(len(points), dtype=torch.int64, device=points.device), points) > 0


@torch.no_grad()
def choose_points(
    mask_logits: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    is_ignored: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Prefer points where a mask is uncertain, that is, where its logit is near zero.

    Of `oversample_ratio * num_points` random candidates, the `importance_sample_ratio * num_points` most uncertain are kept; the
    rest is drawn afresh.

    Args:
        mask_logits: (R, 1, h, w).
        num_points: P, of the result.
        oversample_ratio: >= 1.
        importance_sample_ratio: in [0, 1].
        is_ignored: which points (R, ., 2) do not count, bool (R, .). Such candidates are kept only if there are too few others;
            of the points that are drawn afresh, any may be among them.

    Returns:
        (R, P, 2), in the type of the logits.
    """
    num_rows, device, dtype = mask_logits.shape[0], mask_logits.device, mask_logits.dtype
    num_uncertain = int(importance_sample_ratio * num_points)
    candidates = torch.rand(num_rows, int(num_points * oversample_ratio), 2, device=device, dtype=dtype)
    certainty = sample_maps(mask_logits, candidates)[:, 0].abs()
    if is_ignored is not None:
        certainty = certainty.masked_fill(is_ignored(candidates), torch.inf)
    index = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, index[:, :, None].expand(-1, -1, 2))
    return torch.cat(
        [uncertain, torch.rand(num_rows, num_points - num_uncertain, 2, device=device, dtype=dtype)], dim=1
    )
