"""Sparse MLP: a map mixed along its rows and along its columns by learned matrices, instead of by attention.

Source: Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", arXiv 2109.05422, and the
authors' code, https://github.com/microsoft/SPACH (MIT licence).

Verified against the authors' code in float64: outputs, gradients and running statistics of both layers. Our choice:
maps of other sizes than the layer was built for.
"""
import math
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerType, get_act_layer, get_norm_layer, register_notrace_module, to_2tuple

from ..ops import column_mixing, resize_mixing_bias, resize_mixing_matrix, row_mixing
from ..ops._backend import short_cut
from ..ops.sparse_mlp import JOIN

__all__ = ['AxialMixing', 'DepthwiseBlock', 'SparseMLP']


@register_notrace_module  # works on shapes in Python
class AxialMixing(nn.Module):
    """Linear map along one axis of a map, the same for all channels and for all places of the other axis.

    rows:     out[b, c, h, i] = sum over j of weight[i, j] * x[b, c, h, j] + bias[i]
    columns:  out[b, c, i, w] = sum over j of weight[i, j] * x[b, c, j, w] + bias[i]

    A map of another size is mixed by `weight` and `bias` resampled to it, and a state dict of another size loads
    resampled. At the size of the layer nothing is resampled.

    Args:
        length: Positions L along the axis.
        axis: 'width' mixes along the rows of the map, 'height' along its columns.

    Shape:
        Input (B, C, H, W); output the same. Parameters: `weight` (L, L) and `bias` (L,).

    Raises:
        ValueError: `length` is not positive or `axis` is another word.
    """

    def __init__(self, length: int, axis: str, device: Any = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if length < 1:
            raise ValueError(f'length must be >= 1, got {length}')
        if axis not in ('width', 'height'):
            raise ValueError(f"axis must be 'width' or 'height', got {axis!r}")
        self.axis = axis
        self.weight = nn.Parameter(torch.empty(length, length, **dd))
        self.bias = nn.Parameter(torch.empty(length, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors' 1 x 1 convolution over positions: both uniform within 1 / sqrt(L)."""
        bound = 1 / math.sqrt(self.weight.shape[0])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f'{self.weight.shape[0]}, axis={self.axis!r}'

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        length = self.weight.shape[0]
        weight, bias = state_dict.get(prefix + 'weight'), state_dict.get(prefix + 'bias')
        if weight is not None and bias is not None and weight.shape == (*bias.shape, *bias.shape) and bias.ndim == 1:
            state_dict[prefix + 'weight'] = resize_mixing_matrix(weight, length)
            state_dict[prefix + 'bias'] = resize_mixing_bias(bias, length)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def matrix(self, length: int) -> torch.Tensor:
        """Weights of an axis of so many positions, (length, length); row i holds what position i takes from each."""
        return resize_mixing_matrix(self.weight, length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.axis == 'width':
            length = x.shape[-1]
            return row_mixing(x, self.matrix(length), resize_mixing_bias(self.bias, length))
        length = x.shape[-2]
        return column_mixing(x, self.matrix(length), resize_mixing_bias(self.bias, length))


class DepthwiseBlock(nn.Module):
    """Pre-activation depthwise convolution: conv3x3(act(norm(x))), one filter a channel.

    Args:
        dim: Channels C.
        act_layer: Activation layer; the authors' is the exact GELU.
        norm_layer: Norm layer.

    Shape:
        Input (B, C, H, W); output the same. Parameters: `norm`, and `conv` 3 x 3 without bias.

    Raises:
        ValueError: `dim` is smaller than 1.
    """

    def __init__(
            self,
            dim: int,
            act_layer: LayerType = nn.GELU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim < 1:
            raise ValueError(f'dim must be >= 1, got {dim}')
        self.norm = get_norm_layer(norm_layer)(dim, **dd)
        self.act = get_act_layer(act_layer)()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.act(self.norm(x)))


class SparseMLP(nn.Module):
    """Token mixing of sMLPNet: a position sees its row, its column and itself.

    z = act(norm(x));  out = fuse(concat(z, width(z), height(z)))

    `width` mixes the positions of every row, `height` those of every column, each by one matrix for all channels; they
    work side by side on z, not in sequence. Nothing follows `fuse`. The cost of a position is C * (3C + H + W), not
    C * H * W as in an MLP over all positions.

    Args:
        dim: Channels C.
        feat_size: Height and width of the map the layer is built for, one number for both or (H, W). A map of another
            size runs with resampled matrices.
        act_layer: Activation layer; the authors' is the exact GELU.
        norm_layer: Norm layer.

    Shape:
        Input (B, C, H, W); output the same. Parameters: `norm`; `width` with a (W, W) and `height` with an (H, H)
        matrix and a bias each; `fuse` a 1 x 1 convolution 3C -> C without bias, its input in the order z, width,
        height.

    Raises:
        ValueError: `feat_size` is not positive.
    """

    def __init__(
            self,
            dim: int,
            feat_size: int | tuple[int, int],
            act_layer: LayerType = nn.GELU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        height, width = to_2tuple(feat_size)
        if height < 1 or width < 1:
            raise ValueError(f'feat_size must be positive, got {feat_size}')
        self.norm = get_norm_layer(norm_layer)(dim, **dd)
        self.act = get_act_layer(act_layer)()
        self.width = AxialMixing(width, 'width', **dd)
        self.height = AxialMixing(height, 'height', **dd)
        self.fuse = nn.Conv2d(3 * dim, dim, kernel_size=1, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(x))
        rows, columns = self.width(x), self.height(x)
        if not torch.jit.is_scripting():
            joined = short_cut(JOIN, self, x, rows, columns)
            if joined is not None:
                return joined
        return self.fuse(torch.cat([x, rows, columns], dim=1))
