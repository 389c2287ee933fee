"""Draw what a model has learned about positions: GSA's tables of relative positions, the radii of prior attention.

    python tools/learned_positions.py
    python tools/learned_positions.py --model priorattn_resnet_tiny
    python tools/learned_positions.py --model gsa_resnet_tiny --checkpoint model_best.pth.tar --classes DIR/train
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _attention_figure import SIGNED, rendered
from classify import Classifier, add_model_arguments, require_extra, save
from PIL import Image

import timm_gsa
from timm_gsa.layers import GlobalSelfAttention, PriorAttention

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS_ABREAST = 4


def table_figure(name: str, model: torch.nn.Module) -> Image.Image | None:
    """Tables of relative positions of each GSA layer and the lengths of their rows; None for a model without some."""
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
            if table is None:  # of content alone
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
    """Radius of every prior attention layer by depth, in positions and in pixels; None for a model without some."""
    from matplotlib.figure import Figure

    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, PriorAttention)}
    if not layers:
        return None
    maps = timm_gsa.attention_maps(model, torch.zeros(1, *input_size))
    drawing = Figure(figsize=(max(5., 0.45 * len(maps) + 2), 4.6), dpi=110, layout='constrained')
    drawing.suptitle(f'Radii learned by {name}', fontsize=11)
    upper, lower = drawing.subplots(2, 1, sharex=True)
    # Positions of the map, of which a dilated layer counts several as one; pixels by the distance of two positions.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure of a command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--model', default='gsa_resnet_tiny', help='a GSA-ResNet or prior-attention ResNet')
    add_model_arguments(parser)
    parser.add_argument('--out', metavar='FILE', type=Path, help='PNG to write; output/positions/MODEL.png if none')
    args = parser.parse_args(argv)
    out = args.out or Path('output', 'positions', f'{args.model}.png')
    try:
        require_extra(parser.prog)
        classifier = Classifier(args.model, args.checkpoint, args.classes, args.img_size)
        picture = table_figure(args.model, classifier.model)
        if picture is None:
            picture = radius_figure(args.model, classifier.model, classifier.input_size)
        if picture is None:
            raise ValueError(f'--model must have tables of relative positions or radii, {args.model} has none')
        out.parent.mkdir(parents=True, exist_ok=True)
        save(picture, out)
    except (RuntimeError, ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(out)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
