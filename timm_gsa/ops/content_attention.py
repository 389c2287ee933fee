"""Global content attention: queries gather a context summed over all positions, at a cost linear in their number.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch

from ._paths import inference_on_cpu

__all__ = ['content_attention', 'content_attention_reference']


def content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Content attention with keys normalised over positions and queries left as they are.

    out[:, n] = sum over m, k of query[k, n] * softmax(key)[k, m] * value[:, m]

    The softmax runs over all positions, separately for each key channel, in at least float32. The product is taken
    right to left: a d x d context matrix for each head, never an N x N map.

    Args:
        query: Tensor of shape (B, heads, d, H, W).
        key: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).

    Returns:
        Tensor of shape (B, heads, e, H, W) and dtype of `value`.
    """
    if not torch.jit.is_scripting():
        if inference_on_cpu(query, key, value):
            return _image_by_image(query, key, value)
    weight = _normalised_key(key).to(value.dtype)
    context = value.flatten(3) @ weight.transpose(-1, -2)
    return (context @ query.flatten(3)).view(value.shape)


def content_attention_reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same as `content_attention` through the N x N map of weights from every position to every other."""
    attention = torch.einsum('bhkn,bhkm->bhnm', query.flatten(3), _normalised_key(key).to(query.dtype))
    return torch.einsum('bhnm,bhem->bhen', attention, value.flatten(3)).reshape(value.shape)


def _image_by_image(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`content_attention` without copies of slices of a common projection, whose images are not adjacent.

    Not differentiable.
    """
    out = value.new_empty(value.shape)
    for image in range(value.shape[0]):
        weight = key[image].flatten(2).softmax(-1)
        context = torch.bmm(value[image].flatten(2), weight.transpose(-1, -2))
        torch.bmm(context, query[image].flatten(2), out=out[image].flatten(2))
    return out


def _normalised_key(key: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    return key.flatten(3).softmax(-1, dtype=wide)
