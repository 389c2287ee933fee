"""SAN's attention from query, key and value to the sum with channels innermost in memory, for inference on a CPU.

The neighbours in a row then lie side by side in memory, and every loop runs along them. In eager mode this is faster on
small maps, whose rows are short; compiled code is faster on maps of any size. Where the two need different forms, both
are here.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, equations 2 and 4.
"""
from typing import Any

import torch

from .. import _autograd
from .._backend import is_compiling
from .neighbourhood import joined_reflect_pad, reflect_pad, same_padding
from .plain import network_flops, patch_flops

__all__ = ['buffered', 'difference_attention', 'patch_attention', 'weighted_sum']


def _difference_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_query: torch.Tensor,
        position_key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`aggregation` by the softmax over the places of what `difference_network` gives; not differentiable.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        value: Map of shape (B, D, H, W), D a multiple of G.
        position_query: Further channels of all images' queries, (1, P, H, W).
        position_key: Further channels of all images' keys, (1, P, H, W).
        weight1: Matrix of shape (M, C + P).
        bias1: Vector of shape (M,).
        weight2: Matrix of shape (G, M). There is no second bias: the softmax cancels it.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, D, H, W), channels innermost in memory.
    """
    channels, window = query.shape[1], (kernel_size, dilation)
    weight1, position_weight = weight1.split([channels, weight1.shape[1] - channels], dim=1)
    centre = position_query.movedim(1, -1).unsqueeze(-2)
    offsets = torch.stack([(centre - keys).relu() for keys in _rows(position_key, *window)])
    offsets = offsets @ position_weight.t() + bias1
    query = query.movedim(1, -1).contiguous().unsqueeze(-2)
    # One copy for each row: Inductor would fuse kernels that read the same buffer, and fill all rows' buffers at once.
    queries = torch.stack([query] * kernel_size) if is_compiling() else [query] * kernel_size
    logits = []
    for centre, keys, offset in zip(queries, _rows(key, *window), offsets, strict=True):
        relation = (centre - keys).relu_()
        hidden = (relation @ weight1.t()).add_(offset).relu_()
        logits.append(hidden @ weight2.t())
    highest = logits[0].amax(-2, keepdim=True)
    for each in logits[1:]:
        highest = torch.maximum(highest, each.amax(-2, keepdim=True))
    weights = [each.sub_(highest).exp_() for each in logits]
    share = 1 / sum(each.sum(-2, keepdim=True) for each in weights)
    return weighted_sum(value, [each.mul_(share) for each in weights], *window)


def _patch_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`aggregation` by weight2 relu(weight1 relu(scale * relation + shift) + bias1) + bias2; not differentiable.

    The channels of the relation are those of the query, then those of `patch`.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        value: Map of shape (B, D, H, W), D a multiple of G.
        scale: Factors of shape (C + C * K * K,).
        shift: Summands, laid out as `scale`.
        weight1: Matrix of shape (M, C + C * K * K).
        bias1: Vector of shape (M,).
        weight2: Matrix of shape (G * K * K, M), places of a group one after another in row-major order.
        bias2: Summands, laid out as the rows of `weight2`.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, D, H, W), channels innermost in memory.
    """
    channels, window, places = query.shape[1], (kernel_size, dilation), (kernel_size, kernel_size)
    centre = torch.addcmul(shift[:channels], query.movedim(1, -1), scale[:channels]).relu_()
    hidden = centre @ weight1[:, :channels].t() + bias1
    # Places before channels, as the rows of keys have them.
    scale, shift = buffered(*(x[channels:].unflatten(0, (-1, *places)).movedim(0, -1) for x in (scale, shift)))
    weight1 = weight1[:, channels:].unflatten(1, (-1, *places)).permute(2, 3, 1, 0)
    for row, keys in enumerate(_rows(key, *window)):
        relation = torch.addcmul(shift[row], keys, scale[row]).relu_()
        hidden += relation.flatten(-2) @ weight1[row].flatten(0, 1)
    # The bias as one more column: added after the product, it would be copied to the size of the weights first.
    hidden = torch.cat([hidden.relu_(), hidden.new_ones(1).expand(*hidden.shape[:-1], 1)], dim=-1)
    weight2 = torch.cat([weight2, bias2[:, None]], dim=1).unflatten(0, (-1, *places)).permute(1, 3, 2, 0)
    weights = [(hidden @ matrix.flatten(1)).unflatten(-1, (kernel_size, -1)) for matrix in weight2]
    return weighted_sum(value, weights, *window)


