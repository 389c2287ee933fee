"""Axial relative positional attention: each position gathers values along its column (or row), weighted by its query
and a learned embedding of the offset.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch
import torch.nn.functional as F

from ._axial import (
    by_columns,
    by_rows,
    column_blocks,
    from_columns,
    gather,
    image_blocks,
    is_narrow,
    room,
    unfolded,
)
from ._paths import (
    compiled_for_cpu,
    eager_on_cpu,
    is_known_to_hold,
    register_gradients,
    register_triton,
    triton_attends,
)

__all__ = [
    'column_attention',
    'column_attention_reference',
    'halved_row_attention',
    'is_large',
    'resize_relative_table',
    'row_attention',
]


def column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Attention along the columns of a map by relative position, without softmax or scale.

    out[:, x, y] = sum over rows i of (query[:, x, y] . table[i - x + H - 1]) * value[:, i, y]

    Rows outside the map do not contribute.

    Args:
        query: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).
        table: Embeddings of shape (2 * H - 1, d), shared by the heads; row r belongs to the offset r - (H - 1) of the
            neighbour from the position itself.

    Returns:
        Tensor of shape (B, heads, e, H, W).

    Raises:
        ValueError: The table has another number of rows than 2 * H - 1 (`resize_relative_table` makes it fit).
    """
    _check(query, table)
    if not torch.jit.is_scripting():
        tensors = query, value, table
        if compiled_for_cpu(*tensors) or (eager_on_cpu(*tensors) and is_large(query)) or triton_attends(*tensors):
            return _blocked(query, value, table)
    return _column_attention(query, value, table)


def row_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`column_attention` along the rows: `table` is of shape (2 * W - 1, d)."""
    return column_attention(query.transpose(-1, -2), value.transpose(-1, -2), table).transpose(-1, -2)


def halved_row_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Averages over 2 x 2 positions of `row_attention` on a CPU, (B, heads, e, H / 2, W / 2), for even H and W."""
    return _halved_blocked(query.transpose(-1, -2), value.transpose(-1, -2), table).transpose(-1, -2)


