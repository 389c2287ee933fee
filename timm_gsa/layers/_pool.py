"""Max pools of the networks' stems, with forms that are faster in inference on a CPU."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from ..ops._paths import inference_on_cpu

__all__ = ['HalvingMaxPool', 'OverlappingMaxPool']


@register_notrace_module  # works on shapes in Python
class HalvingMaxPool(nn.Module):
    """Max pool over 2 x 2 pixels, which ignores the last row and column of odd maps.

    The same as `nn.MaxPool2d(2)`, whose kernel for contiguous maps on a CPU takes several times as long as the maximum
    of slices; the gradient of that is another where pixels are equal.
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

    The same as `nn.MaxPool2d(3, 2, 1)`, whose kernel for contiguous maps on a CPU takes several times as long as the
    maximum of slices, image by image.
    """

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if inference_on_cpu(x) and x.ndim == 4 and x.is_contiguous():
                return _image_by_image(x)
        return F.max_pool2d(x, 3, 2, 1)


@torch.jit.unused
def _image_by_image(x: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    rows = x.new_empty(channels, (height + 1) // 2, width)
    out = x.new_empty(batch, channels, (height + 1) // 2, (width + 1) // 2)
    for image, pooled in zip(x, out, strict=True):
        _pool_axis(image.movedim(1, 0), rows.movedim(1, 0))
        _pool_axis(rows.movedim(2, 0), pooled.movedim(2, 0))
    return out


def _pool_axis(x: torch.Tensor, out: torch.Tensor) -> None:
    """Maximum of every second slice along the first axis and of the slices beside it."""
    centre, between = x[::2], x[1::2]
    pairs = len(between)
    torch.maximum(centre[:pairs], between, out=out[:pairs])
    out[pairs:].copy_(centre[pairs:])
    torch.maximum(out[1:], between[:len(out) - 1], out=out[1:])
