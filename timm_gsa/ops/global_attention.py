"""The GSA module between its projection and its pool, in one operation for inference.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch

from ._axial import by_columns, by_rows, gather, image_blocks, unfolded
from ._paths import inference_on_cpu
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

    with `content_attention`, `column_attention` and `row_attention`. In inference on a CPU images are computed one
    after the other, so that all that lies between stays in the cache.

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
    batch, heads, channels, height, width = value.shape
    if not inference_on_cpu(query, key, value, table_h, table_w, scale, shift):
        return global_attention_reference(query, key, value, table_h, table_w, scale, shift)
    embedding_h, embedding_w = unfolded(table_h, height), unfolded(table_w, width)
    scale, shift = scale.view(heads, 1, 1, channels), shift.view(heads, 1, 1, channels)
    out = value.new_empty(value.shape)
    for images in image_blocks(query):
        q, k, v = query[images], key[images], value[images]
        content = content_attention(q, k, v)
        column = gather(by_rows(q), embedding_h, by_columns(v)).view(-1, heads, width, height, channels)
        normed = value.new_empty(len(q), heads, height, width, channels)
        torch.addcmul(shift, column.transpose(2, 3), scale, out=normed)
        position = gather(by_rows(q.transpose(-1, -2)), embedding_w, normed.view(-1, width, channels))
        torch.add(content, position.view(normed.shape).permute(0, 1, 4, 2, 3), out=out[images])
    return out


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
