"""Operations of global self-attention networks.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch
import torch.nn.functional as F

from .._backend import Form, Operation, compute, statically_true
from . import cpu, gpu, plain, reference
from .query_norm import normalise_query

__all__ = [
    'COLUMN',
    'CONTENT',
    'CONTENT_AND_ROW',
    'GLOBAL',
    'HALVE',
    'LAYER',
    'column_attention',
    'content_and_row_attention',
    'content_attention',
    'global_attention',
    'halve',
    'normalise_query',
    'resize_relative_table',
    'row_attention',
]


def content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Content attention with keys normalised over positions and queries left as they are.

    out[:, n] = sum over m, k of query[k, n] * softmax(key)[k, m] * value[:, m]

    The softmax runs over all positions, separately for each key channel, in at least float32. The product is taken
    right to left: a d x d context matrix for each head, never an N x N map. The cost is linear in the positions.

    Args:
        query: Tensor of shape (B, heads, d, H', W').
        key: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).

    Returns:
        Tensor of shape (B, heads, e, H', W') and dtype of `value`.
    """
    if not torch.jit.is_scripting():
        return compute(CONTENT, query, key, value)
    return plain.content_attention(query, key, value)


def column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Attention along the columns of a map by relative position, without softmax or scale.

    out[:, x, y] = sum over rows i of (query[:, x, y] . table[i - x + H - 1]) * value[:, i, y]

    Rows outside the map do not contribute.

    Args:
        query: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).
        table: Embeddings of shape (2 * H - 1, d), shared by the heads; row r belongs to the offset r - (H - 1) of the
            neighbour from the position itself. They are rounded to the dtype of `query` where they are multiplied.

    Returns:
        Tensor of shape (B, heads, e, H, W).

    Raises:
        ValueError: The table has another number of rows than 2 * H - 1 (`resize_relative_table` makes it fit).
    """
    _check_table(query, table)
    if not torch.jit.is_scripting():
        return compute(COLUMN, query, value, table)
    return plain.column_attention(query, value, table)


def row_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`column_attention` along the rows: `table` is of shape (2 * W - 1, d)."""
    return column_attention(query.transpose(-1, -2), value.transpose(-1, -2), table).transpose(-1, -2)


def content_and_row_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    """content_attention(query, key, value) + row_attention(query, column, table), which a GPU computes at once.

    Args:
        query: Tensor of shape (B, heads, d, H, W).
        key: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).
        column: Result of the column step behind its norm, (B, heads, e, H, W).
        table: Embeddings of shape (2 * W - 1, d).

    Returns:
        Tensor of shape (B, heads, e, H, W).

    Raises:
        ValueError: The table has another number of rows than 2 * W - 1.
    """
    _check_table(query.transpose(-1, -2), table)
    if not torch.jit.is_scripting():
        return compute(CONTENT_AND_ROW, query, key, value, column, table)
    return plain.content_and_row_attention(query, key, value, column, table)


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
    `stride` is 2.

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
    return compute(GLOBAL, x, weight, bias, table_h, table_w, scale, shift, stride, query_norm)


def halve(x: torch.Tensor) -> torch.Tensor:
    """Average pool over 2 x 2 positions; the last windows of odd maps average what they cover.

    Args:
        x: Map of shape (B, C, H, W).

    Returns:
        Map of shape (B, C, ceil(H / 2), ceil(W / 2)).
    """
    if not torch.jit.is_scripting():
        return compute(HALVE, x)
    return plain.halve(x)


def resize_relative_table(table: torch.Tensor, length: int) -> torch.Tensor:
    """Resample a table of relative embeddings to the offsets of another map size.

    Linear interpolation along the offset axis that keeps offset 0 and the two extreme offsets in place (a new axis of
    one position has offset 0 alone). The entries are scaled by old / new length of the axis, so that a sum over all
    positions keeps its size. A table that already fits is returned as it is. Our choice: of four rules it kept most of
    the accuracy of trained weights at every size (tools/measure/sizes.py).

    Args:
        table: Embeddings of shape (2 * L - 1, d).
        length: New length of the axis in positions.

    Returns:
        Embeddings of shape (2 * length - 1, d), dtype of `table`.
    """
    if _fits(table, length):
        return table
    return plain.resize_relative_table(table, length)


def _fits(table: torch.Tensor, length: int) -> bool:
    if not torch.jit.is_scripting():
        return statically_true(table.shape[0] == 2 * length - 1)
    return table.shape[0] == 2 * length - 1


def _check_table(query: torch.Tensor, table: torch.Tensor) -> None:
    length = query.shape[-2]
    if table.shape[0] != 2 * length - 1:
        raise ValueError(
            f'table must have 2 * {length} - 1 = {2 * length - 1} rows for an axis of {length} positions, '
            f'got {table.shape[0]}'
        )


def _global_by_parts(
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
    """`global_attention` by the operations it consists of, each by the backend at hand."""
    query, key, value = F.conv2d(x, weight[:, :, None, None], bias).unflatten(1, (3, -1, table_h.shape[1])).unbind(1)
    query = normalise_query(query, query_norm)
    column = column_attention(query, value, table_h).reshape(x.shape)
    normed = (column * scale[:, None, None] + shift[:, None, None]).to(value.dtype).reshape(value.shape)
    out = content_and_row_attention(query, key, value, normed, table_w).flatten(1, 2)
    return halve(out) if stride == 2 else out


CONTENT = Operation(
    'content_attention', reference.content_attention, plain.content_attention,
    cpu=Form(cpu.content_attention, cpu.why_not_content_attention),
    triton=Form(gpu.content_attention, gpu.why_not_attention),
)
COLUMN = Operation(
    'column_attention', reference.column_attention, plain.column_attention,
    cpu=Form(cpu.column_attention, cpu.why_not_column_attention),
    triton=Form(gpu.column_attention, gpu.why_not_attention),
)
CONTENT_AND_ROW = Operation(
    'content_and_row_attention', reference.content_and_row_attention, plain.content_and_row_attention,
    cpu=Form(cpu.content_and_row_attention, cpu.why_not_content_and_row_attention),
    triton=Form(gpu.content_and_row_attention, gpu.why_not_attention),
)
GLOBAL = Operation(
    'global_attention', _global_by_parts, _global_by_parts,
    cpu=Form(cpu.global_attention, cpu.why_not_global_attention),
    triton=Form(gpu.global_attention, gpu.why_not_global_attention),
)
HALVE = Operation('halve', reference.halve, plain.halve, cpu=Form(cpu.halve, cpu.why_not_halve))

LAYER = Operation(
    'global_self_attention',
    cpu=Form(cpu.layer, cpu.why_not_layer),
    triton=Form(gpu.layer, gpu.why_not_layer),
)
