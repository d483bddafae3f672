"""Bilinear resizing (align_corners False) of mask logits, computed where it is needed.

Mask logits go to the padded size of the image, are cropped to its valid size and go on to the target size. Each step is
linear and treats rows and columns separately, so both together are one matrix for the rows and one for the columns, with
at most four neighbouring weights that are not zero in each row. A window of the target is two small matrix products of
the few logits that reach it, and stays in the processor's cache; no float tensor of the target size is made.

Axes: N masks (queries or classes) of one image, h w mask logits (1/4 of the padded image), H W target size. Values are
kept as (rows, N, columns): one product for each axis, and a reduction over N runs along contiguous columns.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 4 * 2**20}  # float values of one block: what the caches of a few cores hold
BLOCK_BYTES_ELSEWHERE = 64 * 2**20
SHORTEST_BLOCK = 8  # pixels along each side, whatever the number of channels
LARGEST_LOGIT = 1e4  # infinities become this: 0 times infinity would spread NaN over a block

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class ImageGeometry:
    """Sizes of one image on its way from mask logits to the result: padded, valid (top left of it), target."""

    padded: Size
    valid: Size
    target: Size


@dataclass(frozen=True)
class AxisResize:
    """A linear resize along one axis, each output a weighted mean of few neighbouring inputs.

    Attributes:
        inputs: int64, (size out, 2 or 4), which inputs; on the CPU, like the weights. An input may occur twice.
        weights: float64, (size out, 2 or 4), in [0, 1]; each row adds up to one.
        first: int64, (size out,), first input of each output, never falling.
        last: int64, (size out,), last input of each output, never falling.
    """

    inputs: Tensor
    weights: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def bilinear(cls, size_in: int, size_out: int) -> "AxisResize":
        """Resize `size_in` values to `size_out`, as `interpolate(mode="bilinear", align_corners=False)`."""
        position = (torch.arange(size_out, dtype=torch.float64) + 0.5) * (size_in / size_out) - 0.5
        position = position.clamp(0, size_in - 1)
        first = position.floor().long()
        last = (first + 1).clamp(max=size_in - 1)
        share = position - first
        return cls(torch.stack([first, last], 1), torch.stack([1 - share, share], 1), first, last)

    def crop(self, size_out: int) -> "AxisResize":
        """Keep the first outputs."""
        return AxisResize(self.inputs[:size_out], self.weights[:size_out], self.first[:size_out], self.last[:size_out])

    def then(self, following: "AxisResize") -> "AxisResize":
        """Join this resize and another one of its outputs."""
        inputs = self.inputs[following.inputs].flatten(1)
        weights = (self.weights[following.inputs] * following.weights[..., None]).flatten(1)
        return AxisResize(inputs, weights, self.first[following.first], self.last[following.last])

    def sources(self, outputs: slice) -> slice:
        """Inputs that some neighbouring outputs are made of."""
        return slice(int(self.first[outputs.start]), int(self.last[outputs.stop - 1]) + 1)

    def outputs(self, sources: slice) -> slice:
        """Outputs that some neighbouring inputs have a part in."""
        start = int(torch.searchsorted(self.last, sources.start))
        stop = int(torch.searchsorted(self.first, sources.stop - 1, right=True))
        return slice(start, stop)

    def matrix(self, outputs: slice, like: Tensor) -> Tensor:
        """Write the resize of `sources(outputs)` to `outputs` as a matrix (outputs, sources), of a tensor's type and device."""
        sources = self.sources(outputs)
        matrix = torch.zeros(outputs.stop - outputs.start, sources.stop - sources.start, dtype=torch.float64)
        return matrix.scatter_add_(1, self.inputs[outputs] - sources.start, self.weights[outputs]).to(like)


