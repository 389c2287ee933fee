"""The GSA module between its projection and its pool, in one operation for inference.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch

from ._axial import by_columns, by_rows, gather, image_blocks, unfolded
from ._paths import compiled_for_cpu, eager_on_cpu, records_gradients
from .content_attention import content_attention
from .position_attention import column_attention, row_attention

__all__ = ['global_attention', 'global_attention_reference']


def global_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """Content attention and axial positional attention in parallel, with a norm that is a fixed affine map.

    out = content(query, key, value) + row(query, scale * column(query, value, table_h) + shift, table_w)

    with `content_attention`, `column_attention` and `row_attention`. In inference on a CPU, compiled or not, images are
    computed one after the other, so that all that lies between stays in the cache.

    Args:
        query: Tensor of shape (B, heads, d, H, W).
        key: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).
        table_h: Embeddings of shape (2 * H - 1, d).
        table_w: Embeddings of shape (2 * W - 1, d).
        scale: Factor of each channel of the values, (heads * e,).
        shift: Summand of each channel, (heads * e,).

    Returns:
        Tensor of shape (B, heads, e, H, W).
    """
    tensors = query, key, value, table_h, table_w, scale, shift
    if (eager_on_cpu(*tensors) or compiled_for_cpu(*tensors)) and not records_gradients(*tensors):
        return _image_by_image(*tensors)
    return global_attention_reference(*tensors)


def global_attention_reference(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """The same as `global_attention` by the three operations it consists of."""
    shape = (*value.shape[1:3], 1, 1)
    column = column_attention(query, value, table_h) * scale.view(shape) + shift.view(shape)
    return content_attention(query, key, value) + row_attention(query, column, table_w)


@torch.library.custom_op('timm_gsa::global_attention', mutates_args=(), device_types='cpu')
def _image_by_image(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """An operator, as the compiler makes calls of matrix products of the steps, with whole batches between them."""
    heads, channels, height, width = value.shape[1:]
    embedding_h, embedding_w = unfolded(table_h, height), unfolded(table_w, width)
    scale, shift = scale.view(heads, 1, 1, channels), shift.view(heads, 1, 1, channels)
    out = value.new_empty(value.shape)
    for images in image_blocks(query):
        q, k, v = query[images], key[images], value[images]
        column = gather(by_rows(q), embedding_h, by_columns(v)).view(-1, heads, width, height, channels)
        normed = value.new_empty(len(q), heads, height, width, channels)
        torch.addcmul(shift, column.transpose(2, 3), scale, out=normed)
        position = gather(by_rows(q.transpose(-1, -2)), embedding_w, normed.view(-1, width, channels))
        torch.add(content_attention(q, k, v), position.view(normed.shape).permute(0, 1, 4, 2, 3), out=out[images])
    return out


@_image_by_image.register_fake
def _like_value(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    return value.new_empty(value.shape)
