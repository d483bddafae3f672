"""The compiled kernels behind csrc/ms_deform_attn.h, called through ctypes.

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 1
MAX_LEVELS = 8
MAX_POINTS = 8
MAX_CHANNELS = 128
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}
Shapes = tuple[tuple[int, int], ...]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "cells", "heads", "channels", "queries", "levels", "points")),
        ("heights", ctypes.c_int64 * MAX_LEVELS),
        ("widths", ctypes.c_int64 * MAX_LEVELS),
    ]


class _Place(ctypes.Structure):
    _fields_ = [("threads", ctypes.c_int32), ("device", ctypes.c_int32), ("stream", ctypes.c_void_p)]


class CompiledLibrary:
    """One loaded library: the CPU's or CUDA's.

    Attributes:
        description: one line of the library about itself, such as the instruction set in use.
    """

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            OSError: it cannot be loaded, or was built from other sources.
        """
        self.path = path
        library = ctypes.CDLL(str(path))
        library.mpformer_abi_version.restype = ctypes.c_int
        version = library.mpformer_abi_version()
        if version != ABI_VERSION:
            raise OSError(
                f"{path} has version {version} of the interface, this package needs {ABI_VERSION}. "
                "Build it again: python -m mpformer_hf.ops build"
            )
        library.mpformer_describe.restype = library.mpformer_explain.restype = ctypes.c_char_p
        library.mpformer_explain.argtypes = [ctypes.c_int]
        sizes_and_place: list[Any] = [ctypes.c_int, ctypes.POINTER(_Sizes), ctypes.POINTER(_Place)]
        library.mpformer_forward.argtypes = [*sizes_and_place, *[ctypes.c_void_p] * 4]
        library.mpformer_backward.argtypes = [*sizes_and_place, *[ctypes.c_void_p] * 7]
        self.description: str = library.mpformer_describe().decode()
        self._library = library

    def forward(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator; arguments as `deformable_attention.ms_deform_attn`, all on the library's kind of device.

        Raises:
            RuntimeError: the library refuses the sizes or CUDA reports an error.
        """
        kernel_type, real_type = choose_types(value, locations)
        output = value.new_empty((*locations.shape[:3], value.shape[-1]), dtype=kernel_type)
        inputs = prepare(kernel_type, value) + prepare(real_type, locations, weights)
        self._call(self._library.mpformer_forward, (value, shapes, locations), kernel_type, [*inputs, output])
        return output.to(value.dtype)

    def backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        shapes: Shapes,
        locations: Tensor,
        weights: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of value, locations and weights, those that are `needed`, in the types of what they belong to."""
        kernel_type, real_type = choose_types(value, locations)
        grads = [
            value.new_zeros(value.shape, dtype=real_type) if needed[0] else None,
            locations.new_empty(locations.shape, dtype=real_type) if needed[1] else None,
            weights.new_empty(weights.shape, dtype=real_type) if needed[2] else None,
        ]
        inputs = prepare(kernel_type, grad_output, value) + prepare(real_type, locations, weights)
        self._call(self._library.mpformer_backward, (value, shapes, locations), kernel_type, [*inputs, *grads])
        types = (value.dtype, locations.dtype, weights.dtype)
        cast = [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, types, strict=True)]
        return cast[0], cast[1], cast[2]

    def _call(
        self,
        function: "ctypes._FuncPointer",
        arguments: tuple[Tensor, Shapes, Tensor],
        kernel_type: torch.dtype,
        tensors: list[Tensor | None],
    ) -> None:
        value, shapes, locations = arguments
        sizes = make_sizes(tuple(value.shape), shapes, locations.shape[1], locations.shape[4])
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        status = function(TYPE_CODES[kernel_type], sizes, make_place(value.device), *pointers)
        if status:
            raise RuntimeError(
                f"The compiled deformable attention refused a value of shape {tuple(value.shape)} and type {kernel_type} with "
                f"levels {shapes} and locations of shape {tuple(locations.shape)}: "
                f"{self._library.mpformer_explain(status).decode()}."
            )


def choose_types(value: Tensor, locations: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Types that the kernels work with: of value and output, and of locations, weights and gradients."""
    if torch.float64 in (value.dtype, locations.dtype):
        return torch.float64, torch.float64
    if value.dtype == torch.float16 and value.device.type == "cpu":
        return torch.float32, torch.float32  # processors have no arithmetic for it
    return value.dtype, torch.float32


def prepare(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors of one type; those that are already are returned as they are."""
    return [tensor.to(dtype).contiguous() for tensor in tensors]


@functools.lru_cache(maxsize=64)
def make_sizes(value_shape: tuple[int, ...], shapes: Shapes, num_queries: int, num_points: int) -> _Sizes:
    """The sizes, as the library reads them."""
    images, cells, heads, channels = value_shape
    sizes = _Sizes(images, cells, heads, channels, num_queries, len(shapes), num_points)
    sizes.heights[: len(shapes)] = [height for height, _ in shapes]
    sizes.widths[: len(shapes)] = [width for _, width in shapes]
    return sizes


def make_place(device: torch.device) -> _Place:
    """Threads on a CPU; device and current stream on a GPU."""
    if device.type == "cpu":
        return _Place(torch.get_num_threads(), 0, None)
    return _Place(0, device.index, torch.cuda.current_stream(device).cuda_stream)


def can_handle(value: Tensor, locations: Tensor) -> bool:
    """Whether the kernels have been written for these numbers of levels, points and channels, and this type."""
    return (
        value.dtype in TYPE_CODES
        and 1 <= locations.shape[3] <= MAX_LEVELS
        and 1 <= locations.shape[4] <= MAX_POINTS
        and 1 <= value.shape[3] <= MAX_CHANNELS
    )
