#!/usr/bin/env python3
"""Compare norms of the query: train a GSA-ResNet for some steps on Tiny ImageNet at 32 px, then look for infinities.

    python tools/measure/query_norms.py DIR --model gsa_resnet50 gsa_resnet26 --query-norm none softmax rms --lr 2e-3

DIR holds train.tar and val.tar, laid out <class>/<image>. A row for each run: loss (mean over the last steps), top-1
and top-5 on 2,000 validation images, how many of them give an output that is not finite, the same at three and ten
times their contrast and in float16, how much the largest logit of an image grows with the contrast at most, and the
largest value after the norm that follows a layer. AdamW, weight decay 0.05, label
smoothing 0.1, gradients clipped to norm 1, 30 steps of warm-up, linear decay over the last 30 %. `--model resnet50` is
for comparison.
"""
import argparse
import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import timm_gsa  # noqa: F401  registers the models
from timm_gsa.layers import GlobalSelfAttention

SIZE = 32


def load(path: Path, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First images of every class of a tar, uint8 (N, 3, 32, 32), and their labels."""
    classes: dict[str, int] = {}
    counts: dict[int, int] = {}
    images, labels = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            label = classes.setdefault(member.name.split('/')[0], len(classes))
            counts[label] = counts.get(label, 0) + 1
            file = tar.extractfile(member)
            if counts[label] > per_class or file is None:
                continue
            image = Image.open(io.BytesIO(file.read())).convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Normalised float32 images."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images.float() / 255 - mean) / std


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, batch: int, lr: float) -> float:
    """Train with random shifts and flips; return the mean loss over the last steps."""
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and 'rel_' not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim <= 1 or 'rel_' in n]
    groups = [dict(params=decay, weight_decay=.05), dict(params=plain, weight_decay=0.)]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    generator = torch.Generator().manual_seed(0)
    mean_loss, start = float('nan'), time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = lr * min(1., step / 30, (steps - step) / (steps * .3))
        index = torch.randint(0, len(images), (batch,), generator=generator)
        x = F.pad(prepare(images[index]), (2, 2, 2, 2), mode='reflect')
        top, left, flip = torch.randint(0, 10, (3,), generator=generator).tolist()
        x = x[:, :, top % 5:top % 5 + SIZE, left % 5:left % 5 + SIZE]
        loss = F.cross_entropy(model(x.flip(3) if flip % 2 else x), labels[index], label_smoothing=.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        mean_loss = loss.item() if step == 1 else .97 * mean_loss + .03 * loss.item()
        if step % 50 == 0:
            print(f'  step {step}: loss {mean_loss:.3f}, {time.time() - start:.0f} s', flush=True)
    return mean_loss


@torch.no_grad()
def measure(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Accuracy, outputs that are not finite, and the largest value after the norm behind an attention layer."""
    model.eval()
    largest: list[torch.Tensor] = []
    norms: list[Any] = [
        block.bn2 for block in model.modules()
        if isinstance(getattr(block, 'conv2', None), GlobalSelfAttention | nn.Conv2d) and hasattr(block, 'bn2')
    ]
    hooks = [norm.register_forward_hook(lambda m, i, out: largest.append(out.abs().max())) for norm in norms]
    out = torch.cat([model(prepare(part)) for part in images.split(200)])
    peak = torch.stack(largest)
    for hook in hooks:
        hook.remove()
    ranked = out.topk(5).indices == labels[:, None]
    row = {
        'top1': 100 * ranked[:, 0].float().mean().item(),
        'top5': 100 * ranked.any(1).float().mean().item(),
        'not_finite': int((~out.isfinite().all(1)).sum()),
        'largest': peak[peak.isfinite()].max().item(),
    }
    usual = out[::4].abs().amax(1)
    for contrast in (0.1, 3, 10):
        out = torch.cat([model(contrast * prepare(part)) for part in images[::4].split(200)])
        row[f'not_finite_x{contrast}'] = int((~out.isfinite().all(1)).sum())
        row[f'growth_x{contrast}'] = (out.abs().amax(1) / usual).max().item()
    model.half()
    for contrast in (1, 3, 10):
        out = model((contrast * prepare(images[::40])).half())
        row[f'not_finite_float16_x{contrast}'] = int((~out.isfinite().all(1)).sum())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, metavar='DIR')
    parser.add_argument('--model', nargs='+', default=['gsa_resnet50'])
    norms = ['none', 'softmax', 'rms']
    parser.add_argument('--query-norm', nargs='+', default=norms, choices=norms)
    parser.add_argument('--lr', nargs='+', type=float, default=[2e-3])
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--out', type=Path, help='append a line of JSON for each run to this file')
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    images, labels = load(args.data / 'train.tar', 250)
    val_images, val_labels = load(args.data / 'val.tar', 10)
    for name in args.model:
        gsa = name.startswith('gsa')
        for norm in args.query_norm if gsa else ['']:
            for lr in args.lr:
                torch.manual_seed(0)
                more = dict(img_size=2 * SIZE, query_norm=norm) if gsa else {}
                model = timm.create_model(name, num_classes=200, **more)
                loss = train(model, images, labels, args.steps, args.batch, lr)
                row = dict(model=name, query_norm=norm, lr=lr, steps=args.steps, batch=args.batch, loss=round(loss, 3))
                figures = measure(model, val_images, val_labels)
                row.update((key, float(f'{value:.4g}')) for key, value in figures.items())
                print(json.dumps(row), flush=True)
                if args.out is not None:
                    with args.out.open('a', encoding='utf-8') as file:
                        file.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    main()
