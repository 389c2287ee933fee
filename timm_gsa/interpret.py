"""What a model attends to: the exact weights of its attention layers at chosen positions, and their rollout.

Everything is read out of an ordinary forward pass by hooks that are gone afterwards; nothing in the models knows of it.
"""
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from .layers import GlobalSelfAttention, PairwiseAttention, PatchwiseAttention, PriorAttention
from .layers._norm import affine_of
from .ops import aggregation, gaussian_weight, resize_relative_table
from .ops.san.neighbourhood import reflected_index, same_padding

__all__ = [
    'GaussianMaps',
    'GlobalMaps',
    'LayerAttention',
    'NeighbourhoodMaps',
    'attention_maps',
    'attention_rollout',
]

Layer = GlobalSelfAttention | PairwiseAttention | PatchwiseAttention | PriorAttention


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """Attention of one layer at the chosen positions, for a batch of images; P is the number of positions.

    Weights are over the positions of the layer's values, a map of H x W, and of at least float32. Each layer is linear
    in its values once its weights are known, and `attend` is that linear map.

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
    A layer of stride 2 averages windows of 2 x 2 outputs, and so all that stands here is averaged over the window.

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


def attention_maps(
        model: nn.Module,
        images: torch.Tensor,
        points: Sequence[tuple[float, float]] | torch.Tensor | None = None,
        layers: Sequence[str] | None = None,
) -> dict[str, LayerAttention]:
    """Effective weight that each input position of an attention layer has in its output at chosen positions.

    The weights are exact: applied to the layer's values (`LayerAttention.attend`) they give the layer's own output.
    Equations and shapes are in the classes returned, one for each kind of layer. The model runs once, without
    gradients; memory is P maps of each layer's size for every head or weight group.

    A compiled model runs without its compiled code, `DistributedDataParallel` without communication.

    Args:
        model: Model of this package, or any network with layers of `timm_gsa.layers`, in eval mode; also compiled, in
            a wrapper or as timm's feature extractor.
        images: Batch of preprocessed images as the model takes them, (B, channels, height, width).
        points: Query positions (x, y) in pixels of `images`, from the upper left corner; for each layer the position
            of its output map that covers the pixel. The centre where None.
        layers: Names of layers, or of modules that contain some, as in `model.named_modules()`; all where None.

    Returns:
        What each layer attends to, by the name of the layer, in the order in which the layers run.

    Raises:
        ValueError: The model is in training mode, has no attention layer, or one whose norm is not a fixed affine map;
            a name in `layers` is none of its layers; a point lies outside the images; or `images` is no batch.
        RuntimeError: A layer asked for did not run.
    """
    cells_of = _cells_of(points, images)

    def read(name: str, layer: Any, x: torch.Tensor, output: torch.Tensor) -> LayerAttention:
        out_size = (output.shape[-2], output.shape[-1])
        frame = _Frame(name, out_size, images.shape[-2:], cells_of(out_size).to(x.device))
        return _READERS[type(layer)](frame, layer, x)

    model = _unwrapped(model)
    with torch.inference_mode(False), torch.no_grad():
        return _run(model, images, _chosen(model, layers), read)


def attention_rollout(
        model: nn.Module,
        images: torch.Tensor,
        points: Sequence[tuple[float, float]] | torch.Tensor | None = None,
) -> torch.Tensor:
    """How far positions of the first attention layer's input reach chosen positions of the last, through all layers.

    Attention rollout (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers"): the product over the
    layers of (A + I) / 2, where A holds the weights of one layer with rows that sum to 1 and I is its shortcut. Our
    choice, as the paper has transformers: A is the mean over heads or weight groups of absolute weights, of GSA those
    of content and position together with the mean factor of the norm between; a position of a halved map stands for
    those it covers, in equal parts.

    It ignores what the layers do to channels and reads best for pairwise SAN, whose weights are positive and sum to 1.
    It describes only networks whose positions meet in attention alone, and so not prior attention, where a convolution
    stands beside it.

    Args:
        model: As for `attention_maps`.
        images: As for `attention_maps`.
        points: Positions (x, y) in pixels of `images`. Where None, the mean over all positions, which is what the
            pooled features of a classifier come from.

    Returns:
        Tensor of shape (B, P, H, W), P = 1 where `points` is None, over the map that the first attention layer
        attends to. Non-negative, and sums to 1 over the map.

    Raises:
        ValueError: As for `attention_maps`, or a convolution mixes positions between the attention layers.
        RuntimeError: A layer did not run.
    """
    model = _unwrapped(model)
    cells_of = None if points is None else _cells_of(points, images)
    with torch.inference_mode(False), torch.no_grad():
        layers: dict[str, nn.Module] = dict(_chosen(model, None))
        convs = {
            name: module for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        }
        results = _run(model, images, layers | convs, _rollout_step)
        steps = []
        for name, step in dropwhile(lambda item: item[1] is None, results.items()):  # behind the stem
            if step is None:
                raise ValueError(
                    f'model must mix positions by attention alone for a rollout, but {name} is a convolution'
                )
            steps.append(step)
        out_size = steps[-1].out_size
        area = out_size[0] * out_size[1]
        if cells_of is None:
            share = images.new_full((1, area), 1 / area)
        else:
            cells = cells_of(out_size)
            share = F.one_hot(cells[:, 0] * out_size[1] + cells[:, 1], area)
        share = share.to(device=steps[-1].device, dtype=steps[-1].dtype)
        share = share.expand(images.shape[0], -1, -1).unflatten(2, out_size)
        for step in reversed(steps):
            share = _spread(share, step.out_size)
            share = (step.back(share) + _spread(share, step.feat_size)) / 2
        return share


@dataclass(frozen=True)
class _Frame:
    """Where a layer stands: its name, the size of its output and of the image, and the query positions."""

    layer: str
    out_size: tuple[int, int]
    image_size: Sequence[int]
    cells: torch.Tensor

    def fields(self, feat_size: tuple[int, int], normalised: bool) -> dict[str, Any]:
        return dict(
            layer=self.layer,
            feat_size=feat_size,
            out_size=self.out_size,
            stride=(self.image_size[0] / feat_size[0], self.image_size[1] / feat_size[1]),
            cells=self.cells,
            normalised=normalised,
        )


def _read_global(frame: _Frame, layer: GlobalSelfAttention, x: torch.Tensor) -> GlobalMaps:
    if layer.branches != 'both' or layer.rel_h is None or layer.rel_w is None:
        raise ValueError(f'layer {frame.layer} must have both branches, got {layer.branches!r}')
    height, width = feat_size = (x.shape[-2], x.shape[-1])
    query, key, _ = _wide(*layer.project(x))
    with _no_autocast(x):
        affine = affine_of(layer.norm)
        if affine is None:
            raise ValueError(
                f'layer {frame.layer} must have a batch norm with running statistics, whose map is affine, '
                f'got {type(layer.norm).__name__}'
            )
        scale, shift = affine
        rel_h, rel_w = _wide(resize_relative_table(layer.rel_h, height), resize_relative_table(layer.rel_w, width))
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


def _read_neighbourhood(
        frame: _Frame,
        layer: PairwiseAttention | PatchwiseAttention,
        x: torch.Tensor,
) -> NeighbourhoodMaps:
    height, width = feat_size = (x.shape[-2], x.shape[-1])
    query, key, _ = layer.project(x)
    weight, = _wide(layer.attention(query, key))  # (B, G, K * K, H, W)
    rows, columns = frame.cells.unbind(-1)
    places = weight[..., rows, columns].transpose(-1, -2)  # (B, G, P, K * K)
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


def _read_gaussian(frame: _Frame, layer: PriorAttention, x: torch.Tensor) -> GaussianMaps:
    height, width = frame.out_size  # the branch attends to a map of its output's size
    with _no_autocast(x):
        down = gaussian_weight(height, layer.radius, layer.attn_dilation)[frame.cells[:, 0]]
        across = gaussian_weight(width, layer.radius, layer.attn_dilation)[frame.cells[:, 1]]
        weight = down[:, :, None] * across[:, None, :]
    return GaussianMaps(
        **frame.fields(frame.out_size, normalised=True),
        weight=weight.expand(x.shape[0], 1, -1, -1, -1),
        radius=layer.radius.item(),
        dilation=layer.attn_dilation,
    )


_READERS: dict[type, Callable[..., LayerAttention]] = {
    GlobalSelfAttention: _read_global,
    PairwiseAttention: _read_neighbourhood,
    PatchwiseAttention: _read_neighbourhood,
    PriorAttention: _read_gaussian,
}


@dataclass(frozen=True)
class _RolloutStep:
    """One layer of a rollout: takes shares (B, P, ...) of its output positions back to those it attended to."""

    feat_size: tuple[int, int]
    out_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    back: Callable[[torch.Tensor], torch.Tensor]


_ROLLOUT_CELLS = 64  # query positions whose maps are held at once


def _rollout_step(name: str, layer: Any, x: torch.Tensor, output: torch.Tensor) -> _RolloutStep | None:
    """The layer's step; None for a convolution."""
    if isinstance(layer, nn.Conv2d):
        return None
    feat_size, out_size = (x.shape[-2], x.shape[-1]), (output.shape[-2], output.shape[-1])
    if isinstance(layer, GlobalSelfAttention):
        cells = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in out_size)).reshape(-1, 2)

        def back(share: torch.Tensor) -> torch.Tensor:
            total = share.new_zeros(*share.shape[:2], feat_size[0] * feat_size[1])
            parts = cells.split(_ROLLOUT_CELLS), share.flatten(2).split(_ROLLOUT_CELLS, -1)
            for some, shares in zip(*parts, strict=True):
                maps = _read_global(_Frame(name, out_size, feat_size, some), layer, x)
                scale = maps.scale.unflatten(0, (layer.num_heads, -1)).mean(-1)
                weight = (maps.content + scale[:, None, None, None] * maps.position).abs().mean(1).flatten(2)
                total += shares @ F.normalize(weight, p=1, dim=-1)
            return total.unflatten(-1, feat_size)
    elif isinstance(layer, PairwiseAttention | PatchwiseAttention):
        query, key, _ = layer.project(x)
        absolute = _wide(layer.attention(query, key))[0].abs().mean(1, keepdim=True)
        places = F.normalize(absolute, p=1, dim=2)

        def attend(value: torch.Tensor) -> torch.Tensor:
            return aggregation(value, places, layer.kernel_size, layer.dilation)

        def back(share: torch.Tensor) -> torch.Tensor:
            return _transposed(attend, share, feat_size)
    else:
        raise ValueError(
            f'model must mix positions by attention alone for a rollout, but layer {name} has a convolution beside it')
    return _RolloutStep(feat_size, out_size, x.device, _wide(x)[0].dtype, back)