def column_attention_reference(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The same as `column_attention`, with the embeddings picked by a one-hot tensor of all pairs of rows."""
    _check(query, table)
    height = query.shape[-2]
    row = torch.arange(height, device=query.device)
    one_hot = F.one_hot(row[None, :] - row[:, None] + height - 1, 2 * height - 1).to(query.dtype)
    embedding = torch.einsum('xir,rd->xid', one_hot, table.to(query.dtype))
    logits = torch.einsum('bhdxy,xid->bhxyi', query, embedding)
    return torch.einsum('bhxyi,bheiy->bhexy', logits, value)


def resize_relative_table(table: torch.Tensor, length: int) -> torch.Tensor:
    """Resample a table of relative embeddings to the offsets of another map size.

    Linear interpolation along the offset axis that keeps offset 0 and the two extreme offsets in place (a new axis of
    one position has offset 0 alone). The entries are scaled by old / new length of the axis, so that a sum over all
    positions keeps its size. A table that already fits is returned as it is.

    Args:
        table: Embeddings of shape (2 * L - 1, d).
        length: New length of the axis in positions.

    Returns:
        Embeddings of shape (2 * length - 1, d), dtype of `table`.
    """
    rows = table.shape[0]
    new_rows = 2 * length - 1
    if _same(rows, new_rows):
        return table
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    source = table.t().unsqueeze(0).to(wide)
    if new_rows == 1:  # offset 0; interpolation would keep the first offset
        resized = source[..., rows // 2:rows // 2 + 1]
    else:
        resized = F.interpolate(source, size=new_rows, mode='linear', align_corners=True)
    return (resized.squeeze(0).t() * ((rows + 1) / (new_rows + 1))).to(table.dtype)


def _same(rows: int, new_rows: int) -> bool:
    if not torch.jit.is_scripting():
        return is_known_to_hold(rows == new_rows)
    return rows == new_rows


def _check(query: torch.Tensor, table: torch.Tensor) -> None:
    length = query.shape[-2]
    if table.shape[0] != 2 * length - 1:
        raise ValueError(
            f'table must have 2 * {length} - 1 = {2 * length - 1} rows for an axis of {length} positions, '
            f'got {table.shape[0]}'
        )


def _column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`column_attention` by operations that every compiler and exporter takes, with the logits of all positions."""
    logits = torch.einsum('bhdxy,xid->bhyxi', query, _pairwise_embedding(table, query.shape[-2]))
    return torch.einsum('bhyxi,bheiy->bhexy', logits, value)


def _pairwise_embedding(table: torch.Tensor, length: int) -> torch.Tensor:
    """(2L - 1, d) embeddings of offsets gathered to (L, L, d), [x, i] for the offset i - x."""
    position = torch.arange(length, device=table.device)
    return table[position[None, :] - position[:, None] + length - 1]


def is_large(query: torch.Tensor) -> bool:
    """Whether the logits of a map's columns are known to be so many that they are faster computed twice than kept."""
    height, width = query.shape[-2:]
    return is_known_to_hold(height * height * width >= 2 ** 14)


def _halved_column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Averages over 2 x 2 positions of `_column_attention`, of even maps."""
    out = _column_attention(query, value, table)
    return F.avg_pool2d(out.flatten(1, 2), 2).unflatten(1, out.shape[1:3])


@torch.library.custom_op('timm_gsa::column_attention', mutates_args=(), device_types='cpu')
def _blocked(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`column_attention` by blocks of logits, which the backward pass computes anew.

    An operator, as the compiler makes calls of matrix products of the steps, with all logits between them.
    """
    return _gathered(query, value, table, 1)


@_blocked.register_fake
def _like_value(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


@torch.library.custom_op('timm_gsa::column_attention_backward', mutates_args=(), device_types='cpu')
def _blocked_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gathered_backward(grad, query, value, table, 1)


@torch.library.custom_op('timm_gsa::halved_column_attention', mutates_args=(), device_types='cpu')
def _halved_blocked(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`_halved_column_attention` by blocks of logits, of which there are half as many as before the map is halved.

    Two queries of a column ask as one of twice the channels, and two columns have their sum in common.
    """
    return _gathered(query, value, table, 2)


@_halved_blocked.register_fake
def _like_halved_value(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value[..., ::2, ::2])


@torch.library.custom_op('timm_gsa::halved_column_attention_backward', mutates_args=(), device_types='cpu')
def _halved_blocked_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gathered_backward(grad, query, value, table, 2)


def _gathered(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor, stride: int) -> torch.Tensor:
    batch, heads, _, height, width = query.shape
    embedding = unfolded(table, height, stride)
    out = torch.empty_like(value[..., ::stride, ::stride])
    if batch == 0:
        return out
    blocks = image_blocks(batch, heads, height, width)
    queries = query.new_empty(query[blocks[0]].numel())
    values, found = value.new_empty(2, value[blocks[0]].numel())
    logits = room(query, blocks[0].stop * heads * width, height)
    for images in blocks:
        rows, columns = by_rows(query[images], queries, stride), by_columns(value[images], values, stride)
        from_columns(gather(rows, embedding, columns, found, logits), out[images])
    return out


def _gathered_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
        stride: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, depth, length, width = query.shape
    embedding = unfolded(table, length, stride)
    places, asked = embedding.shape[:2]
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    if batch == 0:
        return grad_query, grad_value, torch.zeros_like(table)
    grad_embedding = torch.zeros_like(embedding)
    blocks = image_blocks(batch, heads, length, width)
    queries, grad_queries = query.new_empty(2, query[blocks[0]].numel())
    values, grads, grad_values = value.new_empty(3, value[blocks[0]].numel())
    logits_memory = room(query, blocks[0].stop * heads * width, length)
    narrow_query, narrow_value = is_narrow(asked, length), is_narrow(value.shape[2], length)
    for images in blocks:
        q, v = by_rows(query[images], queries, stride), by_columns(value[images], values, stride)
        g = by_columns(grad[images], grads)
        # Seen as (stride, x, n, d) and (n, i, e), where narrow the other way round in memory.
        grad_q = grad_queries[:q.numel()].view(stride, places, *((asked, -1) if narrow_query else (-1, asked)))
        grad_v = grad_values[:v.numel()].view(v.mT.shape if narrow_value else v.shape)
        for block in column_blocks(len(v), length):
            memory = logits_memory[:(block.stop - block.start) * length ** 2]
            columns = q[:, stride * block.start:stride * block.stop]
            logits = torch.bmm(columns, embedding, out=memory.view(places, -1, length))
            logits = logits.view(places, -1, stride * length)  # (x, n, i)
            if narrow_value:
                torch.bmm(g[block].mT, logits.transpose(0, 1), out=grad_v[block])
            else:
                torch.bmm(logits.permute(1, 2, 0), g[block], out=grad_v[block])
            grad_logits = torch.bmm(g[block], v[block].mT, out=memory.view(-1, places, stride * length))  # (n, x, i)
            for step, part in enumerate(grad_logits.split(length, 2)):
                if narrow_query:
                    grad_q[step][..., block] = torch.bmm(embedding, part.permute(1, 2, 0))
                else:
                    grad_q[step][:, block] = torch.bmm(part.transpose(0, 1), embedding.mT)
                grad_embedding.baddbmm_(columns[:, step::stride].mT, part.transpose(0, 1))
        from_columns(grad_v.mT if narrow_value else grad_v, grad_value[images], stride)
        turned = grad_query[images].unflatten(4, (-1, stride)).unflatten(3, (-1, stride)).permute(6, 3, 0, 1, 5, 4, 2)
        grad_q = grad_q.mT if narrow_query else grad_q
        turned.copy_(grad_q.unflatten(3, (stride, -1)).unflatten(2, turned.shape[2:5]))
    position = torch.arange(length)
    offset = position[None, :] - position[:, None] + length - 1
    grad_table = torch.zeros_like(table)
    grad_embedding = grad_embedding.view(length, depth, length).div_(stride ** 2)
    grad_table.index_add_(0, offset.flatten(), grad_embedding.transpose(1, 2).reshape(-1, depth))
    return grad_query, grad_value, grad_table


register_gradients(_blocked, _blocked_backward, _column_attention)
register_gradients(_halved_blocked, _halved_blocked_backward, _halved_column_attention)
register_triton(_blocked, 'attend')
register_triton(_blocked_backward, 'attend_backward')
