"""Attention condenser: attention computed on a condensed map and expanded again.

Source: Wong et al., "TinySpeech: Attention Condensers for Deep Speech Recognition Neural Networks on Edge Devices",
arXiv 2008.04245, and Wong et al., "AttendNets", arXiv 2009.14385. The papers give the form Q = C(V), K = E(Q),
A = X(K) and the limit V' -> A for S -> 0. Which layers C, E and X are was not readable for us, and no code of the
authors is public.
"""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType, get_act_layer, register_notrace_module

__all__ = ['AttentionCondenser']


@register_notrace_module  # works on shapes in Python
class AttentionCondenser(nn.Module):
    """Self-attention by condensing, embedding and expanding, after TinySpeech and AttendNets.

    Q = condense(V);  K = embed(Q);  A = expand(K);  V' = S * V + A

    The smaller the learned scale S, the more selective the attention: V' -> A as S -> 0.

    From the papers: the four steps, and what S does in the limit. Our choice: `condense` is a 2 x 2 max pool (a last
    odd row or column is pooled alone), `embed` a 3 x 3 group convolution, activation and a 1 x 1 convolution, `expand`
    repeats each number over the pixels that were pooled; A has no activation; S is one number for each layer and
    starts at 1.

    Args:
        dim: Channels C.
        embed_dim: Channels between the two convolutions; C / 2, at least one for each group, where None.
        groups: Groups of the 3 x 3 convolution.
        act_layer: Activation layer between the two convolutions.
        scale: Initial S.

    Shape:
        Input (B, C, H, W); output the same. Parameters: `conv1` 3 x 3 and `conv2` 1 x 1, both with bias, and `scale`
        (1,).

    Raises:
        ValueError: `groups` does not divide `dim` or `embed_dim`.
    """

    def __init__(
            self,
            dim: int,
            embed_dim: int | None = None,
            groups: int = 1,
            act_layer: LayerType = nn.ReLU,
            scale: float = 1.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if groups < 1 or dim % groups != 0:
            raise ValueError(f'groups must divide dim = {dim}, got {groups}')
        if embed_dim is None:
            embed_dim = max(dim // 2 // groups, 1) * groups
        if embed_dim < 1 or embed_dim % groups != 0:
            raise ValueError(f'groups must divide embed_dim = {embed_dim}, got {groups}')
        self.init_scale = scale
        self.conv1 = nn.Conv2d(dim, embed_dim, kernel_size=3, padding=1, groups=groups, **dd)
        self.act = get_act_layer(act_layer)()
        self.conv2 = nn.Conv2d(embed_dim, dim, kernel_size=1, **dd)
        self.scale = nn.Parameter(torch.empty(1, **dd))  # with an axis, along which FSDP shards
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the convolutions as PyTorch does by default, and the scale."""
        self.conv1.reset_parameters()
        self.conv2.reset_parameters()
        nn.init.constant_(self.scale, self.init_scale)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Attention values A of a map, (B, C, H, W)."""
        height, width = x.shape[-2:]
        condensed = F.max_pool2d(x, 2, ceil_mode=True)
        embedded = self.conv2(self.act(self.conv1(condensed)))
        expanded = embedded.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
        return expanded[..., :height, :width]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x + self.attention(x)
