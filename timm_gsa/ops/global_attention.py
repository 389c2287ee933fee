"""The GSA module up to its pool, in one operation for inference.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch
import torch.nn.functional as F

from ._axial import gather, image_blocks, unfolded
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
    batch, channels, height, width = x.shape
    projected = F.conv2d(x, weight[:, :, None, None], bias)
    query, key, value = projected.reshape(batch, 3, -1, table_h.shape[1], height, width).unbind(1)
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
    depth = table_h.shape[1]
    heads = channels // depth
    embedding_h, embedding_w = unfolded(table_h, height), unfolded(table_w, width)
    query_weight, key_weight, value_weight = weight.split(channels)
    query_bias, key_bias, value_bias = (None,) * 3 if bias is None else bias.split(channels)
    scale, shift = scale.view(heads, 1, depth), shift.view(heads, 1, depth)
    out = torch.empty_like(x)
    for images in image_blocks(batch, heads, height, width):
        pixels = x[images].flatten(2).transpose(1, 2)
        count = len(pixels)
        query = F.linear(pixels, query_weight, query_bias)
        value = F.linear(pixels, value_weight, value_bias)
        key = torch.matmul(key_weight, pixels.transpose(1, 2))
        if key_bias is not None:
            key += key_bias[:, None]

        # Column step: one matrix for each row of queries, and for each column of values and head.
        rows = query.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth)
        columns = value.view(count, height, -1).transpose(0, 1).reshape(height, -1, depth).transpose(0, 1)
        column = gather(rows, embedding_h, columns).view(count, width, heads, height, depth)

        # Row step: the same on the turned map.
        normed = x.new_empty(width, count, heads, height, depth)
        torch.addcmul(shift, column.transpose(0, 1), scale, out=normed)
        turned = query.view(count, height, width, heads, depth).permute(2, 0, 3, 1, 4).reshape(width, -1, depth)
        total = gather(turned, embedding_w, normed.view(width, -1, depth).transpose(0, 1))
        total = total.view(count, heads, height * width, depth)

        weights = key.softmax(-1).view(count, heads, depth, -1)
        by_head = (count, -1, heads, depth)
        queries, values = query.view(by_head).transpose(1, 2), value.view(by_head).transpose(1, 2)
        for image in range(count):  # as images and heads of them are no single axis
            context = torch.bmm(weights[image], values[image])
            torch.baddbmm(total[image], queries[image], context, out=total[image])
        out[images].unflatten(1, (heads, depth)).copy_(
            total.view(count, heads, height, width, depth).permute(0, 1, 4, 2, 3))
    return out


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
