"""Neighbourhood aggregation: the weighted sum over K x K neighbours that both kinds of SAN attention end in.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, equations 2 and 4.
"""
import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from ._paths import is_exporting
from .neighbourhood import reflect_pad, same_padding, windows

__all__ = ['aggregation', 'aggregation_reference']

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """Sum of each position's K x K neighbours, weighted per position, place and weight group.

    out[b, c, l] = sum over places k of weight[b, c mod G, k, l] * value[b, c, neighbour k of l]

    Neighbours outside the map are mirrored (`reflect_pad`). Channels c, c + G, c + 2G, ... share one weight.
    Sums of half precision inputs are accumulated in float32.

    Args:
        value: Map of shape (B, C, H, W).
        weight: Weights of shape (B, G, K * K, H, W), places in row-major order, C a multiple of G.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, C, H, W) and dtype of `value`.

    Raises:
        ValueError: The shapes of `value` and `weight` do not fit together, or K is even.
    """
    _check(value, weight, kernel_size)
    padding = same_padding(kernel_size, dilation)
    if not torch.jit.is_scripting():
        if _triton_serves(value, weight, padding):
            return _by_triton(value, weight, kernel_size, dilation)
    padded = reflect_pad(value, padding)
    weight = weight.to(value.dtype)
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return _shifted_sum(padded, weight, kernel_size, dilation)
    else:
        if is_exporting():
            return _shifted_sum(padded, weight, kernel_size, dilation)
        if torch.compiler.is_compiling():
            return _window_sum(padded, weight, kernel_size, dilation)
        if torch.is_grad_enabled() and (value.requires_grad or weight.requires_grad):
            return _ShiftedSum.apply(padded, weight, kernel_size, dilation)
        return _shifted_sum(padded, weight, kernel_size, dilation)


def aggregation_reference(
        value: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """The same sum as `aggregation` by F.unfold and einsum, materialising all K * K shifted values."""
    _check(value, weight, kernel_size)
    batch, channels, height, width = value.shape
    padded = reflect_pad(value, same_padding(kernel_size, dilation))
    neighbours = F.unfold(padded, kernel_size, dilation=dilation)
    neighbours = neighbours.reshape(batch, -1, weight.shape[1], kernel_size ** 2, height, width)
    return torch.einsum('bsgkhw,bgkhw->bsghw', neighbours, weight).reshape(batch, channels, height, width)


def _triton_serves(value: torch.Tensor, weight: torch.Tensor, padding: int) -> bool:
    """Whether the Triton kernels compute it: on a GPU, eagerly and compiled, but not in what is exported or traced.

    An exported program must run where this package or Triton is not: in onnxruntime, in C++, on a CPU. It holds plain
    slices, which its own compiler may fuse.
    """
    return (
        value.device.type == 'cuda'
        and weight.device == value.device
        and value.dtype in _FLOATS
        and weight.dtype in _FLOATS
        and padding < min(value.shape[-2], value.shape[-1])
        and not is_exporting()
        and not torch.jit.is_tracing()
        and _runs_triton(value.device)
    )


@torch.jit.unused
def _by_triton(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    from ._aggregation_triton import fused_aggregation  # imports Triton

    return fused_aggregation(value, weight, kernel_size, dilation)


@torch.compiler.assume_constant_result
def _runs_triton(device: torch.device) -> bool:
    # torch.func does not differentiate operators that are registered in Python.
    return _finds_triton(device) and not torch._C._are_functorch_transforms_active()


@functools.cache
def _finds_triton(device: torch.device) -> bool:
    # What came with torch 2.8 is the first that compiles the kernels, and Triton asks for such a device. Where there is
    # none to ask, tensors are fake: traced for a device elsewhere.
    return (
        torch.version.cuda is not None
        and torch.__version__ >= '2.8'
        and importlib.util.find_spec('triton') is not None
        and (not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0))
    )


def _check(value: torch.Tensor, weight: torch.Tensor, kernel_size: int) -> None:
    if value.dim() != 4 or weight.dim() != 5:
        raise ValueError(
            'value must be (B, C, H, W) and weight (B, G, K * K, H, W), '
            f'got shapes {list(value.shape)} and {list(weight.shape)}'
        )
    if weight.shape[0] != value.shape[0] or weight.shape[3:] != value.shape[2:]:
        raise ValueError(
            'value and weight must agree in batch size, height and width, '
            f'got shapes {list(value.shape)} and {list(weight.shape)}'
        )
    if weight.shape[2] != kernel_size ** 2:
        raise ValueError(f'weight must hold kernel_size ** 2 = {kernel_size ** 2} places, got {weight.shape[2]}')
    if value.shape[1] % weight.shape[1] != 0:
        raise ValueError(
            f'channels of value must be a multiple of the weight groups, got {value.shape[1]} and {weight.shape[1]}'
        )


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, C, ...) seen as (B, C / G, G, ...), so that channels sharing a weight lie along one axis."""
    return x.unflatten(1, (x.shape[1] // groups, groups))


def _shifted_sum(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """One multiply-add over the whole map for each of the K * K places; nothing is materialised."""
    height, width = weight.shape[-2], weight.shape[-1]
    source = _grouped(padded, weight.shape[1])
    wide = torch.float64 if padded.dtype == torch.float64 else torch.float32
    total = torch.zeros_like(padded[..., :height, :width], dtype=wide)
    out = _grouped(total, weight.shape[1])
    for place in range(kernel_size * kernel_size):  # TorchScript's ** yields a float
        top = place // kernel_size * dilation
        left = place % kernel_size * dilation
        shifted = source[..., top:top + height, left:left + width]
        out.addcmul_(shifted, weight[:, None, :, place])
    return total.to(padded.dtype)


def _window_sum(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Product of a strided view and the weights, summed over the window: the compiler makes one loop of it."""
    wide = torch.float64 if padded.dtype == torch.float64 else torch.float32
    # Widened before the windows are taken, so that their gradients are summed in float32 as well.
    source = _grouped(padded.to(wide), weight.shape[1])
    factors = weight.unflatten(2, (kernel_size, kernel_size))[:, None]
    return (windows(source, kernel_size, dilation) * factors).sum((-4, -3)).to(padded.dtype).flatten(1, 2)


class _ShiftedSum(torch.autograd.Function):
    """`_shifted_sum` with a backward pass that needs only its two inputs.

    Autograd through the loop would keep K * K slices alive and write the gradient of the padded map once per place.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
        return _shifted_sum(padded, weight, kernel_size, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        padded, weight, ctx.kernel_size, ctx.dilation = inputs
        ctx.save_for_backward(padded, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        groups = weight.shape[1]
        height, width = weight.shape[-2:]
        wide = torch.float64 if padded.dtype == torch.float64 else torch.float32
        grad = _grouped(grads[0], groups)
        source = _grouped(padded, groups)
        grad_padded = torch.zeros_like(padded, dtype=wide)
        target = _grouped(grad_padded, groups)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for place in range(ctx.kernel_size ** 2):
            top = place // ctx.kernel_size * ctx.dilation
            left = place % ctx.kernel_size * ctx.dilation
            window = (..., slice(top, top + height), slice(left, left + width))
            if ctx.needs_input_grad[0]:
                target[window].addcmul_(grad, weight[:, None, :, place])
            if grad_weight is not None:
                grad_weight[:, :, place] = (grad * source[window]).sum(1, dtype=wide)
        return (
            grad_padded.to(padded.dtype) if ctx.needs_input_grad[0] else None,
            grad_weight,
            None,
            None,
        )
