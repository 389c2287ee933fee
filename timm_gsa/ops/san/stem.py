"""The stem of SAN up to its pool on a CPU, in inference.

Before the pool the maps are as large as the images, with 64 channels in the authors' networks. The first convolution is
1 x 1 and takes in the norm; adding a summand and rectifying keep the order of numbers. So the maximum over the
four places of the pool's windows is taken of products, place by place, and no map is larger than the pooled one.
"""
import functools
from typing import Any

import torch
import torch.nn as nn

from .._backend import affine_of, is_compiling, records_gradients, why_not_cpu, why_not_pristine
from .innermost import buffered

__all__ = ['stem', 'why_not_stem']

_COLOURS = 4  # at most, if the stem is one loop


def why_not_stem(layer: Any, x: torch.Tensor, pool: type[nn.Module]) -> str | None:
    tensors = x, *layer.parameters()
    if records_gradients(*tensors):
        return 'gradients are recorded'
    reason = why_not_cpu(*tensors)
    if reason is None and list(layer._modules)[:4] != ['conv', 'norm', 'act', 'pool']:
        return 'the stem has other submodules'
    if reason is None and (type(layer.conv), type(layer.act), type(layer.pool)) != (nn.Conv2d, nn.ReLU, pool):
        return 'conv, act or pool is of another class'
    reason = reason or why_not_pristine(layer, dict(conv=None, norm=None, act=None, pool=None), (pool,))
    if reason is None and type(layer.norm) is not nn.Identity and affine_of(layer.norm) is None:
        return 'norm is no fixed affine map: it is in training mode, or no batch norm with running statistics'
    return reason or _why_not_image(layer, x)


def _why_not_image(layer: Any, x: torch.Tensor) -> str | None:
    """Images that do not fit are left to the submodules, which raise torch's own errors."""
    if x.dim() != 4 or x.shape[1] != layer.conv.in_channels or x.dtype != layer.conv.weight.dtype:
        return 'conv does not take images of this shape or dtype'
    if is_compiling():
        return None if layer.conv.in_channels <= _COLOURS else f'the images have more than {_COLOURS} channels'
    return 'the images have less than 2 x 2 pixels' if min(x.shape[-2:]) < 2 else None


def stem(layer: Any, x: torch.Tensor, pool: type[nn.Module]) -> torch.Tensor:
    """Convolution, norm, activation and pool of `SANStem`."""
    weight, bias = _folded(layer)
    return _in_one_loop(weight, bias, x) if is_compiling() else _by_place(weight, bias, x)


def _folded(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix (O, I) and summands (O,) of convolution and norm."""
    weight = layer.conv.weight[:, :, 0, 0]
    bias = weight.new_zeros(len(weight)) if layer.conv.bias is None else layer.conv.bias
    affine = affine_of(layer.norm)
    if affine is None:
        return weight, bias
    scale, shift = affine
    return weight * scale[:, None], bias * scale + shift


def _by_place(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Image by image: a product for each of the four places of the windows."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    pixels = x[..., :2 * height, :2 * width].unflatten(-1, (width, 2)).unflatten(-3, (height, 2))
    pixels = pixels.permute(0, 3, 5, 1, 2, 4).reshape(len(x), 4, x.shape[1], height * width)
    in_rows = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if in_rows else torch.channels_last
    out = torch.empty(
        (len(x), len(weight), height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    for image, places in zip(out.flatten(2), pixels, strict=True):
        torch.mm(weight, places[0], out=image)
        other = torch.empty_like(image)
        for place in places[1:]:
            torch.maximum(image, torch.mm(weight, place, out=other), out=image)
        image.add_(bias[:, None]).relu_()
    return out


def _in_one_loop(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same as one loop over pixels, for a compiler."""
    rows = buffered(*weight.unbind(1))
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    x = x.movedim(1, -1).unsqueeze(-1)

    def mapped(top: int, left: int) -> torch.Tensor:
        pixels = x[:, top:height:2, left:width:2]
        terms = (pixels[..., channel, :] * row for channel, row in enumerate(rows))
        return functools.reduce(torch.add, terms)

    pooled = torch.maximum(torch.maximum(mapped(0, 0), mapped(0, 1)), torch.maximum(mapped(1, 0), mapped(1, 1)))
    return (pooled + bias).relu().movedim(-1, 1)
