"""Pools whose form for contiguous maps in inference on a CPU is several times as fast as the kernel of torch."""
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from ..ops._paths import inference_on_cpu

__all__ = ['HalvingMaxPool', 'OverlappingMaxPool', 'overlapping_average_pool']


@register_notrace_module  # works on shapes in Python
class HalvingMaxPool(nn.Module):
    """Max pool over 2 x 2 pixels, which ignores the last row and column of odd maps.

    The same as `nn.MaxPool2d(2)`. The faster form is the maximum of slices, whose gradient is another where pixels are
    equal.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
            if inference_on_cpu(x) and height > 0 and width > 0:
                x = torch.maximum(x[..., 0:height:2, :width], x[..., 1:height:2, :width])
                return torch.maximum(x[..., 0::2], x[..., 1::2])
        return F.max_pool2d(x, 2)


@register_notrace_module
class OverlappingMaxPool(nn.MaxPool2d):
    """Max pool over 3 x 3 pixels with stride 2 and padding 1, that of a ResNet's stem.

    The same as `nn.MaxPool2d(3, 2, 1)`.
    """

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if _by_slices(x):
                return _image_by_image(x, torch.maximum)
        return F.max_pool2d(x, 3, 2, 1)


def overlapping_average_pool(x: torch.Tensor) -> torch.Tensor:
    """Average over the pixels of 3 x 3 that lie within the map, with stride 2 and padding 1.

    Args:
        x: Maps of shape (B, C, H, W).

    Returns:
        Maps of shape (B, C, ceil(H / 2), ceil(W / 2)).
    """
    if not torch.jit.is_scripting():
        if _by_slices(x):
            covered = _image_by_image(x.new_ones(1, 1, *x.shape[2:]), torch.add)
            return _image_by_image(x, torch.add).div_(covered)
    return F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False)


@torch.jit.unused
def _by_slices(x: torch.Tensor) -> bool:
    return inference_on_cpu(x) and x.ndim == 4 and x.is_contiguous()


Operation = Callable[..., torch.Tensor]


@torch.jit.unused
def _image_by_image(x: torch.Tensor, operation: Operation) -> torch.Tensor:
    batch, channels, height, width = x.shape
    rows = x.new_empty(channels, (height + 1) // 2, width)
    out = x.new_empty(batch, channels, (height + 1) // 2, (width + 1) // 2)
    for image, pooled in zip(x, out, strict=True):
        _pool_axis(image.movedim(1, 0), operation, rows.movedim(1, 0))
        _pool_axis(rows.movedim(2, 0), operation, pooled.movedim(2, 0))
    return out


def _pool_axis(x: torch.Tensor, operation: Operation, out: torch.Tensor) -> None:
    """Maximum or sum of every second slice along the first axis and of the slices beside it."""
    centre, between = x[::2], x[1::2]
    pairs = len(between)
    operation(centre[:pairs], between, out=out[:pairs])
    out[pairs:].copy_(centre[pairs:])
    operation(out[1:], between[:len(out) - 1], out=out[1:])
