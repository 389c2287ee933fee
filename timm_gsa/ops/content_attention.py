"""Global content attention: queries gather a context summed over all positions, at a cost linear in their number.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
import torch

from ._paths import compiled_for_cpu, eager_on_cpu, register_gradients, register_triton, triton_attends

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
        by_triton = query.shape == value.shape and triton_attends(*tensors)
        if eager_on_cpu(*tensors) or compiled_for_cpu(*tensors) or by_triton:
            return _image_by_image(query, key, value)
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


@torch.library.custom_op('timm_gsa::content_attention', mutates_args=(), device_types='cpu')
def _image_by_image(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`content_attention` image by image, so that all that lies between stays in the cache and no weights are kept.

    An operator, as otherwise slices of a common projection, whose images are not adjacent, would be copied.
    """
    out = _like_part_of_value(query, key, value)
    for image in range(len(value)):
        context = torch.bmm(value[image].flatten(2), _weight(key[image].flatten(2)).mT)
        _product(context, query[image].flatten(2), out[image])
    return out


@_image_by_image.register_fake
def _like_part_of_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value[..., :query.shape[-2], :query.shape[-1]])


@torch.library.custom_op('timm_gsa::content_attention_backward', mutates_args=(), device_types='cpu')
def _image_by_image_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for image in range(len(value)):
        g, q, k, v = (x[image].flatten(2) for x in (grad, query, key, value))
        grad_query, grad_key, grad_value = (x[image] for x in grads)
        weight = _weight(k)
        context = torch.bmm(v, weight.mT)
        grad_context = torch.bmm(g, q.mT)
        _product(context.mT, g, grad_query)
        _product(grad_context, weight, grad_value)
        _product(grad_context.mT, v, grad_key)
        grad_key -= (grad_context * context).sum(1)[..., None, None]  # the sum of gradients times weights
        grad_key *= weight.unflatten(2, grad_key.shape[2:])
    return grads


def _weight(key: torch.Tensor) -> torch.Tensor:
    """Softmax of keys (heads, d, N) over positions, laid out in memory as they are."""
    return key.permute(2, 0, 1).softmax(0).permute(1, 2, 0) if key.stride(1) == 1 else key.softmax(-1)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Matrix products of all heads, written to a map (heads, channels, H, W)."""
    if out.is_contiguous():
        torch.bmm(left, right, out=out.flatten(2))
    else:
        out.copy_(torch.bmm(right.mT, left.mT).mT.unflatten(2, out.shape[2:]))


register_gradients(_image_by_image, _image_by_image_backward, _content_attention)
register_triton(_image_by_image, 'content')
register_triton(_image_by_image_backward, 'content_backward')
