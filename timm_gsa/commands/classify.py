"""Name what is in photos with a pretrained model, on the terminal and in one picture for each photo.

examples:
  timm-gsa classify
  timm-gsa classify photo.jpg other.png --model san_tiny_patchwise --top-k 3 --save-dir out
  timm-gsa classify photo.jpg --where
  timm-gsa classify photo.jpg --checkpoint output/train/ten/model_best.pth.tar --classes DIR/train

Without photos it takes the four that come with the package. The exit status is 1 if a photo could not be classified.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from ._inputs import (
    PHOTOS,
    Classifier,
    Prediction,
    add_model_arguments,
    positive,
    progress,
    read_image,
    require_extra,
    save,
)

PICTURE_HEIGHT = 320  # pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument('images', metavar='IMAGE', nargs='*', type=Path, help='photos; those of the package if none')
    parser.add_argument('--model', default='gsa_resnet50', help='any timm model')
    add_model_arguments(parser)
    parser.add_argument('--top-k', metavar='K', type=positive, default=5, help='classes to name')
    parser.add_argument(
        '--where', action='store_true', help='draw the relevance for the best class (needs the extra interpret)')
    parser.add_argument(
        '--save-dir', metavar='DIR', type=Path, default=Path('output', 'classify'), help='where pictures are written')


def run(args: argparse.Namespace) -> int:
    """Classify the photos; returns 1 if one failed."""
    if args.where:
        require_extra('interpret', 'matplotlib', 'pytorch_grad_cam')
    classifier = Classifier(args.model, args.checkpoint, args.classes, args.img_size)
    args.save_dir.mkdir(parents=True, exist_ok=True)
    failed = False
    taken: set[Path] = set()
    for path in progress(args.images or sorted(PHOTOS.glob('*.jpg')), 'classifying', 'photo'):
        try:
            image = read_image(path)
            predictions = classifier.predict(image, args.top_k)
            where = _where(classifier, image, predictions[0].name) if args.where else None
            target = free_name(args.save_dir, path.stem, taken)
            save(draw(image, predictions, args.model, where), target)
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or error
            tqdm.write(f'{path}: not classified: {reason}', file=sys.stderr)
            failed = True
            continue
        listing = ', '.join(f'{p.name} {100 * p.probability:.1f} %' for p in predictions)
        tqdm.write(f'{path.name}: {listing}  -> {target}')
        sys.stdout.flush()
    return int(failed)


def _where(classifier: Classifier, image: Image.Image, best: str) -> Image.Image:
    from ._figure import draw_panel, relevance_panel

    return draw_panel(classifier.view(image), relevance_panel(classifier, image, best), None, PICTURE_HEIGHT)


def draw(
        image: Image.Image,
        predictions: Sequence[Prediction],
        title: str,
        beside: Image.Image | None = None,
) -> Image.Image:
    """The photo, a picture beside it if there is one, and the predictions as bars."""
    bar_width, row = 180, 44
    height = max(PICTURE_HEIGHT, 60 + row * len(predictions))
    pictures = [ImageOps.contain(each, (2 * PICTURE_HEIGHT, PICTURE_HEIGHT)) for each in (image, beside) if each]
    left = sum(picture.width + 20 for picture in pictures)
    canvas = Image.new('RGB', (left + bar_width + 170, height), 'white')
    across = 0
    for picture in pictures:
        canvas.paste(picture, (across, (height - picture.height) // 2))
        across += picture.width + 20
    pen = ImageDraw.Draw(canvas)
    pen.text((left, 16), title, fill='#666666', font=ImageFont.load_default(14))
    for i, prediction in enumerate(predictions):
        top = 50 + i * row
        pen.text((left, top), prediction.name, fill='black', font=ImageFont.load_default(17))
        pen.rectangle((left, top + 24, left + bar_width, top + 32), fill='#eeeeee')
        pen.rectangle((left, top + 24, left + round(bar_width * prediction.probability), top + 32), fill='#2f6f9f')
        text = f'{100 * prediction.probability:.1f} %'
        pen.text((left + bar_width + 12, top + 19), text, fill='black', font=ImageFont.load_default(15))
    return canvas


def free_name(directory: Path, stem: str, taken: set[Path]) -> Path:
    """Path that no picture of this run has; pictures of earlier runs are replaced."""
    path, number = directory / f'{stem}.png', 1
    while path in taken:
        number += 1
        path = directory / f'{stem}-{number}.png'
    taken.add(path)
    return path
