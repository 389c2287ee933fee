"""Accuracy of a pretrained GSA-ResNet at other sizes than it was trained for, with several rules for its tables.

    python tools/measure/sizes.py --data-dir DIR --split val.tar --count 2000

Images are enlarged or reduced to each size; nothing is trained. A rule makes a table of relative embeddings fit a map:
`stretch` is `timm_gsa.ops.resize_relative_table`, which interpolates and scales by old over new length; `stretch,
unscaled` leaves the scale; `in place` keeps each embedding at its offset, crops the table or extends it by zeros;
`in place, edge` extends it by its outermost embeddings.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.utils import accuracy
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from timm_gsa.commands._inputs import positive
from timm_gsa.layers import GlobalSelfAttention
from timm_gsa.ops import resize_relative_table


def unscaled(table: torch.Tensor, length: int) -> torch.Tensor:
    """Stretch a table (2 * L - 1, d) to `length` positions without scaling it."""
    return resize_relative_table(table, length) * (length / ((len(table) + 1) // 2))


def in_place(table: torch.Tensor, length: int, mode: str = 'constant') -> torch.Tensor:
    """Crop a table (2 * L - 1, d) to `length` positions, or extend it by zeros or its edges (`mode` of `F.pad`)."""
    more = length - (len(table) + 1) // 2
    if more <= 0:
        return table[-more:len(table) + more]
    return F.pad(table.t()[None], (more, more), mode)[0].t()


RULES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    'stretch': resize_relative_table,
    'stretch, unscaled': unscaled,
    'in place': in_place,
    'in place, edge': lambda table, length: in_place(table, length, 'replicate'),
}


def map_sizes(model: nn.Module, size: int) -> dict[GlobalSelfAttention, tuple[int, int]]:
    """Height and width of the map of each GSA layer for square images of `size` pixels."""
    found: dict[GlobalSelfAttention, tuple[int, int]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda layer, args: found.update({layer: tuple(args[0].shape[-2:])}))
        for module in model.modules() if isinstance(module, GlobalSelfAttention)]
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return found


def fit(model: nn.Module, size: int, rule: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Make all tables of a model fit images of `size` pixels, so that its layers take them as they are."""
    with torch.no_grad():
        for layer, sides in map_sizes(model, size).items():
            for name, side in zip(('rel_h', 'rel_w'), sides, strict=True):
                setattr(layer, name, nn.Parameter(rule(getattr(layer, name), side).contiguous()))


@torch.inference_mode()
def measure(models: dict[str, nn.Module], size: int, data_dir: Path, split: str, count: int) -> dict[str, list[float]]:
    """Top-1 and top-5 in percent of each model on `count` images, spread evenly over the data set."""
    transform = create_transform(**resolve_data_config({'img_size': size}, model=next(iter(models.values()))))
    dataset = create_dataset('', root=str(data_dir), split=split, transform=transform)
    chosen = Subset(dataset, range(0, len(dataset), max(1, len(dataset) // count)))
    loader = DataLoader(chosen, batch_size=100)
    sums = {name: torch.zeros(2) for name in models}
    for images, labels in tqdm(loader, desc=f'{size} px', unit='batch'):
        for name, model in models.items():
            sums[name] += len(labels) * torch.tensor(accuracy(model(images), labels, topk=(1, 5)))
    return {name: (each / len(chosen)).tolist() for name, each in sums.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table with a row for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--model', default='gsa_resnet50', help='pretrained GSA-ResNet')
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR')
    parser.add_argument('--split', default='val', help='folder or tar in DIR')
    parser.add_argument('--sizes', type=positive, nargs='+', default=[48, 64, 96, 128, 160], metavar='PIXELS')
    parser.add_argument('--rules', nargs='+', choices=RULES, default=list(RULES))
    parser.add_argument('--count', type=positive, default=10_000, help='images, spread evenly over the data set')
    args = parser.parse_args(argv)
    print(f'| size | {" | ".join(f"{rule}, top-1 | top-5" for rule in args.rules)} |')
    print('| ---: ' * (1 + 2 * len(args.rules)) + '|')
    for size in args.sizes:
        models = {}
        for rule in args.rules:
            models[rule] = timm.create_model(args.model, pretrained=True).eval()
            fit(models[rule], size, RULES[rule])
        results = measure(models, size, args.data_dir, args.split, args.count)
        cells = [f'{value:.2f}' for rule in args.rules for value in results[rule]]
        print(f'| {size} px | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
