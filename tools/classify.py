"""Name what is in photos with a pretrained model, on the terminal and in one picture for each photo.

    python tools/classify.py
    python tools/classify.py photo.jpg other.png --model san_tiny_patchwise --top-k 3 --save-dir out
"""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from _files import written_whole
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config

import timm_gsa  # noqa: F401  registers the models where autoload is switched off

PHOTOS = Path(__file__).parent / 'photos'
PICTURE_HEIGHT = 320  # pixels


@dataclass(frozen=True)
class Prediction:
    """A class and the probability the model gives it."""

    name: str
    probability: float


class Classifier:
    """A pretrained timm model with its own preprocessing and class names.

    Args:
        name: Name of the model for `timm.create_model`.

    Raises:
        RuntimeError: There is no such model, or no weights for it.
    """

    def __init__(self, name: str) -> None:
        self.model = timm.create_model(name, pretrained=True).eval()
        self.transform = create_transform(**resolve_model_data_config(self.model))
        self.class_names = class_names(self.model)

    @torch.inference_mode()
    def predict(self, image: Image.Image, top_k: int) -> list[Prediction]:
        """The `top_k` most probable classes of an RGB image, most probable first."""
        probabilities = self.model(self.transform(image).unsqueeze(0))[0].softmax(-1)
        values, indices = probabilities.topk(min(top_k, len(probabilities)))
        names = (self.class_names[i] for i in indices.tolist())
        return [Prediction(name, value) for name, value in zip(names, values.tolist(), strict=True)]


def class_names(model: Any) -> list[str]:
    """Readable names of a model's classes: from its pretrained config, of ImageNet, else their numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names:
        return [name.replace('_', ' ') for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [f'class {i}' for i in range(model.num_classes)]


def read_image(path: Path) -> Image.Image:
    """Read a picture as RGB, upright.

    Raises:
        OSError, ValueError: The file is missing, unreadable or not a picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert('RGB')
    except (Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError(str(error)) from error


def draw(image: Image.Image, predictions: Sequence[Prediction], title: str) -> Image.Image:
    """The photo with the predictions as bars beside it."""
    photo = ImageOps.contain(image, (2 * PICTURE_HEIGHT, PICTURE_HEIGHT))
    bar_width, row = 180, 44
    height = max(PICTURE_HEIGHT, 60 + row * len(predictions))
    canvas = Image.new('RGB', (photo.width + bar_width + 190, height), 'white')
    canvas.paste(photo, (0, (height - photo.height) // 2))
    pen = ImageDraw.Draw(canvas)
    left = photo.width + 20
    pen.text((left, 16), title, fill='#666666', font=ImageFont.load_default(14))
    for i, prediction in enumerate(predictions):
        top = 50 + i * row
        pen.text((left, top), prediction.name, fill='black', font=ImageFont.load_default(17))
        pen.rectangle((left, top + 24, left + bar_width, top + 32), fill='#eeeeee')
        pen.rectangle((left, top + 24, left + round(bar_width * prediction.probability), top + 32), fill='#2f6f9f')
        text = f'{100 * prediction.probability:.1f} %'
        pen.text((left + bar_width + 12, top + 19), text, fill='black', font=ImageFont.load_default(15))
    return canvas


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    with written_whole(path) as temporary:
        picture.save(temporary, format='PNG')


def free_name(directory: Path, stem: str, taken: set[Path]) -> Path:
    """Path of a picture that none of this run has; pictures of earlier runs are replaced."""
    path, number = directory / f'{stem}.png', 1
    while path in taken:
        number += 1
        path = directory / f'{stem}-{number}.png'
    taken.add(path)
    return path


def positive(text: str) -> int:
    """Whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Classify the images of a command line.

    Returns:
        Exit status: 0, or 1 where a file could not be classified.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('images', metavar='IMAGE', nargs='*', type=Path, help='photos; those beside this tool if none')
    parser.add_argument('--model', default='gsa_resnet_tiny', help='any pretrained timm model')
    parser.add_argument('--top-k', metavar='K', type=positive, default=5, help='classes to name')
    parser.add_argument(
        '--save-dir', metavar='DIR', type=Path, default=Path('output', 'classify'), help='where pictures are written')
    args = parser.parse_args(argv)
    try:
        classifier = Classifier(args.model)
        args.save_dir.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')

    failed = False
    taken: set[Path] = set()
    for path in args.images or sorted(PHOTOS.glob('*.jpg')):
        try:
            image = read_image(path)
            predictions = classifier.predict(image, args.top_k)
            target = free_name(args.save_dir, path.stem, taken)
            save(draw(image, predictions, args.model), target)
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or error
            print(f'{path}: not classified: {reason}', file=sys.stderr)
            failed = True
            continue
        listing = ', '.join(f'{p.name} {100 * p.probability:.1f} %' for p in predictions)
        print(f'{path.name}: {listing}  -> {target}', flush=True)
    return int(failed)


if __name__ == '__main__':
    raise SystemExit(main())
