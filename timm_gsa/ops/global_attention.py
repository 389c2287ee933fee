"""The GSA module up to its pool, in one operation for inference.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch
import torch.nn.functional as F

from ._axial import gather, image_blocks, room, unfolded
from ._paths import compiled_for_cpu, eager_on_cpu, records_gradients
from .content_attention import content_attention
from .position_attention import column_attention, row_attention

__all__ = ['global_attention', 'global_attention_reference']


def global_attention(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """Content attention and axial positional attention in parallel, with a norm that is a fixed affine map.

    query, key, value = weight x + bias
    out = content(query, key, value) + row(query, scale * column(query, value, table_h) + shift, table_w)

    with `content_attention`, `column_attention` and `row_attention` of C / d heads. In inference on a CPU, compiled or
    not, images are computed one after the other, so that all that lies between stays in the cache.

    Args:
        x: Map of shape (B, C, H, W).
        weight: Matrix of shape (3C, C), rows of query, key and value one after another.
        bias: Vector of shape (3C,), or None.
        table_h: Embeddings of shape (2 * H - 1, d), d a divisor of C.
        table_w: Embeddings of shape (2 * W - 1, d).
        scale: Factor of each channel of the values, (C,).
        shift: Summand of each channel, (C,).

    Returns:
        Tensor of the shape and memory layout of `x`.
    """
    tensors = [each for each in (x, weight, bias, table_h, table_w, scale, shift) if each is not None]
    if (eager_on_cpu(*tensors) or compiled_for_cpu(*tensors)) and not records_gradients(*tensors):
        return _image_by_image(x, weight, bias, table_h, table_w, scale, shift)
    return global_attention_reference(x, weight, bias, table_h, table_w, scale, shift)


def global_attention_reference(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """The same as `global_attention` by the operations it consists of."""
    projected = F.conv2d(x, weight[:, :, None, None], bias)
    query, key, value = projected.unflatten(1, (3, -1, table_h.shape[1])).unbind(1)
    column = column_attention(query, value, table_h).reshape(x.shape)
    normed = (column * scale[:, None, None] + shift[:, None, None]).reshape(value.shape)
    return (content_attention(query, key, value) + row_attention(query, normed, table_w)).reshape(x.shape)


@torch.library.custom_op('timm_gsa::global_attention', mutates_args=(), device_types='cpu')
def _image_by_image(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """An operator, as the compiler makes calls of matrix products of the steps, with whole batches between them.

    Channels are innermost, heads before their channels: so the columns of a map, and what lies along its rows once it
    is turned, are matrices that need no copy.
    """
    batch, channels, height, width = x.shape
    positions = height * width
    depth = table_h.shape[1]
    heads = channels // depth
    embedding_h, embedding_w = unfolded(table_h, height), unfolded(table_w, width)
    query_weight, key_weight, value_weight = weight.split(channels)
    scale, shift = scale.view(heads, 1, depth), shift.view(heads, 1, depth)
    out = torch.empty_like(x)
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

        # Column step: one matrix for each row of queries, and for each column of values and head.
        rows = query.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth)
        columns = value.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth).transpose(0, 1)
        column = gather(rows, embedding_h, columns, held, logits).unflatten(0, (count, width, heads))
        normed = normed.view(width, count, heads, height, depth)
        torch.addcmul(shift, column.transpose(0, 1), scale, out=normed)

        by_head = (count, positions, heads, depth)
        queries, values = query.view(by_head).transpose(1, 2), value.view(by_head).transpose(1, 2)
        weights = torch.softmax(key, -1, out=held.view(key.shape)).view(count, heads, depth, -1)
        content = key.view(weights.shape)
        for image in range(count):  # as images and heads of them are no single axis
            context = torch.bmm(weights[image], values[image])
            torch.bmm(context.mT, queries[image].mT, out=content[image])

        # Row step: the same on the turned map.
        turned = held.view(normed.shape)
        turned.copy_(query.view(count, height, width, heads, depth).permute(2, 0, 3, 1, 4))
        turned, normed = turned.view(width, -1, depth), normed.view(width, -1, depth)
        total = gather(turned, embedding_w, normed.transpose(0, 1), query.view(-1), logits)
        total = total.unflatten(0, (count, heads, height)).permute(0, 1, 4, 2, 3)
        torch.add(content.view(total.shape), total, out=out[images].unflatten(1, (heads, depth)))
    return out


def _products(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Matrix products of a matrix and those of all images, from either side, (images, ., .)."""
    if len(out) == 1:
        torch.mm(left.view(left.shape[-2:]), right.view(right.shape[-2:]), out=out[0])
    else:
        torch.bmm(*(x.expand(len(out), *x.shape[-2:]) for x in (left, right)), out=out)


@_image_by_image.register_fake
def _like_x(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(x)