# Operators, for their FLOP formulas. A compiler sees the functions instead.


def _like_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return value.new_empty(value.shape[0], *value.shape[2:], value.shape[1]).permute(0, 3, 1, 2)


def _sum_flops(value: Any, kernel_size: int) -> int:
    batch, channels, height, width = value
    return 2 * batch * channels * height * width * kernel_size ** 2


def _difference_flops(query: Any, key: Any, value: Any, *more: Any, **_: Any) -> int:
    weight1, weight2, kernel_size = more[2], more[4], more[5]
    network = network_flops((query[0], weight1[1], *query[2:]), weight1, weight2, kernel_size)
    return network + _sum_flops(value, kernel_size)


def _patch_flops(query: Any, key: Any, value: Any, *more: Any, **_: Any) -> int:
    weight1, weight2, kernel_size = more[2], more[4], more[6]
    positions = query[0], *query[2:]
    return patch_flops(positions, weight1) + patch_flops(positions, weight2) + _sum_flops(value, kernel_size)


_difference_operator = _autograd.operator(
    'difference_attention', _difference_attention, _like_value, _difference_flops)
_patch_operator = _autograd.operator('patch_attention', _patch_attention, _like_value, _patch_flops)


def difference_attention(*args: Any) -> torch.Tensor:
    """`_difference_attention`, as one operator in eager mode."""
    return _difference_attention(*args) if is_compiling() else _difference_operator(*args)


def patch_attention(*args: Any) -> torch.Tensor:
    """`_patch_attention`, as one operator in eager mode."""
    return _patch_attention(*args) if is_compiling() else _patch_operator(*args)


def buffered(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of one shape through one buffer: a compiler would compute them anew in every kernel that reads them."""
    return torch.stack(tensors).unbind()


def weighted_sum(value: torch.Tensor, weights: list[torch.Tensor], kernel_size: int, dilation: int) -> torch.Tensor:
    """`aggregation` by a (B, H, W, K, G) of weights for each row."""
    batch, channels, height, width = value.shape
    groups = weights[0].shape[-1]
    out = value.new_zeros(batch, height, width, channels // groups, groups)
    for values, weight in zip(_rows(value, kernel_size, dilation), weights, strict=True):
        grouped = values.unflatten(-1, (-1, groups))
        if is_compiling():
            out = out + (grouped * weight.unsqueeze(-2)).sum(-3)
        else:
            for place in range(kernel_size):
                out.addcmul_(grouped[..., place, :, :], weight[..., place, None, :])
    return out.flatten(-2).movedim(-1, 1)


def _rows(x: torch.Tensor, kernel_size: int, dilation: int) -> list[torch.Tensor]:
    """The neighbours of every position, (B, H, W, K, C) for each row of the neighbourhood."""
    height = x.shape[-2]
    padded = _padded(x, same_padding(kernel_size, dilation))
    span = dilation * (kernel_size - 1) + 1
    windows = padded.unfold(2, span, 1)[..., ::dilation].transpose(-2, -1)
    return [windows[:, top:top + height] for top in range(0, span, dilation)]


def _padded(x: torch.Tensor, padding: int) -> torch.Tensor:
    """`reflect_pad` of (B, C, H, W), as (B, H + 2 * padding, W + 2 * padding, C)."""
    height, width = x.shape[-2:]
    if not 0 < padding < min(height, width):
        return reflect_pad(x, padding).movedim(1, -1).contiguous()
    return joined_reflect_pad(x.movedim(1, -1), padding, (1, 2))
