"""Draw what models attend to at chosen places of a photo.

    python tools/attention_maps.py photo.jpg
    python tools/attention_maps.py photo.jpg --model gsa_resnet_tiny san_tiny_pairwise --point 210 120 --point 40 40
    python tools/attention_maps.py photo.jpg --layers layer3 --checkpoint model_best.pth.tar --classes DIR/train

The rows of a model belong to one place, marked by a ring, and show the weights with which the output there gathers the
values of each layer; GSA has a row for content and one for position. Behind them stand the rollout of that place
through all layers, where one has a meaning, and the relevance for the predicted class by pytorch-grad-cam.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from _attention_figure import FRAME, Panel, draw_on, mark, panels, relevance_panel, rendered, rollout_panel
from classify import Classifier, add_model_arguments, read_image, require_extra, save
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_SIZE = 1.7  # inches
FONT_SIZE = 7.

Point = tuple[float, float]


@dataclass
class Row:
    """Panels that belong to one place (in pixels of the view); the first of its rows has a title and the photo."""

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
        points: Places (x, y) in pixels of the photo; the centre where there is none.
        layers: Layers to draw, as for `timm_gsa.attention_maps`; the last of each stage where None.

    Raises:
        ValueError: A model has no attention layers or none of those names, or does not see a point.
    """
    from matplotlib.figure import Figure

    points = points or [((photo.width - 1) / 2, (photo.height - 1) / 2)]
    blocks = {name: _rows(photo, classifier, points, layers) for name, classifier in classifiers.items()}
    views = {name: classifier.view(photo) for name, classifier in classifiers.items()}
    columns = 1 + max(len(row.panels) for rows in blocks.values() for row in rows)
    lines = sum(len(rows) for rows in blocks.values())
    # Every map has the same place in its cell, so that photos and maps of all rows stand in line.
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
        of_place = [Row(point, '', [panel for panel in drawn if panel.kind == kind]) for kind in kinds]
        of_place[0].title = f'{best.name} {100 * best.probability:.0f} %, from ({x:g}, {y:g})'
        rollout = rollout_panel(classifier, photo, point)
        if rollout is not None:
            of_place[0].panels.append(rollout)
        rows += of_place
    rows[0].panels.append(relevance_panel(classifier, photo, best.name))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure of a command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('image', metavar='IMAGE', type=Path, help='photo')
    parser.add_argument(
        '--model', nargs='+', default=['gsa_resnet_tiny'], help='models of this package, drawn below one another')
    parser.add_argument(
        '--point', metavar=('X', 'Y'), nargs=2, type=float, action='append', default=[],
        help='place in pixels of the photo, may be repeated; the centre if not given')
    parser.add_argument('--layers', nargs='+', help='layers, or modules with some; the last of each stage if not given')
    add_model_arguments(parser)
    parser.add_argument(
        '--out', metavar='FILE', type=Path, help='PNG to write; output/attention/IMAGE.png if not given')
    args = parser.parse_args(argv)
    if args.checkpoint and len(args.model) > 1:
        parser.error(f'argument --checkpoint: belongs to one model, got {len(args.model)}')
    out = args.out or Path('output', 'attention', f'{args.image.stem}.png')
    try:
        require_extra(parser.prog)
        photo = read_image(args.image)
        classifiers = {name: Classifier(name, args.checkpoint, args.classes, args.img_size) for name in args.model}
        picture = figure(photo, classifiers, [(x, y) for x, y in args.point], args.layers)
        out.parent.mkdir(parents=True, exist_ok=True)
        save(picture, out)
    except (RuntimeError, ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(out)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
