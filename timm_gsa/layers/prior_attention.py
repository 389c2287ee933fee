"""Prior attention: a convolution some of whose output channels come from a fixed-form Gaussian attention map.

Source: Tan et al., "Explicitly Modeled Attention Maps for Image Classification", arXiv 2006.07872.
"""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import register_notrace_module

from ..ops import gaussian_attention
from ._pool import overlapping_average_pool

__all__ = ['PriorAttention']


@register_notrace_module  # works on shapes in Python
class PriorAttention(nn.Module):
    """3 x 3 convolution beside Gaussian attention with one learnable radius, concatenated along the channels.

    out = concat(conv(x), proj(gaussian_attention(value(x), radius)))

    A map of any size and aspect ratio runs with the same parameters, as nothing is stored for a position. With
    `stride` 2 the attention branch averages 3 x 3 windows (padding not counted) first.

    A reconstruction. Verified: parameters and costs of the depth-152 network agree with the paper's claims. Our
    choice: distances in cells of the attended grid, radius 1.0 at the start and one for each layer, pooling before the
    value projection, distances divided by the dilation where a network trades stride for dilation.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the output; `dim` where None.
        stride: Stride of the layer, 1 or 2.
        dilation: Dilation of the convolution.
        ratio: Share of the output channels that come from attention (the upsilon of attention-augmented networks),
            truncated to whole channels.
        radius: Initial radius of the Gaussian in cells, positive.
        attn_dilation: Cells of the attended map that the attention counts as one; `dilation` where None.

    Shape:
        Input (B, dim, H, W); output (B, dim_out, ceil(H / stride), ceil(W / stride)). Parameters: `conv` 3 x 3 to the
        remaining channels, `value` 1 x 1 to the attended channels, `proj` 1 x 1 among them, `radius` (1,).

    Raises:
        ValueError: `stride` is neither 1 nor 2, a dilation is smaller than 1, `radius` is not positive, or `ratio`
            leaves no channel for the convolution or the attention.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int | None = None,
            stride: int = 1,
            dilation: int = 1,
            ratio: float = 0.1,
            radius: float = 1.0,
            attn_dilation: int | None = None,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        attn_dilation = dilation if attn_dilation is None else attn_dilation
        attended = int(ratio * dim_out)
        if stride not in (1, 2):
            raise ValueError(f'stride must be 1 or 2, got {stride}')
        for name, cells in (('dilation', dilation), ('attn_dilation', attn_dilation)):
            if cells < 1:
                raise ValueError(f'{name} must be >= 1, got {cells}')
        if radius <= 0:  # at 0 its gradient vanishes, below it only duplicates the positive range
            raise ValueError(f'radius must be positive, got {radius}')
        if not 0 < attended < dim_out:
            raise ValueError(f'ratio must leave 1 to {dim_out - 1} of {dim_out} channels to attention, got {ratio}')
        self.stride = stride
        self.attn_dilation = attn_dilation
        self.init_radius = radius
        self.conv = nn.Conv2d(
            dim,
            dim_out - attended,
            kernel_size=3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            bias=False,
            **dd,
        )
        self.value = nn.Conv2d(dim, attended, kernel_size=1, bias=False, **dd)
        self.proj = nn.Conv2d(attended, attended, kernel_size=1, bias=False, **dd)
        self.radius = nn.Parameter(torch.empty(1, **dd))  # with an axis, along which FSDP shards
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the convolutions as timm's ResNet does its own, and the radius."""
        for conv in (self.conv, self.value, self.proj):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        nn.init.constant_(self.radius, self.init_radius)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Values of the attention branch, (B, attended channels, ceil(H / stride), ceil(W / stride))."""
        if self.stride == 2:
            x = overlapping_average_pool(x)
        return self.value(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = gaussian_attention(self.project(x), self.radius, self.attn_dilation)
        return torch.cat([self.conv(x), self.proj(attended)], dim=1)
