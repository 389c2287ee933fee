"""The GSA module in one operation for inference.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
from typing import Any

import torch
import torch.nn.functional as F

from ._axial import gather, image_blocks, room, unfolded
from ._paths import (
    WIDEST_HEAD,
    compiled_for_cpu,
    eager_on_cpu,
    is_known_to_hold,
    records_gradients,
    register_gradients,
    triton_attends,
    triton_serves,
)
from .content_attention import _content_attention, content_attention
from .position_attention import (
    _column_attention,
    column_attention,
    halved_row_attention,
    is_large,
    row_attention,
)
from .query_norm import normalise_query

__all__ = ['by_stride', 'content_and_row_attention', 'global_attention', 'global_attention_reference', 'halved']


def global_attention(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        stride: int = 1,
        query_norm: str | None = None,
) -> torch.Tensor:
    """Content attention and axial positional attention in parallel, with a norm that is a fixed affine map.

    query, key, value = weight x + bias
    query = normalise_query(query, query_norm)
    out = content(query, key, value) + row(query, scale * column(query, value, table_h) + shift, table_w)

    with `content_attention`, `column_attention` and `row_attention` of C / d heads, then averages of 2 x 2 positions if
    `stride` is 2. In inference on a CPU, compiled or not, images are computed one after the other, so that all that
    lies between stays in the cache; in inference on a GPU, three kernels follow the projection.

    Args:
        x: Map of shape (B, C, H, W).
        weight: Matrix of shape (3C, C), rows of query, key and value one after another.
        bias: Vector of shape (3C,), or None.
        table_h: Embeddings of shape (2 * H - 1, d), d a divisor of C.
        table_w: Embeddings of shape (2 * W - 1, d).
        scale: Factor of each channel of the values, (C,).
        shift: Summand of each channel, (C,).
        stride: 1, or 2 for a map of half the size.
        query_norm: None, 'softmax' or 'rms': norm of the queries over the d channels of a head.

    Returns:
        Tensor of shape (B, C, ceil(H / stride), ceil(W / stride)) and the memory layout of `x`.
    """
    tensors = [each for each in (x, weight, bias, table_h, table_w, scale, shift) if each is not None]
    if (eager_on_cpu(*tensors) or compiled_for_cpu(*tensors)) and not records_gradients(*tensors):
        return _image_by_image(x, weight, bias, table_h, table_w, scale, shift, stride, query_norm)
    by_triton = triton_serves(*tensors) and x.dtype != torch.float64 and table_h.shape[1] <= WIDEST_HEAD
    if by_triton and not records_gradients(*tensors):
        query, key, value = _projected(x, weight, bias, table_h.shape[1])
        query = normalise_query(query, query_norm)
        tables = table_h.to(query.dtype), table_w.to(query.dtype)  # autocast chooses the type of the projection
        out = _fused(query, key, value, *tables, scale, shift).reshape(x.shape)
        return halved(out) if stride == 2 else out
    return global_attention_reference(x, weight, bias, table_h, table_w, scale, shift, stride, query_norm)


def global_attention_reference(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        stride: int = 1,
        query_norm: str | None = None,
) -> torch.Tensor:
    """The same as `global_attention` by the operations it consists of."""
    query, key, value = _projected(x, weight, bias, table_h.shape[1])
    query = normalise_query(query, query_norm)
    column = column_attention(query, value, table_h).reshape(x.shape)
    normed = (column * scale[:, None, None] + shift[:, None, None]).to(value.dtype).reshape(value.shape)
    return content_and_row_attention(query, key, value, normed, table_w, stride).flatten(1, 2)


def content_and_row_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
        stride: int = 1,
) -> torch.Tensor:
    """content_attention(query, key, value) + row_attention(query, column, table), on a GPU as one operation.

    Both are linear in what is asked for, so that on a CPU an even map is halved before them.

    Args:
        query: Tensor of shape (B, heads, d, H, W).
        key: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).
        column: What the column step gave, normed, of shape (B, heads, e, H, W).
        table: Embeddings of shape (2 * W - 1, d).
        stride: 1, or 2 for averages of 2 x 2 positions, as `halved` has them.

    Returns:
        Tensor of shape (B, heads, e, ceil(H / stride), ceil(W / stride)).
    """
    if not torch.jit.is_scripting():
        tensors = query, key, value, column, table
        fits = table.shape[0] == 2 * query.shape[-1] - 1
        early = stride == 2 and fits and _is_even(query) and is_large(query.mT)
        if early and (eager_on_cpu(*tensors) or compiled_for_cpu(*tensors)):
            return content_attention(by_stride(query, 2), key, value) + halved_row_attention(query, column, table)
        if fits and query.shape == value.shape and triton_attends(*tensors):
            return by_stride(_gather(*tensors), stride)
    return by_stride(content_attention(query, key, value) + row_attention(query, column, table), stride)


def _projected(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        depth: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, each (B, C / d, d, H, W)."""
    query, key, value = F.conv2d(x, weight[:, :, None, None], bias).unflatten(1, (3, -1, depth)).unbind(1)
    return query, key, value


