"""Maps of attention condensers: what they do at a position depends on its surroundings, but acts on it alone.

Source: Wong et al., "Faster Attention Is What You Need", arXiv 2208.06980 (`CondenserBlock` of DC-AC), and
"TinySpeech", arXiv 2008.04245 (`AttentionCondenser`).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..layers import AttentionCondenser
from ..models.dcac import CondenserBlock
from ._reader import Frame, LayerAttention, Reader, no_autocast, wide

__all__ = ['BLOCK_READER', 'LAYER_READER', 'CondenserMaps', 'GateMaps']


def _at_cells(x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """(B, C, P) at the positions (P, 2) of a map (B, C, H, W)."""
    return x[..., cells[:, 0], cells[:, 1]]


def _own_position(factor: torch.Tensor, cells: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Factors (B, G, P) as maps (B, G, P, H, W) that are 0 but at the position itself."""
    place = F.one_hot(cells[:, 0] * size[1] + cells[:, 1], size[0] * size[1])
    return (factor[..., None] * place.to(factor.dtype)).unflatten(-1, size)


@dataclass(frozen=True, eq=False)
class GateMaps(LayerAttention):
    """Gate of a `CondenserBlock` with attention (Wong et al. 2022).

        output[c, n] = gate[c, n] * value[c, n],    gate[:, n] = softmax over channels of F(x)[:, n]

    The values are what the block's `downsample` gives; its activation follows the product.

    Attributes:
        gate: The gate at every position, (B, C, H, W); positive, sums to 1 over the channels.
    """

    gate: torch.Tensor

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        return {'gate': _own_position(_at_cells(self.gate, self.cells), self.cells, self.feat_size)}

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        return _at_cells(self.gate.to(value.dtype) * value, self.cells)


@dataclass(frozen=True, eq=False)
class CondenserMaps(LayerAttention):
    """Attention of an `AttentionCondenser` (Wong et al. 2020).

        output[c, n] = scale * value[c, n] + attention[c, n]

    The values are the layer's input. The smaller the scale S, the more selective the attention A.

    Attributes:
        attention: A at every position, (B, C, H, W).
        scale: The learned S.
    """

    attention: torch.Tensor
    scale: float

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        factor = self.attention.new_full((len(self.attention), 1, len(self.cells)), self.scale)
        return {'scale': _own_position(factor, self.cells, self.feat_size)}

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        return _at_cells(self.scale * value + self.attention.to(value.dtype), self.cells)


def _read_block(frame: Frame, block: CondenserBlock, x: torch.Tensor) -> GateMaps:
    condensed = wide(block.condense(x))
    with no_autocast(x):
        return GateMaps(**frame.fields(frame.out_size, normalised=False), gate=condensed.softmax(1))


def _read_layer(frame: Frame, layer: AttentionCondenser, x: torch.Tensor) -> CondenserMaps:
    return CondenserMaps(
        **frame.fields(frame.out_size, normalised=False),
        attention=wide(layer.attention(x)),
        scale=layer.scale.item(),
    )


_NO_ROLLOUT = 'has convolutions within its attention'

BLOCK_READER = Reader(
    (CondenserBlock,), _read_block, _NO_ROLLOUT, has_attention=lambda block: block.downsample is not None)
LAYER_READER = Reader((AttentionCondenser,), _read_layer, _NO_ROLLOUT)
