"""Maps of `SparseMLP`: a row and a column of its mixing matrices, the same for all images.

Source: Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", arXiv 2109.05422.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..layers import SparseMLP
from ..ops import resize_mixing_bias
from ._reader import Frame, LayerAttention, Reader, no_autocast, wide

__all__ = ['READER', 'AxialMaps']


@dataclass(frozen=True, eq=False)
class AxialMaps(LayerAttention):
    """Weights of `SparseMLP` along the row and the column of a position, the same for all images and channels.

        row[n, m]    = width.weight[column of n, column of m]    in the row of n, else 0
        column[n, m] = height.weight[row of n, row of m]         in the column of n, else 0

    They act on the map behind the layer's norm and activation. `fuse` follows, which takes this map, the map mixed
    along its rows and the map mixed along its columns. On a map of another size than the layer was built for, the
    matrices are those resampled to it. They are learned and signed, and do not depend on the image.

    Attributes:
        row: Weights along the row, (B, 1, P, H, W).
        column: Weights along the column, (B, 1, P, H, W).
        row_bias: Summand of the mixing along the row, (P,).
        column_bias: Summand of the mixing along the column, (P,).
    """

    row: torch.Tensor
    column: torch.Tensor
    row_bias: torch.Tensor
    column_bias: torch.Tensor

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        return {'row': self.row, 'column': self.column}

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        """What `fuse` takes at the query positions, (B, 3C, P), from the map (B, C, H, W) behind the activation."""
        def mixed(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            weight, bias = weight[:, 0].flatten(2).to(value.dtype), bias.to(value.dtype)
            return torch.einsum('bpm,bcm->bcp', weight, value.flatten(2)) + bias

        own = value[..., self.cells[:, 0], self.cells[:, 1]]
        return torch.cat([own, mixed(self.row, self.row_bias), mixed(self.column, self.column_bias)], dim=1)


def _read(frame: Frame, layer: SparseMLP, x: torch.Tensor) -> AxialMaps:
    height, width = feat_size = (x.shape[-2], x.shape[-1])
    rows, columns = frame.cells.unbind(-1)
    with no_autocast(x):
        along_row, along_column = wide(layer.width.matrix(width))[columns], wide(layer.height.matrix(height))[rows]
        in_row = F.one_hot(rows, height).to(along_row)[:, :, None] * along_row[:, None, :]
        in_column = along_column[:, :, None] * F.one_hot(columns, width).to(along_column)[:, None, :]
        return AxialMaps(
            **frame.fields(feat_size, normalised=False),
            row=in_row.expand(x.shape[0], 1, -1, -1, -1),
            column=in_column.expand(x.shape[0], 1, -1, -1, -1),
            row_bias=wide(resize_mixing_bias(layer.width.bias, width))[columns],
            column_bias=wide(resize_mixing_bias(layer.height.bias, height))[rows],
        )


READER = Reader((SparseMLP,), _read, 'passes its input on beside the mixing')
