"""Global content attention: queries gather a context summed over all positions, at a cost linear in their number.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch

from ._paths import register_gradients, triton_attends

__all__ = ['content_attention', 'content_attention_reference']


def content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Content attention with keys normalised over positions and queries left as they are.

    out[:, n] = sum over m, k of query[k, n] * softmax(key)[k, m] * value[:, m]

    The softmax runs over all positions, separately for each key channel, in at least float32. The product is taken
    right to left: a d x d context matrix for each head, never an N x N map.

    Args:
        query: Tensor of shape (B, heads, d, H', W'); H' is at most H, and W' at most W.
        key: Tensor of shape (B, heads, d, H, W).
        value: Tensor of shape (B, heads, e, H, W).

    Returns:
        Tensor of shape (B, heads, e, H', W') and dtype of `value`.
    """
    if not torch.jit.is_scripting():
        tensors = query, key, value
        if query.shape == value.shape and triton_attends(*tensors):
            return _on_gpu(query, key, value)
    return _content_attention(query, key, value)


def content_attention_reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same as `content_attention` through the N x N map of weights from every position to every other."""
    attention = torch.einsum('bhkn,bhkm->bhnm', query.flatten(3), _normalised_key(key).to(query.dtype))
    out = torch.einsum('bhnm,bhem->bhen', attention, value.flatten(3))
    return out.unflatten(-1, query.shape[3:])


def _content_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`content_attention` by operations that every compiler and exporter takes, for all images at once."""
    weight = _normalised_key(key).to(value.dtype)
    context = value.flatten(3) @ weight.transpose(-1, -2)
    return (context @ query.flatten(3)).unflatten(-1, query.shape[3:])


def _normalised_key(key: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    return key.flatten(3).softmax(-1, dtype=wide)


@torch.library.custom_op('timm_gsa::content_attention', mutates_args=(), device_types='cuda')
def _on_gpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from ._global_attention_triton import content  # imports Triton

    return content(query, key, value)


@_on_gpu.register_fake
def _like_part_of_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value[..., :query.shape[-2], :query.shape[-1]])


@torch.library.custom_op('timm_gsa::content_attention_backward', mutates_args=(), device_types='cuda')
def _on_gpu_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ._global_attention_triton import content_backward  # imports Triton

    return content_backward(grad, query, key, value)


register_gradients(_on_gpu, _on_gpu_backward, _content_attention)
