"""SAN's layers by the functions of `timm_gsa.ops`, which compute the submodules' norms and convolutions too."""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .._backend import Affine, affine_of, why_not_pristine, wide_type

__all__ = [
    'by_batch',
    'conv2_bias',
    'fixed_norms',
    'hidden_of_patches',
    'logits_of_differences',
    'why_not_own_parts',
]

_PARTS = dict(norm1=None, act1=None, conv1=False, norm2=None, act2=None, conv2=None)
_CLASSES = dict(act1=nn.ReLU, conv1=nn.Conv2d, act2=nn.ReLU, conv2=nn.Conv2d)


def why_not_own_parts(layer: Any) -> str | None:
    """Why a short cut may not compute a layer's submodules between the relations and the weights."""
    for name, kind in _CLASSES.items():
        if type(getattr(layer, name)) is not kind:
            return f'{name} is a {type(getattr(layer, name)).__name__}'
    reason = why_not_pristine(layer, _PARTS)
    if reason is None and not by_batch(layer) and len(fixed_norms(layer)) != 2:
        return 'norm1 and norm2 are neither fixed affine maps nor batch norms in training'
    return reason


def by_batch(layer: Any) -> bool:
    """True if both norms are batch norms that use the statistics of the batch and follow them."""
    return all(type(norm) is nn.BatchNorm2d and norm.training for norm in (layer.norm1, layer.norm2))


def fixed_norms(layer: Any) -> list[Affine]:
    """Factor and shift of each of the two norms that is fixed."""
    return [affine for affine in map(affine_of, (layer.norm1, layer.norm2)) if affine is not None]


def conv2_bias(layer: Any) -> torch.Tensor:
    bias = layer.conv2.bias
    return layer.conv2.weight.new_zeros(layer.conv2.out_channels) if bias is None else bias


def logits_of_differences(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        position: torch.Tensor,
        moments: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        network: Callable[..., torch.Tensor],
        normed_network: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Logits of `PairwiseAttention`; the first norm acts on query and key.

    Maps are at least float32 until they are subtracted: half precision hardly separates the positions of neighbours.
    `position` is (1, 2, H, W); `moments`, `network` and `normed_network` are `difference_moments` and the networks of
    differences.
    """
    dtype = query.dtype
    position = position.expand(query.shape[0], -1, -1, -1)
    query, key = torch.cat([query, position], dim=1), torch.cat([key, position], dim=1)
    window = layer.kernel_size, layer.dilation
    count = query[:, 0].numel() * layer.kernel_size ** 2
    scale, shift = _affine_or_batch(layer.norm1, lambda: moments(query, key, *window), count, query)
    query = query * scale[:, None, None] + shift[:, None, None]
    key = key * scale[:, None, None]
    weight1, weight2 = layer.conv1.weight[:, :, 0, 0], layer.conv2.weight[:, :, 0, 0].to(dtype)
    bias2 = conv2_bias(layer)
    affine = affine_of(layer.norm2)
    if affine is not None:
        return network(query, key, weight1 * affine[0][:, None], affine[1], weight2, bias2, *window)
    scale, shift = _weight_and_bias(layer.norm2, query)
    logits, mean, variance = normed_network(
        query, key, weight1, scale, shift, layer.norm2.eps, weight2, bias2, *window)
    _update_running(layer.norm2, mean, variance, count)
    return logits


def hidden_of_patches(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        moments: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        network: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Input of the second norm of `PatchwiseAttention`; `moments` and `network` are those of patches."""
    channels, window = layer.dim_key, (layer.kernel_size, layer.dilation)

    def joined_moments() -> tuple[torch.Tensor, torch.Tensor]:
        variance, mean = torch.var_mean(query.double(), (0, 2, 3), correction=0)
        means, variances = moments(key, *window)
        return torch.cat([mean, means]), torch.cat([variance, variances])

    scale, shift = _affine_or_batch(layer.norm1, joined_moments, query[:, 0].numel(), query)
    centre = (query * scale[:channels, None, None] + shift[:channels, None, None]).relu().to(query.dtype)
    weight = layer.conv1.weight
    hidden = network(key, scale[channels:], shift[channels:], weight[:, channels:, 0, 0], *window)
    return hidden + F.conv2d(centre, weight[:, :channels])


def _affine_or_batch(
        norm: nn.BatchNorm2d,
        moments: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        count: int,
        like: torch.Tensor,
) -> Affine:
    """Factor and summand of each channel, (C,), in eval mode, or in training mode from the moments of a batch.

    Args:
        norm: The norm, whose running statistics follow the batch in training mode.
        moments: Gives mean and variance (with the divisor n) of each channel over the batch, (C,), differentiable.
        count: Numbers n of a channel in the batch.
        like: The result has its dtype if that is wider than float32.
    """
    affine = affine_of(norm)
    if affine is not None:
        return affine
    mean, variance = moments()
    _update_running(norm, mean.detach(), variance.detach(), count)
    weight, bias = _weight_and_bias(norm, like)
    scale = (variance + norm.eps).rsqrt() * weight
    wide = wide_type(like.dtype)
    return Affine(scale.to(wide), (bias - mean * scale).to(wide))


def _update_running(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Let running statistics follow a batch as the norm itself does; `variance` has the divisor n = `count`."""
    if count < 2:
        raise ValueError(f'Expected more than 1 value per channel when training, got {count}')
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * count / (count - 1))):
        # As a tensor: a compiler takes no number from one.
        momentum = norm.num_batches_tracked.to(running.dtype).reciprocal() if norm.momentum is None else norm.momentum
        running.lerp_(batch.to(running.dtype), momentum)


def _weight_and_bias(norm: nn.BatchNorm2d, like: torch.Tensor) -> Affine:
    """Factors and summands that a norm learned, (C,); ones and zeros where it has none."""
    if norm.weight is None:
        return Affine(like.new_ones(norm.num_features), like.new_zeros(norm.num_features))
    return Affine(norm.weight, norm.bias)
