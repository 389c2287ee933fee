"""Batch norms as affine maps."""
from collections.abc import Callable

import torch
import torch.nn as nn

from ..ops._backend import affine_of

__all__ = ['affine_of', 'affine_or_batch', 'update_running', 'watched', 'weight_and_bias']


def affine_or_batch(
        norm: nn.BatchNorm2d,
        moments: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        count: int,
        like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and shift of each channel, (C,), in eval mode, or in training mode from the moments of a batch.

    Args:
        norm: The norm, whose running statistics follow the batch in training mode.
        moments: Gives mean and variance (with the divisor n) of each channel over the batch, (C,), differentiable.
        count: Numbers n of a channel in the batch.
        like: Has the dtype that is asked for, where it is wider than float32.
    """
    affine = affine_of(norm)
    if affine is not None:
        return affine
    mean, variance = moments()
    update_running(norm, mean.detach(), variance.detach(), count)
    weight, bias = weight_and_bias(norm, like)
    scale = (variance + norm.eps).rsqrt() * weight
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return scale.to(wide), (bias - mean * scale).to(wide)


def update_running(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
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


def weight_and_bias(norm: nn.BatchNorm2d, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors and summands that a norm learned, (C,); ones and zeros where it has none."""
    if norm.weight is None:
        return like.new_ones(norm.num_features), like.new_zeros(norm.num_features)
    return norm.weight, norm.bias


def watched(*modules: nn.Module) -> bool:
    """Whether a hook watches or changes what a module takes or gives."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)

