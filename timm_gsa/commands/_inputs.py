"""Shared by the commands: photos, models with preprocessing and class names, checkpoints, arguments, extras."""
import argparse
import importlib.util
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from tqdm import tqdm

from ..models._families import map_size
from ._files import written_whole

PHOTOS = Path(str(files('timm_gsa') / 'photos'))
VIEW_SIZE = 448  # pixels, about

T = TypeVar('T')


@dataclass(frozen=True)
class Prediction:
    """A class and the probability the model gives it."""

    name: str
    probability: float


class Classifier:
    """A timm model with its own preprocessing and class names.

    Args:
        name: Name of the model for `timm.create_model`.
        checkpoint: Checkpoint of timm's train.py or safetensors file. None: pretrained weights.
        classes: Source of the class names: the folder the model was trained on, with a folder for each class, or a text
            file with a name on each line. None: names of the pretrained weights.
        img_size: Height and width of the model's input in pixels. None: the size the model was trained on.
        for_maps: Pretrained weights get images of the size at which their maps are drawn, where `img_size` is None.

    Raises:
        RuntimeError: There is no such model, no weights for it, or they do not fit.
        ValueError: `classes` names none.
        OSError: A file is missing or unreadable.
    """

    def __init__(
            self,
            name: str,
            checkpoint: Path | None = None,
            classes: Path | None = None,
            img_size: int | None = None,
            for_maps: bool = False,
    ) -> None:
        names = None if classes is None else read_class_names(classes)
        self.model = timm.create_model(name, pretrained=checkpoint is None, num_classes=names and len(names)).eval()
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        elif for_maps and img_size is None:
            img_size = map_size(self.model.pretrained_cfg['architecture'])
        config = resolve_model_data_config(self.model, {} if img_size is None else {'img_size': img_size})
        self.input_size: tuple[int, int, int] = config['input_size']
        self._crop_pct, self._crop_mode = config['crop_pct'], config['crop_mode']
        self.transform = create_transform(**config)
        self.class_names = names or class_names(self.model)
        # The view is the model's input enlarged by a whole factor.
        self.view_scale = max(1, round(VIEW_SIZE / min(self.input_size[1:])))
        height, width = (self.view_scale * size for size in self.input_size[1:])
        self._view = create_transform(**{**config, 'input_size': (3, height, width)}, normalize=False)

    def view(self, photo: Image.Image) -> Image.Image:
        """Part of an RGB photo that the model sees, `view_scale` times as large as its input."""
        return Image.fromarray(self._view(photo).permute(1, 2, 0).numpy())

    def locate(self, photo: Image.Image, point: tuple[float, float]) -> tuple[float, float]:
        """Position in `view` of a pixel (x, y) of the photo.

        Raises:
            ValueError: The pixel is outside of what the model sees, or the model's crop mode is not supported.
        """
        height, width = self.input_size[1:]
        factors = [
            math.floor(size / self._crop_pct) / of for size, of in zip((width, height), photo.size, strict=True)]
        if self._crop_mode == 'center':
            factors = [max(factors)] * 2
        elif self._crop_mode != 'squash':
            raise ValueError(f"crop_mode must be 'center' or 'squash', got {self._crop_mode!r}")
        x, y = (
            (at + 0.5 - of / 2) * factor + size / 2
            for at, of, factor, size in zip(point, photo.size, factors, (width, height), strict=True))
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f'point must lie in what the model sees, the middle {min(photo.width, width / factors[0]):.0f} x '
                f'{min(photo.height, height / factors[1]):.0f} pixels of {photo.width} x {photo.height}, '
                f'got {point[0]:g} {point[1]:g}'
            )
        return x * self.view_scale, y * self.view_scale

    @torch.inference_mode()
    def predict(self, image: Image.Image, top_k: int) -> list[Prediction]:
        """The `top_k` most probable classes of an RGB image, most probable first."""
        probabilities = self.model(self.transform(image).unsqueeze(0))[0].softmax(-1)
        values, indices = probabilities.topk(min(top_k, len(probabilities)))
        names = (self.class_names[i] for i in indices.tolist())
        return [Prediction(name, value) for name, value in zip(names, values.tolist(), strict=True)]


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a checkpoint of timm's train.py or a safetensors file without executing code in it.

    Raises:
        RuntimeError: It is no checkpoint, or does not fit the model.
        OSError: It is missing or unreadable.
    """
    try:
        # The oldest supported timm unpickles anything by default. train.py stores its arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            timm.models.load_checkpoint(model, str(path), weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f'checkpoint {path} does not exist') from None
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        broken = any(not isinstance(each, RuntimeError) for each in (error, error.__cause__) if each)
        what = 'is not one that can be loaded safely' if broken else 'does not fit the model'
        reason = str(error).partition('. ')[0]  # the rest advises to switch the protection off
        raise RuntimeError(f'checkpoint {path} {what}: {reason}') from error


def read_class_names(path: Path) -> list[str]:
    """Class names in order, from a folder as timm reads it or a text file with a name on each line.

    Raises:
        ValueError: There are no names, or the file is not UTF-8.
        OSError: The path is missing or unreadable.
    """
    if path.is_dir():
        index = find_images_and_targets(str(path))[1]
        names = sorted(index, key=index.__getitem__)
    else:
        names = [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    if not names:
        raise ValueError(f'classes must be a folder of folders or a file of names, found none in {path}')
    return [name.replace('_', ' ') for name in names]


def class_names(model: Any) -> list[str]:
    """Readable class names of a model: from its pretrained config, else of ImageNet, else numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
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
            return upright_rgb(image)
    except (Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError(str(error)) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB form of a picture of any mode: rotated by its EXIF data, scaled to 8 bits, on a white ground."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert() would clip at 255
    if not image.has_transparency_data:
        return image.convert('RGB')
    image = image.convert('RGBA')
    on_white = Image.new('RGB', image.size, 'white')
    on_white.paste(image, mask=image.getchannel('A'))
    return on_white


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    with written_whole(path) as temporary:
        picture.save(temporary, format='PNG')


def positive(text: str) -> int:
    """Whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `Classifier` except the model's name."""
    parser.add_argument(
        '--checkpoint', metavar='FILE', type=Path, help="weights of timm's train.py or in safetensors; else pretrained")
    parser.add_argument(
        '--classes', metavar='PATH', type=Path,
        help='names of its classes: the folder it was trained on, or a file with a name on each line')
    parser.add_argument('--img-size', metavar='PIXELS', type=positive, help="input size; the model's own if not given")


def require_extra(extra: str, *modules: str) -> None:
    """Check that the libraries of an extra are installed.

    Args:
        extra: Name of the extra in the package's metadata.
        *modules: Modules that the caller is about to import.

    Raises:
        RuntimeError: One of them is missing; the message says how to install the extra.
    """
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise RuntimeError(f'needs {" and ".join(missing)}: pip install "timm-gsa[{extra}]"')


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None, which blocks the import
        return False


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar, on terminals only, that disappears at the end."""
    return tqdm(items, desc=what, unit=unit, total=total, leave=False, disable=None)
