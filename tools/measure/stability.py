#!/usr/bin/env python3
"""Look for outputs that are not finite: pretrained models on images as they are, and on inputs far from any photo.

    python tools/measure/stability.py
    python tools/measure/stability.py gsa_resnet_tiny san_tiny_patchwise --data-dir DIR --split test.tar

A row for each model and condition: how many outputs are not finite, and the largest logit. Conditions are the data set
as it is and at 0.1, 3 and 10 times its contrast about its mean, black, white, one colour, noise, sizes from 32 to 512
px, and float32, bfloat16 and float16. Without --data-dir the four photos of the package stand in for the data set.
The exit status is 1 if an output is not finite.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_dataset, create_transform, resolve_data_config

from timm_gsa.commands._inputs import PHOTOS, read_image
from timm_gsa.models._families import trained_models

CONTRASTS = (0.1, 3., 10.)
SIZES = (32, 48, 96, 128, 224, 512)


def load(model: nn.Module, data_dir: Path | None, split: str, count: int) -> torch.Tensor:
    """Images as the model takes them, (N, 3, H, W), normalised."""
    transform = create_transform(**resolve_data_config({}, model=model))
    if data_dir is None:
        return torch.stack([transform(read_image(path)) for path in sorted(PHOTOS.glob('*.jpg'))])
    dataset = create_dataset('', root=str(data_dir), split=split)
    step = max(1, len(dataset) // count)
    return torch.stack([transform(dataset[index][0]) for index in range(0, len(dataset), step)][:count])


def conditions(model: nn.Module, images: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Name, images and dtype of every condition."""
    cfg: Any = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ('mean', 'std'))
    few, one = images[:16], torch.ones_like(images[:1])
    yield 'as they are', images, torch.float32
    for contrast in CONTRASTS:
        yield f'contrast x{contrast:g}', contrast * images, torch.float32
    for name, level in (('black', 0.), ('white', 1.)):
        yield name, (level * one - mean) / std, torch.float32
    yield 'one colour', one * torch.tensor([1., 0., 0.])[:, None, None] / std, torch.float32
    generator = torch.Generator().manual_seed(0)
    yield 'noise', torch.randn(few.shape, generator=generator), torch.float32
    yield 'noise x10', 10 * torch.randn(few.shape, generator=generator), torch.float32
    for size in SIZES:
        yield f'{size} px', F.interpolate(few[:4], size, mode='bilinear', antialias=True), torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix('torch.')
        yield name, few, dtype
        yield f'{name}, contrast x3', 3 * few, dtype


@torch.no_grad()
def probe(model: nn.Module, images: torch.Tensor) -> Iterator[tuple[str, int, int, float]]:
    """Condition, number of outputs, how many of them are not finite, and the largest finite logit."""
    for name, batch, dtype in conditions(model, images):
        model.to(dtype)
        out = torch.cat([model(part.to(dtype)) for part in batch.split(100)]).float()
        model.float()
        finite = out.isfinite().all(1)
        largest = out[finite].abs().max().item() if finite.any() else float('nan')
        yield name, len(out), int((~finite).sum()), largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', metavar='MODEL', nargs='*', default=trained_models(), help='those with weights')
    parser.add_argument('--data-dir', type=Path, metavar='DIR')
    parser.add_argument('--split', default='val', help='folder or tar in DIR')
    parser.add_argument('--count', type=int, default=10_000, help='images of the data set, spread evenly over it')
    args = parser.parse_args()
    failed = 0
    print('| model | condition | outputs | not finite | largest logit |\n| --- | --- | ---: | ---: | ---: |')
    for name in args.models:
        model = timm.create_model(name, pretrained=True).eval()
        for condition, count, wrong, largest in probe(model, load(model, args.data_dir, args.split, args.count)):
            print(f'| `{name}` | {condition} | {count} | {wrong} | {largest:.3g} |', flush=True)
            failed += wrong
    return 1 if failed else 0


if __name__ == '__main__':
    raise SystemExit(main())
