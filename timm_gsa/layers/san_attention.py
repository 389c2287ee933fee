"""The two self-attention layers of SAN: pairwise and patchwise.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, sections 3.1 to 3.3.
"""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerType, get_act_layer, get_norm_layer, register_notrace_module

from ..ops import aggregation, coordinates, patch, subtraction
from ..ops._backend import in_full_precision, short_cut, wide_softmax
from ..ops.san import PAIRWISE, PAIRWISE_WEIGHTS, PATCHWISE, PATCHWISE_WEIGHTS
from ..ops.san.neighbourhood import same_padding

__all__ = ['PairwiseAttention', 'PatchwiseAttention']


class _NeighbourhoodAttention(nn.Module):
    """What both kinds share: the projection to query, key and value, and the network that maps relations to weights."""

    def __init__(
            self,
            dim: int,
            dim_out: int | None,
            dim_key: int | None,
            kernel_size: int,
            num_groups: int | None,
            dilation: int,
            device: Any,
            dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        same_padding(kernel_size, dilation)  # raises where they are out of range
        self.dim_out = dim // 4 if dim_out is None else dim_out
        self.dim_key = dim // 16 if dim_key is None else dim_key
        self.num_groups = self.dim_out // 8 if num_groups is None else num_groups
        if self.dim_key < 1:
            raise ValueError(f'dim_key must be >= 1, got {self.dim_key} (a sixteenth of dim = {dim} where not given)')
        if self.num_groups < 1 or self.dim_out % self.num_groups != 0:
            raise ValueError(f'num_groups must divide dim_out = {self.dim_out}, got {self.num_groups}')
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Conv2d(dim, 2 * self.dim_key + self.dim_out, kernel_size=1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise every part as PyTorch does by default, which is what the authors trained from."""
        for child in self.children():
            reset = getattr(child, 'reset_parameters', None)
            if reset is not None:
                reset()

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Query (B, dim_key, H, W), key (B, dim_key, H, W) and value (B, dim_out, H, W) of a map (B, dim, H, W)."""
        return self.qkv(x).split([self.dim_key, self.dim_key, self.dim_out], dim=1)


@register_notrace_module  # works on shapes in Python
class PairwiseAttention(_NeighbourhoodAttention):
    """Pairwise self-attention: each neighbour's weights follow from its relation to the centre alone.

    out_i = sum over neighbours j of softmax over j of (gamma(query_i - key_j, position_i - position_j)) * value_j

    gamma is norm1, act, conv1, norm2, act, conv2 on each pair. Positions are coordinates from -1 to 1 over the map,
    mapped by the learned `position`; nothing depends on a fixed size. Verified to the bit of float64 rounding against
    the authors' code, gradients included; maps smaller than plain reflection allows follow our rule
    (`timm_gsa.ops.reflect_pad`), as does `dilation`, which the authors' networks never use.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the values and the output; dim / 4 where None.
        dim_key: Channels of query and key; dim / 16 where None.
        kernel_size: Odd number K of places a side of the neighbourhood.
        num_groups: Weight groups G; channels c, c + G, ... share weights. dim_out / 8 where None.
        dilation: Distance in pixels between neighbouring places.
        act_layer: Activation inside gamma.
        norm_layer: Norm inside gamma; its spatial axes are places and positions.

    Shape:
        Input (B, dim, H, W); output (B, dim_out, H, W).

    Raises:
        ValueError: K is even, or the channel numbers do not fit together.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int | None = None,
            dim_key: int | None = None,
            kernel_size: int = 7,
            num_groups: int | None = None,
            dilation: int = 1,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, dim_out, dim_key, kernel_size, num_groups, dilation, **dd)
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.position = nn.Conv2d(2, 2, kernel_size=1, **dd)
        self.norm1 = norm_layer(self.dim_key + 2, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv1 = nn.Conv2d(self.dim_key + 2, self.dim_key, kernel_size=1, bias=False, **dd)
        self.norm2 = norm_layer(self.dim_key, **dd)
        self.act2 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(self.dim_key, self.num_groups, kernel_size=1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x)
        if not torch.jit.is_scripting():
            out = short_cut(PAIRWISE, self, query, key, value)
            if out is not None:
                return out
        return aggregation(value, self.attention(query, key), self.kernel_size, self.dilation)

    def attention(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Weights (B, G, K * K, H, W) of every position's neighbours, which sum to 1 over the places."""
        if not torch.jit.is_scripting():
            weight = short_cut(PAIRWISE_WEIGHTS, self, query, key)
            if weight is not None:
                return weight
        batch, _, height, width = query.shape
        position = self.mapped_position(query)
        relation = subtraction(query, key, self.kernel_size, self.dilation)
        offset = subtraction(position, position, self.kernel_size, self.dilation).to(relation.dtype)
        weight = torch.cat([relation, offset.expand(batch, -1, -1, -1, -1)], dim=1).flatten(3)
        weight = self.conv1(self.act1(self.norm1(weight)))
        weight = self.conv2(self.act2(self.norm2(weight)))
        return wide_softmax(weight, 2).unflatten(3, (height, width))

    def mapped_position(self, query: torch.Tensor) -> torch.Tensor:
        """Coordinates of a map's positions as `position` maps them, (1, 2, H, W), in at least float32.

        Half precision (autocast too) would leave neighbouring positions hardly apart.
        """
        grid = coordinates(query.shape[-2], query.shape[-1], query.device, query.dtype)
        if not torch.jit.is_scripting():
            return in_full_precision(self.position, grid)
        bias = self.position.bias
        assert bias is not None  # for TorchScript, which takes the bias of any convolution for optional
        return ((self.position.weight * grid).sum(1) + bias[:, None, None]).unsqueeze(0)


@register_notrace_module  # works on shapes in Python
class PatchwiseAttention(_NeighbourhoodAttention):
    """Patchwise self-attention: all weights of a neighbourhood follow from all of its keys together.

    out_i = sum over neighbours j of gamma(query_i, key of every neighbour)_j * value_j

    gamma is norm1, act, conv1, norm2, act, conv2 on the concatenated channels and yields G * K * K weights for each
    position, without a softmax. Verified to the bit of float64 rounding against the authors' code, gradients included;
    maps smaller than plain reflection allows follow our rule (`timm_gsa.ops.reflect_pad`), as does `dilation`, which
    the authors' networks never use.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the values and the output; dim / 4 where None.
        dim_key: Channels of query and key; dim / 16 where None.
        kernel_size: Odd number K of places a side of the neighbourhood.
        num_groups: Weight groups G; channels c, c + G, ... share weights. dim_out / 8 where None.
        dilation: Distance in pixels between neighbouring places.
        act_layer: Activation inside gamma.
        norm_layer: Norm inside gamma.

    Shape:
        Input (B, dim, H, W); output (B, dim_out, H, W).

    Raises:
        ValueError: K is even, or the channel numbers do not fit together.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int | None = None,
            dim_key: int | None = None,
            kernel_size: int = 7,
            num_groups: int | None = None,
            dilation: int = 1,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, dim_out, dim_key, kernel_size, num_groups, dilation, **dd)
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        places = kernel_size ** 2
        self.norm1 = norm_layer(self.dim_key * (places + 1), **dd)
        self.act1 = act_layer(inplace=True)
        self.conv1 = nn.Conv2d(self.dim_key * (places + 1), self.num_groups, kernel_size=1, bias=False, **dd)
        self.norm2 = norm_layer(self.num_groups, **dd)
        self.act2 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(self.num_groups, self.num_groups * places, kernel_size=1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x)
        if not torch.jit.is_scripting():
            out = short_cut(PATCHWISE, self, query, key, value)
            if out is not None:
                return out
        return aggregation(value, self.attention(query, key), self.kernel_size, self.dilation)

    def attention(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Weights (B, G, K * K, H, W) of every position's neighbours, unbounded and not normalised."""
        if not torch.jit.is_scripting():
            weight = short_cut(PATCHWISE_WEIGHTS, self, query, key)
            if weight is not None:
                return weight
        weight = torch.cat([query, patch(key, self.kernel_size, self.dilation)], dim=1)
        weight = self.conv1(self.act1(self.norm1(weight)))
        weight = self.conv2(self.act2(self.norm2(weight)))
        return weight.unflatten(1, (self.num_groups, -1))
