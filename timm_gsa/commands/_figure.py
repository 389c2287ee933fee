"""Draws attention maps and relevance over the part of a photo that the model sees."""
from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..interpret import (
    AxialMaps,
    GaussianMaps,
    GlobalMaps,
    LayerAttention,
    NeighbourhoodMaps,
    NoRolloutError,
    attention_maps,
    attention_rollout,
)
from ._inputs import Classifier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Perceptually uniform and dark at zero weight, so that the photo stays in the background.
POSITIVE, SIGNED = 'inferno', 'berlin'
SHARE, WEIGHT, RELEVANCE = 'weight, % of the sum', 'weight, without unit', 'relevance, % of the maximum'
OPACITY = 0.68
FRAME = (0.24, 0.26)  # space for the title above and the colour bar below a map, in heights of the map


@dataclass(frozen=True)
class Panel:
    """One map to draw over the photo.

    Attributes:
        kind: 'content', 'position', 'weight', 'rollout' or 'relevance'.
        title: First line above the map.
        detail: Second line: size of the map and what it was averaged over.
        weight: Array (H, W) over the part of the photo that the model sees.
        unit: Label of the colour bar.
    """

    kind: str
    title: str
    detail: str
    weight: np.ndarray
    unit: str

    @property
    def signed(self) -> bool:
        return self.unit == WEIGHT

    @property
    def of_point(self) -> bool:
        """True if the map belongs to one query position."""
        return self.kind != 'relevance'


def panels(
        classifier: Classifier,
        photo: Image.Image,
        point: tuple[float, float] | None = None,
        layers: Sequence[str] | None = None,
) -> list[Panel]:
    """Attention of one position in the layers of a model, averaged over heads or weight groups.

    Args:
        classifier: The model, with its preprocessing.
        photo: RGB image.
        point: Position (x, y) in pixels of `classifier.view(photo)`; its centre where None.
        layers: Names of layers, or of modules that contain some. None: the last attention layer of each stage.

    Returns:
        One panel for each layer, for GSA two: content and position. The position's weights are multiplied by the mean
        factor of the norm between column and row step.

    Raises:
        ValueError: The model has no attention layer, none of that name, or the point lies outside.
    """
    maps = attention_maps(
        classifier.model, classifier.transform(photo).unsqueeze(0), _input_points(classifier, point), layers)
    if layers is None:
        maps = {_stage(classifier.model, attention.layer): attention for attention in maps.values()}
    return [panel for attention in maps.values() for panel in _layer_panels(attention)]


def rollout_panel(classifier: Classifier, photo: Image.Image, point: tuple[float, float]) -> Panel | None:
    """Rollout of one position of the last attention layer through all layers; None if the model has no rollout.

    Args:
        classifier: As for `panels`.
        photo: As for `panels`.
        point: Position (x, y) in pixels of `classifier.view(photo)`.
    """
    x = classifier.transform(photo).unsqueeze(0)
    try:
        share = attention_rollout(classifier.model, x, _input_points(classifier, point))[0, 0]
    except NoRolloutError:
        return None
    return Panel('rollout', 'rollout through all layers', 'from the last map', 100 * _array(share), SHARE)


def relevance_panel(classifier: Classifier, photo: Image.Image, best: str) -> Panel:
    """Relevance of the photo's parts for the most probable class, called `best`, by pytorch-grad-cam.

    The mean of LayerCAM (Jiang et al. 2021, "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization")
    over all feature maps but the first. Works for any timm model with `feature_info`.

    Raises:
        ImportError: pytorch-grad-cam is not installed.
        ValueError: The model names no feature maps.
    """
    from pytorch_grad_cam import LayerCAM

    model = classifier.model
    names = [info['module'] for info in getattr(model, 'feature_info', [])][1:]
    if not names:
        raise ValueError(f'model must name its feature maps (feature_info), {type(model).__name__} does not')
    with torch.inference_mode(False), LayerCAM(model, [model.get_submodule(name) for name in names]) as cam:
        relevance = cam(classifier.transform(photo).unsqueeze(0), targets=None)[0]
    model.zero_grad()
    detail = f'LayerCAM of {len(names)} feature maps'
    return Panel('relevance', f'relevance for {best}', detail, 100 * relevance, RELEVANCE)


def draw_panel(view: Image.Image, panel: Panel, point: tuple[float, float] | None, size: int = 320) -> Image.Image:
    """Picture of one panel with its colour bar.

    Args:
        view: The part of the photo that the model sees.
        panel: The map to draw.
        point: Position to mark, in pixels of `view`.
        size: Height of the picture in pixels.
    """
    from matplotlib.figure import Figure

    height = size / (1 + sum(FRAME))
    width = height * view.width / view.height + 0.14 * size  # labels of the colour bar reach beyond the map
    figure = Figure(figsize=(width / 100, size / 100), dpi=100)
    axes = figure.add_axes((0.07 * size / width, FRAME[1] * height / size, 1 - 0.14 * size / width, height / size))
    draw_on(axes, view, panel, point, font_size=size / 40)
    return rendered(figure)


