"""The operator `torch.ops.mpformer.ms_deform_attn`: schema, shapes, derivative, autocast, and what runs on which device.

    ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights) -> output

Axes: B images, Q queries, S cells of all levels, N heads, D channels of a head, L levels, K points. `value` is (B, S, N, D) of
any float type, `spatial_shapes` the 2 * L heights and widths in a row, `sampling_locations` (B, Q, N, L, K, 2) and
`attention_weights` (B, Q, N, L, K) are float32 or float64, `output` is (B, Q, N, D) of the value's type. Under autocast the value
keeps its type, locations and weights stay float32: in bfloat16 they would be wrong by whole cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .compiled import Shapes

NAMESPACE = "mpformer"
FORWARD = f"{NAMESPACE}::ms_deform_attn"
BACKWARD = f"{NAMESPACE}::ms_deform_attn_backward"
LOCATION_TYPES = (torch.float32, torch.float64)


def define() -> None:
    """Define the operators, for no device yet."""
    torch.library.define(
        FORWARD,
        "(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> Tensor",
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.define(
        BACKWARD,
        "(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights, "
        "bool[3] needed) -> (Tensor, Tensor, Tensor)",
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.register_fake(FORWARD, fake_forward)
    torch.library.register_fake(BACKWARD, fake_backward)
    torch.library.register_autograd(FORWARD, differentiate, setup_context=save_for_backward)
    torch.library.register_autograd(BACKWARD, refuse_second_derivative)


def implement(device_type: str) -> None:
    """Offer the operators on a kind of device, "cpu" or "cuda"."""
    torch.library.impl(FORWARD, device_type, forward)
    torch.library.impl(BACKWARD, device_type, backward)
    autocast_key = "AutocastCPU" if device_type == "cpu" else f"Autocast{device_type.upper()}"

    def autocast(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
        """Cast what must not be half precision, then run outside of autocast."""
        with torch.amp.autocast(device_type, enabled=False):
            real_type = torch.promote_types(locations.dtype, torch.float32)
            return torch.ops.mpformer.ms_deform_attn(
                value, spatial_shapes, locations.to(real_type), weights.to(real_type)
            )

    torch.library.impl(FORWARD, autocast_key, autocast)


# ------------------------------------------------------------------------------------------------------------ on a device


def forward(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Run on the backend in use."""
    check_arguments(value, spatial_shapes, locations, weights)
    kernel = backends.choose_kernel(value, locations)
    return kernel.forward(value, pair_up(spatial_shapes), locations, weights)


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, contiguous; an empty tensor for one that is not needed."""
    kernel = backends.choose_kernel(value, locations)
    grads = kernel.backward(grad_output, value, pair_up(spatial_shapes), locations, weights, needed)
    given = [
        grad.contiguous() if is_needed and grad is not None else tensor.new_empty(0)
        for grad, is_needed, tensor in zip(grads, needed, (value, locations, weights), strict=True)
    ]
    return given[0], given[1], given[2]


def pair_up(spatial_shapes: Sequence[int]) -> Shapes:
    """[h0, w0, h1, w1] to ((h0, w0), (h1, w1))."""
    return tuple(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


# ----------------------------------------------------------------------------------------------------- shapes, derivative


def fake_forward(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Shape and type of the output."""
    check_arguments(value, spatial_shapes, locations, weights)
    return value.new_empty((*locations.shape[:3], value.shape[3]))


def fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and types of the gradients."""
    del grad_output, spatial_shapes
    grads = [
        tensor.new_empty(tensor.shape if is_needed else 0)
        for tensor, is_needed in zip((value, locations, weights), needed, strict=True)
    ]
    return grads[0], grads[1], grads[2]


def save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Sequence[int], Tensor, Tensor], output: Tensor
) -> None:
    """Keep the inputs: nothing of the size (D, Q, L * K) is stored."""
    del output
    value, spatial_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.spatial_shapes = spatial_shapes  # type: ignore[attr-defined]


def differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor
) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    """Gradients of the arguments of the forward operator."""
    value, locations, weights = ctx.saved_tensors  # type: ignore[attr-defined]
    needed = [ctx.needs_input_grad[i] for i in (0, 2, 3)]  # type: ignore[attr-defined]
    spatial_shapes = ctx.spatial_shapes  # type: ignore[attr-defined]
    grads = torch.ops.mpformer.ms_deform_attn_backward(grad_output, value, spatial_shapes, locations, weights, needed)
    given = [grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)]
    return given[0], None, given[1], given[2]


def refuse_second_derivative(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> None:
    """Say what to do instead of giving a wrong answer."""
    del ctx, grads
    raise NotImplementedError(
        "The compiled deformable attention has no second derivative. "
        "Set MPFORMER_MSDA_BACKEND=reference, whose second derivative PyTorch knows."
    )


# ---------------------------------------------------------------------------------------------------------------- checks


def check_arguments(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """Raise ValueError where sizes, types or devices do not fit together."""
    num_cells = sum(height * width for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    if value.ndim != 4 or value.shape[1] != num_cells:  # noqa: PLR2004 - the axes of the docstring
        raise ValueError(
            f"Expected a value of shape (B, {num_cells}, N, D) for spatial shapes {list(spatial_shapes)}, "
            f"got {tuple(value.shape)}."
        )
    expected = (value.shape[0], locations.shape[1], value.shape[2], len(spatial_shapes) // 2)
    if locations.ndim != 6 or locations.shape[-1] != 2 or locations.shape[:4] != expected:  # noqa: PLR2004
        raise ValueError(
            f"Expected sampling locations of shape (B, Q, N, L, K, 2) = ({expected[0]}, Q, {expected[2]}, {expected[3]}, K, 2), "
            f"got {tuple(locations.shape)}."
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"Expected attention weights of shape {tuple(locations.shape[:-1])}, got {tuple(weights.shape)}."
        )
    check_types(value, locations, weights)


def check_types(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    """Raise ValueError for types and devices that the operator does not take."""
    if locations.dtype not in LOCATION_TYPES or weights.dtype != locations.dtype:
        raise ValueError(
            "Expected sampling locations and attention weights of one type, float32 or float64, got "
            f"{locations.dtype} and {weights.dtype}. Compute them in float32: half precision is wrong by whole cells."
        )
    if not value.dtype.is_floating_point:
        raise ValueError(f"Expected a value of a float type, got {value.dtype}.")
    if not value.device == locations.device == weights.device:
        raise ValueError(
            f"Expected all tensors on one device, got {value.device}, {locations.device} and {weights.device}."
        )
