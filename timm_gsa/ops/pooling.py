"""Pools, with forms for inference on a CPU that are several times as fast as the kernels of torch.

Gradients, and everything on a GPU, are those of the pools of torch.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ._backend import Form, Operation, compute, is_compiling, records_gradients, statically_true, why_not_cpu

__all__ = ['check_map', 'halving_max_pool', 'overlapping_average_pool', 'overlapping_max_pool']


def check_map(x: torch.Tensor, min_side: int, min_size: int | None = None) -> None:
    """Check a map before a pool or convolution without padding; sizes that a program leaves open pass.

    Args:
        x: Map of shape (..., H, W).
        min_side: Smallest height and width.
        min_size: Smallest side of the images of the network, for the error.

    Raises:
        ValueError: The map is smaller.
    """
    height, width = x.shape[-2:]
    if statically_true(height < min_side) or statically_true(width < min_side):
        images = '' if min_size is None else f': images must be at least {min_size} x {min_size} pixels'
        raise ValueError(f'maps must be at least {min_side} x {min_side}, got {height} x {width}{images}')


def halving_max_pool(x: torch.Tensor) -> torch.Tensor:
    """Max pool over 2 x 2 pixels, which ignores the last row and column of odd maps.

    Args:
        x: Maps of shape (B, C, H, W) or (C, H, W).

    Returns:
        Maps of shape (..., floor(H / 2), floor(W / 2)).
    """
    return compute(_HALVING_MAX, x)


def overlapping_max_pool(x: torch.Tensor) -> torch.Tensor:
    """Max pool over 3 x 3 pixels with stride 2 and padding 1, that of a ResNet's stem.

    Args:
        x: Maps of shape (B, C, H, W) or (C, H, W).

    Returns:
        Maps of shape (..., ceil(H / 2), ceil(W / 2)).
    """
    return compute(_OVERLAPPING_MAX, x)


def overlapping_average_pool(x: torch.Tensor) -> torch.Tensor:
    """Average over the pixels of 3 x 3 that lie within the map, with stride 2 and padding 1.

    Args:
        x: Maps of shape (B, C, H, W).

    Returns:
        Maps of shape (B, C, ceil(H / 2), ceil(W / 2)).
    """
    if not torch.jit.is_scripting():
        return compute(_OVERLAPPING_AVERAGE, x)
    return _average(x)


def _max(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 2)


def _max_of_nine(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, 2, 1)


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False)


def _why_not_inference(x: torch.Tensor) -> str | None:
    if is_compiling():
        return 'a compiler fuses the plain form'
    return 'gradients are recorded' if records_gradients(x) else why_not_cpu(x)


def _why_not_pairs(x: torch.Tensor) -> str | None:
    return _why_not_inference(x) or ('the map has less than 2 x 2 pixels' if min(x.shape[-2:]) < 2 else None)


def _max_of_slices(x: torch.Tensor) -> torch.Tensor:
    """The maximum of slices. For inference alone: where pixels are equal its gradient is not that of the pool."""
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    x = torch.maximum(x[..., 0:height:2, :width], x[..., 1:height:2, :width])
    return torch.maximum(x[..., 0::2], x[..., 1::2])


def _why_not_slices(x: torch.Tensor) -> str | None:
    reason = _why_not_inference(x)
    if reason is None and not (x.ndim == 4 and x.is_contiguous()):
        return 'the maps are no contiguous batch'
    return reason


def _max_of_nine_slices(x: torch.Tensor) -> torch.Tensor:
    return _image_by_image(x, torch.maximum)


def _average_of_slices(x: torch.Tensor) -> torch.Tensor:
    covered = _image_by_image(x.new_ones(1, 1, *x.shape[2:]), torch.add)
    return _image_by_image(x, torch.add).div_(covered)


def _image_by_image(x: torch.Tensor, combine: Callable[..., torch.Tensor]) -> torch.Tensor:
    batch, channels, height, width = x.shape
    rows = x.new_empty(channels, (height + 1) // 2, width)
    out = x.new_empty(batch, channels, (height + 1) // 2, (width + 1) // 2)
    for image, pooled in zip(x, out, strict=True):
        _pool_axis(image.movedim(1, 0), combine, rows.movedim(1, 0))
        _pool_axis(rows.movedim(2, 0), combine, pooled.movedim(2, 0))
    return out


def _pool_axis(x: torch.Tensor, combine: Callable[..., torch.Tensor], out: torch.Tensor) -> None:
    """Maximum or sum of every second slice along the first axis and of the slices beside it."""
    centre, between = x[::2], x[1::2]
    pairs = len(between)
    combine(centre[:pairs], between, out=out[:pairs])
    out[pairs:].copy_(centre[pairs:])
    combine(out[1:], between[:len(out) - 1], out=out[1:])


_HALVING_MAX = Operation('halving_max_pool', _max, _max, cpu=Form(_max_of_slices, _why_not_pairs))
_OVERLAPPING_MAX = Operation(
    'overlapping_max_pool', _max_of_nine, _max_of_nine, cpu=Form(_max_of_nine_slices, _why_not_slices))
_OVERLAPPING_AVERAGE = Operation(
    'overlapping_average_pool', _average, _average, cpu=Form(_average_of_slices, _why_not_slices))
