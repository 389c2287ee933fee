"""What all readers of attention share: the record of a layer's maps, and what the readers of families give."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..ops._backend import wide_type

__all__ = ['Frame', 'LayerAttention', 'Reader', 'no_autocast', 'transposed', 'wide']


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """Attention of one layer at the chosen positions, for a batch of images; P is the number of positions.

    Weights are over the positions of the layer's values, a map of H x W, and of at least float32. For given weights
    each layer is linear in its values; `attend` is that linear map.

    Attributes:
        layer: Name of the layer in the model.
        feat_size: Height and width (H, W) of the map that is attended to.
        out_size: Height and width of the layer's output, on which the query positions lie.
        stride: Pixels of the image to a position of the attended map, along height and width. Where the map does not
            divide the image this is the mean distance, not a whole number.
        cells: Row and column of each query position on the output map, int64 of shape (P, 2).
        normalised: Whether the weights of a position are positive and sum to 1; else they are signed.
    """

    layer: str
    feat_size: tuple[int, int]
    out_size: tuple[int, int]
    stride: tuple[float, float]
    cells: torch.Tensor
    normalised: bool

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        """Name and weights of every map of the layer, each of shape (B, groups, P, H, W)."""
        raise NotImplementedError

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        """Output of the layer's attention at the query positions, of shape (B, C, P), from values (B, C, H, W)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Frame:
    """Where a layer stands: its name, the size of its output and of the image, and the query positions."""

    layer: str
    out_size: tuple[int, int]
    image_size: Sequence[int]
    cells: torch.Tensor

    def fields(self, feat_size: tuple[int, int], normalised: bool) -> dict[str, Any]:
        """Arguments of `LayerAttention` for a layer that attends to a map of this size."""
        return dict(
            layer=self.layer,
            feat_size=feat_size,
            out_size=self.out_size,
            stride=(self.image_size[0] / feat_size[0], self.image_size[1] / feat_size[1]),
            cells=self.cells,
            normalised=normalised,
        )


class Reader(NamedTuple):
    """Reader of one kind of layers.

    Attributes:
        layers: Classes of the layers; subclasses are not read.
        read: Maps of a layer from its frame, the layer and its input.
        share_back: Takes shares (B, P, h, w) of the positions of a layer's output, from the layer's name, the layer,
            its input and these shares, back to the positions it attended to, (B, P, H, W); or the reason why a rollout
            through such a layer has no meaning.
        has_attention: False for layers of these classes that are built without attention.
    """

    layers: tuple[type[nn.Module], ...]
    read: Callable[[Frame, Any, torch.Tensor], LayerAttention]
    share_back: Callable[[str, Any, torch.Tensor, torch.Tensor], torch.Tensor] | str
    has_attention: Callable[[Any], bool] = lambda layer: True


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in at least float32."""
    return x.to(wide_type(x.dtype))


def no_autocast(x: torch.Tensor) -> torch.autocast:
    """Context without autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def transposed(
        linear: Callable[[torch.Tensor], torch.Tensor],
        share: torch.Tensor,
        size: tuple[int, int],
) -> torch.Tensor:
    """Product of `share` and the matrix of a linear map of (B, P, *size), which is the gradient of that map."""
    with torch.enable_grad():
        value = share.new_zeros(*share.shape[:2], *size, requires_grad=True)
        return torch.autograd.grad(linear(value), value, share)[0]
