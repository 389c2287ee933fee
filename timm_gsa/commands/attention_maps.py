"""Draw what models attend to at chosen points of a photo.

examples:
  timm-gsa attention-maps photo.jpg
  timm-gsa attention-maps photo.jpg --model gsa_resnet_tiny san_tiny_pairwise --point 210 120 --point 40 40
  timm-gsa attention-maps photo.jpg --layers layer3 --checkpoint model_best.pth.tar --classes DIR/train

Each row belongs to one point, marked by a ring, and shows the attention weights of the output at that point, layer by
layer. GSA has one row for content and one for position. The last columns are the rollout through all layers (GSA, SAN)
and the relevance for the predicted class by pytorch-grad-cam.
Needs the extra interpret.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ._figure import FRAME, Panel, draw_on, mark, panels, relevance_panel, rendered, rollout_panel
from ._inputs import PHOTOS, Classifier, add_model_arguments, progress, read_image, require_extra, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_SIZE = 1.7  # inches
FONT_SIZE = 7.

Point = tuple[float, float]


@dataclass
class Row:
    """Panels of one point, given in pixels of the view. Only the first row of a point has a title and the photo."""

    point: Point
    title: str
    panels: list[Panel]


def figure(
        photo: Image.Image,
        classifiers: dict[str, Classifier],
        points: Sequence[Point] = (),
        layers: Sequence[str] | None = None,
) -> Image.Image:
    """One figure of all models, a block of rows for each, below one another.

    Args:
        photo: RGB image.
        classifiers: Models by their names.
        points: Points (x, y) in pixels of the photo; the centre if there are none.
        layers: Layers to draw, as for `timm_gsa.attention_maps`; the last of each stage where None.

    Raises:
        ValueError: A model has no attention layers or none of those names, or does not see a point.
    """
    from matplotlib.figure import Figure

    points = points or [((photo.width - 1) / 2, (photo.height - 1) / 2)]
    blocks = {
        name: _rows(photo, classifier, points, layers)
        for name, classifier in progress(classifiers.items(), 'drawing', 'model')}
    views = {name: classifier.view(photo) for name, classifier in classifiers.items()}
    columns = 1 + max(len(row.panels) for rows in blocks.values() for row in rows)
    lines = sum(len(rows) for rows in blocks.values())
    # Maps have fixed places in their cells, so that all rows are aligned.
    height = PANEL_SIZE * max(view.height / view.width for view in views.values())
    cell_width, cell_height = 1.14 * PANEL_SIZE, height * (1 + sum(FRAME))
    drawing = Figure(figsize=(columns * cell_width, lines * cell_height), dpi=110)

    def axes(line: int, column: int) -> Axes:
        return drawing.add_axes((
            (column + 0.06) / columns,
            1 - (line + (FRAME[0] * height + height) / cell_height) / lines,
            PANEL_SIZE / cell_width / columns,
            height / cell_height / lines,
        ))

    line = 0
    for name, rows in blocks.items():
        for row in rows:
            if row.title:
                left = axes(line, 0)
                left.set_axis_off()
                left.imshow(views[name])
                left.set_title(f'{name}\n{row.title}', fontsize=FONT_SIZE, pad=0.5 * FONT_SIZE)
                mark(left, row.point)
            for column, panel in enumerate(row.panels, start=1):
                draw_on(axes(line, column), views[name], panel, row.point if panel.of_point else None, FONT_SIZE)
            line += 1
    return rendered(drawing)


def _rows(
        photo: Image.Image,
        classifier: Classifier,
        points: Sequence[Point],
        layers: Sequence[str] | None,
) -> list[Row]:
    best, = classifier.predict(photo, 1)
    rows = []
    for x, y in points:
        point = classifier.locate(photo, (x, y))
        drawn = panels(classifier, photo, point, layers)
        kinds = list(dict.fromkeys(panel.kind for panel in drawn))
        block = [Row(point, '', [panel for panel in drawn if panel.kind == kind]) for kind in kinds]
        block[0].title = f'{best.name} {100 * best.probability:.0f} %, from ({x:g}, {y:g})'
        rollout = rollout_panel(classifier, photo, point)
        if rollout is not None:
            block[0].panels.append(rollout)
        rows += block
    rows[0].panels.append(relevance_panel(classifier, photo, best.name))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        'image', metavar='IMAGE', nargs='?', type=Path, help="photo; the package's rocket if not given")
    parser.add_argument(
        '--model', nargs='+', default=['gsa_resnet50'], help='models of this package, drawn below one another')
    parser.add_argument(
        '--point', metavar=('X', 'Y'), nargs=2, type=float, action='append', default=[],
        help='point in pixels of the photo, may be repeated; the centre if not given')
    parser.add_argument('--layers', nargs='+', help='layers, or modules with some; the last of each stage if not given')
    add_model_arguments(parser)
    parser.add_argument(
        '--out', metavar='FILE', type=Path, help='PNG to write; output/attention/IMAGE.png if not given')


def run(args: argparse.Namespace) -> int:
    """Draw the figure; returns 0."""
    if args.checkpoint and len(args.model) > 1:
        raise ValueError(f'--checkpoint belongs to one model, got {len(args.model)}')
    require_extra('interpret', 'matplotlib', 'pytorch_grad_cam')
    path = args.image or PHOTOS / 'rocket.jpg'
    photo = read_image(path)
    classifiers = {
        name: Classifier(name, args.checkpoint, args.classes, args.img_size, for_maps=True)
        for name in progress(args.model, 'loading', 'model')}
    picture = figure(photo, classifiers, [(x, y) for x, y in args.point], args.layers)
    out = args.out or Path('output', 'attention', f'{path.stem}.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    save(picture, out)
    print(out)
    return 0
