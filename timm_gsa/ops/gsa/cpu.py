"""GSA's operations on a CPU: attention along one axis in blocks of logits that stay in the cache.

The columns of all heads and images of a block form one axis of length n. Attention along the rows of a map is attention
along the columns of its transpose.
"""
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import _autograd
from .._backend import (
    affine_of,
    chooses_by_speed,
    is_compiling,
    records_gradients,
    statically_true,
    why_not_cpu,
    why_not_pristine,
)
from . import plain
from .query_norm import normalise_query

__all__ = [
    'column_attention',
    'content_and_row_attention',
    'content_attention',
    'global_attention',
    'halve',
    'layer',
    'why_not_column_attention',
    'why_not_content_and_row_attention',
    'why_not_content_attention',
    'why_not_global_attention',
    'why_not_halve',
    'why_not_layer',
]

# Logits that a core computes at once: few enough for its cache, and enough for matrix products.
_BLOCK = 2 ** 18

# Channels of a head below which a norm over them is faster with positions innermost.
_FEW = 16

# Logits of a map and head from which on recomputing them in the backward pass beats storing them.
_MANY = 2 ** 14


def why_not_column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> str | None:
    reason = why_not_cpu(query, value, table)
    height, width = query.shape[-2:]
    if reason is None and not is_compiling() and height * height * width < _MANY and chooses_by_speed():
        return 'the map is small: its logits fit into the cache'
    return reason


def column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`column_attention` in blocks of logits, which the backward pass computes anew."""
    return _column_attention(query, value, table)


def why_not_content_and_row_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> str | None:
    return why_not_cpu(query, key, value, column, table)


def content_and_row_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    """Content attention, and the row step in blocks of logits where that is faster."""
    transposed = query.mT, column.mT, table
    rows = _column_attention if why_not_column_attention(*transposed) is None else plain.column_attention
    return _content_attention(query, key, value) + rows(*transposed).mT


# Content attention.


def why_not_content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    return why_not_cpu(query, key, value)


def content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`content_attention` that keeps neither weights nor copies of slices of a projection for the backward pass."""
    return _content_attention(query, key, value)


