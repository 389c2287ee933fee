"""GSA's operations as the textbook has them: einsum, and embeddings picked by one-hot tensors of all pairs."""
import torch
import torch.nn.functional as F

from .plain import normalised_key

__all__ = ['column_attention', 'content_and_row_attention', 'content_attention', 'halve']


def content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Content attention as the paper factors it: keys times values first, so that no N x N map is made."""
    context = torch.einsum('bhkm,bhem->bhke', normalised_key(key).to(query.dtype), value.flatten(3))
    return torch.einsum('bhkn,bhke->bhen', query.flatten(3), context).unflatten(-1, query.shape[3:])


def column_attention(query: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Column attention with embeddings picked by a one-hot tensor of all pairs of rows."""
    height = query.shape[-2]
    row = torch.arange(height, device=query.device)
    one_hot = F.one_hot(row[None, :] - row[:, None] + height - 1, 2 * height - 1).to(query.dtype)
    embedding = torch.einsum('xir,rd->xid', one_hot, table.to(query.dtype))
    logits = torch.einsum('bhdxy,xid->bhxyi', query, embedding)
    return torch.einsum('bhxyi,bheiy->bhexy', logits, value)


def content_and_row_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    """The sum of content attention and of column attention on the transposed map."""
    return content_attention(query, key, value) + column_attention(query.mT, column.mT, table).mT


def halve(x: torch.Tensor) -> torch.Tensor:
    """Average pool over 2 x 2 positions."""
    return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
