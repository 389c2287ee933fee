"""Maps of `PairwiseAttention` and `PatchwiseAttention`, for each weight group.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, equations 2 and 4.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..layers import PairwiseAttention, PatchwiseAttention
from ..ops import aggregation
from ..ops.san.neighbourhood import reflected_index, same_padding
from ._reader import Frame, LayerAttention, Reader, transposed, wide

__all__ = ['READER', 'NeighbourhoodMaps']


@dataclass(frozen=True, eq=False)
class NeighbourhoodMaps(LayerAttention):
    """Weights of `PairwiseAttention` or `PatchwiseAttention` for each of its G groups (Zhao et al. 2020, eqs. 2, 4).

        output[c, n] = sum over places k of places[c mod G, n, k] * value[c, neighbour k of n]
                     = sum over m of weight[c mod G, n, m] * value[c, m]

    Neighbours outside the map are mirrored into it, so that near a border several places are one position. Pairwise
    weights are positive and sum to 1; patchwise weights are signed and not normalised.

    Attributes:
        places: Weights by place in the neighbourhood, (B, G, P, K, K).
        weight: The same by position on the map, (B, G, P, H, W).
    """

    places: torch.Tensor
    weight: torch.Tensor

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        return {'weight': self.weight}

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        source = value.flatten(2).unflatten(1, (-1, self.weight.shape[1]))  # (B, C / G, G, N)
        return torch.einsum('bgpm,bsgm->bsgp', self.weight.flatten(3).to(value.dtype), source).flatten(1, 2)


def _weights(layer: PairwiseAttention | PatchwiseAttention, x: torch.Tensor) -> torch.Tensor:
    """(B, G, K * K, H, W)."""
    query, key, _ = layer.project(x)
    return wide(layer.attention(query, key))


def _read(frame: Frame, layer: PairwiseAttention | PatchwiseAttention, x: torch.Tensor) -> NeighbourhoodMaps:
    height, width = feat_size = (x.shape[-2], x.shape[-1])
    rows, columns = frame.cells.unbind(-1)
    places = _weights(layer, x)[..., rows, columns].transpose(-1, -2)  # (B, G, P, K * K)
    step = layer.dilation * torch.arange(layer.kernel_size, device=x.device)
    padding = same_padding(layer.kernel_size, layer.dilation)
    row_of = reflected_index(height, padding, x.device)[rows[:, None] + step]  # (P, K)
    column_of = reflected_index(width, padding, x.device)[columns[:, None] + step]
    target = (row_of[:, :, None] * width + column_of[:, None, :]).flatten(1)  # (P, K * K)
    on_map = places.new_zeros(*places.shape[:3], height * width)
    on_map.scatter_add_(-1, target.expand_as(places), places)
    return NeighbourhoodMaps(
        **frame.fields(feat_size, normalised=isinstance(layer, PairwiseAttention)),
        places=places.unflatten(-1, (layer.kernel_size, layer.kernel_size)),
        weight=on_map.unflatten(-1, feat_size),
    )


def _share_back(
        name: str,
        layer: PairwiseAttention | PatchwiseAttention,
        x: torch.Tensor,
        share: torch.Tensor,
) -> torch.Tensor:
    """Through the mean over groups of absolute weights."""
    places = F.normalize(_weights(layer, x).abs().mean(1, keepdim=True), p=1, dim=2)

    def attend(value: torch.Tensor) -> torch.Tensor:
        return aggregation(value, places, layer.kernel_size, layer.dilation)

    return transposed(attend, share, (x.shape[-2], x.shape[-1]))


READER = Reader((PairwiseAttention, PatchwiseAttention), _read, _share_back)
