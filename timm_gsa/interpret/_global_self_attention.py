"""Maps of `GlobalSelfAttention`, for each head.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..layers import GlobalSelfAttention
from ..ops import resize_relative_table
from ..ops._backend import affine_of
from ._reader import Frame, LayerAttention, Reader, no_autocast, wide

__all__ = ['READER', 'GlobalMaps']

_ROLLOUT_CELLS = 64  # query positions whose maps are held at once


@dataclass(frozen=True, eq=False)
class GlobalMaps(LayerAttention):
    """Weights of `GlobalSelfAttention` for each of its h heads (Shen et al. 2020, Figure 1).

        content[n, m]  = sum over k of query[k, n] * softmax over positions of (key)[k, m]
        column[n, m]   = query[:, n] . rel_h[row of m - row of n]   in the column of n, else 0
        row[n, m]      = query[:, n] . rel_w[column of m - column of n]   in the row of n, else 0
        position[n, m] = sum over l of row[n, l] * column[l, m]

        output[c, n] = sum over m of (content[n, m] + scale[c] * position[n, m]) * value[c, m] + constant[c, n]

    Between the column and the row step stands a batch norm: in eval mode the affine map scale[c] * x + shift[c], so
    that constant[c, n] = shift[c] * sum over l of row[n, l]. Neither branch normalises its weights; they are signed.
    A layer of stride 2 averages windows of 2 x 2 outputs, and all maps are averaged over the window.

    Attributes:
        content: Content weights, (B, h, P, H, W).
        column: Weights of the column step, (B, h, P, H, W); it maps the values to what the norm receives.
        row: Weights of the row step, (B, h, P, H, W), over what the norm gives.
        position: Both steps in one without the norm, (B, h, P, H, W).
        scale: Factor of the norm for each channel, (C,).
        constant: What the norm's shift adds to the output, (B, C, P).
    """

    content: torch.Tensor
    column: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    scale: torch.Tensor
    constant: torch.Tensor

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        return {'content': self.content, 'position': self.position, 'column': self.column, 'row': self.row}

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        heads = self.content.shape[1]
        source = value.flatten(2).unflatten(1, (heads, -1))  # (B, h, d, N)
        content, position = (
            torch.einsum('bhpm,bhdm->bhdp', weight.flatten(3).to(value.dtype), source).flatten(1, 2)
            for weight in (self.content, self.position)
        )
        return content + self.scale.to(value.dtype)[:, None] * position + self.constant.to(value.dtype)


class _Window(NamedTuple):
    """Rows and columns that each output position averages, and the share of each, (P, stride ** 2)."""

    rows: torch.Tensor
    columns: torch.Tensor
    share: torch.Tensor


def _window(cells: torch.Tensor, stride: int, feat_size: tuple[int, int], dtype: torch.dtype) -> _Window:
    """At the border of an odd map windows are narrower: the share of what lies outside is 0."""
    step = torch.arange(stride, device=cells.device)
    rows = (cells[:, 0, None, None] * stride + step[:, None]).expand(-1, stride, stride).flatten(1)
    columns = (cells[:, 1, None, None] * stride + step).expand(-1, stride, stride).flatten(1)
    inside = (rows < feat_size[0]) & (columns < feat_size[1])
    share = inside.to(dtype) / inside.sum(1, keepdim=True)
    return _Window(rows.clamp(max=feat_size[0] - 1), columns.clamp(max=feat_size[1] - 1), share)


def _affine(frame: Frame, layer: GlobalSelfAttention) -> tuple[torch.Tensor, torch.Tensor]:
    affine = affine_of(layer.norm)
    if affine is None:
        raise ValueError(
            f'layer {frame.layer} must have a batch norm with running statistics, whose map is affine, '
            f'got {type(layer.norm).__name__}'
        )
    return affine


def _read(frame: Frame, layer: GlobalSelfAttention, x: torch.Tensor) -> GlobalMaps:
    if layer.branches != 'both' or layer.rel_h is None or layer.rel_w is None:
        raise ValueError(f'layer {frame.layer} must have both branches, got {layer.branches!r}')
    height, width = feat_size = (x.shape[-2], x.shape[-1])
    query, key, _ = map(wide, layer.project(x))
    with no_autocast(x):
        scale, shift = _affine(frame, layer)
        rel_h = wide(resize_relative_table(layer.rel_h, height))
        rel_w = wide(resize_relative_table(layer.rel_w, width))
        rows, columns, share = _window(frame.cells, layer.stride, feat_size, query.dtype)  # (P, S) each
        at = query[..., rows, columns]  # (B, h, d, P, S)
        content = torch.einsum('bhkps,ps,bhkm->bhpm', at, share, key.flatten(3).softmax(-1))
        offsets = torch.arange(width, device=x.device) - columns[..., None] + width - 1
        along_row = torch.einsum('bhkps,psjk->bhpsj', at, rel_w[offsets])
        offsets = torch.arange(height, device=x.device) - rows[..., None] + height - 1
        embedding = rel_h[offsets]  # (P, S, H, d)
        along_column = torch.einsum('bhkpsj,psik->bhpsij', query[..., rows, :], embedding)  # at (row, j), over i
        position = torch.einsum('ps,bhpsj,bhpsij->bhpij', share, along_row, along_column)
        own_column = torch.einsum('bhkps,psik->bhpsi', at, embedding)
        in_row = F.one_hot(rows, height).to(share) * share[..., None]
        in_column = F.one_hot(columns, width).to(share) * share[..., None]
        constant = torch.einsum('ps,bhpsj->bhp', share, along_row).repeat_interleave(layer.head_dim, dim=1)
        return GlobalMaps(
            **frame.fields(feat_size, normalised=False),
            content=content.unflatten(-1, feat_size),
            column=torch.einsum('bhpsi,psj->bhpij', own_column, in_column),
            row=torch.einsum('bhpsj,psi->bhpij', along_row, in_row),
            position=position,
            scale=scale,
            constant=shift[:, None] * constant,
        )


def _share_back(name: str, layer: GlobalSelfAttention, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Through absolute weights of content and position together, with the mean factor of the norm between."""
    feat_size, out_size = (x.shape[-2], x.shape[-1]), (share.shape[-2], share.shape[-1])
    cells = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in out_size)).reshape(-1, 2)
    total = share.new_zeros(*share.shape[:2], feat_size[0] * feat_size[1])
    parts = cells.split(_ROLLOUT_CELLS), share.flatten(2).split(_ROLLOUT_CELLS, -1)
    for part, shares in zip(*parts, strict=True):
        maps = _read(Frame(name, out_size, feat_size, part), layer, x)
        scale = maps.scale.unflatten(0, (layer.num_heads, -1)).mean(-1)
        weight = (maps.content + scale[:, None, None, None] * maps.position).abs().mean(1).flatten(2)
        total += shares @ F.normalize(weight, p=1, dim=-1)
    return total.unflatten(-1, feat_size)


READER = Reader((GlobalSelfAttention,), _read, _share_back)
