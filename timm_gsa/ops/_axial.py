"""Attention along one axis in blocks of logits that stay in the cache of a CPU; not differentiable.

All columns of all heads and images of a block stand behind one another, as one axis of length n. What is gathered along
rows of a map is gathered along the columns of its transpose.
"""
import torch

__all__ = [
    'by_columns',
    'by_rows',
    'column_blocks',
    'from_columns',
    'gather',
    'image_blocks',
    'is_narrow',
    'room',
    'unfolded',
]

# Logits that a core computes at once: few enough for its cache, and enough for matrix products.
_BLOCK = 2 ** 18


def unfolded(table: torch.Tensor, length: int, stride: int = 1) -> torch.Tensor:
    """(2L - 1, d) embeddings of offsets as (L, d, L), [x, :, i] for the offset i - x.

    With a stride, `stride` places ask as one of as many times the channels, and averages over the squares of that side
    are gathered: (L / stride, stride * d, L).
    """
    embedding = table.unfold(0, length, 1).flip(0).contiguous()
    return embedding if stride == 1 else embedding.view(length // stride, -1, length).div_(stride ** 2)


def by_rows(query: torch.Tensor, memory: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """(images, heads, d, H, W) copied to (H / stride, n, stride * d), in memory for as many numbers or more."""
    rows = query.unflatten(3, (-1, stride)).permute(3, 0, 1, 5, 4, 2)
    return _copied(rows, memory).view(len(rows), -1, stride * query.shape[2])


def by_columns(value: torch.Tensor, memory: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """(images, heads, e, H, W) copied to (n / stride, stride * H, e), in memory for as many numbers or more."""
    return _copied(value.permute(0, 1, 4, 3, 2), memory).view(-1, stride * value.shape[3], value.shape[2])


def _copied(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return memory[:x.numel()].view(x.shape).copy_(x)


def from_columns(columns: torch.Tensor, out: torch.Tensor, stride: int = 1) -> None:
    """Write columns as `by_columns` lays them out into a map (images, heads, e, H, W)."""
    turned = out.unflatten(4, (-1, stride)).permute(0, 1, 4, 5, 3, 2)
    turned.copy_(columns.unflatten(1, (stride, -1)).unflatten(0, turned.shape[:3]))


def image_blocks(batch: int, heads: int, height: int, width: int) -> list[slice]:
    """Images whose logits along a column are computed at once; at least one, and most in the first."""
    images = max(1, _block() // (heads * height * height * width))
    return [slice(first, min(first + images, batch)) for first in range(0, batch, images)]


def column_blocks(count: int, length: int) -> list[slice]:
    """Columns whose logits are computed at once, of so many of this length: blocks of nearly the same size."""
    columns = -(-count // -(-count * length ** 2 // _block()))
    return [slice(first, min(first + columns, count)) for first in range(0, count, columns)]


def room(like: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Memory for the logits of any block of up to so many columns of this length.

    To be asked for once: a CPU may take longer to be given new memory than to compute what goes there.
    """
    return like.new_empty(min(count, -(-_block() // length ** 2)) * length ** 2)


def _block() -> int:
    """Logits that are computed at once, by all cores; in no more memory than eight of them ask for."""
    return _BLOCK * min(torch.get_num_threads(), 8)


def is_narrow(depth: int, length: int) -> bool:
    """Whether a product whose result is (length, depth) takes less time as one whose result is (depth, length)."""
    return 3 * depth <= length


def gather(
        query: torch.Tensor,
        embedding: torch.Tensor,
        value: torch.Tensor,
        memory: torch.Tensor,
        logits_memory: torch.Tensor,
) -> torch.Tensor:
    """out[n, x] = sum over i of (query[x, n] . embedding[x, :, i]) * value[n, i]

    Adjacent columns may have a sum in common, as have the columns of a map that is halved afterwards: `value` then has
    their H one after another.

    Args:
        query: (P, N, d), as `by_rows` lays it out where the places x are those that are gathered.
        embedding: (P, d, H), as `unfolded` has it, with d as above.
        value: (n, H, e) as `by_columns` lays it out, or (n, N / n * H, e), in any order in memory.
        memory: For n * P * e numbers or more, which the result is written to.
        logits_memory: By `room`, for n columns of as many logits or more.

    Returns:
        Tensor of shape (n, P, e), in memory as that, or as (n, e, P) where `is_narrow`.
    """
    places, length = embedding.shape[0], embedding.shape[2]
    count, summed, depth = value.shape
    narrow = is_narrow(depth, places)
    out = memory[:count * places * depth].view(count, *((depth, places) if narrow else (places, depth)))
    in_sum = query.shape[1] // count
    for block in column_blocks(count, length):
        columns = query[:, in_sum * block.start:in_sum * block.stop]
        logits = logits_memory[:columns.shape[1] * places * length].view(places, -1, length)
        torch.bmm(columns, embedding, out=logits)
        logits = logits.view(places, -1, summed)
        if narrow:
            torch.bmm(value[block].transpose(1, 2), logits.permute(1, 2, 0), out=out[block])
        else:
            torch.bmm(logits.transpose(0, 1), value[block], out=out[block])
    return out.transpose(1, 2) if narrow else out
