"""Sine position embedding of feature maps (DETR, appendix A.4), computed in forward and cached by shape."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

TEMPERATURE = 10000
EPSILON = 1e-6
MAX_CACHED_TABLES = 8


def cache_table(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remember the last tables of a function whose result depends on its (hashable) arguments alone.

    A buffer filled in `__init__` would hold random memory after `from_pretrained`, which builds models on the meta device.
    Nothing is remembered while torch traces, nor when a tensor subclass (fake, functional) comes out; tables are made outside
    of inference mode, so that they can take part in a later training step.
    """

    @lru_cache(maxsize=MAX_CACHED_TABLES)
    def cached(*arguments: object) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            table = function(*arguments)
        if type(table) is not Tensor:
            raise _NotCacheableError(table)
        return table

    def lookup(*arguments: object) -> Tensor:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return cached(*arguments)
        except _NotCacheableError as error:
            return error.table

    return lookup


class _NotCacheableError(Exception):
    """Carries a table past the cache: what raises is not remembered."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table


@cache_table
def sine_position_embedding(
    height: int, width: int, num_channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Sines and cosines of the row (first half of the channels) and the column (second half) of each cell.

    Positions run from 1 to height (width) and are scaled to (0, 2 pi]. Computed in float32.

    Args:
        height: of the feature map in cells.
        width: of the feature map in cells.
        num_channels: a multiple of 4.
        dtype: of the result.
        device: of the result.

    Returns:
        (height * width, num_channels), rows of the map one after the other.
    """
    half = num_channels // 2
    channel = torch.arange(half, dtype=torch.int64, device=device)
    wavelength = TEMPERATURE ** (2 * torch.div(channel, 2, rounding_mode="floor").float() / half)  # (C / 2,)

    def encode(length: int) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        angle = (position / (length + EPSILON) * (2 * math.pi))[:, None] / wavelength
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)  # (length, C / 2)

    rows = encode(height)[:, None, :].expand(height, width, half)
    columns = encode(width)[None, :, :].expand(height, width, half)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(dtype)