def _spread(share: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Shares of the positions of a map, handed on in equal parts to those of the larger map it was pooled from."""
    if share.shape[-2:] == size:
        return share
    out_size = (share.shape[-2], share.shape[-1])
    return _transposed(lambda value: F.adaptive_avg_pool2d(value, out_size), share, size)


def _transposed(
        linear: Callable[[torch.Tensor], torch.Tensor],
        share: torch.Tensor,
        size: tuple[int, int],
) -> torch.Tensor:
    """Product of `share` and the matrix of a linear map of (B, P, *size), which is the gradient of that map."""
    with torch.enable_grad():
        value = share.new_zeros(*share.shape[:2], *size, requires_grad=True)
        return torch.autograd.grad(linear(value), value, share)[0]


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def _no_autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _window(
        cells: torch.Tensor,
        stride: int,
        feat_size: tuple[int, int],
        dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns that an output position averages, and the share of each, of shape (P, stride ** 2).

    At the border of an odd map windows are narrower: the share of what lies outside is 0.
    """
    step = torch.arange(stride, device=cells.device)
    rows = (cells[:, 0, None, None] * stride + step[:, None]).expand(-1, stride, stride).flatten(1)
    columns = (cells[:, 1, None, None] * stride + step).expand(-1, stride, stride).flatten(1)
    inside = (rows < feat_size[0]) & (columns < feat_size[1])
    share = inside.to(dtype) / inside.sum(1, keepdim=True)
    return rows.clamp(max=feat_size[0] - 1), columns.clamp(max=feat_size[1] - 1), share


def _cells_of(
        points: Sequence[tuple[float, float]] | torch.Tensor | None,
        images: torch.Tensor,
) -> Callable[[tuple[int, int]], torch.Tensor]:
    """Function from the size of a map to the row and column (P, 2) that covers each of the points."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            'images must be a floating point batch (B, channels, height, width), '
            f'got {images.dtype} of shape {list(images.shape)}'
        )
    height, width = images.shape[-2:]
    if points is None:
        points = [(width / 2, height / 2)]
    at = torch.as_tensor(points, dtype=torch.float64, device='cpu')
    if at.dim() != 2 or at.shape[0] == 0 or at.shape[1] != 2:
        raise ValueError(f'points must be pairs (x, y), got {points}')
    size = torch.tensor([width, height])
    if not ((at >= 0) & (at < size)).all():  # false for NaN
        raise ValueError(f'points must lie in 0 <= x < {width} and 0 <= y < {height}, got {at.tolist()}')

    def cells(feat_size: tuple[int, int]) -> torch.Tensor:
        return (at * torch.tensor(feat_size[::-1]) / size).long().flip(-1)

    return cells


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if '_orig_mod' in model._modules:  # compiled
            model = model.get_submodule('_orig_mod')
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, Layer]:
    """The attention layers to read, by the names they have without the compiler's wrappers."""
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f'model must be in eval mode, but {name or type(model).__name__} is in training mode: call model.eval()'
            )
    found = {
        name.replace('_orig_mod.', ''): module for name, module in model.named_modules() if type(module) in _READERS}
    if not found:
        raise ValueError(
            f'model must contain attention layers of timm_gsa.layers, got a {type(model).__name__} with none '
            '(scripted, traced and exported programs keep none)'
        )
    if names is None:
        return found
    names = [names] if isinstance(names, str) else list(names)
    for wanted in names:
        if not any(f'{name}.'.startswith(f'{wanted}.') for name in found):
            raise ValueError(f'layers must be of {", ".join(found)}, or contain some of them; got {wanted!r}')
    return {
        name: layer for name, layer in found.items() if any(f'{name}.'.startswith(f'{wanted}.') for wanted in names)}


def _run(
        model: nn.Module,
        images: torch.Tensor,
        modules: Mapping[str, nn.Module],
        read: Callable[[str, Any, torch.Tensor, torch.Tensor], Any],
) -> dict[str, Any]:
    """What `read` makes of the input and output of each module while the model runs on the images, in that order."""
    results: dict[str, Any] = {}

    def hook(name: str, module: nn.Module) -> RemovableHandle:
        def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            results[name] = read(name, module, args[0], output)
        return module.register_forward_hook(forward)

    handles = [hook(name, module) for name, module in modules.items()]
    try:
        with _eager(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, module in modules.items() if type(module) in _READERS and name not in results]
    if missing:
        raise RuntimeError(f'{", ".join(missing)} did not run when the model was called')
    return results


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled parts run uncompiled, as compiled code does not see new hooks."""
    compiled = any(m._compiled_call_impl is not None or '_orig_mod' in m._modules for m in model.modules())
    if compiled and hasattr(torch.compiler, 'set_stance'):  # torch 2.6
        return torch.compiler.set_stance('force_eager')
    return nullcontext()
