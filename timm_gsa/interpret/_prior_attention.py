"""Maps of `PriorAttention`, the same for all images.

Source: Tan et al., "Explicitly Modeled Attention Maps for Image Classification", arXiv 2006.07872.
"""
from dataclasses import dataclass

import torch

from ..layers import PriorAttention
from ..ops import gaussian_weight
from ._reader import Frame, LayerAttention, Reader, no_autocast

__all__ = ['READER', 'GaussianMaps']


@dataclass(frozen=True, eq=False)
class GaussianMaps(LayerAttention):
    """Weights of `PriorAttention`, the same for all images and channels (Tan et al. 2020; a reconstruction).

        weight[n, m] = softmax over m of (-||n - m||^2 / (2 r^2)), with r^2 = radius^2 + 1e-6

    They act on the values of the attention branch, which a layer of stride 2 takes from a map averaged to the size of
    its output; the branch's projection follows, and the convolution beside it has no part in them.

    Attributes:
        weight: (B, 1, P, H, W); rows are positive and sum to 1.
        radius: Learned radius, in positions of the attended map that `dilation` makes one.
        dilation: Positions of the attended map that the attention counts as one.
    """

    weight: torch.Tensor
    radius: float
    dilation: int

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        return {'weight': self.weight}

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        return torch.einsum('bpm,bcm->bcp', self.weight[:, 0].flatten(2).to(value.dtype), value.flatten(2))


def _read(frame: Frame, layer: PriorAttention, x: torch.Tensor) -> GaussianMaps:
    height, width = frame.out_size  # the branch attends to a map of its output's size
    with no_autocast(x):
        down = gaussian_weight(height, layer.radius, layer.attn_dilation)[frame.cells[:, 0]]
        across = gaussian_weight(width, layer.radius, layer.attn_dilation)[frame.cells[:, 1]]
        weight = down[:, :, None] * across[:, None, :]
    return GaussianMaps(
        **frame.fields(frame.out_size, normalised=True),
        weight=weight.expand(x.shape[0], 1, -1, -1, -1),
        radius=layer.radius.item(),
        dilation=layer.attn_dilation,
    )


READER = Reader((PriorAttention,), _read, 'has a convolution beside it')
