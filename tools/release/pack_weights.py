"""Turn a checkpoint of timm's train.py into the weights of an entry that the wheel carries, and record what they reach.

    python tools/release/pack_weights.py CHECKPOINT gsa_resnet_tiny.c100 --data-dir DIR --split test.tar --curve SUMMARY

writes timm_gsa/weights/gsa_resnet_tiny.c100.safetensors (convolutions in fp16, all else as trained), measures it on the
given images and puts size, SHA-256, accuracy and the curve of the training (train.py's summary.csv, of each stage) into
timm_gsa/weights/c100.json. Of a checkpoint with an exponential moving average it takes that. With
`--baseline NAME --model-kwargs key=value ...` it measures a checkpoint of another timm model for comparison, without
keeping its weights.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint, load_state_dict
from timm.utils import ParseKwargs, accuracy
from tqdm import tqdm

import timm_gsa
from timm_gsa.commands._files import written_whole

WEIGHTS = Path(timm_gsa.__file__).parent / 'weights'


def pack(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state dict as safetensors under a temporary name, then rename it; matrices in fp16."""
    tensors = {
        key: tensor.half().contiguous() if tensor.is_floating_point() and tensor.ndim > 1 else tensor.contiguous()
        for key, tensor in state_dict.items()
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={'format': 'pt'})
        temporary.chmod(0o644)


@torch.inference_mode()
def measure(model: torch.nn.Module, config: dict[str, Any], data_dir: str, split: str) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent over a data set, in float32."""
    loader = create_loader(
        create_dataset('', root=data_dir, split=split),
        input_size=config['input_size'],
        batch_size=256,
        use_prefetcher=False,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        num_workers=1,
        device=torch.device('cpu'),
    )
    top1 = top5 = count = 0.
    for images, labels in tqdm(loader, desc='measuring', unit='batch'):
        batch1, batch5 = accuracy(model(images), labels, topk=(1, 5))
        top1 += batch1.item() * len(labels)
        top5 += batch5.item() * len(labels)
        count += len(labels)
    return {'top1': round(top1 / count, 2), 'top5': round(top5 / count, 2), 'images': int(count)}


def record(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put a result into the results file."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault('models', {})[name] = result
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + '\n')


def curve(paths: Sequence[Path]) -> list[dict[str, float]]:
    """Validations of a training from summary.csv of each of its stages; `epoch` counts the epochs that were over."""
    points: list[dict[str, float]] = []
    for path in paths:
        before = points[-1]['epoch'] if points else 0
        with path.open(newline='', encoding='utf-8') as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        keys = ('lr', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5')
        points += [
            {'epoch': before + row['epoch'] + 1, **{key: float(f'{row[key]:.4g}') for key in keys}} for row in rows]
    return points


def main(argv: Sequence[str] | None = None) -> None:
    """Pack and measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('entry', metavar='ARCH.TAG', help='entry to write, or the one a baseline is compared with')
    parser.add_argument('--data-dir', required=True, help='data set to measure on')
    parser.add_argument('--split', required=True, help='its split, as timm names it: a folder or a tar')
    parser.add_argument('--baseline', metavar='NAME', help='measure this timm model instead, keep no weights')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='arguments of the baseline')
    parser.add_argument('--curve', metavar='FILE', type=Path, nargs='+', help='summary.csv of train.py, one a stage')
    parser.add_argument('--note', help='what sets this run apart from the recipe')
    args = parser.parse_args(argv)

    arch, _, tag = args.entry.partition('.')
    config = timm.models.get_pretrained_cfg(args.entry).to_dict()
    results = WEIGHTS / f'{tag}.json'
    kept: dict[str, Any] = {}
    if args.baseline:
        model = timm.create_model(args.baseline, num_classes=config['num_classes'], **args.model_kwargs)
        load_checkpoint(model, str(args.checkpoint))
        name = 'baseline'
        kept = {'model': args.baseline, 'model_kwargs': args.model_kwargs}
    else:
        path = WEIGHTS / f'{args.entry}.safetensors'
        model = timm.create_model(args.entry)
        model.load_state_dict(load_state_dict(str(args.checkpoint)))  # strictly, before anything is written
        pack(model.state_dict(), path)
        model = timm.create_model(args.entry, pretrained=True)
        name = args.entry
        kept = {'size': path.stat().st_size, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}
    result = {
        **measure(model.eval(), config, args.data_dir, args.split),
        'parameters': sum(p.numel() for p in model.parameters()),
        **kept,
        'trained_with': {'timm': timm.__version__, 'torch': torch.__version__.partition('+')[0]},
    }
    if args.curve:
        result['curve'] = curve(args.curve)
    if args.note:
        result['note'] = args.note
    record(results, name, result)
    print(json.dumps({name: result}, indent=2))


if __name__ == '__main__':
    main()
