"""GSA's operations by plain operators of torch, for any device, transform, exporter and tracer."""
import torch
import torch.nn.functional as F

from .._backend import is_compiling, statically_true, wide_softmax, wide_type

__all__ = [
    'column_attention',
    'content_and_row_attention',
    'content_attention',
    'halve',
    'is_even',
    'normalised_key',
    'resize_relative_table',
]


def content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Content attention through the d x d context of each head."""
    weight = normalised_key(key).to(value.dtype)
    context = value.flatten(3) @ weight.transpose(-1, -2)
    return (context @ query.flatten(3)).unflatten(-1, query.shape[3:])


def normalised_key(key: torch.Tensor) -> torch.Tensor:
    """Softmax of keys (B, heads, d, H, W) over positions, (B, heads, d, N), in at least float32."""
    return wide_softmax(key.flatten(3), -1)


def column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Column attention with the logits of all positions."""
    position = torch.arange(query.shape[-2], device=table.device)
    embedding = table.to(query.dtype)[position[None, :] - position[:, None] + query.shape[-2] - 1]  # (L, L, d), [x, i]
    logits = torch.einsum('bhdxy,xid->bhyxi', query, embedding)
    return torch.einsum('bhyxi,bheiy->bhexy', logits, value)


def content_and_row_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    """The sum of both."""
    row = column_attention(query.transpose(-1, -2), column.transpose(-1, -2), table).transpose(-1, -2)
    return content_attention(query, key, value) + row


def halve(x: torch.Tensor) -> torch.Tensor:
    """Average pool over 2 x 2 positions; the last windows of odd maps average what they cover."""
    if not torch.jit.is_scripting():
        if is_compiling():
            return _halve_by_slices(x)
    return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


@torch.jit.unused
def _halve_by_slices(x: torch.Tensor) -> torch.Tensor:
    """For a compiler: Inductor compiles a pool that rounds up once for odd and once for even maps."""
    if is_even(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    for axis in (-2, -1):
        first = 2 * torch.arange((x.shape[axis] + 1) // 2, device=x.device)
        second = (first + 1).clamp(max=x.shape[axis] - 1)
        x = (x.index_select(axis, first) + x.index_select(axis, second)) / 2
    return x


def is_even(x: torch.Tensor) -> bool:
    """True if height and width of a map are even at every size that a program is for."""
    return statically_true(x.shape[-2] % 2 == 0) and statically_true(x.shape[-1] % 2 == 0)


def resize_relative_table(table: torch.Tensor, length: int) -> torch.Tensor:
    """`timm_gsa.ops.resize_relative_table` by arithmetic that holds at every length, also where the table fits."""
    rows = table.shape[0]
    wide = wide_type(table.dtype)
    offset = torch.arange(1 - length, length, device=table.device)
    # Offset 0 keeps its place, and the outermost offsets theirs; an axis of one position has offset 0 alone.
    source = offset.to(wide) * (rows // 2) / offset[-1].clamp(min=1) + rows // 2
    lower = source.floor().clamp(0, max(rows - 2, 0))
    share = (source - lower)[:, None]
    lower_row = lower.long()
    upper_row = (lower_row + 1).clamp(max=rows - 1)
    resized = table[lower_row].to(wide) * (1 - share) + table[upper_row].to(wide) * share
    return (resized * ((rows + 1) / 2 / (offset[-1].to(wide) + 1))).to(table.dtype)
