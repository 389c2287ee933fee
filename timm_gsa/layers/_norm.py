"""Norms that are fixed affine maps."""
from typing import Any

import torch
import torch.nn as nn

__all__ = ['affine_of']


def affine_of(norm: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Factor and shift of each channel, (C,) in at least float32, of a batch norm that uses its running statistics.

    None where the norm is no such map: in training mode, without running statistics, of another kind, or with an
    activation in it.
    """
    mean, variance = getattr(norm, 'running_mean', None), getattr(norm, 'running_var', None)
    if norm.training or mean is None or variance is None or not isinstance(getattr(norm, 'act', None), _NO_ACT):
        return None
    wide = torch.float64 if mean.dtype == torch.float64 else torch.float32
    scale = (variance.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    shift = -mean.to(wide) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    return scale, shift


_NO_ACT = (type(None), nn.Identity)