class ResizedMasks:
    """Mask logits of one image at the target size, or at the valid one, computed window by window."""

    def __init__(self, mask_logits: Tensor, geometry: ImageGeometry, *, to_valid_size: bool = False) -> None:
        """Prepare the resize.

        Args:
            mask_logits: any float type, (N, h, w).
            geometry: sizes of the image.
            to_valid_size: stop after the first step, at the valid size (True), or go to the target size (False).
        """
        self.size = geometry.valid if to_valid_size else geometry.target
        values = mask_logits.to(product_type(mask_logits.device)).transpose(0, 1)
        self.values = torch.empty_like(values, memory_format=torch.contiguous_format)  # (h, N, w)
        torch.clamp(values, -LARGEST_LOGIT, LARGEST_LOGIT, out=self.values)
        self.rows, self.columns = (
            axis_resize(mask_logits.shape[axis - 2], geometry.padded[axis], geometry.valid[axis], self.size[axis])
            for axis in (0, 1)
        )

    def window(self, rows: slice, columns: slice, mask: slice = slice(None)) -> Tensor:
        """Compute one window of some masks: float32, (rows, N, columns)."""
        return resample(self.values[:, mask], self.rows, self.columns, rows, columns).float()


def resample(
    values: Tensor,
    row_resize: AxisResize,
    column_resize: AxisResize,
    rows: slice,
    columns: slice,
    origin: Size = (0, 0),
) -> Tensor:
    """Compute a window of a resize.

    Args:
        values: float, (height, N, width), the input from `origin` (row, column) on.
        row_resize: resize of the whole input along the rows.
        column_resize: resize of the whole input along the columns.
        rows: rows of the output.
        columns: columns of the output.
        origin: row and column of the input that `values` begins with.

    Returns:
        float, (rows, N, columns).
    """
    source_rows, source_columns = row_resize.sources(rows), column_resize.sources(columns)
    part = values[
        source_rows.start - origin[0] : source_rows.stop - origin[0],
        :,
        source_columns.start - origin[1] : source_columns.stop - origin[1],
    ]
    height, masks, width = part.shape
    wide = part.reshape(height * masks, width) @ column_resize.matrix(columns, like=values).T  # (height * N, columns)
    tall = row_resize.matrix(rows, like=values) @ wide.view(height, -1)  # (rows, N * columns)
    return tall.view(len(tall), masks, -1)


def axis_resize(size_in: int, padded: int, valid: int, size_out: int) -> AxisResize:
    """Join the two steps along one axis: to the padded size, cropped to the valid one, to the result."""
    to_valid = AxisResize.bilinear(size_in, padded).crop(valid)
    return to_valid if size_out == valid else to_valid.then(AxisResize.bilinear(valid, size_out))


def product_type(device: torch.device) -> torch.dtype:
    """Choose the float type in which products of float32 values keep float32's precision.

    CPUs keep it unless told otherwise (`torch.set_float32_matmul_precision`); GPUs may round to TF32, of 10 bits.
    """
    if device.type == "mps":  # has no float64, and no reduced precision either
        return torch.float32
    try:
        is_exact = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer switches, each backend for itself
        is_exact = False
    return torch.float32 if is_exact else torch.float64


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute without gradients, and in float32 whatever the caller's autocast says: rounded logits move edges of masks."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def blocks(size: Size, channels: int, device: torch.device, shrink: float = 1.0) -> Iterator[tuple[slice, slice]]:
    """Divide an image into nearly square blocks, whose float values for all channels fit into the cache.

    Args:
        size: height and width.
        channels: float values of each pixel.
        device: where the work happens; away from the CPU blocks are larger.
        shrink: divides the sides of the blocks, where each pixel of them needs the square of it of others.

    Yields:
        Rows and columns.
    """
    pixels = BLOCK_BYTES.get(device.type, BLOCK_BYTES_ELSEWHERE) / (4 * max(1, channels))
    side = max(SHORTEST_BLOCK, math.floor(math.sqrt(pixels) / max(1.0, shrink)))
    for rows in parts(size[0], side):
        for columns in parts(size[1], side):
            yield rows, columns


def parts(length: int, longest: int) -> list[slice]:
    """Divide a length into equal parts (to a pixel) of at most `longest`."""
    count = math.ceil(length / longest)
    edges = [length * index // max(1, count) for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]
