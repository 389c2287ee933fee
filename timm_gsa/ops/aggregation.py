"""Neighbourhood aggregation: the weighted sum over K x K neighbours that both kinds of SAN attention end in.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, equations 2 and 4.
"""
from typing import Any

import torch
import torch.nn.functional as F

from ._autograd import differentiable_gradients
from ._innermost import buffered, weighted_sum
from ._paths import is_exporting, is_known_to_hold, records_gradients, triton_serves
from .neighbourhood import joined_reflect_pad, reflect_pad, same_padding, windows

__all__ = ['aggregation', 'aggregation_reference']


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
    weight = weight.to(value.dtype)
    if not torch.jit.is_scripting():
        if not torch.jit.is_tracing() and not is_exporting():
            compiling = torch.compiler.is_compiling()
            if records_gradients(value, weight):
                shifted_sum = _compiled_shifted_sum if compiling else _ShiftedSum.apply
                return shifted_sum(reflect_pad(value, padding), weight, kernel_size, dilation)
            if compiling:
                return _fused_sum(value, weight, kernel_size, dilation)
    return _shifted_sum(reflect_pad(value, padding), weight, kernel_size, dilation)


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
    weight = weight.to(value.dtype)
    return torch.einsum('bsgkhw,bgkhw->bsghw', neighbours, weight).reshape(batch, channels, height, width)


def _triton_serves(value: torch.Tensor, weight: torch.Tensor, padding: int) -> bool:
    """Whether Triton kernels compute it, which reflect plainly."""
    return triton_serves(value, weight) and padding < min(value.shape[-2], value.shape[-1])


@torch.jit.unused
def _by_triton(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    from ._aggregation_triton import fused_aggregation  # imports Triton

    return fused_aggregation(value, weight, kernel_size, dilation)


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


def _fused_sum(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """The sum in the form that a compiler makes the fastest code of; not for training.

    For gradients it would keep all K * K shifted values.
    """
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    height, width = value.shape[-2:]
    padding = same_padding(kernel_size, dilation)
    square = kernel_size, kernel_size
    on_cpu = value.device.type == 'cpu'
    short, long = on_cpu and is_known_to_hold(width < 16), on_cpu and is_known_to_hold(width >= 16)
    if short or long:
        channels_last, groups_last = value.stride(1) == 1, weight.stride(1) == 1
        if short or channels_last or groups_last:
            rows = weight.unflatten(2, square).permute(2, 0, 4, 5, 3, 1).to(wide).unbind()
            out = weighted_sum(
                value.to(wide), list(rows if groups_last else buffered(*rows)), kernel_size, dilation).to(value.dtype)
            return out if channels_last else out.contiguous()
    if long and padding > 0 and padding < height and padding < width:
        padded = joined_reflect_pad(_grouped(value.to(wide), weight.shape[1]), padding, (-2, -1))
        shifted = padded.unfold(-2, height, dilation).unfold(-2, width, dilation)
    else:
        shifted = windows(_grouped(reflect_pad(value, padding).to(wide), weight.shape[1]), kernel_size, dilation)
    factors = weight.unflatten(2, square)[:, None]
    return (shifted * factors).sum((-4, -3)).to(value.dtype).flatten(1, 2)


def _shifted_gradients(
        grad: torch.Tensor,
        padded: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
        needed: tuple[bool, bool] = (True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `_shifted_sum` to its two tensors, those that are needed, from that of its result.

    Autograd through the loop would keep K * K slices alive and write the gradient of the padded map once per place.
    """
    groups = weight.shape[1]
    height, width = weight.shape[-2:]
    wide = torch.float64 if padded.dtype == torch.float64 else torch.float32
    grad = _grouped(grad, groups)
    source = _grouped(padded, groups)
    grad_padded = torch.zeros_like(padded, dtype=wide)
    target = _grouped(grad_padded, groups)
    grad_weight = torch.empty_like(weight) if needed[1] else None
    for place in range(kernel_size ** 2):
        top = place // kernel_size * dilation
        left = place % kernel_size * dilation
        window = (..., slice(top, top + height), slice(left, left + width))
        if needed[0]:
            target[window].addcmul_(grad, weight[:, None, :, place])
        if grad_weight is not None:
            grad_weight[:, :, place] = (grad * source[window]).sum(1, dtype=wide)
    return grad_padded.to(padded.dtype) if needed[0] else None, grad_weight


class _ShiftedSum(torch.autograd.Function):
    """`_shifted_sum` with a backward pass that needs only its two inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
        return _shifted_sum(padded, weight, kernel_size, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        return *_shifted_gradients(grads[0], padded, weight, ctx.kernel_size, ctx.dilation, needed), None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    padded, weight, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(padded, weight)


@torch.library.custom_op('timm_gsa::shifted_sum', mutates_args=())
def _compiled_shifted_sum(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """`_ShiftedSum` as an operator: a compiler would make one large kernel of each of its K * K steps."""
    return _shifted_sum(padded, weight, kernel_size, dilation)


@_compiled_shifted_sum.register_fake
def _like_map(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    return torch.empty_like(padded[..., :weight.shape[-2], :weight.shape[-1]])


@torch.library.custom_op('timm_gsa::shifted_sum_backward', mutates_args=())
def _compiled_shifted_gradients(
        grad: torch.Tensor,
        padded: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_padded, grad_weight = _shifted_gradients(grad, padded, weight, kernel_size, dilation)
    assert grad_padded is not None and grad_weight is not None
    return grad_padded, grad_weight


@_compiled_shifted_gradients.register_fake
def _like_inputs(
        grad: torch.Tensor,
        padded: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(padded), torch.empty_like(weight)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # for gradients of gradients
        return differentiable_gradients(_shifted_sum, ctx.saved_tensors, grad, ctx.kernel_size, ctx.dilation)
    return *_compiled_shifted_gradients(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.dilation), None, None


_compiled_shifted_sum.register_autograd(_gradients, setup_context=_keep)
