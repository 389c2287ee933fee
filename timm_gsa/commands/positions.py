"""Draw what a model has learned about positions, independent of the photo.

examples:
  timm-gsa positions
  timm-gsa positions --model priorattn_resnet_tiny
  timm-gsa positions --model gsa_resnet_tiny --checkpoint model_best.pth.tar --classes DIR/train

For a GSA-ResNet these are the tables of relative positions, for a prior-attention ResNet the radii.
Needs the extra interpret.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..interpret import attention_maps
from ..layers import GlobalSelfAttention, PriorAttention
from ._figure import SIGNED, rendered
from ._inputs import Classifier, add_model_arguments, progress, require_extra, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS_ABREAST = 4  # columns of a figure


def table_figure(name: str, model: torch.nn.Module) -> Image.Image | None:
    """Tables of relative positions of each GSA layer and the norms of their rows; None if there are none."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, GlobalSelfAttention)
              and layer.rel_h is not None}
    if not layers:
        return None
    columns = min(len(layers), LAYERS_ABREAST)
    lines = math.ceil(len(layers) / columns)
    drawing = Figure(figsize=(2.7 * columns + 0.4, 5.8 * lines + 0.5), dpi=110, layout='constrained')
    drawing.suptitle(f'Relative positions learned by {name}', fontsize=11)
    grid = drawing.subplots(3 * lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (key, layer) in enumerate(layers.items()):
        upper, middle, lower = grid[i // columns * 3:i // columns * 3 + 3, i % columns]
        upper.set_title(f'{key}\n{layer.num_heads} heads share a table', fontsize=8)
        for axes, table, axis in ((upper, layer.rel_h, 'rows'), (middle, layer.rel_w, 'columns')):
            if table is None:  # layer with the content branch only
                continue
            embedding = table.detach().float()
            _draw_table(axes, embedding, axis)
            reach = embedding.shape[0] // 2
            lower.plot(
                range(-reach, reach + 1), embedding.norm(dim=1), label=axis, marker='.', markersize=3, linewidth=1)
        lower.set_axis_on()
        lower.set_xlabel('offset, positions', fontsize=7)
        lower.set_ylabel('length of the embedding', fontsize=7)
        lower.set_ylim(bottom=0)
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.tick_params(labelsize=6)
        lower.legend(fontsize=6, loc='lower right', ncols=2)
    return rendered(drawing)


def _draw_table(axes: Axes, table: torch.Tensor, axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    reach = table.shape[0] / 2
    limit = table.abs().max().item() or 1.
    drawn = axes.imshow(
        table.t().numpy(),
        cmap=SIGNED,
        vmin=-limit,
        vmax=limit,
        extent=(-reach, reach, table.shape[1], 0),
        aspect='auto',
        interpolation='nearest',
    )
    axes.set_axis_on()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f'offset in {axis}, positions', fontsize=7)
    axes.set_ylabel('channel', fontsize=7)
    axes.tick_params(labelsize=6)
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.06, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    bar.set_label('embedding, without unit', fontsize=6)


def radius_figure(name: str, model: torch.nn.Module, input_size: Sequence[int]) -> Image.Image | None:
    """Radius of every prior attention layer by depth, in positions and in pixels; None if there are none."""
    from matplotlib.figure import Figure

    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, PriorAttention)}
    if not layers:
        return None
    maps = attention_maps(model, torch.zeros(1, *input_size))
    drawing = Figure(figsize=(max(5., 0.45 * len(maps) + 2), 4.6), dpi=110, layout='constrained')
    drawing.suptitle(f'Radii learned by {name}', fontsize=11)
    upper, lower = drawing.subplots(2, 1, sharex=True)
    # A dilated layer measures its radius in steps of several positions; stride converts positions to pixels.
    cells = {key: layer.attn_dilation for key, layer in layers.items()}
    pixels = {key: cells[key] * maps[key].stride[1] for key in layers}
    for axes, scale, unit in ((upper, cells, 'positions of its map'), (lower, pixels, 'pixels of the image')):
        learned = [abs(layer.radius.item()) * scale[key] for key, layer in layers.items()]
        start = [layer.init_radius * scale[key] for key, layer in layers.items()]
        axes.plot(range(len(layers)), learned, marker='o', markersize=4, linewidth=1, label='learned')
        axes.plot(range(len(layers)), start, color='grey', linewidth=0.8, linestyle='--', label='before training')
        axes.set_ylabel(f'radius, {unit}', fontsize=7)
        axes.set_ylim(bottom=0)
        axes.grid(axis='y', linewidth=0.3)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    lower.set_xticks(
        range(len(maps)),
        ['{}, {} x {}'.format(key, *attention.feat_size) for key, attention in maps.items()],
        rotation=90 if len(maps) > LAYERS_ABREAST else 0,
        fontsize=7,
    )
    return rendered(drawing)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument('--model', default='gsa_resnet_tiny', help='a GSA-ResNet or prior-attention ResNet')
    add_model_arguments(parser)
    parser.add_argument('--out', metavar='FILE', type=Path, help='PNG to write; output/positions/MODEL.png if none')


def run(args: argparse.Namespace) -> int:
    """Draw the figure; returns 0."""
    require_extra('interpret', 'matplotlib')
    classifier = Classifier(args.model, args.checkpoint, args.classes, args.img_size)
    drawings = (
        lambda: table_figure(args.model, classifier.model),
        lambda: radius_figure(args.model, classifier.model, classifier.input_size),
    )
    picture = next(filter(None, (draw() for draw in progress(drawings, 'drawing', 'figure'))), None)
    if picture is None:
        raise ValueError(f'--model must have tables of relative positions or radii, {args.model} has none')
    out = args.out or Path('output', 'positions', f'{args.model}.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    save(picture, out)
    print(out)
    return 0
