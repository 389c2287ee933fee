"""SAN's operations by plain operators of torch, for any device, transform, exporter and tracer.

Only the sum over neighbours is an operator of its own, outside tracers and transforms: its loop over places would add
K * K steps to the graph of autograd, each of which writes a gradient of the whole map.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import _autograd
from .._backend import why_not_plain_tensors, wide_type
from .neighbourhood import neighbourhood, reflect_pad, same_padding, windows

__all__ = [
    'aggregation',
    'coordinates',
    'difference_moments',
    'difference_network',
    'grouped',
    'moments_from_sums',
    'network_flops',
    'normed_difference_network',
    'on_differences',
    'on_patches',
    'patch',
    'patch_flops',
    'patch_moments',
    'patch_network',
    'subtraction',
    'window_sums',
]


def subtraction(query: torch.Tensor, key: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """Difference of each position's query and the keys of its K x K neighbours.

    delta(x_i, x_j) = query(x_i) - key(x_j)    (the paper's "subtraction" relation)

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, C, K * K, H, W), places in row-major order.
    """
    relation = query[:, :, None, None] - neighbourhood(key, kernel_size, dilation)
    return relation.flatten(2, 3)


def patch(key: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """The K x K neighbours of each position, laid out along the channels.

    Args:
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, C * K * K, H, W); channel c * K * K + k holds channel c at place k (row-major).
    """
    return neighbourhood(key, kernel_size, dilation).flatten(1, 3)


def coordinates(height: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Horizontal and vertical coordinates of a map, each running from -1 to 1 over the pixel centres.

    Built in at least float32 whatever the dtype of the features, because neighbouring coordinates of a large map
    are not apart in half precision. An axis of one pixel has the coordinate -1, as the authors' code.

    Returns:
        Tensor of shape (1, 2, H, W); channel 0 varies along the width, channel 1 along the height.
    """
    dtype = wide_type(dtype)
    # Not torch.linspace, which ties an exported or compiled program to one size.
    rows = torch.arange(height, device=device, dtype=dtype) * 2 / max(height - 1, 1) - 1
    columns = torch.arange(width, device=device, dtype=dtype) * 2 / max(width - 1, 1) - 1
    return torch.stack([columns[None, :].expand(height, width), rows[:, None].expand(height, width)]).unsqueeze(0)


# The sum over neighbours.

_MANY_GROUPS = 32


def aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """One multiply-add over the whole map for each of the K * K places; nothing is materialised."""
    padded = reflect_pad(value, same_padding(kernel_size, dilation))
    weight = weight.to(value.dtype)
    if not torch.jit.is_scripting():
        if why_not_plain_tensors(padded, weight) is None:
            return _shifted_sum(padded, weight, kernel_size, dilation)
    return _sum_over_places(padded, weight, kernel_size, dilation)


def grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View of (B, C, ...) as (B, C / G, G, ...): channels that share a weight lie along one axis."""
    return x.unflatten(1, (x.shape[1] // groups, groups))


def _sum_over_places(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """The sum without operations in place, which transforms do not support."""
    height, width = weight.shape[-2], weight.shape[-1]
    wide = wide_type(padded.dtype)
    source = grouped(padded, weight.shape[1])
    out = torch.zeros_like(source[..., :height, :width], dtype=wide)
    for place in range(kernel_size * kernel_size):  # TorchScript's ** yields a float
        top = place // kernel_size * dilation
        left = place % kernel_size * dilation
        out = torch.addcmul(out, source[..., top:top + height, left:left + width], weight[:, None, :, place])
    return out.flatten(1, 2).to(padded.dtype)


def _sum_in_place(padded: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    height, width = weight.shape[-2:]
    pattern = padded[..., :height, :width]
    padded, weight = _laid_out(padded, weight)
    source = grouped(padded, weight.shape[1])
    total = torch.zeros_like(padded[..., :height, :width], dtype=wide_type(padded.dtype))
    out = grouped(total, weight.shape[1])
    for place in range(kernel_size ** 2):
        window = _window(place, kernel_size, dilation, height, width)
        out.addcmul_(source[window], weight[:, None, :, place])
    return _autograd.like(total, pattern)


def _laid_out(padded: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """All of them with positions innermost, or with channels where padded and weight have them so and groups are many.

    The loops over places are slow on tensors whose layouts differ, and along few groups.
    """
    if padded.stride(1) == weight.stride(1) == 1 and weight.shape[1] >= _MANY_GROUPS:
        return [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (padded, weight, *others)]
    return [x.contiguous() for x in (padded, weight, *others)]


def _window(place: int, kernel_size: int, dilation: int, height: int, width: int) -> tuple[Any, ...]:
    """Index of the neighbours of all positions at one place."""
    top, left = place // kernel_size * dilation, place % kernel_size * dilation
    return (..., slice(top, top + height), slice(left, left + width))


def _sum_backward(
        grad: torch.Tensor,
        padded: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
        for_value: bool,
        for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of padded values and weights; one that is not needed has no elements."""
    groups = weight.shape[1]
    height, width = weight.shape[-2:]
    inputs = padded, weight
    padded, weight, grad = _laid_out(padded, weight, grad)
    wide = wide_type(padded.dtype)
    grad, source = grouped(grad, groups), grouped(padded, groups)
    grad_padded = torch.zeros_like(padded, dtype=wide) if for_value else padded.new_empty(0)
    grad_weight = torch.empty_like(weight) if for_weight else weight.new_empty(0)
    for place in range(kernel_size ** 2):
        window = _window(place, kernel_size, dilation, height, width)
        if for_value:
            grouped(grad_padded, groups)[window].addcmul_(grad, weight[:, None, :, place])
        if for_weight:
            grad_weight[:, :, place] = (grad * source[window]).sum(1, dtype=wide)
    return (
        _autograd.like(grad_padded, inputs[0]) if for_value else grad_padded,
        _autograd.like(grad_weight, inputs[1]) if for_weight else grad_weight,
    )


def _sum_flops(padded: Any, weight: Any, *_: Any, products: int = 1, **__: Any) -> int:
    """A multiply-add for each channel, place and position; two in the backward pass."""
    _, _, places, height, width = weight
    return 2 * products * padded[0] * padded[1] * places * height * width


def _like_sum_inputs(
        grad: torch.Tensor,
        padded: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
        for_value: bool,
        for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(padded) if for_value else padded.new_empty(0),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
    )


_shifted_sum = _autograd.operator(
    'shifted_sum', _sum_in_place,
    lambda padded, weight, kernel_size, dilation: torch.empty_like(
        padded[..., :weight.shape[-2], :weight.shape[-1]]),
    _sum_flops, 'CompositeExplicitAutograd')
_shifted_sum_backward = _autograd.operator(
    'shifted_sum_backward', _sum_backward, _like_sum_inputs,
    lambda grad, padded, weight, kernel_size, dilation, for_value, for_weight, **more: _sum_flops(
        padded, weight, products=for_value + for_weight),
    'CompositeExplicitAutograd')


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.window = inputs[2:]


def _gradients_of_sum(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        return _autograd.differentiable_gradients(_sum_over_places, ctx.saved_tensors, grad, *ctx.window)
    needed = ctx.needs_input_grad[:2]
    grads = _shifted_sum_backward(grad, *ctx.saved_tensors, *ctx.window, *needed)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), None, None


_autograd.register('shifted_sum', _gradients_of_sum, _keep_sum)


# The networks between relations and weights.


def difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`difference_network` on all differences at once."""
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    return on_differences(
        query, padded, weight1, torch.ones_like(bias1), bias1, weight2, bias2, None, kernel_size, dilation)[0]


def normed_difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`normed_difference_network` on all differences at once."""
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    return on_differences(query, padded, weight1, scale, shift, weight2, bias2, eps, kernel_size, dilation)