def by_stride(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Maps of heads (B, heads, d, H, W) as they are, or `halved` with a stride of 2."""
    return halved(x.flatten(1, 2)).unflatten(1, x.shape[1:3]) if stride == 2 else x


def halved(x: torch.Tensor) -> torch.Tensor:
    """Average pool over 2 x 2 positions; the last windows of odd maps average what they cover."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling():
            if _is_even(x):
                return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
            # Inductor compiles a pool that rounds up anew for odd and even maps, and AOTInductor takes them for alike.
            for axis in (-2, -1):
                first = 2 * torch.arange((x.shape[axis] + 1) // 2, device=x.device)
                second = (first + 1).clamp(max=x.shape[axis] - 1)
                x = (x.index_select(axis, first) + x.index_select(axis, second)) / 2
            return x
        if _is_even(x) and (eager_on_cpu(x) or (x.device.type == 'cuda' and not torch.jit.is_tracing())):
            return _HalvedPairs.apply(x)
    return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


def _is_even(x: torch.Tensor) -> bool:
    return is_known_to_hold(x.shape[-2] % 2 == 0) and is_known_to_hold(x.shape[-1] % 2 == 0)


class _HalvedPairs(torch.autograd.Function):
    """`halved` of an even map with gradients that are copies: those of the pool take up to ten times as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.device.type == 'cpu' and x.is_contiguous():
            out = x[..., ::2, ::2] + x[..., 1::2, ::2]
            return out.add_(x[..., ::2, 1::2]).add_(x[..., 1::2, 1::2]).div_(4)
        return F.avg_pool2d(x, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0] / 4
        if grad.device.type == 'cpu' and grad.is_contiguous():
            pairs = grad[..., :, None, :, None].expand(*grad.shape[:-1], 2, grad.shape[-1], 2)
            return pairs.reshape(*grad.shape[:-2], 2 * grad.shape[-2], 2 * grad.shape[-1])
        return F.interpolate(grad, scale_factor=2., mode='nearest')


@torch.library.custom_op('timm_gsa::global_attention', mutates_args=(), device_types='cpu')
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
    """An operator, as the compiler makes calls of matrix products of the steps, with whole batches between them.

    Channels are innermost, heads before their channels: so the columns of a map, and what lies along its rows once it
    is turned, are matrices that need no copy.

    All but keys, values and the column step is linear in what is asked for, so that even maps are halved before it: two
    queries along a row ask as one of twice the channels, and two rows have their sum in common.
    """
    if stride == 2 and (x.shape[-2] % 2 or x.shape[-1] % 2):
        out = halved(_image_by_image(x, weight, bias, table_h, table_w, scale, shift, 1, query_norm))
        return torch.empty_like(x[..., ::2, ::2]).copy_(out)
    batch, channels, height, width = x.shape
    positions = height * width
    depth = table_h.shape[1]
    heads = channels // depth
    embedding_h, embedding_w = unfolded(table_h, height), unfolded(table_w, width, stride)
    query_weight, key_weight, value_weight = weight.split(channels)
    scale, shift = scale.view(heads, 1, 1, depth), shift.view(heads, 1, 1, depth)
    out = torch.empty_like(x[..., ::stride, ::stride])
    if batch == 0:
        return out
    blocks = image_blocks(batch, heads, height, width)
    maps = x.new_empty(5, blocks[0].stop * channels * positions)
    logits = max(
        room(x, blocks[0].stop * heads * width, height), room(x, blocks[0].stop * heads * height, width), key=len)
    for images in blocks:
        count = images.stop - images.start
        query, key, value, held, normed = maps[:, :count * channels * positions]
        pixels = x[images].flatten(2).transpose(1, 2)
        query, value = query.view(pixels.shape), value.view(pixels.shape)
        key = key.view(count, channels, positions)
        _products(pixels, query_weight.t(), query)
        _products(pixels, value_weight.t(), value)
        _products(key_weight, pixels.mT, key)
        if bias is not None:
            for projected, summand in zip((query, key.mT, value), bias.split(channels), strict=True):
                projected += summand
        if query_norm is not None:
            query.copy_(normalise_query(query.unflatten(2, (heads, depth)), query_norm, -1).flatten(2))

        # Column step: one matrix for each row of queries, and for each column of values and head.
        rows = query.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth)
        columns = value.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth).transpose(0, 1)
        column = gather(rows, embedding_h, columns, held, logits).unflatten(0, (count, width, heads))
        normed = normed.view(count, heads, height, width, depth)
        torch.addcmul(shift, column.permute(0, 2, 3, 1, 4), scale, out=normed)

        by_head = (count, positions, heads, depth)
        queries, values = query.view(by_head).transpose(1, 2), value.view(by_head).transpose(1, 2)
        weights = torch.softmax(key, -1, out=held.view(key.shape)).view(count, heads, depth, -1)
        # Image by image, as images and heads of them are no single axis.
        contexts = [torch.bmm(*each) for each in zip(weights, values, strict=True)]
        if stride == 2:
            pooled = F.avg_pool2d(query.view(count, height, width, channels).permute(0, 3, 1, 2), 2)
            queries = pooled.permute(0, 2, 3, 1).reshape(count, -1, heads, depth).transpose(1, 2)
        content = key.view(-1)[:queries.numel()].view(*queries.mT.shape)
        for context, wanted, found in zip(contexts, queries, content, strict=True):
            torch.bmm(context.mT, wanted.mT, out=found)

        # Row step: the same on the turned map.
        turned = held.view(width // stride, count, heads, height, stride, depth)
        turned.copy_(query.view(count, height, -1, stride, heads, depth).permute(2, 0, 4, 1, 3, 5))
        turned, normed = turned.view(width // stride, -1, stride * depth), normed.view(-1, stride * width, depth)
        total = gather(turned, embedding_w, normed, query.view(-1), logits)
        total = total.unflatten(0, (count, heads, height // stride)).permute(0, 1, 4, 2, 3)
        torch.add(content.view(total.shape), total, out=out[images].unflatten(1, (heads, depth)))
    return out


def _products(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Matrix products of a matrix and those of all images, from either side, (images, ., .)."""
    if len(out) == 1:
        torch.mm(left.view(left.shape[-2:]), right.view(right.shape[-2:]), out=out[0])
    else:
        torch.bmm(*(x.expand(len(out), *x.shape[-2:]) for x in (left, right)), out=out)


@_image_by_image.register_fake
def _like_strided_x(
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
    return torch.empty_like(x[..., ::stride, ::stride])


@torch.library.custom_op('timm_gsa::fused_global_attention', mutates_args=(), device_types='cuda')
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
    from ._global_attention_triton import fused  # imports Triton

    return fused(query, key, value, table_h, table_w, scale, shift)


@_fused.register_fake
def _like_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


@torch.library.custom_op('timm_gsa::content_and_row_attention', mutates_args=(), device_types='cuda')
def _gather(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    from ._global_attention_triton import gather  # imports Triton

    return gather(query, key, value, column, table)


_gather.register_fake(_like_value)


@torch.library.custom_op('timm_gsa::content_and_row_attention_backward', mutates_args=(), device_types='cuda')
def _gather_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from ._global_attention_triton import gather_backward  # imports Triton

    return gather_backward(grad, query, key, value, column, table)


def _plain_gather(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    return _content_attention(query, key, value) + _column_attention(query.mT, column.mT, table).mT


register_gradients(_gather, _gather_backward, _plain_gather)
