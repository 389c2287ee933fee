"""GSA's operations on a GPU: operators whose kernels, forward and backward, are in triton_attention.py."""
from typing import Any

import torch
import torch.nn.functional as F

from .. import _autograd
from .._backend import records_gradients, why_not_triton
from .._kernels import guarded, why_no_products
from . import plain
from .cpu import column_flops, layer_arguments, why_not_whole
from .query_norm import normalise_query

__all__ = [
    'column_attention',
    'content_and_row_attention',
    'content_attention',
    'global_attention',
    'layer',
    'why_not_attention',
    'why_not_global_attention',
    'why_not_layer',
]

_like = _autograd.like


def why_not_attention(*tensors: torch.Tensor) -> str | None:
    """Why the kernels cannot compute on maps of heads (B, heads, d, H, W) of one dtype, and a table.

    The table may have another dtype than the maps, as a float32 parameter under autocast has. Its gradient is then as
    precise as the table.
    """
    maps = [x for x in tensors if x.dim() == 5]
    query, value = maps[0], maps[-1]
    reason = why_not_triton('gsa', *tensors, widest=max(query.shape[2], value.shape[2]))
    if reason is not None:
        return reason
    if any(x.dtype != query.dtype for x in maps):
        return 'maps of several dtypes'
    if len(maps) > 2 and any(x.shape != query.shape for x in maps):  # content: a square context for each head
        return 'maps of several shapes'
    return why_no_products(query.dtype, query.device) or why_no_products(tensors[-1].dtype, query.device)


def column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return _column_attention(query, value, table)


def content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _content_attention(query, key, value)


def content_and_row_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    return _content_and_row_attention(query, key, value, column, table)


@guarded(plain.column_attention)
def _attend(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    from . import triton_attention  # imports Triton

    return triton_attention.attend(query, value, table)


@guarded(_autograd.plain_gradients(plain.column_attention))
def _attend_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import triton_attention

    grads = triton_attention.attend_backward(grad, query, value, table)
    return _like(grads[0], query), _like(grads[1], value), _like(grads[2], table)


@guarded(plain.content_attention)
def _content(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from . import triton_attention

    return triton_attention.content(query, key, value)


@guarded(_autograd.plain_gradients(plain.content_attention))
def _content_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import triton_attention

    return triton_attention.content_backward(grad, query, key, value)


@guarded(plain.content_and_row_attention)
def _gather(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    from . import triton_attention

    return _like(triton_attention.gather(query, key, value, column, table), value)


@guarded(_autograd.plain_gradients(plain.content_and_row_attention))
def _gather_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import triton_attention

    grads = triton_attention.gather_backward(grad, query, key, value, column, table)
    return (
        _like(grads[0], query), _like(grads[1], key), _like(grads[2], value), _like(grads[3], column),
        _like(grads[4], table))


def _content_flops(query: Any, key: Any, value: Any, *_: Any, products: int = 2, **__: Any) -> int:
    """Two products for the context and what is read from it; five in the backward pass."""
    batch, heads, depth, height, width = key
    return 2 * products * batch * heads * height * width * depth * value[2]


def _gather_flops(query: Any, key: Any, value: Any, column: Any, *_: Any, products: int = 2, **__: Any) -> int:
    across = (*query[:3], query[4], query[3])
    return _content_flops(query, key, value, products=products) + column_flops(across, column, products=products)


def _inputs(grad: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.empty_like, tensors))


_column_attention = _autograd.operator(
    'triton_column_attention', _attend, lambda query, value, table: torch.empty_like(value), column_flops, 'CUDA')
_column_attention_backward = _autograd.operator(
    'triton_column_attention_backward', _attend_backward, _inputs,
    lambda grad, *shapes, **more: column_flops(*shapes, products=5, **more), 'CUDA')
_autograd.gradients('triton_column_attention', 3, _column_attention_backward, plain.column_attention)

_content_attention = _autograd.operator(
    'triton_content_attention', _content, lambda query, key, value: torch.empty_like(value), _content_flops, 'CUDA')
_content_attention_backward = _autograd.operator(
    'triton_content_attention_backward', _content_backward, _inputs,
    lambda grad, *shapes, **more: _content_flops(*shapes, products=5, **more), 'CUDA')
_autograd.gradients('triton_content_attention', 3, _content_attention_backward, plain.content_attention)

_content_and_row_attention = _autograd.operator(
    'triton_content_and_row_attention', _gather,
    lambda query, key, value, column, table: torch.empty_like(value), _gather_flops, 'CUDA')
_content_and_row_attention_backward = _autograd.operator(
    'triton_content_and_row_attention_backward', _gather_backward, _inputs,
    lambda grad, *shapes, **more: _gather_flops(*shapes, products=5, **more), 'CUDA')
_autograd.gradients(
    'triton_content_and_row_attention', 5, _content_and_row_attention_backward, plain.content_and_row_attention)


# The whole layer in inference.


def why_not_layer(layer: Any, x: torch.Tensor) -> str | None:
    tensors = x, *layer.parameters()
    if records_gradients(*tensors):
        return 'gradients are recorded'
    return _why_not_global(x, layer.head_dim, tensors) or why_not_whole(layer)


def layer(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`GlobalSelfAttention` by three kernels behind the projection, the norm folded into them."""
    return global_attention(*layer_arguments(layer, x))


def why_not_global_attention(x: torch.Tensor, *more: Any) -> str | None:
    tensors = [each for each in (x, *more) if isinstance(each, torch.Tensor)]
    if records_gradients(*tensors):
        return 'gradients are recorded'
    return _why_not_global(x, more[2].shape[1], tensors)


def _why_not_global(x: torch.Tensor, depth: int, tensors: Any) -> str | None:
    return why_not_triton('gsa', *tensors, widest=depth) or why_no_products(x.dtype, x.device)


def global_attention(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        stride: int,
        query_norm: str | None,
) -> torch.Tensor:
    """`timm_gsa.ops.global_attention` by three kernels behind the projection."""
    query, key, value = F.conv2d(x, weight[:, :, None, None], bias).unflatten(1, (3, -1, table_h.shape[1])).unbind(1)
    query = normalise_query(query, query_norm)
    out = _attend_fused(query, key, value, table_h, table_w, scale, shift).reshape(x.shape)
    return plain.halve(out) if stride == 2 else out


def _fused_by_parts(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """The same by plain operators."""
    heads = (*value.shape[1:3], 1, 1)
    column = plain.column_attention(query, value, table_h) * scale.view(heads) + shift.view(heads)
    return _like(plain.content_and_row_attention(query, key, value, column.to(value.dtype), table_w), value)


@guarded(_fused_by_parts)
def _fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """All that follows the projection, with the norm in the column step and the content in the row step."""
    from . import triton_attention

    return _like(triton_attention.fused(query, key, value, table_h, table_w, scale, shift), value)


def _fused_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _gather_flops(query, key, value, value) + column_flops(query, value)


_attend_fused = _autograd.operator(
    'triton_global_attention', _fused, lambda query, key, value, *more: torch.empty_like(value), _fused_flops, 'CUDA')

for _name, _function in (
        ('column_attention', _attend),
        ('column_attention_backward', _attend_backward),
        ('content_attention', _content),
        ('content_attention_backward', _content_backward),
        ('content_and_row_attention', _gather),
        ('content_and_row_attention_backward', _gather_backward),
        ('global_attention', _fused),
):
    _autograd.implement(f'triton_{_name}', _function, 'CPU')  # in Triton's interpreter