def on_differences(
        query: torch.Tensor,
        padded: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        eps: float | None,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits in the dtype of weight2, mean and variance; a factor and a summand in place of the norm if `eps` is None.

    `padded` holds the keys behind `reflect_pad`.
    """
    dtype, wide = weight2.dtype, wide_type(query.dtype)
    query, padded, weight1, scale, shift, weight2, bias2 = (
        x.to(wide) for x in (query, padded, weight1, scale, shift, weight2, bias2))
    relation = (query[:, :, None, None] - windows(padded, kernel_size, dilation)).flatten(2, 3).relu()
    hidden = torch.einsum('mc,bckhw->bmkhw', weight1, relation)
    variance, mean = torch.var_mean(hidden.detach(), (0, 2, 3, 4), correction=0)
    if eps is None:
        hidden = hidden * scale[:, None, None, None] + shift[:, None, None, None]
    else:
        hidden = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=eps)
    logits = torch.einsum('gm,bmkhw->bgkhw', weight2, hidden.relu()) + bias2[:, None, None, None]
    return logits.to(dtype), mean.double(), variance.double()


def patch_network(
        key: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`patch_network` on all patches at once."""
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    return on_patches(padded, scale, shift, weight, kernel_size, dilation)


def on_patches(
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`patch_network` of keys behind `reflect_pad`, in their dtype."""
    dtype, wide = padded.dtype, wide_type(padded.dtype)
    padded, scale, shift, weight = (x.to(wide) for x in (padded, scale, shift, weight))
    keys = windows(padded, kernel_size, dilation).flatten(1, 3)
    keys = (keys * scale[:, None, None] + shift[:, None, None]).relu()
    return torch.einsum('mc,bchw->bmhw', weight, keys).to(dtype)


def network_flops(query: Any, weight1: Any, weight2: Any, kernel_size: int, products: int = 1) -> int:
    """The two linear maps of every pair; gradients take them anew, and two products for each."""
    batch, channels, height, width = query
    pairs = batch * height * width * kernel_size ** 2
    return 2 * products * pairs * weight1[0] * (channels + weight2[0])


def patch_flops(out: tuple[int, int, int], weight: Any, products: int = 1) -> int:
    """The linear map of each of (batch, height, width) positions."""
    batch, height, width = out
    return 2 * products * batch * height * width * weight[0] * weight[1]


# Moments of relations, which batch norms need of them.


def difference_moments(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`difference_moments` from sums over windows."""
    return moments_from_sums(query, key, window_sums, kernel_size, dilation)


def moments_from_sums(
        query: torch.Tensor,
        key: torch.Tensor,
        sums: Callable[..., torch.Tensor],
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`difference_moments` from `window_sums`, which are computed by `sums`."""
    centre = key.detach().mean((0, 2, 3), keepdim=True)
    query, key = (query - centre).double(), (key - centre).double()
    first, second = sums(torch.cat([key, key.square()], dim=1), kernel_size, dilation).chunk(2, dim=1)
    places = kernel_size ** 2
    mean = (query - first / places).mean((0, 2, 3))
    square = (query.square() - 2 / places * query * first + second / places).mean((0, 2, 3))
    return mean, square - mean.square()


def window_sums(x: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Sums of a map's neighbourhoods, (B, C, H, W)."""
    height, width = x.shape[-2:]
    x = reflect_pad(x, same_padding(kernel_size, dilation))
    offsets = range(0, kernel_size * dilation, dilation)
    x = torch.stack([x[..., top:top + height, :] for top in offsets]).sum(0)
    return torch.stack([x[..., left:left + width] for left in offsets]).sum(0)


def patch_moments(key: torch.Tensor, kernel_size: int, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`patch_moments` from sums over windows."""
    batch, channels, height, width = key.shape
    centre = key.detach().mean((0, 2, 3), keepdim=True)
    padded = reflect_pad((key - centre).double(), same_padding(kernel_size, dilation))
    both = torch.stack([padded.sum(0), padded.square().sum(0)])
    offsets = range(0, kernel_size * dilation, dilation)
    sums = torch.stack([both[..., top:top + height, :].sum(-2) for top in offsets], -2)
    sums = torch.stack([sums[..., left:left + width].sum(-1) for left in offsets], -1)
    mean, square = sums / (batch * height * width)
    return (mean + centre.view(-1, 1, 1)).flatten(), (square - mean.square()).flatten()
