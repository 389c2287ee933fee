"""Pools as modules."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from ..ops.pooling import check_map, halving_max_pool, overlapping_average_pool, overlapping_max_pool

__all__ = ['HalvingAveragePool', 'HalvingMaxPool', 'OverlappingMaxPool', 'overlapping_average_pool']


@register_notrace_module  # works on shapes in Python
class HalvingMaxPool(nn.Module):
    """Max pool over 2 x 2 pixels, which ignores the last row and column of odd maps: `nn.MaxPool2d(2)`.

    Args:
        min_size: Smallest side of the images that the network takes, for the error on smaller ones.

    Raises:
        ValueError: The map has less than 2 x 2 pixels.
    """

    def __init__(self, min_size: int | None = None) -> None:
        super().__init__()
        self.min_size = min_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            check_map(x, 2, self.min_size)
            return halving_max_pool(x)
        return F.max_pool2d(x, 2)


@register_notrace_module
class HalvingAveragePool(nn.AvgPool2d):
    """Average pool over 2 x 2 pixels, which ignores the last row and column of odd maps: `nn.AvgPool2d(2)`.

    Args:
        min_size: Smallest side of the images that the network takes, for the error on smaller ones.

    Raises:
        ValueError: The map has less than 2 x 2 pixels.
    """

    def __init__(self, min_size: int | None = None) -> None:
        super().__init__(kernel_size=2, stride=2)
        self.min_size = min_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            check_map(x, 2, self.min_size)
        return F.avg_pool2d(x, 2)


@register_notrace_module
class OverlappingMaxPool(nn.MaxPool2d):
    """Max pool over 3 x 3 pixels with stride 2 and padding 1, that of a ResNet's stem: `nn.MaxPool2d(3, 2, 1)`."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            return overlapping_max_pool(x)
        return F.max_pool2d(x, 3, 2, 1)