def draw_on(
        axes: Axes,
        view: Image.Image,
        panel: Panel,
        point: tuple[float, float] | None,
        font_size: float,
) -> None:
    """Draw a map over the view in grey, with a colour bar below, and the position the map belongs to."""
    axes.set_axis_off()
    extent = (0, view.width, view.height, 0)
    axes.imshow(view.convert('L'), cmap='gray', vmin=-160, vmax=255, extent=extent)  # brightened
    limit = 100. if panel.unit == RELEVANCE else float(abs(panel.weight).max()) or 1.
    drawn = axes.imshow(
        panel.weight,
        cmap=SIGNED if panel.signed else POSITIVE,
        vmin=-limit if panel.signed else 0,
        vmax=limit,
        alpha=OPACITY,
        extent=extent,
        interpolation='nearest',
    )
    axes.set_title(f'{panel.title}\n{panel.detail}', fontsize=font_size, pad=0.5 * font_size)
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((0, -0.09, 1, 0.05)), orientation='horizontal')
    bar.set_ticks([-limit, 0, limit] if panel.signed else [0, limit])
    labels = bar.ax.set_xticklabels([f'{tick:.3g}' for tick in bar.get_ticks()])
    labels[0].set_horizontalalignment('left')  # so that labels of neighbouring panels stay apart
    labels[-1].set_horizontalalignment('right')
    bar.ax.tick_params(labelsize=0.9 * font_size, length=2, pad=1)
    bar.set_label(panel.unit, fontsize=0.9 * font_size, labelpad=1)
    bar.outline.set_visible(False)
    if point is not None:
        mark(axes, point)


def mark(axes: Axes, point: tuple[float, float]) -> None:
    """A ring around a position, visible on any ground."""
    for colour, width in (('black', 4), ('white', 1.8)):
        axes.plot(
            *point, marker='o', markersize=7, markerfacecolor='none', markeredgecolor=colour, markeredgewidth=width)


def rendered(figure: Figure) -> Image.Image:
    """The figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    with Image.open(buffer) as picture:
        return picture.convert('RGB')


def _stage(model: Any, layer: str) -> str:
    """Module of a feature map (`feature_info`) that contains a layer, else the top-level module."""
    names = [info['module'] for info in getattr(model, 'feature_info', [])]
    return max((name for name in names if layer.startswith(f'{name}.')), key=len, default=layer.partition('.')[0])


def _input_points(classifier: Classifier, point: tuple[float, float] | None) -> list[tuple[float, float]] | None:
    return None if point is None else [(point[0] / classifier.view_scale, point[1] / classifier.view_scale)]


def _layer_panels(attention: LayerAttention) -> list[Panel]:
    size = '{} x {}'.format(*attention.feat_size)
    if isinstance(attention, GlobalMaps):
        heads = attention.content.shape[1]
        scale = attention.scale.unflatten(0, (heads, -1)).mean(1)[:, None, None]
        detail = f'{size}, ' + ('one head' if heads == 1 else f'mean of {heads} heads')
        return [
            Panel('content', f'{attention.layer} content', detail, _array(attention.content[0, :, 0].mean(0)), WEIGHT),
            Panel(
                'position',
                f'{attention.layer} position',
                detail,
                _array((scale * attention.position[0, :, 0]).mean(0)),
                WEIGHT,
            ),
        ]
    if isinstance(attention, AxialMaps):
        return [
            Panel('weight', f'{attention.layer} {name}', size, _array(weight[0, 0, 0]), WEIGHT)
            for name, weight in attention.maps.items()
        ]
    if isinstance(attention, GaussianMaps):
        detail = f'{size}, radius {abs(attention.radius):.2f} cells'
    else:
        if not isinstance(attention, NeighbourhoodMaps):
            raise ValueError(f'layer {attention.layer} weighs channels, not positions: there is no map to draw')
        groups = attention.weight.shape[1]
        detail = f'{size}, ' + ('one group' if groups == 1 else f'mean of {groups} groups')
    weight = _array(attention.weight[0, :, 0].mean(0))
    if attention.normalised:
        return [Panel('weight', attention.layer, detail, 100 * weight, SHARE)]
    return [Panel('weight', attention.layer, detail, weight, WEIGHT)]


def _array(weight: torch.Tensor) -> np.ndarray:
    return weight.float().cpu().numpy()
