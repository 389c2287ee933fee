"""The GSA module: content attention and axial relative positional attention in parallel.

Source: Shen et al., "Global Self-Attention Networks for Image Recognition", arXiv 2010.03019, Figure 1.
"""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerType, get_norm_layer, register_notrace_module, to_2tuple

from ..ops import column_attention, content_attention, normalise_query, resize_relative_table, row_attention
from ..ops._backend import short_cut
from ..ops.gsa import LAYER, content_and_row_attention, halve
from ..ops.gsa.query_norm import check_query_norm

__all__ = ['GlobalSelfAttention']


@register_notrace_module  # works on shapes in Python
class GlobalSelfAttention(nn.Module):
    """Global self-attention over a feature map, in place of a spatial convolution.

    query = normalise_query(query)
    out = content(query, key, value) + row(query, norm(column(query, value)))

    with the operations of `timm_gsa.ops` (`normalise_query`, `content_attention`, `column_attention`, `row_attention`).
    No output projection, no residual and no final norm: the network around it brings those. With `stride` 2 the
    attention runs at the input size and a 2 x 2 average pool follows.

    The two position tables are built for maps of `feat_size`; any other size runs too, on tables resampled along
    their offset axis (`resize_relative_table`). State dicts with tables of other sizes load into the module's own
    size by the same resampling.

    Verified: parameter counts and multiply-adds of networks built from it agree with the values believed to be the
    paper's. Our choice, as the paper's text was not readable for us: `query_norm` (a reader of the paper reports none;
    without one, query, table and value multiply twice, and trained networks of 50 layers overflow on single photos), no
    bias on query, key and value, no norm on key and value, initialisation (std dim ** -0.5 for the projection,
    (dim / num_heads) ** -0.5 for the tables), pooling of odd maps (the last, narrower window averages what it covers,
    so sizes agree with a stride-2 shortcut) and resampling.

    Args:
        dim: Channels C of input and output.
        feat_size: Height and width of the maps the tables are built for, in positions of the input.
        num_heads: Attention heads; must divide `dim`.
        stride: 1, or 2 to halve the map after the attention.
        qkv_bias: Whether the projection to query, key and value has a bias.
        norm_layer: Norm between the column and the row step, over all C channels.
        branches: 'both', or 'content' or 'position' for that branch alone, as ablations have it: content without tables
            and norm, position without a key.
        query_norm: Norm of the query over the channels of a head: 'softmax', 'rms' or None for the bare equation.

    Shape:
        Input (B, C, H, W); output (B, C, ceil(H / stride), ceil(W / stride)). Parameters: `qkv` a 1 x 1 convolution
        C -> 3C in the order query, key, value; `rel_h` (2H - 1, C / num_heads) and `rel_w` (2W - 1, C / num_heads)
        for the H, W of `feat_size`; `norm`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, `stride` is neither 1 nor 2, `feat_size` is not positive, or
            `branches` or `query_norm` is none of those above.
    """

    def __init__(
            self,
            dim: int,
            feat_size: int | tuple[int, int],
            num_heads: int = 8,
            stride: int = 1,
            qkv_bias: bool = False,
            norm_layer: LayerType = nn.BatchNorm2d,
            branches: str = 'both',
            query_norm: str | None = 'softmax',
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f'num_heads must divide dim = {dim}, got {num_heads}')
        if stride not in (1, 2):
            raise ValueError(f'stride must be 1 or 2, got {stride}')
        height, width = to_2tuple(feat_size)
        if height < 1 or width < 1:
            raise ValueError(f'feat_size must be positive, got {feat_size}')
        if branches not in ('both', 'content', 'position'):
            raise ValueError(f"branches must be 'both', 'content' or 'position', got {branches!r}")
        check_query_norm(query_norm)
        self.dim = dim
        self.branches = branches
        self.query_norm = query_norm
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.stride = stride
        parts = 2 if branches == 'position' else 3
        self.qkv = nn.Conv2d(dim, parts * dim, kernel_size=1, bias=qkv_bias, **dd)
        self.rel_h: nn.Parameter | None = None
        self.rel_w: nn.Parameter | None = None
        self.norm: nn.Module = nn.Identity()
        if branches != 'content':
            self.rel_h = nn.Parameter(torch.empty(2 * height - 1, self.head_dim, **dd))
            self.rel_w = nn.Parameter(torch.empty(2 * width - 1, self.head_dim, **dd))
            self.norm = get_norm_layer(norm_layer)(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projection and the tables, and the norm by its own rule."""
        nn.init.normal_(self.qkv.weight, std=self.dim ** -0.5)
        if self.qkv.bias is not None:
            nn.init.zeros_(self.qkv.bias)
        for table in (self.rel_h, self.rel_w):
            if table is not None:
                nn.init.normal_(table, std=self.head_dim ** -0.5)
        reset = getattr(self.norm, 'reset_parameters', None)
        if reset is not None:
            reset()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, table in (('rel_h', self.rel_h), ('rel_w', self.rel_w)):
            loaded = state_dict.get(prefix + name)
            if table is None or loaded is None or loaded.ndim != 2:
                continue
            if loaded.shape[0] % 2 == 1 and loaded.shape[1] == table.shape[1]:
                state_dict[prefix + name] = resize_relative_table(loaded, (table.shape[0] + 1) // 2)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Normalised query, key and value of a map (B, C, H, W), each (B, heads, C / heads, H, W).

        There is no key for position alone.
        """
        # Split, not unbind: stacking the gradients would lose channels_last.
        parts = [part.unflatten(1, [self.num_heads, self.head_dim]) for part in self.qkv(x).split(self.dim, dim=1)]
        parts[0] = normalise_query(parts[0], self.query_norm)
        return parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            out = short_cut(LAYER, self, x)
            if out is not None:
                return out
        parts = self.project(x)
        query, value = parts[0], parts[-1]
        if self.rel_h is None or self.rel_w is None:
            return self._pool(content_attention(query, parts[1], value))
        height, width = x.shape[-2:]
        rel_h = resize_relative_table(self.rel_h, height)
        rel_w = resize_relative_table(self.rel_w, width)
        column = self.norm(column_attention(query, value, rel_h).reshape(x.shape)).reshape(value.shape)
        if self.branches == 'position':
            return self._pool(row_attention(query, column, rel_w))
        return self._pool(content_and_row_attention(query, parts[1], value, column, rel_w))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """Join the heads; average windows of 2 x 2 positions if the stride is 2."""
        x = x.flatten(1, 2)
        return halve(x) if self.stride == 2 else x
