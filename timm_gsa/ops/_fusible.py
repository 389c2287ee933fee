"""SAN's attention from query, key and value to the sum, in the form that torch.compile makes fast CPU code of.

Channels are innermost throughout, so that the neighbours in a row lie side by side in memory and every loop of the
compiled code runs along it. One row of the neighbourhood is computed at a time, in buffers that serve the next row too.
The operations of this package for eager mode are faster there; these are for inference under a compiler.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, equations 2 and 4.
"""
import torch

from .neighbourhood import reflect_pad, same_padding

__all__ = ['buffered', 'fusible_difference_attention', 'fusible_patch_attention']


def fusible_difference_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_query: torch.Tensor,
        position_key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`aggregation` by the softmax over the places of what `difference_network` gives.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        value: Map of shape (B, D, H, W), D a multiple of G.
        position_query: Further channels of all images' queries, (1, P, H, W).
        position_key: Further channels of all images' keys, (1, P, H, W).
        weight1: Matrix of shape (M, C + P).
        bias1: Vector of shape (M,).
        weight2: Matrix of shape (G, M). There is no second bias, as the softmax takes no notice of it.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, D, H, W), channels innermost in memory.
    """
    channels, window = query.shape[1], (kernel_size, dilation)
    weight1, position_weight = weight1.split([channels, weight1.shape[1] - channels], dim=1)
    centre = position_query.movedim(1, -1).unsqueeze(-2)
    offsets = torch.stack([(centre - keys).relu() for keys in _rows(position_key, *window)])
    offsets = offsets @ position_weight.t() + bias1
    # A copy for every row: kernels that read the same the compiler makes one of, which fills the buffers of all rows.
    queries = torch.stack([query.movedim(1, -1).unsqueeze(-2)] * kernel_size)
    logits = []
    for centre, keys, offset in zip(queries, _rows(key, *window), offsets, strict=True):
        hidden = ((centre - keys).relu() @ weight1.t() + offset).relu()
        logits.append(hidden @ weight2.t())
    highest = logits[0].amax(-2, keepdim=True)
    for each in logits[1:]:
        highest = torch.maximum(highest, each.amax(-2, keepdim=True))
    weights = [(each - highest).exp() for each in logits]
    share = 1 / sum(each.sum(-2, keepdim=True) for each in weights)
    return _weighted_sum(value, [each * share for each in weights], *window)


def fusible_patch_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`aggregation` by weight2 relu(weight1 relu(scale * relation + shift) + bias1) + bias2.

    The channels of the relation are those of the query, then those of `patch`.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        value: Map of shape (B, D, H, W), D a multiple of G.
        scale: Factors of shape (C + C * K * K,).
        shift: Summands, laid out as `scale`.
        weight1: Matrix of shape (M, C + C * K * K).
        bias1: Vector of shape (M,).
        weight2: Matrix of shape (G * K * K, M), places of a group one after another in row-major order.
        bias2: Summands, laid out as the rows of `weight2`.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, D, H, W), channels innermost in memory.
    """
    channels, window, places = query.shape[1], (kernel_size, dilation), (kernel_size, kernel_size)
    centre = (query.movedim(1, -1) * scale[:channels] + shift[:channels]).relu()
    hidden = centre @ weight1[:, :channels].t() + bias1
    # Places before channels, as the rows of keys have them.
    scale, shift = buffered(*(x[channels:].unflatten(0, (-1, *places)).movedim(0, -1) for x in (scale, shift)))
    weight1 = weight1[:, channels:].unflatten(1, (-1, *places)).permute(2, 3, 1, 0)
    for row, keys in enumerate(_rows(key, *window)):
        relation = (keys * scale[row] + shift[row]).relu()
        hidden = hidden + relation.flatten(-2) @ weight1[row].flatten(0, 1)
    hidden = hidden.relu()
    # The bias as one more column: added after the product, it would be copied to the size of the weights first.
    hidden = torch.cat([hidden, hidden.new_ones(1).expand(*hidden.shape[:-1], 1)], dim=-1)
    weight2 = torch.cat([weight2, bias2[:, None]], dim=1).unflatten(0, (-1, *places)).permute(1, 3, 2, 0)
    weights = [(hidden @ matrix.flatten(1)).unflatten(-1, (kernel_size, -1)) for matrix in weight2]
    return _weighted_sum(value, weights, *window)


def buffered(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of one shape, which the compiler computes once and not for every element of what is made of them."""
    return torch.stack(tensors).unbind()


def _weighted_sum(value: torch.Tensor, weights: list[torch.Tensor], kernel_size: int, dilation: int) -> torch.Tensor:
    """`aggregation` by a (B, H, W, K, G) of weights for each row."""
    out = torch.zeros((), dtype=value.dtype)
    for values, weight in zip(_rows(value, kernel_size, dilation), weights, strict=True):
        grouped = values.unflatten(-1, (-1, weight.shape[-1]))
        out = out + (grouped * weight.unsqueeze(-2)).sum(-3)
    return out.flatten(-2).movedim(-1, 1)


def _rows(x: torch.Tensor, kernel_size: int, dilation: int) -> list[torch.Tensor]:
    """The neighbours of every position, (B, H, W, K, C) for each row of the neighbourhood."""
    height = x.shape[-2]
    padded = _padded(x, same_padding(kernel_size, dilation))
    span = dilation * (kernel_size - 1) + 1
    windows = padded.unfold(2, span, 1)[..., ::dilation].transpose(-2, -1)
    return [windows[:, top:top + height] for top in range(0, span, dilation)]


def _padded(x: torch.Tensor, padding: int) -> torch.Tensor:
    """`reflect_pad` of (B, C, H, W), as (B, H + 2 * padding, W + 2 * padding, C)."""
    height, width = x.shape[-2:]
    if not 0 < padding < min(height, width):
        return reflect_pad(x, padding).movedim(1, -1)
    # Joined from slices, which the compiler makes a buffer of; a padding it would do again wherever that is read.
    x = x.movedim(1, -1)
    x = torch.cat([x[:, 1:padding + 1].flip(1), x, x[:, height - padding - 1:height - 1].flip(1)], dim=1)
    return torch.cat([x[:, :, 1:padding + 1].flip(2), x, x[:, :, width - padding - 1:width - 1].flip(2)], dim=2)