def _empty_content(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if query.shape[3:] == value.shape[3:]:
        return torch.empty_like(value)
    return value.new_empty(*value.shape[:3], *query.shape[3:])


def _content_blocks(key: torch.Tensor) -> list[slice]:
    """Images whose keys are as many numbers as the logits of a block; at least one."""
    images = max(1, _block() // max(1, key[:1].numel()))
    return [slice(first, first + images) for first in range(0, len(key), images)]


def _gather_content(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out = _empty_content(query, key, value)
    for images in _content_blocks(key):
        out[images] = plain.content_attention(query[images], key[images], value[images])
    return out


def _gather_content_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for images in _content_blocks(key):
        g, q, v = (x[images].flatten(3) for x in (grad, query, value))
        weight = plain.normalised_key(key[images])
        rounded = weight.to(v.dtype)
        grad_context = g @ q.mT
        grad_weight = (grad_context.mT @ v).to(weight.dtype).mul_(weight)
        grad_key = grad_weight - weight * grad_weight.sum(-1, keepdim=True)
        computed = (v @ rounded.mT).mT @ g, grad_key, grad_context @ rounded
        for out, each in zip(grads, computed, strict=True):
            out[images] = each.view(out[images].shape)
    return grads


def content_flops(query: Any, key: Any, value: Any, *, backward: bool = False, **_: Any) -> int:
    """The contexts of the heads and their products with the queries; five products in the backward pass."""
    batch, heads, depth, *sides = query
    per_position = 2 * batch * heads * depth * value[2]
    queries, keys = sides[0] * sides[1], key[3] * key[4]
    return per_position * (2 * queries + 3 * keys if backward else queries + keys)


_content_attention = _autograd.operator('content_attention', _gather_content, _empty_content, content_flops)
_content_attention_backward = _autograd.operator(
    'content_attention_backward',
    _gather_content_backward,
    lambda grad, *tensors: tuple(map(torch.empty_like, tensors)),
    lambda grad, *shapes, **more: content_flops(*shapes, backward=True, **more),
)
_autograd.gradients('content_attention', 3, _content_attention_backward, plain.content_attention)


# Attention along the columns.


def _gather_columns(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    batch, heads, _, height, width = query.shape
    embedding = _unfold(table, height)
    out = torch.empty_like(value)
    if batch == 0:
        return out
    blocks = _image_blocks(batch, heads, height, width)
    queries = query.new_empty(query[blocks[0]].numel())
    values, result = value.new_empty(2, value[blocks[0]].numel())
    workspace = _workspace(query, blocks[0].stop * heads * width, height)
    for images in blocks:
        rows, columns = _by_rows(query[images], queries), _by_columns(value[images], values)
        _from_columns(_gather(rows, embedding, columns, result, workspace), out[images])
    return out


def _gather_columns_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, depth, length, width = query.shape
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    if batch == 0:
        return grad_query, grad_value, torch.zeros_like(table)
    embedding = _unfold(table, length)
    grad_embedding = torch.zeros_like(embedding)
    blocks = _image_blocks(batch, heads, length, width)
    queries, grad_queries = query.new_empty(2, query[blocks[0]].numel())
    values, grads, grad_values = value.new_empty(3, value[blocks[0]].numel())
    workspace = _workspace(query, blocks[0].stop * heads * width, length)
    transpose_query, transpose_value = _transposes(depth, length), _transposes(value.shape[2], length)
    for images in blocks:
        q, v, g = _by_rows(query[images], queries), _by_columns(value[images], values), _by_columns(grad[images], grads)
        # Seen as (x, n, d) and (n, i, e), in memory the other way round where that product is faster.
        grad_q = grad_queries[:q.numel()].view(length, *((depth, -1) if transpose_query else (-1, depth)))
        grad_v = grad_values[:v.numel()].view(v.mT.shape if transpose_value else v.shape)
        for block in _column_blocks(len(v), length):
            memory = workspace[:(block.stop - block.start) * length ** 2]
            logits = torch.bmm(q[:, block], embedding, out=memory.view(length, -1, length))  # (x, n, i)
            if transpose_value:
                torch.bmm(g[block].mT, logits.transpose(0, 1), out=grad_v[block])
            else:
                torch.bmm(logits.permute(1, 2, 0), g[block], out=grad_v[block])
            grad_logits = torch.bmm(g[block], v[block].mT, out=memory.view(-1, length, length))  # (n, x, i)
            if transpose_query:
                grad_q[..., block] = torch.bmm(embedding, grad_logits.permute(1, 2, 0))
            else:
                grad_q[:, block] = torch.bmm(grad_logits.transpose(0, 1), embedding.mT)
            grad_embedding.baddbmm_(q[:, block].mT, grad_logits.transpose(0, 1))
        _from_columns(grad_v.mT if transpose_value else grad_v, grad_value[images])
        _from_rows(grad_q.mT if transpose_query else grad_q, grad_query[images])
    position = torch.arange(length, device=table.device)
    offset = position[None, :] - position[:, None] + length - 1
    grad_table = torch.zeros_like(table)
    grad_table.index_add_(0, offset.flatten(), grad_embedding.transpose(1, 2).reshape(-1, depth))
    return grad_query, grad_value, grad_table


def column_flops(query: Any, value: Any, *_: Any, products: int = 2, **__: Any) -> int:
    """Two products of every pair of a column, with the query and the value; five in the backward pass."""
    batch, heads, depth, height, width = query
    pairs = 2 * batch * heads * width * height ** 2
    return pairs * (products // 2 * value[2] + (products - products // 2) * depth)


_column_attention = _autograd.operator(
    'column_attention', _gather_columns, lambda query, value, table: torch.empty_like(value), column_flops)
_column_attention_backward = _autograd.operator(
    'column_attention_backward',
    _gather_columns_backward,
    lambda grad, *tensors: tuple(map(torch.empty_like, tensors)),
    lambda grad, *shapes, **more: column_flops(*shapes, products=5, **more),
)
_autograd.gradients('column_attention', 3, _column_attention_backward, plain.column_attention)


# The whole layer in inference.


def why_not_layer(layer: nn.Module, x: torch.Tensor) -> str | None:
    tensors = x, *layer.parameters()
    if records_gradients(*tensors):
        return 'gradients are recorded'
    return why_not_cpu(*tensors) or why_not_whole(layer)


def why_not_whole(layer: Any) -> str | None:
    """Why query, key, value and norm of a layer may not be computed by a short cut."""
    if layer.branches != 'both':
        return f'the layer has the {layer.branches} branch alone'
    reason = why_not_pristine(layer, dict(qkv=None, norm=None))
    if reason is None and affine_of(layer.norm) is None:
        return 'norm is no fixed affine map: it is in training mode, or no batch norm with running statistics'
    return reason


def layer(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`GlobalSelfAttention` in one operator."""
    return global_attention(*layer_arguments(layer, x))


def layer_arguments(layer: Any, x: torch.Tensor) -> tuple[Any, ...]:
    """Arguments of `timm_gsa.ops.global_attention` that compute a layer."""
    tables = (fitted_table(table, size) for table, size in zip((layer.rel_h, layer.rel_w), x.shape[-2:], strict=True))
    affine = affine_of(layer.norm)
    assert affine is not None
    return x, layer.qkv.weight[:, :, 0, 0], layer.qkv.bias, *tables, *affine, layer.stride, layer.query_norm


def fitted_table(table: torch.Tensor, length: int) -> torch.Tensor:
    """The table of a layer for an axis of this length."""
    return table if statically_true(table.shape[0] == 2 * length - 1) else plain.resize_relative_table(table, length)


def why_not_global_attention(x: torch.Tensor, *more: Any) -> str | None:
    tensors = [each for each in (x, *more) if isinstance(each, torch.Tensor)]
    return 'gradients are recorded' if records_gradients(*tensors) else why_not_cpu(*tensors)


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
    """`timm_gsa.ops.global_attention` for a few images at a time, whose intermediate maps stay in the cache."""
    return _global_attention(x, weight, bias, table_h, table_w, scale, shift, stride, query_norm)


class _Sizes(NamedTuple):
    """Sizes of the maps of a layer."""

    heads: int
    depth: int
    height: int
    width: int
    stride: int


def _image_by_image(
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
    """Computes `global_attention` with channels innermost: columns of a map, and of its transpose, need no copy.

    The content and the row step are linear in the query, so for stride 2 we pool the queries first: two adjacent
    queries of a row are concatenated along channels, and two rows share their sum.
    """
    if stride == 2 and (x.shape[-2] % 2 or x.shape[-1] % 2):
        out = plain.halve(_image_by_image(x, weight, bias, table_h, table_w, scale, shift, 1, query_norm))
        return torch.empty_like(x[..., ::2, ::2]).copy_(out)
    batch, channels, height, width = x.shape
    depth = table_h.shape[1]
    heads = channels // depth
    out = torch.empty_like(x[..., ::stride, ::stride])
    if batch == 0:
        return out
    embedding_h, embedding_w = _unfold(table_h, height), _unfold(table_w, width, stride)
    scale, shift = scale.view(heads, 1, 1, depth), shift.view(heads, 1, 1, depth)
    blocks = _image_blocks(batch, heads, height, width)
    maps = x.new_empty(5, blocks[0].stop * channels * height * width)
    workspace = max(
        _workspace(x, blocks[0].stop * heads * width, height), _workspace(x, blocks[0].stop * heads * height, width),
        key=len)
    for images in blocks:
        count = images.stop - images.start
        query, key, value, scratch, normed = maps[:, :count * channels * height * width]
        pixels = x[images].flatten(2).transpose(1, 2)
        query, value = query.view(pixels.shape), value.view(pixels.shape)
        key = key.view(count, channels, -1)
        _project(pixels, weight, bias, query, key, value)
        if query_norm is not None:
            _normalise(query, query_norm, heads, scratch)
        # Column step: one matrix for each row of queries, and for each column of values and head.
        rows = query.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth)
        columns = value.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth).transpose(0, 1)
        column = _gather(rows, embedding_h, columns, scratch, workspace).unflatten(0, (count, width, heads))
        normed = normed.view(count, heads, height, width, depth)
        torch.addcmul(shift, column.permute(0, 2, 3, 1, 4), scale, out=normed)
        content = _content(query, key, value, scratch, _Sizes(heads, depth, height, width, stride))
        # Row step: the same on the transposed map.
        along = scratch.view(width // stride, count, heads, height, stride, depth)
        along.copy_(query.view(count, height, -1, stride, heads, depth).permute(2, 0, 4, 1, 3, 5))
        along, normed = along.view(width // stride, -1, stride * depth), normed.view(-1, stride * width, depth)
        row = _gather(along, embedding_w, normed, query.view(-1), workspace)
        row = row.unflatten(0, (count, heads, height // stride)).permute(0, 1, 4, 2, 3)
        torch.add(content.view(row.shape), row, out=out[images].unflatten(1, (heads, depth)))
    return out


def _project(
        pixels: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
) -> None:
    """Write query and value (images, N, C) and key (images, C, N) of pixels (images, N, C)."""
    query_weight, key_weight, value_weight = weight.chunk(3)
    _products(pixels, query_weight.t(), query)
    _products(pixels, value_weight.t(), value)
    _products(key_weight, pixels.mT, key)
    if bias is not None:
        for projected, summand in zip((query, key.mT, value), bias.chunk(3), strict=True):
            projected += summand


def _normalise(query: torch.Tensor, query_norm: str, heads: int, scratch: torch.Tensor) -> None:
    """`normalise_query` of queries (images, N, C), in place."""
    by_head = query.unflatten(2, (heads, -1))
    if by_head.shape[-1] < _FEW:
        transposed = scratch.view(by_head.permute(0, 2, 3, 1).shape).copy_(by_head.permute(0, 2, 3, 1))
        by_head.copy_(normalise_query(transposed, query_norm).permute(0, 3, 1, 2))
    else:
        by_head.copy_(normalise_query(by_head, query_norm, -1))


def _content(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scratch: torch.Tensor,
        sizes: _Sizes,
) -> torch.Tensor:
    """Content attention of query and value (images, N, C) and key (images, C, N), written over the key.

    Image by image, as images and their heads are no single axis.
    """
    heads, depth, height, width, stride = sizes
    count, channels = key.shape[:2]
    by_head = (count, -1, heads, depth)
    queries, values = query.view(by_head).transpose(1, 2), value.view(by_head).transpose(1, 2)
    weights = torch.softmax(key, -1, out=scratch.view(key.shape)).view(count, heads, depth, -1)
    contexts = [torch.bmm(*each) for each in zip(weights, values, strict=True)]
    if stride == 2:
        pooled = F.avg_pool2d(query.view(count, height, width, channels).permute(0, 3, 1, 2), 2)
        queries = pooled.permute(0, 2, 3, 1).reshape(by_head).transpose(1, 2)
    content = key.view(-1)[:queries.numel()].view(*queries.mT.shape)
    for context, each, result in zip(contexts, queries, content, strict=True):
        torch.bmm(context.mT, each.mT, out=result)
    return content


def _products(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Matrix products of a matrix and those of all images, from either side, (images, ., .)."""
    if len(out) == 1:
        torch.mm(left.view(left.shape[-2:]), right.view(right.shape[-2:]), out=out[0])
    else:
        torch.bmm(*(x.expand(len(out), *x.shape[-2:]) for x in (left, right)), out=out)


def global_flops(x: Any, weight: Any, bias: Any, table_h: Any, *_: Any, **__: Any) -> int:
    """Projection, content and both axial steps; pooling and norms count nothing."""
    batch, channels, height, width = x
    return 2 * batch * height * width * channels * (3 * channels + 2 * table_h[1] + 2 * (height + width))


_global_attention = _autograd.operator(
    'global_attention', _image_by_image,
    lambda x, weight, bias, table_h, table_w, scale, shift, stride, query_norm: torch.empty_like(
        x[..., ::stride, ::stride]),
    global_flops,
)


# The pool of a layer with stride 2.


def why_not_halve(x: torch.Tensor) -> str | None:
    if is_compiling():
        return 'a compiler fuses slices, which the plain form gives it'
    return why_not_cpu(x) or (None if plain.is_even(x) else 'height or width is odd')


def halve(x: torch.Tensor) -> torch.Tensor:
    """`halve` of an even map, whose gradients are copies: those of torch's pool take up to ten times as long."""
    return _HalvedPairs.apply(x)


class _HalvedPairs(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous():
            out = x[..., ::2, ::2] + x[..., 1::2, ::2]
            return out.add_(x[..., ::2, 1::2]).add_(x[..., 1::2, 1::2]).div_(4)
        return F.avg_pool2d(x, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0] / 4
        if grad.is_contiguous():
            pairs = grad[..., :, None, :, None].expand(*grad.shape[:-1], 2, grad.shape[-1], 2)
            return pairs.reshape(*grad.shape[:-2], 2 * grad.shape[-2], 2 * grad.shape[-1])
        return F.interpolate(grad, scale_factor=2., mode='nearest')


# Layouts and blocks.


def _unfold(table: torch.Tensor, length: int, stride: int = 1) -> torch.Tensor:
    """(2L - 1, d) embeddings of offsets as (L, d, L), [x, :, i] for the offset i - x.

    With a stride, s adjacent queries are concatenated along channels and the result averages s x s windows:
    (L / s, s * d, L).
    """
    embedding = table.unfold(0, length, 1).flip(0).contiguous()
    return embedding if stride == 1 else embedding.view(length // stride, -1, length).div_(stride ** 2)


def _by_rows(query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """(images, heads, d, H, W) copied to (H, n, d), in memory for as many numbers or more."""
    return _copy(query.permute(3, 0, 1, 4, 2), memory).view(query.shape[3], -1, query.shape[2])


def _from_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows as `_by_rows` lays them out into a map (images, heads, d, H, W)."""
    target = out.permute(3, 0, 1, 4, 2)
    target.copy_(rows.unflatten(1, target.shape[1:4]))


def _by_columns(value: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """(images, heads, e, H, W) copied to (n, H, e), in memory for as many numbers or more."""
    return _copy(value.permute(0, 1, 4, 3, 2), memory).view(-1, value.shape[3], value.shape[2])


def _from_columns(columns: torch.Tensor, out: torch.Tensor) -> None:
    """Write columns as `_by_columns` lays them out into a map (images, heads, e, H, W)."""
    target = out.permute(0, 1, 4, 3, 2)
    target.copy_(columns.unflatten(0, target.shape[:3]))


def _copy(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return memory[:x.numel()].view(x.shape).copy_(x)


def _image_blocks(batch: int, heads: int, height: int, width: int) -> list[slice]:
    """Images whose logits along a column are computed at once; at least one, and most in the first."""
    images = max(1, _block() // (heads * height * height * width))
    return [slice(first, min(first + images, batch)) for first in range(0, batch, images)]


def _column_blocks(count: int, length: int) -> list[slice]:
    """Columns whose logits are computed at once, of so many of this length: blocks of nearly the same size."""
    columns = -(-count // -(-count * length ** 2 // _block()))
    return [slice(first, min(first + columns, count)) for first in range(0, count, columns)]


def _workspace(like: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Memory for the logits of any block of up to so many columns of this length.

    Allocated once: a CPU may take longer to hand out new memory than to compute what goes there.
    """
    return like.new_empty(min(count, -(-_block() // length ** 2)) * length ** 2)


def _block() -> int:
    """Logits that all cores compute at once, in no more memory than eight of them need."""
    return _BLOCK * min(torch.get_num_threads(), 8)


def _transposes(depth: int, length: int) -> bool:
    """True if a product (length, depth) is faster as its transpose."""
    return 3 * depth <= length


def _gather(
        query: torch.Tensor,
        embedding: torch.Tensor,
        value: torch.Tensor,
        memory: torch.Tensor,
        workspace: torch.Tensor,
) -> torch.Tensor:
    """out[n, x] = sum over i of (query[x, n] . embedding[x, :, i]) * value[n, i]

    Adjacent columns may share a sum, as those of a map that is halved afterwards: `value` then holds their H one after
    another.

    Args:
        query: (P, N, d) for the places x that are gathered.
        embedding: (P, d, H), as `_unfold` has it, with d as above.
        value: (n, H, e), or (n, N / n * H, e), in any order in memory.
        memory: For n * P * e numbers or more, which the result is written to.
        workspace: By `_workspace`, for n columns of as many logits or more.

    Returns:
        Tensor of shape (n, P, e), in memory as that, or as (n, e, P).
    """
    places, length = embedding.shape[0], embedding.shape[2]
    count, value_length, depth = value.shape
    transpose = _transposes(depth, places)
    out = memory[:count * places * depth].view(count, *((depth, places) if transpose else (places, depth)))
    in_sum = query.shape[1] // count
    for block in _column_blocks(count, length):
        columns = query[:, in_sum * block.start:in_sum * block.stop]
        logits = workspace[:columns.shape[1] * places * length].view(places, -1, length)
        torch.bmm(columns, embedding, out=logits)
        logits = logits.view(places, -1, value_length)
        if transpose:
            torch.bmm(value[block].transpose(1, 2), logits.permute(1, 2, 0), out=out[block])
        else:
            torch.bmm(logits.transpose(0, 1), value[block], out=out[block])
    return out.transpose(1, 2) if transpose else out
