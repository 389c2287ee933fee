"""Attention along one axis in blocks of logits that stay in the cache of a CPU; not differentiable.

All columns of all heads and images of a block stand behind one another, as one axis of length n. What is gathered along
rows of a map is gathered along the columns of its transpose.
"""
from collections.abc import Iterator

import torch

__all__ = ['by_columns', 'by_rows', 'column_blocks', 'from_columns', 'gather', 'image_blocks', 'unfolded']

# Logits that are computed at once: few enough for the cache, and enough for matrix products.
_BLOCK = 2 ** 18


def unfolded(table: torch.Tensor, length: int) -> torch.Tensor:
    """(2L - 1, d) embeddings of offsets as (L, d, L), [x, :, i] for the offset i - x."""
    return table.unfold(0, length, 1).flip(0).contiguous()


def by_rows(query: torch.Tensor) -> torch.Tensor:
    """(images, heads, d, H, W) copied to (H, n, d)."""
    return query.permute(3, 0, 1, 4, 2).reshape(query.shape[3], -1, query.shape[2])


def by_columns(value: torch.Tensor) -> torch.Tensor:
    """(images, heads, e, H, W) copied to (n, H, e)."""
    return value.permute(0, 1, 4, 3, 2).reshape(-1, value.shape[3], value.shape[2])


def from_columns(columns: torch.Tensor, out: torch.Tensor) -> None:
    """Write columns as `by_columns` lays them out, (n, H, e), into a map (images, heads, e, H, W)."""
    turned = out.permute(0, 1, 4, 3, 2)
    turned.copy_(columns.view(turned.shape))


def image_blocks(batch: int, heads: int, height: int, width: int) -> Iterator[slice]:
    """Images whose logits along a column are computed at once; at least one."""
    images = max(1, _BLOCK // (heads * height * height * width))
    return (slice(first, first + images) for first in range(0, batch, images))


def column_blocks(query: torch.Tensor) -> Iterator[slice]:
    """Columns whose logits, of a query laid out by `by_rows`, are computed at once."""
    height, count = query.shape[:2]
    columns = max(1, _BLOCK // height ** 2)
    return (slice(first, first + columns) for first in range(0, count, columns))


def gather(query: torch.Tensor, embedding: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """out[n, x] = sum over i of (query[x, n] . embedding[x, :, i]) * value[n, i]

    Args:
        query: (H, n, d) by `by_rows`.
        embedding: (H, d, H) by `unfolded`.
        value: (n, H, e) as `by_columns` lays it out, in any order in memory.

    Returns:
        Contiguous tensor of the shape of `value`.
    """
    out = value.new_empty(value.shape)
    length = query.shape[0]
    held = None
    for block in column_blocks(query):
        columns = len(out[block])
        if held is None or held.shape[1] != columns:  # the last block may be smaller
            held = query.new_empty(length, columns, length)
        torch.bmm(query[:, block], embedding, out=held)
        torch.bmm(held.transpose(0, 1), value[block], out=out[block])
    return out
